"""Estimate from a data set what a run's policy is worth, or resume a run of that."""

from __future__ import annotations

from rl_lab.algorithms.fqe import main
from rl_lab.evaluate import load

if __name__ == "__main__":
    main(load)
