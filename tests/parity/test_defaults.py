"""Defaults against those of CleanRL's scripts, as the reference data have them with their commit."""

from __future__ import annotations

import ast
import csv
from pathlib import Path
from types import ModuleType

import pytest

from rl_lab.algorithms import c51, dqn, ppo, sac, td3

ELSEWHERE = {"env_id", "batch_size", "minibatch_size", "num_iterations"}  # PPO's last three are set when it runs


@pytest.mark.parametrize(
    ("script", "algorithm", "env_id"),
    [
        ("ppo", ppo, "CartPole-v1"),
        ("ppo_continuous_action", ppo, "HalfCheetah-v4"),
        ("ppo_atari", ppo, "BreakoutNoFrameskip-v4"),
        ("dqn", dqn, "CartPole-v1"),
        ("dqn_atari", dqn, "BreakoutNoFrameskip-v4"),
        ("c51", c51, "CartPole-v1"),
        ("c51_atari", c51, "BreakoutNoFrameskip-v4"),
        ("sac_continuous_action", sac, "Hopper-v4"),
        ("td3_continuous_action", td3, "Hopper-v4"),
    ],
)
def test_cleanrls(script: str, algorithm: ModuleType, env_id: str, shared: Path) -> None:
    """Guards every hyper-parameter of CleanRL's, by name and value."""
    if env_id.endswith("NoFrameskip-v4"):
        pytest.importorskip("ale_py", reason="Atari needs ale_py")
    with (shared / "references/cleanrl_hyperparameters.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["script"], row["which"]) == (script, "HEAD")]
    theirs = {row["parameter"]: ast.literal_eval(row["default"].replace("int(1e6)", "1000000")) for row in rows}
    args = algorithm.defaults(env_id)
    theirs = {name: value for name, value in theirs.items() if name not in ELSEWHERE}
    assert {name: getattr(args, name) for name in theirs} == theirs and len(theirs) >= 10
