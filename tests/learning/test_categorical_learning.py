"""C51 and Rainbow learn a task that a wrong variant does not; scores are means over the last 20 training episodes."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_lab import offpolicy
from rl_lab.algorithms import c51, rainbow
from rl_lab.replay import Batch, Replay
from rl_lab.vector import TensorEnv

pytestmark = pytest.mark.slow


class Doors(TensorEnv):
    """One of eight cues tells which of two doors is right; five steps later it pays 1, the other nothing.

    Only the first action counts. Observed are the cue, at the start, then the steps since and whether the door was
    right. Choosing blindly is worth 1/2, so are returns of three steps without what follows them.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (18,))
    action_space = gym.spaces.Discrete(2)
    max_episode_steps, reset_draws = 10, 1

    def initial(self, draws: Tensor) -> Tensor:
        return (8 * draws).floor()

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = physics[:, 0]  # 0 to 7 the cue, 8 to 12 behind the wrong door, 13 to 17 behind the right one
        right = 13 * (actions == place % 2) + 8 * (actions != place % 2)
        ended = (place == 12) | (place == 17)
        rewards = torch.where(place == 17, 1.0, 0.0)
        return torch.where(place < 8, right, place + (~ended).float()).unsqueeze(1), rewards, ended

    def observe(self, physics: Tensor) -> Tensor:
        return (physics == torch.arange(18)).float()


class BlindReplay(Replay):
    """As if each transition ended its episode."""

    def sample(self, points: Tensor, beta: float = 1.0) -> Batch:
        batch = super().sample(points, beta)
        return {**batch, "discounts": torch.zeros_like(batch["discounts"])}


@pytest.mark.parametrize("blind", [False, True], ids=["sound", "blind"])
@pytest.mark.parametrize("algorithm", [c51, rainbow], ids=["c51", "rainbow"])
def test_doors(algorithm: ModuleType, blind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the whole of both: 0.9 of 1, where targets without what follows a transition stay at 1/2."""
    if blind:
        monkeypatch.setattr(offpolicy, "Replay", BlindReplay)
    monkeypatch.setattr(algorithm, "make", lambda _, seeds, num_envs, *__, **___: Doors(seeds, num_envs))
    args = algorithm.Args(
        total_timesteps=6_000, num_envs=10, learning_starts=500, target_network_frequency=200, batch_size=64,
        learning_rate=1e-3, gamma=0.9, n_atoms=21, v_min=0.0, v_max=1.0, num_seeds=2, compile=False, runs_dir=tmp_path,
    )  # fmt: skip
    last = [returns[-20:] for returns in algorithm.train(args).recent]
    assert (sum(map(sum, last)) / sum(map(len, last)) >= 0.9) != blind
