"""The parts of algorithms/sac.py on numbers worked out by hand, and the order in which training uses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import safetensors.torch
import torch
from torch import Tensor

from rl_lab.algorithms import sac
from rl_lab.algorithms.sac import Agent, Args
from rl_lab.distributions import Actions, draw_noise
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.rollout import Collector

ONE = Actions((1,), (1,), (-2.0,), (2.0,))  # half the width is 2
# Mean 0 and, as tanh(0) = 0, logstd -5 + 3.5 = -1.5. At noise 0 the density before squashing is exp(1.5) / sqrt(2 pi)
# and squashing stretches by 2: 1.5 - 0.9189385 - 0.6931472.
LOGPROB = -0.1120857


def constant_critics(*values: float) -> Params:
    """Critics that say the same everywhere."""
    params = sac.init_params(1, ONE, 1.0, torch.Generator())["critics"]
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    return zero | {"critic.2.bias": torch.tensor(values).unsqueeze(1)}


def blank_agent(*values: float, alpha: float = 1.0) -> Agent:
    """Constant critics and an actor whose mean is 0 everywhere."""
    agent = sac.init_params(1, ONE, alpha, torch.Generator())
    actor = {name: torch.zeros_like(p) for name, p in agent["actor"].items()}
    return {**agent, "actor": actor, "critics": constant_critics(*values)}


def test_density_integrates_to_one() -> None:
    """Guards the tanh correction and the log of the bounds' widths: summed over all actions, probability is 1."""
    actions = Actions((2,), (2,), (-2.0, -0.5), (4.0, 0.5))
    actor = sac.init_params(3, actions, 1.0, torch.Generator().manual_seed(1))["actor"]
    actor["actor.2.bias"] = torch.tensor([0.3, -0.4, 0.5, 0.2])
    line = torch.linspace(-6, 6, 201)
    noise = torch.cartesian_prod(line, line)
    taken, logprobs = sac.sample(actor, torch.ones(1, 3).expand(len(noise), 3), noise, actions)
    density, grid = logprobs.exp().double().reshape(201, 201), taken.double().reshape(201, 201, 2)
    total = torch.trapezoid(torch.trapezoid(density, grid[0, :, 1]), grid[:, 0, 0])
    assert total.item() == pytest.approx(1.0, abs=1e-4)
    assert (grid.amin((0, 1)) >= torch.tensor(actions.low)).all() and (grid[-1, -1] <= torch.tensor(actions.high)).all()


def test_logprob_where_tanh_saturates() -> None:
    """At x = 30 tanh(x) is 1 in float32; log(1 - tanh(30)^2) is 2 (log 2 - 30) = -58.6137056 to the last digit."""
    actor = blank_agent(0.0, 0.0)["actor"]
    actor["actor.2.bias"] = torch.tensor([30.0, 0.0])
    _, logprobs = sac.sample(actor, torch.zeros(1, 1), torch.zeros(1, 1), ONE)
    assert logprobs.item() == pytest.approx(LOGPROB + 58.6137056, rel=1e-6)


def test_acts_uniformly_at_random_then_by_the_actor() -> None:
    """0.5 of a standard normal lies below 0, 0.8413447 below 1, 0.0227501 below -2."""
    actions = Actions((1,), (1,), (-1.0,), (3.0,))
    noise = torch.tensor([[0.0], [1.0], [-2.0]])
    explorer: dict[str, Any] = {"actor": blank_agent(0.0, 0.0)["actor"], "random": torch.tensor(True)}
    taken, env_actions = sac.act(explorer, {"obs": torch.zeros(3, 1)}, noise, actions)
    assert torch.equal(taken, env_actions)
    torch.testing.assert_close(taken.squeeze(1), torch.tensor([1.0, 4 * 0.8413447 - 1, 4 * 0.0227501 - 1]))
    explorer["random"] = torch.tensor(False)
    taken, _ = sac.act(explorer, {"obs": torch.zeros(3, 1)}, noise, actions)
    # 1 + 2 tanh(noise * exp(-1.5)), and tanh(0.2231302) = 0.2195, tanh(-0.4462603) = -0.4188
    torch.testing.assert_close(taken.squeeze(1), torch.tensor([1.0, 1.4390, 0.1624]), rtol=0, atol=2e-4)


def test_policy() -> None:
    """What evaluation calls: the scaled tanh of the mean, and samples around it."""
    agent = blank_agent(0.0, 0.0)
    agent["actor"]["actor.2.bias"] = torch.tensor([0.5, 0.0])
    inputs = {"obs": torch.zeros(4000, 1, dtype=torch.float64)}
    certain = sac.policy(agent, {}, inputs, None, ONE)
    assert certain.shape == (4000, 1) and certain.dtype == torch.float32
    torch.testing.assert_close(certain[0], torch.tensor([2 * 0.4621172]))
    noise = draw_noise(ONE, (4000,), torch.Generator().manual_seed(0))
    drawn = sac.policy(agent, {}, inputs, noise, ONE)
    assert torch.equal(drawn, sac.policy(agent, {}, inputs, noise, ONE))
    assert 0.3 < drawn.std() < 0.4  # 2 (1 - 0.46^2) exp(-1.5) = 0.35
    assert drawn.mean().item() == pytest.approx(0.9, abs=0.03)


