"""Train a language model by GRPO or a relative of it on prompts with a reward, or resume a run."""

from __future__ import annotations

from rl_lab.preference.grpo import main

if __name__ == "__main__":
    main()
