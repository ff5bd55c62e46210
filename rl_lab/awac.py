"""Train AWAC on a data set, on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.awac import main

if __name__ == "__main__":
    main()
