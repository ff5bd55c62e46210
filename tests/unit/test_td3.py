"""The parts of algorithms/td3.py on numbers worked out by hand, and the order in which training uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from rl_lab.algorithms import td3
from rl_lab.algorithms.td3 import Agent, Args
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.rollout import Collector

ONE = Actions((1,), (1,), (-1.0,), (3.0,))  # the middle is 1, half the width 2
BATCH = {name: torch.zeros(2, 1) for name in ("obs", "next_obs", "actions")}


def blank_agent(*values: float, mean: float = 0.0) -> Agent:
    """An actor with the same mean everywhere before tanh, and critics that say the same everywhere."""
    agent = td3.init_params(1, ONE, torch.Generator())
    zero = {network: {name: torch.zeros_like(p) for name, p in params.items()} for network, params in agent.items()}
    zero["critics"]["critic.2.bias"] = torch.tensor(values).unsqueeze(1)
    zero["actor"]["actor.2.bias"] = torch.tensor([mean])
    return zero


def reads_action(factor: float) -> Params:
    """Critics with Q = factor * max(a, 0) and Q = 2 * factor * max(a, 0)."""
    critics = blank_agent(0.0, 0.0)["critics"]
    critics["critic.0.weight"][:, 0, 1] = 1.0  # inputs are the observation, then the action
    critics["critic.1.weight"][:, 0, 0] = 1.0
    critics["critic.2.weight"][:, 0, 0] = torch.tensor([factor, 2 * factor])
    return critics


def test_acts_uniformly_at_random_then_by_the_actor() -> None:
    """0.5 of a standard normal lies below 0, 0.8413447 below 1, 0.0227501 below -2; noise is clipped to the bounds."""
    noise, inputs = torch.tensor([[0.0], [1.0], [-2.0]]), {"obs": torch.zeros(3, 1)}
    explorer: dict[str, Any] = {"actor": blank_agent(0.0, 0.0, mean=1.0)["actor"], "random": torch.tensor(True)}
    taken, env_actions = td3.act(explorer, inputs, noise, ONE, std=0.4)
    assert torch.equal(taken, env_actions)
    torch.testing.assert_close(taken.squeeze(1), torch.tensor([1.0, 4 * 0.8413447 - 1, 4 * 0.0227501 - 1]))
    explorer["random"] = torch.tensor(False)
    taken, _ = td3.act(explorer, inputs, noise, ONE, std=0.4)
    # 1 + 2 tanh(1) = 2.5231884; 0.8 beyond that is too much; 1.6 less
    torch.testing.assert_close(taken.squeeze(1), torch.tensor([2.5231884, 3.0, 0.9231884]))


def test_policy() -> None:
    """What evaluation calls: the actor's action, and noise of 0.1 of half the width around it."""
    agent, inputs = blank_agent(0.0, 0.0, mean=0.5), {"obs": torch.zeros(2, 1, dtype=torch.float64)}
    certain = td3.policy(agent, {}, inputs, None, ONE)
    torch.testing.assert_close(certain, torch.full((2, 1), 1 + 2 * 0.4621172))
    drawn = td3.policy(agent, {}, inputs, torch.tensor([[1.0], [-2.0]]), ONE)
    torch.testing.assert_close(drawn - certain, torch.tensor([[0.2], [-0.4]]))


def test_critic_loss() -> None:
    """Targets are 1 + 0.9 * 3 = 3.7, from the lesser of 5 and 3, and 1 after the end."""
    batch = BATCH | {"rewards": torch.ones(2), "discounts": torch.tensor([0.9, 0.0])}
    agent, target = blank_agent(1.0, 2.0), blank_agent(5.0, 3.0)
    loss, metrics = td3.critic_loss(agent["critics"], target, batch, torch.zeros(2, 1), ONE, Args())
    assert metrics["qf1_loss"].item() == pytest.approx(3.645, rel=1e-6)  # ((1 - 3.7)^2 + 0) / 2
    assert metrics["qf2_loss"].item() == pytest.approx(1.945, rel=1e-6)  # ((2 - 3.7)^2 + 1) / 2
    assert loss.item() == pytest.approx(5.59, rel=1e-6)
    assert metrics["qf_loss"].item() == pytest.approx(2.795, rel=1e-6)  # the mean, as CleanRL logs
    assert (metrics["qf1_values"].item(), metrics["qf2_values"].item()) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("mean", "noise", "next_action"),
    [
        (0.0, 1.0, 1.4),  # 1 + 2 * 0.2
        (0.0, 9.0, 2.0),  # 1.8, clipped to 0.5
        (0.0, -9.0, 0.0),
        (9.0, 9.0, 3.0),  # then the action is clipped
    ],
)
def test_target_action(mean: float, noise: float, next_action: float) -> None:
    """The noise is clipped, then the action; the target actor chooses, the lesser target critic says max(a, 0)."""
    batch = BATCH | {"rewards": torch.zeros(2), "discounts": torch.ones(2)}
    target = blank_agent(0.0, 0.0, mean=mean) | {"critics": reads_action(1.0)}
    agent = blank_agent(0.0, 0.0, mean=-3.0)
    loss, _ = td3.critic_loss(agent["critics"], target, batch, torch.full((2, 1), noise), ONE, Args())
    assert loss.item() == pytest.approx(2 * next_action**2, rel=1e-5)  # either critic says 0


