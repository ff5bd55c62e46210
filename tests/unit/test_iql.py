"""IQL's losses and their order by hand, and a task where it must beat what the data did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from rl_lab.algorithms import iql
from rl_lab.algorithms.iql import Args
from rl_lab.cli import Stopped
from rl_lab.distributions import Actions
from rl_lab.networks import q_values, stack
from rl_lab.offline import Dataset
from rl_lab.optim import init_adam

ACTIONS = Actions((1,), (1,), (-2.0,), (2.0,))


def constant(value: float) -> dict[str, Tensor]:
    """A value network that is `value` everywhere."""
    params = {name: torch.zeros_like(p) for name, p in iql.init_params(1, ACTIONS, torch.Generator())["value"].items()}
    return params | {"value.2.bias": torch.tensor([value])}


def test_expectile_by_hand() -> None:
    """u = q - V is 1 and -2: with tau 0.9, 0.9 * 1 and 0.1 * 4."""
    loss, mean = iql.value_loss(constant(3.0), torch.tensor([4.0, 1.0]), torch.zeros(2, 1), 0.9)
    assert loss.item() == pytest.approx((0.9 + 0.4) / 2)
    assert mean.item() == 3.0


def test_value_is_the_expectile() -> None:
    """Of 0 and 1 with equal chances the 0.9-expectile is 0.9: 0.9 * (1 - v) = 0.1 * v."""
    grad = torch.func.grad(iql.value_loss, has_aux=True)
    wanted = grad(constant(0.9), torch.tensor([0.0, 1.0]), torch.zeros(2, 1), 0.9)[0]["value.2.bias"]
    assert wanted.item() == pytest.approx(0.0, abs=1e-7)


def test_actor_s_weights_by_hand() -> None:
    """Mean 0, deviation 1, actions 0 and 1: log-likelihoods c and c - 1/2, c = -log(2 pi) / 2; weights exp(2), 100."""
    actor = {name: torch.zeros_like(p) for name, p in iql.init_params(1, ACTIONS, torch.Generator())["actor"].items()}
    batch = {"obs": torch.zeros(2, 1), "actions": torch.tensor([[0.0], [1.0]])}
    advantages = torch.tensor([1.0, 5.0], requires_grad=True)
    loss = iql.actor_loss(actor, advantages, batch, ACTIONS, beta=2.0)
    c = -0.9189385
    assert loss.item() == pytest.approx(-(7.389056 * c + 100 * (c - 0.5)) / 2, rel=1e-5)
    assert not loss.requires_grad  # nothing flows into the advantages


def test_a_terminal_s_target_is_its_reward() -> None:
    """Q = 0 everywhere, rewards 1, V(s') = 10: residuals 1 at the end and 1 + 0.9 * 10 elsewhere, for both critics."""
    critics = stack([iql.init_params(1, ACTIONS, torch.Generator())["critics"]])
    critics = {name: torch.zeros_like(p[0]) for name, p in critics.items()}
    batch = {"obs": torch.zeros(2, 1), "actions": torch.zeros(2, 1), "rewards": torch.ones(2)}
    batch["discounts"] = torch.tensor([0.0, 0.9])
    loss, mean = iql.critic_loss(critics, torch.tensor([10.0, 10.0]), batch)
    assert loss.item() == pytest.approx(2 * (1 + 100) / 2)
    assert mean.item() == 0.0


def test_order_of_an_update() -> None:
    """Value first; actor and critics see the new one; the target moves to the new critics. As the authors' code."""
    generator = torch.Generator().manual_seed(0)
    agent, other = iql.init_params(2, ACTIONS, generator), iql.init_params(2, ACTIONS, generator)
    target, opts = other["critics"], {name: init_adam(params) for name, params in agent.items()}
    batch = {"obs": torch.randn(8, 2, generator=generator), "next_obs": torch.randn(8, 2, generator=generator)}
    batch |= {"actions": torch.randn(8, 1, generator=generator), "rewards": torch.randn(8, generator=generator)}
    batch["discounts"] = torch.full((8,), 0.99)
    args, rate = Args(dataset="x", learning_rate=0.1, tau=0.3), torch.tensor(0.05)
    new, moved, _, metrics = iql.update(agent, target, opts, batch, rate, ACTIONS, args)

    q = q_values(target, batch["obs"], batch["actions"]).amin(0)
    advantages = q - iql.values(new["value"], batch["obs"])
    assert metrics["advantages"].item() == pytest.approx(advantages.mean().item(), rel=1e-5)
    assert metrics["actor_loss"].item() == pytest.approx(
        iql.actor_loss(agent["actor"], advantages, batch, ACTIONS, args.beta).item(), rel=1e-5
    )
    next_values = iql.values(new["value"], batch["next_obs"])
    assert metrics["qf_loss"].item() == pytest.approx(
        iql.critic_loss(agent["critics"], next_values, batch)[0].item(), rel=1e-5
    )
    for name, p in moved.items():
        torch.testing.assert_close(p, 0.7 * target[name] + 0.3 * new["critics"][name])
    step = {name: (new[name][key] - agent[name][key]).abs().max() for name, key in
            (("actor", "actor.0.bias"), ("value", "value.0.bias"), ("critics", "critic.0.bias"))}  # fmt: skip
    assert step["actor"].item() == pytest.approx(0.05, rel=1e-3)  # Adam's first step is the learning rate
    assert step["value"].item() == pytest.approx(0.1, rel=1e-3)
    assert step["critics"].item() == pytest.approx(0.1, rel=1e-3)


def lucky(random: torch.Generator, num_episodes: int = 2000) -> Dataset:
    """Pendulum's spaces; episodes of one step with actions uniform in [-2, 2] and reward -(action - 1)^2."""
    obs, actions = torch.randn(num_episodes, 3, generator=random), 4 * torch.rand(num_episodes, 1, generator=random) - 2
    rewards, flags = -(actions.squeeze(1) - 1).square(), torch.ones(num_episodes, dtype=torch.bool)
    columns = {"obs": obs, "actions": actions, "rewards": rewards, "next_obs": obs}
    columns |= {"terminated": flags, "truncated": ~flags}
    peer = gym.make("Pendulum-v1")
    return Dataset("lucky", "Pendulum-v1", columns, peer.observation_space, peer.action_space, (-10.0, 0.0), "none")


def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> float:
    """Mean action of the policy after training on `lucky`."""
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: lucky(torch.Generator().manual_seed(0)))
    settings = {"total_timesteps": 300, "log_every": 100, "eval_every": 0, "eval_episodes": 0, "learning_rate": 3e-3}
    settings["batch_size"] = 64
    args = replace(Args(dataset="lucky", device="cpu", compile=False, runs_dir=tmp_path), **{**settings, **flags})
    agent = iql.train(args).state()["params"]["actor"]
    obs = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    return iql.gaussian({name: p[0] for name, p in agent.items()}, obs, ACTIONS)["mean"].mean().item()


