"""Clone the behaviour in a data set, or in its best episodes, on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.bc import main

if __name__ == "__main__":
    main()
