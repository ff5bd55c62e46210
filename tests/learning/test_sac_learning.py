"""SAC and TD3 learn a task that a wrong variant does not: with the sign of the actor's loss flipped as the control.

Everything runs eagerly, since a graph that was compiled before would not see the injected fault, with smaller networks
and larger steps than the defaults.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from rl_lab.algorithms import sac, td3

pytestmark = pytest.mark.slow

RATES = {sac: {"policy_lr": 3e-3, "q_lr": 3e-3}, td3: {"learning_rate": 3e-3}}


@pytest.mark.parametrize("flipped", [False, True], ids=["sound", "flipped"])
@pytest.mark.parametrize("algorithm", [sac, td3], ids=["sac", "td3"])
def test_pendulum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: ModuleType, flipped: bool) -> None:
    """Guards the whole of both: at random -1,200 an episode; after 2,400 gradient steps it swings up, near -150."""
    actor_loss = algorithm.actor_loss

    def flip(*args: Any) -> Tensor:
        loss: Tensor = -actor_loss(*args)
        return loss

    if flipped:
        monkeypatch.setattr(algorithm, "actor_loss", flip)
    monkeypatch.setattr(algorithm, "HIDDEN", (64, 64))
    args = algorithm.Args(
        env="Pendulum-v1", total_timesteps=10_400, num_envs=4, train_frequency=4, learning_starts=800, log_every=800,
        batch_size=128, gamma=0.95, tau=0.02, compile=False, runs_dir=tmp_path, **RATES[algorithm],
    )  # fmt: skip
    try:
        last = algorithm.train(args).recent[0][-8:]
    except FloatingPointError:  # a flipped one may diverge
        last = [-math.inf]
    assert (sum(last) / len(last) > -500) != flipped, last