def test_takes_better_actions_than_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data's mean action is 0, the best is 1. Without weights (beta 0) it is behaviour cloning, and stays at 0."""
    assert trained(tmp_path / "iql", monkeypatch, beta=3.0, normalize_reward=False) == pytest.approx(1.0, abs=0.3)
    assert trained(tmp_path / "bc", monkeypatch, beta=0.0, normalize_reward=False) == pytest.approx(0.0, abs=0.2)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: lucky(torch.Generator().manual_seed(0), 200))
    flags = {"total_timesteps": 60, "log_every": 20, "batch_size": 8, "eval_every": 20, "eval_episodes": 2}
    flags |= {"num_seeds": 2, "compile": False, "device": "cpu"}
    whole = iql.train(Args(dataset="lucky", runs_dir=tmp_path / "whole", **flags))
    with pytest.raises(Stopped, match="checkpointed at step 40"):
        iql.train(Args(dataset="lucky", runs_dir=tmp_path / "part", stop_at=40, **flags))
    (folder, _) = sorted((tmp_path / "part").iterdir())
    resumed = iql.train(Args(dataset="lucky", runs_dir=tmp_path / "part", resume=folder, **flags))
    tensors = [pytree.tree_leaves(run.state()) for run in (resumed, whole)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert resumed.recent == whole.recent

    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: replace(lucky(torch.Generator()), checksum="other"))
    with pytest.raises(ValueError, match="--dataset lucky is not what the run has learned from"):
        iql.train(Args(dataset="lucky", runs_dir=tmp_path / "part", resume=folder, **flags))


def test_discrete_actions_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = replace(lucky(torch.Generator(), 10), env_id="CartPole-v1")
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    with pytest.raises(ValueError, match="--env CartPole-v1 must be one with actions in a bounded Box, not Discrete"):
        iql.train(Args(dataset="lucky", runs_dir=tmp_path, device="cpu"))
    assert not list(tmp_path.iterdir())


def test_divergence_stops_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards in [-9, 0] allow |Q| of 900 at gamma 0.99; critics that start at 1e4 are beyond."""
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: lucky(torch.Generator().manual_seed(0), 200))
    sound = iql.init_params

    def inflated(*args: Any) -> iql.Agent:
        agent = sound(*args)
        agent["critics"]["critic.2.bias"] += 1e4
        return agent

    monkeypatch.setattr(iql, "init_params", inflated)
    flags = {"total_timesteps": 20, "log_every": 20, "batch_size": 8, "compile": False, "device": "cpu"}
    with pytest.raises(FloatingPointError, match=r"Q of seed 1 is 1e\+04, the rewards allow"):
        iql.train(Args(dataset="lucky", normalize_reward=False, runs_dir=tmp_path, **flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"dataset": ""}, "--dataset  must be a Minari id or a path"),
        ({"expectile": 1.0}, "--expectile 1.0 must be between 0 and 1"),
        ({"beta": -1.0}, "--beta -1.0 must be finite and 0 or more"),
        ({"total_timesteps": 1500}, "--total-timesteps 1500 must be a multiple of --log-every 1000"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Args(**{"dataset": "x", **flags})
