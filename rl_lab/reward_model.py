"""Train a reward model on preference pairs, or on labelled steps of solutions, or resume a run."""

from __future__ import annotations

from rl_lab.preference.reward_model import main

if __name__ == "__main__":
    main()