def test_actor_climbs_the_first_critic() -> None:
    """Q_1 = -max(a, 0) wants less, whatever Q_2 says; at a = 1 + 2 tanh(0) its slope by the last bias is 2."""
    actor, critics = blank_agent(0.0, 0.0)["actor"], reads_action(-1.0)
    critics["critic.2.weight"][1, 0, 0] = 100.0
    loss = td3.actor_loss(actor, critics, torch.zeros(2, 1), ONE)
    assert loss.item() == pytest.approx(1.0)
    grads = torch.func.grad(td3.actor_loss)(actor, critics, torch.zeros(2, 1), ONE)
    assert grads["actor.2.bias"].item() == pytest.approx(2.0)


def test_all_targets_follow() -> None:
    """By 0.1: critics from 5 to 1, 5 - 0.4; the actor from 2 towards 0 - 0.01, Adam's first step, 2 - 0.201."""
    agent = blank_agent(0.0, 0.0) | {"critics": reads_action(-1.0)}
    target = blank_agent(5.0, 5.0, mean=2.0)
    agent["critics"]["critic.2.bias"] = torch.ones(2, 1)
    actor, moved, opt, _ = td3.update_policy(
        agent, target, init_adam(agent["actor"]), torch.zeros(2, 1), torch.tensor(0.01), ONE, 0.1
    )
    assert actor["actor.2.bias"].item() == pytest.approx(-0.01) and opt["step"] == 1
    assert moved["actor"]["actor.2.bias"].item() == pytest.approx(1.799)
    assert moved["critics"]["critic.2.bias"].flatten().tolist() == pytest.approx([4.6, 4.6])


def tiny(tmp_path: Path, **flags: Any) -> Args:
    args = Args(env="Pendulum-v1", compile=False, log_every=20, batch_size=8, buffer_size=100, runs_dir=tmp_path)
    return replace(args, total_timesteps=40, **flags)


def test_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random actions first; then gradient steps after env steps 11, 12, ... 40, the actor's once at each third, as
    CleanRL counts them, and exploration noise as the flag says."""
    seen: dict[str, list[Any]] = {"critics": [], "policy": [], "random": [], "std": []}
    update_critics, update_policy, act, collect = td3.update_critics, td3.update_policy, td3.act, Collector.collect

    def collecting(self: Collector, params: Any, noise: Tensor) -> Any:
        seen["random"] += params["random"].tolist()
        return collect(self, params, noise)

    def acting(*args: Any, **kwargs: Any) -> Any:
        seen["std"].append(kwargs["std"])
        return act(*args, **kwargs)

    def critics(*args: Any, **kwargs: Any) -> Any:
        seen["critics"].append(10 + len(seen["critics"]))
        return update_critics(*args, **kwargs)

    def policy(*args: Any, **kwargs: Any) -> Any:
        seen["policy"].append(seen["critics"][-1])
        return update_policy(*args, **kwargs)

    monkeypatch.setattr(td3, "update_critics", critics)
    monkeypatch.setattr(td3, "update_policy", policy)
    monkeypatch.setattr(td3, "act", acting)
    monkeypatch.setattr(Collector, "collect", collecting)
    td3.train(tiny(tmp_path, learning_starts=10, policy_frequency=3, exploration_noise=0.3))
    assert seen["critics"] == list(range(10, 40)) and seen["policy"] == list(range(12, 40, 3))
    assert seen["random"] == [True] * 10 + [False] * 30 and set(seen["std"]) == {0.3}


def test_a_seed_alone_and_among_others(tmp_path: Path) -> None:
    """Guards the seed axis: seed 2 learns the same beside seed 1, to rounding."""
    models = []
    for name, more in (("alone", {"seed": 2}), ("beside", {"num_seeds": 2})):
        folders = td3.train(tiny(tmp_path / name, learning_starts=20, **more)).logs.folders
        models.append(safetensors.torch.load_file(folders[-1] / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    for name, x in models[0].items():
        torch.testing.assert_close(x, models[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["exploration_noise", "policy_noise", "noise_clip"])
def test_refused_settings(name: str) -> None:
    for value in (-0.1, float("inf"), float("nan")):
        flags: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value} must be finite and 0 or more"):
            Args(**flags)


def test_refused_actions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--env CartPole-v1: TD3 needs actions in a bounded Box, not Discrete\(2\)"):
        td3.train(tiny(tmp_path, env="CartPole-v1", learning_starts=10))
    assert not list(tmp_path.iterdir())
