"""Train a language model by KTO on completions labelled desirable or not, or resume a run."""

from __future__ import annotations

from rl_lab.preference.kto import main

if __name__ == "__main__":
    main()
