"""Train a language model by DPO or a relative of it on pairs of completions, or resume a run."""

from __future__ import annotations

from rl_lab.preference.dpo import main

if __name__ == "__main__":
    main()
