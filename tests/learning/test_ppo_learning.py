"""PPO learns tasks that a wrong variant does not: each with the sign of the advantage flipped as the control.

Everything runs eagerly, since a graph that was compiled before would not see the injected fault, and with many
environments, which is what eager PyTorch is fast at. Scores are means over the last 20 training episodes of two seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import ppo
from rl_lab.algorithms.ppo import Args
from rl_lab.rollout import Rollout
from rl_lab.vector import TensorEnv

pytestmark = pytest.mark.slow

Score = Callable[..., float]
SOUND_AND_FLIPPED = pytest.mark.parametrize("flipped", [False, True], ids=["sound", "flipped"])


def next_number(x: Tensor) -> Tensor:
    """A chaotic map of [0, 1) to itself: the randomness of a task whose transitions are functions of its state."""
    return (61.7 * x + 0.137).frac()


class Delayed(TensorEnv):
    """Two numbers name the right choice of each component; what was right is paid one step later.

    Physics and observation: the two numbers in [0, 1), and the reward due, 1/2 for each right choice. The right ones
    are floor(3 * first) of 3 and floor(2 * second) of 2. Ten steps, so at most 9; choosing blindly 9 * (1/3 + 1/2) / 2.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (3,))
    action_space = gym.spaces.MultiDiscrete([3, 2])
    max_episode_steps, reset_draws = 10, 2

    def initial(self, draws: Tensor) -> Tensor:
        return torch.cat([draws, torch.zeros_like(draws[:, :1])], 1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        numbers, due = physics[:, :2], physics[:, 2]
        right = actions == (numbers * torch.tensor([3, 2])).floor()
        physics = torch.cat([next_number(numbers), 0.5 * right.sum(1, keepdim=True)], 1)
        return physics, due, torch.zeros_like(due, dtype=torch.bool)

    def observe(self, physics: Tensor) -> Tensor:
        return physics


class Masked(TensorEnv):
    """Four choices, worth 1, 2/3, 1/3 and 0, of which two are allowed at each step; another costs 100.

    Nothing observed tells which are allowed. Ten steps: the better of two random choices is worth 7/9 on average, the
    worse 2/9, any 1/2.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(4)
    max_episode_steps, reset_draws = 10, 1
    pairs = torch.combinations(torch.arange(4))  # (6, 2)

    def initial(self, draws: Tensor) -> Tensor:
        return draws

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        allowed = self.mask(physics).gather(1, actions.unsqueeze(1)).squeeze(1)
        rewards = torch.where(allowed, 1 - actions / 3, -100.0)
        return next_number(physics), rewards, torch.zeros_like(allowed)

    def observe(self, physics: Tensor) -> Tensor:
        return torch.ones_like(physics)

    def mask(self, physics: Tensor) -> Tensor:
        pair = self.pairs[(6 * physics[:, 0]).long()]
        return torch.zeros(len(physics), 4, dtype=torch.bool).scatter(1, pair, True)


@pytest.fixture
def score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Score:
    """Trains two seeds and returns their score; `flipped` turns the advantages' sign, `toy` is another environment."""

    def run(flipped: bool, toy: type[TensorEnv] | None = None, **flags: Any) -> float:
        targets = ppo.targets

        def flip(*args: Any, **kwargs: Any) -> Rollout:
            data = targets(*args, **kwargs)
            return {**data, "advantages": -data["advantages"]}

        if flipped:
            monkeypatch.setattr(ppo, "targets", flip)
        if toy:
            monkeypatch.setattr(ppo, "make", lambda _, seeds, num_envs, *__: toy(seeds, num_envs))
        args = Args(num_envs=32, num_steps=32, num_seeds=2, compile=False, runs_dir=tmp_path, **flags)
        last = [returns[-20:] for returns in ppo.train(args).recent]
        return sum(map(sum, last)) / sum(map(len, last))

    return run


@SOUND_AND_FLIPPED
def test_cartpole(score: Score, flipped: bool) -> None:
    """Guards the whole of PPO for discrete actions: at random 22, at most 500; flipped it learns to fall at once."""
    flags = {"gamma": 0.98, "gae_lambda": 0.8, "ent_coef": 0.0, "learning_rate": 2e-3, "update_epochs": 8}
    assert (score(flipped, env="CartPole-v1", total_timesteps=100_000, **flags) >= 300) != flipped


@SOUND_AND_FLIPPED
def test_pendulum(score: Score, flipped: bool) -> None:
    """Guards Box actions and normalisation: at random -1,200, upright most of the time above -500."""
    flags = {"gamma": 0.9, "ent_coef": 0.0, "learning_rate": 2e-3, "update_epochs": 8, "normalize": True}
    assert (score(flipped, env="Pendulum-v1", total_timesteps=80_000, **flags) >= -500) != flipped


@SOUND_AND_FLIPPED
def test_multidiscrete(score: Score, flipped: bool) -> None:
    """Guards MultiDiscrete actions, and credit that comes a step late: 7.5 of 9, at random 3.75."""
    assert (score(flipped, Delayed, total_timesteps=60_000, learning_rate=3e-3) >= 7.5) != flipped


@SOUND_AND_FLIPPED
def test_masked(score: Score, flipped: bool) -> None:
    """Guards action masks: 7.3 of 7.8, at random 5, and no choice that costs 100."""
    assert (score(flipped, Masked, total_timesteps=30_000, learning_rate=3e-3) >= 7.3) != flipped
