"""Train Rainbow, six improvements of DQN in one, on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.rainbow import main

if __name__ == "__main__":
    main()
