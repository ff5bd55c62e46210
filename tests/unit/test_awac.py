"""AWAC's losses by hand, and a task where it must beat what the data did."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import awac
from rl_lab.algorithms.awac import Args
from rl_lab.distributions import Actions

ACTIONS = Actions((1,), (1,), (-2.0,), (2.0,))


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Critics are `slope` (E,) times the action."""
    monkeypatch.setattr(awac, "q_values", lambda critics, obs, taken, layers: critics["slope"][:, None] * taken[:, 0])


def standard_normal() -> dict[str, Tensor]:
    """An actor of mean 0 and deviation 1 everywhere."""
    params = awac.init_params(1, ACTIONS, torch.Generator())["actor"]
    return {name: torch.zeros_like(p) for name, p in params.items()}


@pytest.mark.usefixtures("linear")
def test_actor_s_weights_by_hand() -> None:
    """Q is the lesser of x and 2x; the policy takes 0.5, 2 (of 3, clipped) and -1.

    Q(s, a) = 1, -2, 2 and Q(s, b) = 0.5, 2, -2, so A = 0.5, -4, 4; weights exp(1), exp(-8), and 100 for exp(8).
    Log-likelihoods are c - a^2 / 2, c = -log(2 pi) / 2; their derivative by the log of the deviation is a^2 - 1.
    """
    batch = {"obs": torch.zeros(3, 1), "actions": torch.tensor([[1.0], [-1.0], [2.0]])}
    critics, noise = {"slope": torch.tensor([1.0, 2.0])}, torch.tensor([[0.5], [3.0], [-1.0]])
    loss = torch.func.grad_and_value(awac.actor_loss, has_aux=True)
    grads, (value, advantage) = loss(standard_normal(), critics, batch, noise, ACTIONS, 0.5)
    c = -0.9189385
    wanted = -(math.e * (c - 0.5) + math.exp(-8) * (c - 0.5) + 100 * (c - 2)) / 3
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    assert advantage.item() == pytest.approx(0.5 / 3)
    assert grads["logstd"].item() == pytest.approx(-100 * 3 / 3, rel=1e-5)  # nothing flows through the policy's actions


@pytest.mark.usefixtures("linear")
def test_targets_by_hand() -> None:
    """Q = 0 and rewards 1: residual 1 at an end; elsewhere 1 + 0.9 * 2, for a' = 2 (of 3, clipped), of 2 and 4."""
    batch = {"obs": torch.zeros(2, 1), "next_obs": torch.zeros(2, 1), "actions": torch.ones(2, 1)}
    batch |= {"rewards": torch.ones(2), "discounts": torch.tensor([0.0, 0.9])}
    critics, target = {"slope": torch.zeros(2)}, {"slope": torch.tensor([1.0, 2.0])}
    noise = torch.tensor([[1.0], [3.0]])
    loss, mean = awac.critic_loss(critics, target, standard_normal(), batch, noise, ACTIONS)
    assert loss.item() == pytest.approx(2 * (1 + 2.8**2) / 2)
    assert mean.item() == 0.0


def test_policy_is_the_mean_within_the_bounds() -> None:
    actor = standard_normal()
    for mean, action in ((0.5, 0.5), (3.0, 2.0)):
        actor |= {f"actor.{len(awac.HIDDEN)}.bias": torch.tensor([mean])}
        assert awac.policy({"actor": actor}, {}, {"obs": torch.zeros(1, 1)}, None, ACTIONS).item() == action


def trained(tmp_path: Path, **flags: Any) -> float:
    """Mean action of the policy after training."""
    settings = {"total_timesteps": 300, "log_every": 100, "eval_every": 0, "eval_episodes": 0, "learning_rate": 3e-3}
    settings["batch_size"] = 64
    args = replace(Args(dataset="lucky", device="cpu", compile=False, runs_dir=tmp_path), **{**settings, **flags})
    agent = awac.train(args).state()["params"]["actor"]
    obs = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    return awac.gaussian({name: p[0] for name, p in agent.items()}, obs)["mean"].mean().item()


def test_takes_better_actions_than_the_data(
    tmp_path: Path, lucky: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's mean action is 0, the best is 1. With a huge lambda, which is behaviour cloning, it stays at 0; with
    the sign of the advantages lost it takes worse ones."""
    monkeypatch.setattr(awac, "HIDDEN", (32, 32))
    lucky()
    assert trained(tmp_path / "awac") == pytest.approx(1.0, abs=0.3)
    assert trained(tmp_path / "bc", awac_lambda=1e6) == pytest.approx(0.0, abs=0.2)
    sound = awac.actor_loss
    monkeypatch.setattr(awac, "actor_loss", lambda *args: sound(*args[:5], -args[5]))  # their sign by lambda's
    assert trained(tmp_path / "flipped") < -0.5
