"""Train CQL on a data set with Discrete actions, on one or many seeds, or resume a run."""

from __future__ import annotations

from rl_lab.algorithms.discrete_cql import main

if __name__ == "__main__":
    main()
