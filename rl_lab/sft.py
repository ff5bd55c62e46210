"""Train a language model to imitate completions, by supervised fine-tuning, or resume a run."""

from __future__ import annotations

from rl_lab.preference.sft import main

if __name__ == "__main__":
    main()