def test_critic_loss() -> None:
    """Targets are 1 + 0.9 (3 + 0.5 * 0.1120857) = 3.7504386, from the lesser of 5 and 3, and 1 after the end."""
    batch = {name: torch.zeros(2, 1) for name in ("obs", "next_obs", "actions")}
    batch |= {"rewards": torch.ones(2), "discounts": torch.tensor([0.9, 0.0])}
    agent, noise = blank_agent(1.0, 2.0, alpha=0.5), torch.zeros(2, 1)
    loss, metrics = sac.critic_loss(agent["critics"], constant_critics(5.0, 3.0), agent, batch, noise, ONE)
    # ((1 - 3.7504386)^2 + 0) / 2 and ((2 - 3.7504386)^2 + 1) / 2
    assert metrics["qf1_loss"].item() == pytest.approx(3.7824562, rel=1e-6)
    assert metrics["qf2_loss"].item() == pytest.approx(2.0320176, rel=1e-6)
    assert loss.item() == pytest.approx(5.8144738, rel=1e-6)
    assert metrics["qf_loss"].item() == pytest.approx(2.9072369, rel=1e-6)  # the mean, as CleanRL logs
    assert (metrics["qf1_values"].item(), metrics["qf2_values"].item()) == (1.0, 2.0)


def test_actor_and_temperature_losses() -> None:
    """0.5 * -0.1120857 less the lesser of 1 and 2; and -0.5 * (mean of -0.2 and 0.4 less dim(A) = 1)."""
    agent = blank_agent(1.0, 2.0, alpha=0.5)
    loss = sac.actor_loss(agent["actor"], agent, torch.zeros(2, 1), torch.zeros(2, 1), ONE)
    assert loss.item() == pytest.approx(-1.0560428, rel=1e-6)
    loss = sac.temperature_loss(agent["temperature"], torch.tensor([-0.2, 0.4]), ONE)
    assert loss.item() == pytest.approx(0.45, rel=1e-6)


@pytest.mark.parametrize(("logstd", "rises"), [(-1.0, True), (0.0, False)])
def test_temperature_follows_the_entropy(logstd: float, rises: bool) -> None:
    """It rises where the policy is surer than its aim, an entropy of -1, and falls elsewhere.

    tanh(-1) makes logstd -4.2: entropy is near 1.4 - 4.2 + log 2 = -2.1. tanh(0) makes it -1.5: near 0.6.
    """
    agent = blank_agent(0.0, 0.0)
    agent["actor"]["actor.2.bias"] = torch.tensor([0.0, logstd])
    opts = {name: init_adam(params) for name, params in agent.items()}
    noise, rate = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(1e-3)
    for autotune in (True, False):
        new, more, metrics = sac.update_policy(agent, opts, torch.zeros(500, 1), noise, rate, rate, ONE, autotune)
        change = new["temperature"]["log_alpha"].item()
        # Adam's first step is as long as its rate.
        assert change == (pytest.approx(0.001 if rises else -0.001, rel=1e-3) if autotune else 0.0)
        assert more["temperature"]["step"] == float(autotune) and ("alpha_loss" in metrics) == autotune
    assert new.keys() == more.keys() == {"actor", "temperature"}


def test_targets_follow_by_their_share() -> None:
    """From 5 by 0.1 towards the new critic: Adam's first step takes 1 to 1.01, so 5 - 0.1 * 3.99 = 4.601."""
    batch = {name: torch.zeros(2, 1) for name in ("obs", "next_obs", "actions")}
    batch |= {"rewards": torch.full((2,), 9.0), "discounts": torch.zeros(2)}
    agent = blank_agent(1.0, 1.0)
    for share, expected in ((0.1, 4.601), (0.0, 5.0)):
        critics, target, *_ = sac.update_critics(
            agent, constant_critics(5.0, 5.0), init_adam(agent["critics"]), batch, torch.zeros(2, 1),
            torch.tensor(0.01), torch.tensor(share), ONE,
        )  # fmt: skip
        assert critics["critic.2.bias"].flatten().tolist() == pytest.approx([1.01, 1.01])
        assert target["critic.2.bias"].flatten().tolist() == pytest.approx([expected, expected])


def tiny(tmp_path: Path, **flags: Any) -> Args:
    args = Args(env="Pendulum-v1", compile=False, log_every=20, batch_size=8, buffer_size=100, runs_dir=tmp_path)
    return replace(args, **flags)


