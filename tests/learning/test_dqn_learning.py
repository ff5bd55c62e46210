"""DQN, plain and with all its variants, learns a task that one who bootstraps through termination provably does not.

Eagerly, since a graph that was compiled before would not see the injected fault. CartPole is judged by the harness, in
tests/curves/test_regression.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import dqn
from rl_lab.replay import Batch, Replay
from rl_lab.vector import TensorEnv

pytestmark = pytest.mark.slow

VARIANTS = {
    "plain": {},
    "polyak": {"tau": 0.1, "target_network_frequency": 20},
    "all": {"double": True, "dueling": True, "prioritized": True, "n_step": 3},
}


class Quit(TensorEnv):
    """Go on for 0.1, at most twenty steps, or quit for 0.5; which of two actions is which changes with what is seen.

    Going on is worth 0.1 / (1 - 0.9) = 1 at gamma 0.9, so the best return is 2. To one who bootstraps through
    termination quitting is worth 0.5 + 0.9 * 5 = 5 and going on at most 0.1 + 0.9 * 5 = 4.6: it quits at once, for 0.5.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)
    max_episode_steps, reset_draws = 20, 1

    def initial(self, draws: Tensor) -> Tensor:
        return torch.where(draws < 0.5, -1.0, 1.0)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quits = actions == (physics[:, 0] > 0)
        return -physics, torch.where(quits, 0.5, 0.1), quits

    def observe(self, physics: Tensor) -> Tensor:
        return physics


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "through termination"])
@pytest.mark.parametrize("name", VARIANTS)
def test_quit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sound: bool) -> None:
    """Guards the mask of terminal steps in the whole of DQN: at random 0.6, quitting 0.5, at best 2."""
    sample = Replay.sample

    def through_termination(self: Replay, *arguments: Any) -> Batch:
        batch = sample(self, *arguments)
        return {**batch, "discounts": torch.where(batch["terminated"], self.gamma, batch["discounts"])}

    if not sound:
        monkeypatch.setattr(Replay, "sample", through_termination)
    monkeypatch.setattr(dqn, "make", lambda _, seeds, num_envs, *__: Quit(seeds, num_envs))
    flags: dict[str, Any] = {"target_network_frequency": 200, **VARIANTS[name]}
    args = dqn.Args(
        num_envs=10, total_timesteps=6_000, learning_starts=500, batch_size=32, learning_rate=1e-3, gamma=0.9,
        num_seeds=2, compile=False, runs_dir=tmp_path, **flags,
    )  # fmt: skip
    last = [returns[-40:] for returns in dqn.train(args).recent]
    score = sum(map(sum, last)) / sum(map(len, last))
    assert score > 1.4 if sound else score < 0.8
