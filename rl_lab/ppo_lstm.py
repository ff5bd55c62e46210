"""Train PPO with an LSTM on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.ppo_lstm import main

if __name__ == "__main__":
    main()