@pytest.mark.parametrize(
    ("flags", "cycles", "steps"),
    [
        ({}, 40, range(10, 40)),  # 0-based gradient steps, those of the first 10 env steps left out
        ({"num_envs": 2, "train_frequency": 4}, 10, range(2, 10)),
        ({"num_envs": 4, "train_frequency": 2}, 10, range(4, 20)),  # from env step 12
    ],
    ids=["1:1", "fewer gradient steps", "more than one a cycle"],
)
def test_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int], cycles: int, steps: range
) -> None:
    """Random actions first; then gradient steps, the actor's thrice at each third, the targets' at each second."""
    seen: dict[str, list[Any]] = {"random": [], "shares": [], "policy": [], "batches": []}
    update_critics, update_policy, collect = sac.update_critics, sac.update_policy, Collector.collect

    def critics(*args: Any, **kwargs: Any) -> Any:
        seen["shares"].append(args[6].item())
        seen["batches"].append(len(args[3]["rewards"]))
        return update_critics(*args, **kwargs)

    def policy(*args: Any, **kwargs: Any) -> Any:
        seen["policy"].append(len(seen["shares"]) - 1)
        return update_policy(*args, **kwargs)

    def collecting(self: Collector, params: Any, noise: Tensor) -> Any:
        seen["random"].append(params["random"].tolist())
        return collect(self, params, noise)

    monkeypatch.setattr(sac, "update_critics", critics)
    monkeypatch.setattr(sac, "update_policy", policy)
    monkeypatch.setattr(Collector, "collect", collecting)
    more = {"total_timesteps": 40, "learning_starts": 10, "policy_frequency": 3, "target_network_frequency": 2}
    sac.train(tiny(tmp_path, **more, **flags))
    first = -(-10 // (40 // cycles))  # cycles that begin before env step 10
    assert seen["random"] == [[True]] * first + [[False]] * (cycles - first)
    assert seen["shares"] == pytest.approx([0.0 if step % 2 else 0.005 for step in steps])
    assert seen["policy"] == [step - steps.start for step in steps if step % 3 == 0 for _ in range(3)]
    assert set(seen["batches"]) == {8}


def test_a_seed_alone_and_among_others(tmp_path: Path) -> None:
    """Guards the seed axis: seed 2 learns the same beside seed 1, to rounding."""
    flags = {"total_timesteps": 40, "learning_starts": 20}
    models = []
    for name, more in (("alone", {"seed": 2}), ("beside", {"num_seeds": 2})):
        folders = sac.train(tiny(tmp_path / name, **flags, **more)).logs.folders
        models.append(safetensors.torch.load_file(folders[-1] / "model.safetensors"))
    assert models[0].keys() == models[1].keys()
    start = sac.init_params(3, Actions((1,), (1,), (-2.0,), (2.0,)), 1.0, Args(seed=2).generators(0)[0])
    for name, x in models[0].items():
        torch.testing.assert_close(x, models[1][name], rtol=0, atol=1e-6)
        _, network, tensor = name.split("/")
        assert not torch.allclose(x, start[network][tensor], rtol=0, atol=1e-5), f"{name} has not learned"


def test_initial_networks() -> None:
    """Two critics that differ; every weight and bias of a layer within 1 / sqrt(inputs)."""
    agent = sac.init_params(17, Actions((6,), (6,), (-1.0,) * 6, (1.0,) * 6), 1.0, torch.Generator().manual_seed(0))
    shapes = {name: tuple(p.shape) for params in agent.values() for name, p in params.items()}
    assert shapes == {
        "actor.0.weight": (256, 17), "actor.0.bias": (256,), "actor.1.weight": (256, 256), "actor.1.bias": (256,),
        "actor.2.weight": (12, 256), "actor.2.bias": (12,),
        "critic.0.weight": (2, 256, 23), "critic.0.bias": (2, 256), "critic.1.weight": (2, 256, 256),
        "critic.1.bias": (2, 256), "critic.2.weight": (2, 1, 256), "critic.2.bias": (2, 1), "log_alpha": (),
    }  # fmt: skip
    first, second = agent["critics"]["critic.1.weight"]
    assert not torch.allclose(first, second)
    assert 0.99 / 16 < first.abs().max() <= 1 / 16 and 0.9 / 17**0.5 < agent["actor"]["actor.0.weight"].max() < 0.2426


def test_a_temperature_that_is_learned_is_not_given() -> None:
    """Guards against a flag without effect: a learned temperature starts from 1, as CleanRL's does."""
    with pytest.raises(ValueError, match=r"--alpha 0.1 must be left out, or with --no-autotune"):
        Args(alpha=0.1)
    assert Args(alpha=0.1, autotune=False).alpha == 0.1


@pytest.mark.parametrize("name", ["q_lr", "policy_lr", "alpha"])
def test_refused_settings(name: str) -> None:
    for value in (0.0, float("inf"), float("nan")):
        flags: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value} must be finite and above 0"):
            Args(**flags)


def test_refused_actions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--env CartPole-v1: SAC needs actions in a bounded Box, not Discrete\(2\)"):
        sac.train(tiny(tmp_path, env="CartPole-v1", total_timesteps=40, learning_starts=10))
    unbounded = gym.spaces.Box(-float("inf"), float("inf"), (1,))
    monkeypatch.setattr("rl_lab.envs.classic.Pendulum.action_space", unbounded)
    with pytest.raises(ValueError, match=r"--env Pendulum-v1: SAC needs actions in a bounded Box, not Box\(-inf, inf"):
        sac.train(tiny(tmp_path, total_timesteps=40, learning_starts=10))
    assert not list(tmp_path.iterdir())
