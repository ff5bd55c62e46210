"""Launcher: python -m rl_lab.compare RUN... judges training runs against reference curves."""

from __future__ import annotations

import sys

from rl_lab.curves.compare import main

if __name__ == "__main__":
    sys.exit(main())
