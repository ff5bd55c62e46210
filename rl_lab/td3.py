"""Train TD3 on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.td3 import main

if __name__ == "__main__":
    main()
