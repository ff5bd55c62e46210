"""Train C51, categorical distributional Q-learning, on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.c51 import main

if __name__ == "__main__":
    main()
