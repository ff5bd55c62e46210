"""Data sets small enough to learn from within a test."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import pytest
import torch

from rl_lab.offline import Dataset


@pytest.fixture
def lucky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Dataset]:
    """Makes a data set of so many episodes, which is then what every training command loads.

    Pendulum's spaces; episodes of one step with actions uniform in [-2, 2] and reward -(action - 1)^2: the data's mean
    action is 0, the best one 1.
    """

    def make(num_episodes: int = 2000) -> Dataset:
        random = torch.Generator().manual_seed(0)
        obs, actions = torch.randn(num_episodes, 3, generator=random), torch.rand(num_episodes, 1, generator=random)
        columns = {"obs": obs, "actions": 4 * actions - 2, "next_obs": obs}
        columns["rewards"] = -(columns["actions"].squeeze(1) - 1).square()
        columns["terminated"] = torch.ones(num_episodes, dtype=torch.bool)
        columns["truncated"] = ~columns["terminated"]
        spaces = (peer := gym.make("Pendulum-v1")).observation_space, peer.action_space
        data = Dataset("lucky", "Pendulum-v1", columns, *spaces, (-10.0, 0.0), "none")
        monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
        return data

    return make
