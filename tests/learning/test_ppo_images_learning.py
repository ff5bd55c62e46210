"""PPO learns from images, in bfloat16 as in float32, and does not with the sign of the advantage flipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import ppo
from rl_lab.optim import fast_bf16
from rl_lab.rollout import Rollout
from rl_lab.vector import TensorEnv

pytestmark = pytest.mark.slow


class Patches(TensorEnv):
    """One of three places of the newest frame is bright, and naming it pays 1; the older frames name other places.

    Four steps, so at most 4 a game; choosing blindly pays 4/3.
    """

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    max_episode_steps, reset_draws = 4, 4

    def initial(self, draws: Tensor) -> Tensor:
        return draws

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards = (actions == (3 * physics[:, 3]).floor()).float()
        return (61.7 * physics + 0.137).frac(), rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def observe(self, physics: Tensor) -> Tensor:
        bright = (3 * physics).floor().unsqueeze(2) == torch.arange(3)  # (B, 4, 3)
        columns = bright.repeat_interleave(28, dim=2).unsqueeze(2)  # (B, 4, 1, 84)
        return (200 * columns).to(torch.uint8).expand(-1, -1, 84, -1).contiguous()


@pytest.mark.parametrize(("bf16", "flipped"), [(False, False), (False, True), (True, False)])
def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, flipped: bool) -> None:
    """Guards the whole of PPO on images, and bfloat16: 3.5 of 4, at random 1.3."""
    if bf16 and not fast_bf16():
        pytest.skip("takes minutes on a processor that does not multiply bfloat16")
    targets = ppo.targets

    def flip(*args: Any, **kwargs: Any) -> Rollout:
        data = targets(*args, **kwargs)
        return {**data, "advantages": -data["advantages"]}

    if flipped:
        monkeypatch.setattr(ppo, "targets", flip)
    monkeypatch.setattr(ppo, "make", lambda _, seeds, num_envs, *__: Patches(seeds, num_envs))
    flags: dict[str, Any] = {"learning_rate": 1e-3, "num_envs": 16, "num_steps": 16, "total_timesteps": 3072}
    args = ppo.Args(bf16=bf16, compile=False, runs_dir=tmp_path, gamma=0.5, update_epochs=2, **flags)
    last = ppo.train(args).recent[0][-40:]
    assert (sum(last) / len(last) >= 3.5) != flipped
