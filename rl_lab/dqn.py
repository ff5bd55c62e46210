"""Train DQN (double, dueling, prioritized, n-step) on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.dqn import main

if __name__ == "__main__":
    main()
