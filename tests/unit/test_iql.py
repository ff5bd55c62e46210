"""IQL's losses and their order by hand, and a task where it must beat what the data did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import iql
from rl_lab.algorithms.iql import Args
from rl_lab.distributions import Actions
from rl_lab.networks import q_values, stack
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
    args, rate = Args(dataset="x", learning_rate=0.1, tau=0.3, expectile=0.9), torch.tensor(0.05)
    new, moved, _, metrics = iql.update(agent, target, opts, batch, rate, ACTIONS, args)

    q = q_values(target, batch["obs"], batch["actions"]).amin(0)
    assert metrics["value_loss"].item() == pytest.approx(
        iql.value_loss(agent["value"], q, batch["obs"], 0.9)[0].item(), rel=1e-5
    )
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


def test_rates_and_rewards_of_the_paper(tmp_path: Path, lucky: Callable[..., Any], monkeypatch: Any) -> None:
    """The actor's rate falls as a cosine over all steps; rewards are scaled, observations are as they are."""
    data, seen = lucky(50), []
    data = replace(data, columns=data.columns | {"obs": data.columns["obs"] + 100})
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)

    def recorded(agent: Any, target: Any, opts: Any, batch: Any, actor_lr: Tensor, **_: Any) -> Any:
        seen.append((float(actor_lr), batch["rewards"], batch["obs"]))
        return agent, target, opts, {"q": torch.zeros(1)}

    monkeypatch.setattr(iql, "Compiled", lambda function, *_, **__: function)
    monkeypatch.setattr(iql, "vmap", lambda function, **_: function)
    monkeypatch.setattr(iql, "update", recorded)
    args = Args(dataset="lucky", device="cpu", compile=False, runs_dir=tmp_path, total_timesteps=4, log_every=4)
    args = replace(args, batch_size=1000, learning_rate=2.0, eval_episodes=0)
    iql.train(args)
    rates, rewards, obs = zip(*seen, strict=True)
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    worst = float(data.columns["rewards"].min())
    assert float(rewards[0].min()) == pytest.approx(worst)  # Pendulum is not locomotion
    assert float(obs[0].mean()) == pytest.approx(100, abs=1)
    monkeypatch.setattr(iql, "authors_scale", lambda *_: 7.0)
    for given, scale in ((None, 7.0), (3.0, 3.0)):
        run = iql.train(replace(args, reward_scale=given))
        assert float(seen[-1][1].min()) == pytest.approx(scale * worst)
        assert run.logs.config["args"]["reward_scale"] == scale


def test_authors_scale_by_hand(lucky: Callable[..., Any]) -> None:
    """1000 over the range of the episodes' returns, here 1 to 5, in the tasks in which the authors' code scales."""
    data = lucky(3)
    data = replace(data, columns=data.columns | {"rewards": torch.tensor([5.0, 2.0, 1.0])})
    for env_id in ("HalfCheetah-v4", "Hopper-v5", "Walker2d-v4"):
        assert iql.authors_scale(data, env_id) == 250
    for env_id in ("AntMaze_UMaze-v5", "AdroitHandPen-v1", "Pendulum-v1", "my.tasks:Hopper"):
        assert iql.authors_scale(data, env_id) == 1
    equal = replace(data, columns=data.columns | {"rewards": torch.ones(3)})
    with pytest.raises(ValueError, match=r"all episodes have the same return, .*; --reward-scale 1 works"):
        iql.authors_scale(equal, "Hopper-v4")
    assert iql.authors_scale(equal, "Pendulum-v1") == 1


def test_policy_is_the_mean_unless_noise_is_given() -> None:
    agent = iql.init_params(2, ACTIONS, torch.Generator().manual_seed(0))
    obs = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    mean = iql.gaussian(agent["actor"], obs, ACTIONS)["mean"]
    assert mean.abs().min() > 1e-3
    torch.testing.assert_close(iql.policy(agent, {}, {"obs": obs}, None, ACTIONS), mean)
    noisy = iql.policy(agent, {}, {"obs": obs}, torch.full((5, 1), 0.5), ACTIONS)
    torch.testing.assert_close(noisy, (mean + 0.5).clamp(-2, 2))


def trained(tmp_path: Path, **flags: Any) -> float:
    """Mean action of the policy after training."""
    settings = {"total_timesteps": 300, "log_every": 100, "eval_every": 0, "eval_episodes": 0, "learning_rate": 3e-3}
    settings["batch_size"] = 64
    args = replace(Args(dataset="lucky", device="cpu", compile=False, runs_dir=tmp_path), **{**settings, **flags})
    agent = iql.train(args).state()["params"]["actor"]
    obs = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    return iql.gaussian({name: p[0] for name, p in agent.items()}, obs, ACTIONS)["mean"].mean().item()


def test_takes_better_actions_than_the_data(tmp_path: Path, lucky: Callable[..., Any]) -> None:
    """The data's mean action is 0, the best is 1. Without weights (beta 0) it is behaviour cloning, and stays at 0."""
    lucky()
    assert trained(tmp_path / "iql", beta=3.0) == pytest.approx(1.0, abs=0.3)
    assert trained(tmp_path / "bc", beta=0.0) == pytest.approx(0.0, abs=0.2)
