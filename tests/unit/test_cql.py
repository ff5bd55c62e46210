"""CQL's losses and their order by hand, and a task where being conservative must pay."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad, grad_and_value

from rl_lab.algorithms import cql
from rl_lab.algorithms.cql import Agent, Args
from rl_lab.cli import Stopped
from rl_lab.distributions import Actions, squashed_sample
from rl_lab.networks import Params, stack
from rl_lab.offline import Dataset
from rl_lab.optim import init_adam

ONE = Actions((1,), (1,), (-2.0,), (2.0,))  # half the width is 2
# Mean 0 and standard deviation 1 before squashing. At noise 0: log(1 / sqrt(2 pi)) - log 2 = -0.9189385 - 0.6931472.
LOGPROB = -1.6120857


def linear_critic(of_obs: float, of_action: float, constant: float = 0.0) -> Params:
    """Q(s, a) = of_obs * s + of_action * a + constant, exactly: as relu(x) - relu(-x) through both hidden layers."""
    params = {name: torch.zeros_like(p[0]) for name, p in blank()["critics"].items()}
    slope = torch.tensor([of_obs, of_action])
    params["critic.0.weight"][:2] = torch.stack([slope, -slope])
    params["critic.1.weight"][:2, :2] = torch.eye(2)
    params["critic.2.weight"][0, :2] = torch.tensor([1.0, -1.0])
    params["critic.2.bias"][0] = constant
    return params


def blank(*critics: Params) -> Agent:
    """An actor of mean 0 and standard deviation 1 everywhere, with these critics."""
    agent = cql.init_params(1, ONE, 1.0, torch.Generator())
    actor = {name: torch.zeros_like(p) for name, p in agent["actor"].items()}
    return {**agent, "actor": actor, **({"critics": stack(critics)} if critics else {})}


def test_critic_loss_by_hand() -> None:
    """At s = 7 the data's action is 0.5; -1 and 1 with probabilities 1/4 and 1/2 are weighed against it. r + ... = 2.

    Q1 = a: log(4 exp(-1) + 2 exp(1)) - 0.5 = 1.4327000, residual (0.5 - 2)^2;
    Q2 = 2a: log(4 exp(-2) + 2 exp(2)) - 1 = 1.7291292, residual (1 - 2)^2. The weight is 3.
    """
    critics = stack([linear_critic(0.0, 1.0), linear_critic(0.0, 2.0)])
    batch = {"obs": torch.tensor([[7.0]]), "actions": torch.tensor([[0.5]])}
    taken, logprobs = torch.tensor([[[-1.0]], [[1.0]]]), torch.tensor([[0.25], [0.5]]).log()
    given = (torch.tensor([2.0]), taken, logprobs, batch, torch.tensor(3.0))
    loss, metrics = cql.critic_loss(critics, *given)
    assert loss.item() == pytest.approx(2.25 + 1.0 + 3 * (1.4327000 + 1.7291292), rel=1e-5)
    assert metrics["qf_loss"].item() == pytest.approx(3.25)
    assert metrics["gap"].item() == pytest.approx((1.4327000 + 1.7291292) / 2, rel=1e-5)
    assert metrics["q"].item() == pytest.approx(0.75)


def test_descent_lowers_q_of_other_actions_and_raises_the_data_s() -> None:
    """Q = w h with h = a + 3 and w = 0: the slope in w is 10 times the others' mean h, of 4 and 5, less the data's 2.

    A constant added to Q changes no gap, and the residual is 0.
    """
    critic = {name: torch.zeros_like(p) for name, p in linear_critic(0.0, 0.0).items()}
    critic["critic.0.weight"][0], critic["critic.0.bias"][0] = torch.tensor([0.0, 1.0]), 3.0
    critic["critic.1.weight"][0, 0] = 1.0
    batch = {"obs": torch.zeros(1, 1), "actions": torch.tensor([[-1.0]])}
    given = (torch.zeros(1), torch.tensor([[[1.0]], [[2.0]]]), torch.zeros(2, 1), batch, torch.tensor(10.0))
    slopes, _ = grad(cql.critic_loss, has_aux=True)(stack([critic, critic]), *given)
    torch.testing.assert_close(slopes["critic.2.weight"][:, 0, 0], torch.full((2,), 10 * (4.5 - 2)))
    torch.testing.assert_close(slopes["critic.2.bias"], torch.zeros(2, 1))


def test_proposals_by_hand() -> None:
    """Two actions of each kind in the bounds [-2, 2], at noise 0 and 1: pi(.|s), pi(.|s'), uniform.

    pi(.|s) is as LOGPROB says. At noise 1: 2 tanh(1) = 1.5231884, and log(1 - tanh(1)^2) = -0.8675617:
    -0.9189385 - 0.5 - log 2 + 0.8675617 = -1.2445240. pi(.|s') has mean 1 and deviation exp(-1), so at noise 0 the same
    action with -0.9189385 + 1 - log 2 + 0.8675617 = 0.2554760. Uniform: 0 and 2 (2 * 0.8413447 - 1), density 1/4.
    """
    here, there = (torch.zeros(1, 1), torch.zeros(1, 1)), (torch.ones(1, 1), -torch.ones(1, 1))
    noise = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]).view(6, 1, 1)
    taken, logprobs = cql.proposals(here, there, noise, ONE)
    assert taken.shape == (6, 1, 1) and logprobs.shape == (6, 1)
    wanted = torch.tensor([0.0, 1.5231884, 1.5231884, 2 * math.tanh(1 + math.exp(-1)), 0.0, 2 * 0.6826895])
    torch.testing.assert_close(taken.flatten(), wanted)
    found = logprobs.flatten()
    torch.testing.assert_close(found[[0, 1, 2]], torch.tensor([LOGPROB, -1.2445240, 0.2554760]))
    torch.testing.assert_close(found[4:], torch.full((2,), -math.log(4)))


def test_uniform_proposals_have_the_density_of_all_bounds() -> None:
    """In [-2, 4] x [-0.5, 0.5] it is 1/6, and they are anywhere in it."""
    actions, zeros = Actions((2,), (2,), (-2.0, -0.5), (4.0, 0.5)), torch.zeros(1, 2)
    noise = torch.randn(3000, 1, 2, generator=torch.Generator().manual_seed(0))
    taken, logprobs = cql.proposals((zeros, zeros), (zeros, zeros), noise, actions)
    torch.testing.assert_close(logprobs[2000:], torch.full((1000, 1), -math.log(6)))
    uniform = taken[2000:, 0]
    torch.testing.assert_close(uniform.mean(0), torch.tensor([1.0, 0.0]), rtol=0, atol=0.2)
    torch.testing.assert_close(uniform.std(0), torch.tensor([6.0, 1.0]) / 12**0.5, rtol=0.05, atol=0)


def updated(agent: Agent, batch: dict[str, Tensor], noise: Tensor, **flags: Any) -> Any:
    """What `update` makes of a new agent in the bounds of ONE; `cloning` is a flag here."""
    opts = {name: init_adam(params) for name, params in agent.items()}
    args, cloning = Args(dataset="x", num_samples=(len(noise) - 2) // 3, **flags), flags.pop("cloning", False)
    return cql.update(agent, agent["critics"], opts, batch, noise, ONE, args, cloning)


def transitions(**columns: float) -> dict[str, Tensor]:
    """One of each in a batch, a vector of one number where it has components."""
    found = {"obs": 0.0, "next_obs": 0.0, "actions": 0.0, "rewards": 0.0, "discounts": 0.0} | columns
    vectors = ("obs", "next_obs", "actions")
    return {name: torch.full((1, 1) if name in vectors else (1,), x) for name, x in found.items()}


def test_every_proposal_is_valued_at_the_current_state() -> None:
    """Q = s, and s' = 100 is far from s = 1: the gap is log of the sum of 1 / probability over the three, not 99 more.

    exp(1.6120857) = 5.0132565 for either policy sample at noise 0, 4 for the uniform one.
    """
    batch = transitions(obs=1.0, next_obs=100.0)
    *_, metrics = updated(blank(linear_critic(1.0, 0.0), linear_critic(1.0, 0.0)), batch, torch.zeros(5, 1, 1))
    assert metrics["gap"].item() == pytest.approx(math.log(2 * 5.0132565 + 4), rel=1e-5)


def test_proposals_of_the_next_state_are_the_policy_s_there() -> None:
    """The mean is s, s' = 1 has 2 tanh(1): with Q = a and s = 0 its term of the sum is exp(1.5231884 - log pi).

    log pi(2 tanh(1)|s') = -0.9189385 - log 2 + 0.8675617 = -0.7445240. The others are 5.0132565 and 4, as above.
    """
    agent = blank(linear_critic(0.0, 1.0), linear_critic(0.0, 1.0))
    for layer, unit in ((0, (0, 0)), (1, (0, 0)), (2, (0, 0))):
        agent["actor"][f"actor.{layer}.weight"][unit] = 1.0
    *_, metrics = updated(agent, transitions(next_obs=1.0), torch.zeros(5, 1, 1))
    total = 5.0132565 + math.exp(1.5231884 + 0.7445240) + 4
    assert metrics["gap"].item() == pytest.approx(math.log(total), rel=1e-5)


def test_the_critics_loss_moves_no_policy() -> None:
    """Neither through the proposals and their log-probabilities nor through the next action."""
    generator = torch.Generator().manual_seed(0)
    agent = cql.init_params(1, ONE, 1.0, generator)
    batch = {name: torch.randn(8, 1, generator=generator) for name in ("obs", "next_obs", "actions")}
    batch |= {"rewards": torch.randn(8, generator=generator), "discounts": torch.full((8,), 0.9)}
    noise, args = torch.randn(8, 8, 1, generator=generator), Args(dataset="x", num_samples=2, backup_entropy=True)

    def loss(actor: Params) -> Tensor:
        here, there = (cql.gaussian(actor, batch[name]) for name in ("obs", "next_obs"))
        wanted = cql.targets(agent, agent["critics"], batch, there, noise[1], ONE, args)
        given = (wanted, *cql.proposals(here, there, noise[2:], ONE), batch, torch.tensor(5.0))
        return cql.critic_loss(agent["critics"], *given)[0]

    assert not any(slope.any() for slope in grad(loss)(agent["actor"]).values())


def test_target_takes_the_lesser_twin_and_ends_at_terminals() -> None:
    """Targets say 5 and 3. r = 1 ends there, goes on at a time limit: 1 + 0.9 * 3; entropy adds 0.9 * -LOGPROB."""
    critics = stack([linear_critic(0.0, 0.0, 5.0), linear_critic(0.0, 0.0, 3.0)])
    batch = {"next_obs": torch.zeros(2, 1), "rewards": torch.ones(2), "discounts": torch.tensor([0.0, 0.9])}
    there, noise = (torch.zeros(2, 1), torch.zeros(2, 1)), torch.zeros(2, 1)
    wanted = partial(cql.targets, blank(), critics, batch, there, noise, ONE)
    torch.testing.assert_close(wanted(Args(dataset="x")), torch.tensor([1.0, 3.7]))
    with_entropy = wanted(Args(dataset="x", backup_entropy=True))
    torch.testing.assert_close(with_entropy, torch.tensor([1.0, 3.7 - 0.9 * LOGPROB]))


def test_actor_loss_by_hand() -> None:
    """alpha is 0.5; of Q = s + a + 2 and s - a + 4 at s = 1 and a = 0 the lesser is 3, whose slope moves the mean."""
    agent = blank(linear_critic(1.0, 1.0, 2.0), linear_critic(1.0, -1.0, 4.0))
    agent["temperature"]["log_alpha"] = torch.tensor(math.log(0.5))
    batch, noise = transitions(obs=1.0), torch.zeros(1, 1)
    loss = partial(cql.actor_loss, agent=agent, batch=batch, noise=noise, actions=ONE, cloning=False)
    value, ((mean, logstd), logprobs) = loss(agent["actor"])
    assert value.item() == pytest.approx(0.5 * LOGPROB - 3.0, rel=1e-6)
    assert (mean.item(), logstd.item()) == (0.0, 0.0) and logprobs.item() == pytest.approx(LOGPROB, rel=1e-6)
    slopes, _ = grad(loss, has_aux=True)(agent["actor"])
    # a = 2 tanh(mean) has slope 2; alpha * log pi none in the mean at 0, and -alpha in the logstd
    torch.testing.assert_close(slopes["actor.2.bias"], torch.tensor([-2.0, -0.5]))


def test_cloning_by_hand() -> None:
    """alpha * log pi(b|s) - log pi(a|s) with a = 2 tanh(1), of x = 1: the critics have no say.

    log pi(a|s) = -1.2445240 as above. Its slopes are x - mean = 1 in the mean and (x - mean)^2 - 1 = 0 in the logstd.
    """
    batch = transitions(actions=2 * math.tanh(1))
    for critics in ((0.0, 0.0), (5.0, -7.0)):
        agent = blank(*(linear_critic(0.0, x, x) for x in critics))
        args = {"agent": agent, "batch": batch, "noise": torch.zeros(1, 1), "actions": ONE, "cloning": True}
        loss = partial(cql.actor_loss, **args)
        assert loss(agent["actor"])[0].item() == pytest.approx(LOGPROB + 1.2445240, rel=1e-5)
        slopes, _ = grad(loss, has_aux=True)(agent["actor"])
        torch.testing.assert_close(slopes["actor.2.bias"], torch.tensor([-1.0, -1.0]), rtol=1e-5, atol=1e-5)


def test_log_probability_of_the_data_s_actions_is_that_of_sampling_them() -> None:
    actions = Actions((2,), (2,), (-2.0, -0.5), (4.0, 0.5))
    mean, logstd, noise = torch.randn(3, 9, 2, generator=torch.Generator().manual_seed(0))
    taken, logprobs = squashed_sample(mean, 0.2 * logstd, noise, actions)
    torch.testing.assert_close(cql.logprobs_of(taken, (mean, 0.2 * logstd), actions), logprobs, rtol=1e-3, atol=1e-3)
    at_the_bounds = cql.logprobs_of(torch.tensor([[4.0, -0.5]]), (mean[:1], logstd[:1]), actions)
    assert at_the_bounds.isfinite().all()


def test_the_multiplier_grows_while_the_gap_is_above_its_target() -> None:
    """The gap is 2.639 as above. Adam's first step is the learning rate; the loss is minus weight * (gap - target)."""
    agent, noise, gap = blank(linear_critic(1.0, 0.0), linear_critic(1.0, 0.0)), torch.zeros(5, 1, 1), 2.6409497
    flags: dict[str, Any] = {"lagrange": True, "q_lr": 0.1, "cql_alpha": 4.0}
    for target, step in ((gap - 1, 0.1), (gap + 1, -0.1)):
        new, *_, metrics = updated(agent, transitions(obs=1.0), noise, target_action_gap=target, **flags)
        assert new["multiplier"]["log_weight"].item() == pytest.approx(step, rel=1e-3)
        assert metrics["weight_loss"].item() == pytest.approx(-4.0 * (gap - target), rel=1e-4)
        assert metrics["weight"].item() == 4.0
    flags["lagrange"] = False
    new, *_, metrics = updated(agent, transitions(obs=1.0), noise, **flags)
    assert new["multiplier"]["log_weight"].item() == 0.0 and "weight_loss" not in metrics


def test_the_multiplier_scales_the_gap_in_the_critics_loss_and_is_bounded() -> None:
    args = Args(dataset="x", cql_alpha=4.0)
    assert cql.gap_weight({"log_weight": torch.tensor(math.log(3.0))}, args).item() == pytest.approx(12.0)
    assert cql.gap_weight({"log_weight": torch.tensor(50.0)}, args).item() == 4e6
    agent, moments = blank(linear_critic(1.0, 1.0), linear_critic(1.0, 1.0)), []
    batch, noise = transitions(obs=1.0, rewards=1.0), torch.full((5, 1, 1), 0.5)  # Q(s, a) is 1 as well: no residual
    opts = {name: init_adam(params) for name, params in agent.items()}
    for log_weight in (0.0, math.log(3.0)):
        agent["multiplier"]["log_weight"] = torch.tensor(log_weight)
        _, _, new, _ = cql.update(agent, agent["critics"], opts, batch, noise, ONE, replace(args, num_samples=1), False)
        moments.append(new["critics"]["first"]["critic.2.weight"])  # (1 - 0.9) of the gradient
    assert moments[0].any()
    torch.testing.assert_close(moments[1], 3 * moments[0])


def test_the_temperature_falls_while_the_entropy_is_above_its_target() -> None:
    """Entropy at noise 0 is 1.612, the target -1; log alpha falls by the learning rate of the policy."""
    for flags, step in (({}, -0.1), ({"autotune": False}, 0.0)):
        agent = blank(linear_critic(0.0, 0.0), linear_critic(0.0, 0.0))
        new, *_, metrics = updated(agent, transitions(), torch.zeros(5, 1, 1), policy_lr=0.1, **flags)
        assert new["temperature"]["log_alpha"].item() == pytest.approx(step, rel=1e-3)
        assert metrics["alpha"].item() == 1.0
    wanted = cql.temperature_loss({"log_alpha": torch.tensor(2.0)}, torch.tensor([LOGPROB, 0.0]), ONE)
    assert wanted.item() == pytest.approx(-2.0 * (LOGPROB / 2 - 1), rel=1e-6)


def test_order_of_an_update() -> None:
    """Every loss is that of the parameters before; only the target critics move to the new ones."""
    generator = torch.Generator().manual_seed(0)
    agent, other = (cql.init_params(2, ONE, 0.7, generator) for _ in range(2))
    target, opts = other["critics"], {name: init_adam(params) for name, params in agent.items()}
    batch = {name: torch.randn(8, 2, generator=generator) for name in ("obs", "next_obs")}
    batch |= {"actions": torch.randn(8, 1, generator=generator), "rewards": torch.randn(8, generator=generator)}
    batch["discounts"], noise = torch.full((8,), 0.99), torch.randn(11, 8, 1, generator=generator)
    args = Args(dataset="x", num_samples=3, lagrange=True, policy_lr=0.1, q_lr=0.05, tau=0.3)
    new, moved, _, metrics = cql.update(agent, target, opts, batch, noise, ONE, args, False)

    actor_loss, (here, logprobs) = cql.actor_loss(agent["actor"], agent, batch, noise[0], ONE, False)
    there = cql.gaussian(agent["actor"], batch["next_obs"])
    wanted = cql.targets(agent, target, batch, there, noise[1], ONE, args)
    _, logged = cql.critic_loss(
        agent["critics"], wanted, *cql.proposals(here, there, noise[2:], ONE), batch, torch.tensor(10.0)
    )
    expected = {**logged, "actor_loss": actor_loss, "weight": torch.tensor(10.0), "alpha": torch.tensor(0.7)}
    expected["alpha_loss"] = cql.temperature_loss(agent["temperature"], logprobs, ONE)
    expected["weight_loss"] = -10.0 * (logged["gap"] - 10.0)
    assert metrics.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(metrics[name], x)
    for name, p in moved.items():
        torch.testing.assert_close(p, 0.7 * target[name] + 0.3 * new["critics"][name])
    for name, key, rate in (("actor", "actor.0.bias", 0.1), ("critics", "critic.0.bias", 0.05),
                            ("temperature", "log_alpha", 0.1), ("multiplier", "log_weight", 0.05)):  # fmt: skip
        step = (new[name][key] - agent[name][key]).abs().max().item()
        assert step == pytest.approx(rate, rel=1e-3)  # Adam's first step is the learning rate


@pytest.mark.parametrize("size", [16, 5])
def test_gradients_of_some_states_at_a_time(size: int) -> None:
    """Are the whole batch's, and what is logged too."""
    generator = torch.Generator().manual_seed(0)
    critics = cql.init_params(2, ONE, 1.0, generator)["critics"]
    taken, logprobs = (torch.randn(9, size, *shape, generator=generator) for shape in ((1,), ()))
    batch = {"obs": torch.randn(size, 2, generator=generator), "actions": torch.randn(size, 1, generator=generator)}
    given = (torch.randn(size, generator=generator), taken, logprobs, batch, torch.tensor(3.0))
    grads, logged = cql.critic_grads(critics, *given)
    whole, (_, expected) = grad_and_value(cql.critic_loss, has_aux=True)(critics, *given)
    torch.testing.assert_close(grads, whole)
    torch.testing.assert_close(logged, expected)


def test_policy() -> None:
    """What evaluation calls: the scaled tanh of the mean at normalised observations, and samples around it."""
    agent = blank()
    for layer in range(3):
        agent["actor"][f"actor.{layer}.weight"][0, 0] = 1.0  # the mean is s
    moments = {"mean": torch.tensor([3.0]), "scale": torch.tensor([2.0])}
    chosen = cql.policy(agent, moments, {"obs": torch.tensor([[5.0]])}, None, ONE)
    assert chosen.item() == pytest.approx(2 * math.tanh(1), rel=1e-6)
    chosen = cql.policy(agent, {}, {"obs": torch.tensor([[0.5]])}, torch.tensor([[0.5]]), ONE)
    assert chosen.item() == pytest.approx(2 * math.tanh(1), rel=1e-6)
    agent["actor"]["actor.2.weight"][1, 0] = 1.0  # and so is the logstd, within [-5, 2]
    assert cql.gaussian(agent["actor"], torch.tensor([[1.0], [9.0]]))[1].flatten().tolist() == [1.0, 2.0]
    agent["actor"]["actor.2.weight"][1, 0] = -1.0
    assert cql.gaussian(agent["actor"], torch.tensor([[1.0], [9.0]]))[1].flatten().tolist() == [-1.0, -5.0]


def upper_edge(random: torch.Generator, num_episodes: int = 1000) -> Dataset:
    """Pendulum's spaces; episodes of one step with actions uniform in [-1.5, -0.5] and reward 5 * action."""
    obs, actions = torch.randn(num_episodes, 3, generator=random), torch.rand(num_episodes, 1, generator=random) - 1.5
    flags = torch.ones(num_episodes, dtype=torch.bool)
    columns = {"obs": obs, "actions": actions, "rewards": 5 * actions.squeeze(1), "next_obs": obs}
    columns |= {"terminated": flags, "truncated": ~flags}
    peer = gym.make("Pendulum-v1")
    return Dataset("edge", "Pendulum-v1", columns, peer.observation_space, peer.action_space, (-10.0, 0.0), "none")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of 32 units, and the data set above."""
    monkeypatch.setattr(cql, "HIDDEN", (32, 32))
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: upper_edge(torch.Generator().manual_seed(0)))


SMALL: dict[str, Any] = {"total_timesteps": 30, "log_every": 10, "batch_size": 8, "num_samples": 2, "compile": False}
SMALL |= {"eval_every": 0, "eval_episodes": 2, "device": "cpu"}


def mean_action(tmp_path: Path, **flags: Any) -> float:
    """Mean action of the policy after training on `upper_edge`."""
    settings = {"total_timesteps": 150, "log_every": 50, "eval_episodes": 0, "batch_size": 64}
    settings |= {"policy_lr": 1e-2, "q_lr": 1e-2, "cql_alpha": 2.0, "num_samples": 4}
    agent = cql.train(Args(dataset="edge", runs_dir=tmp_path, **{**SMALL, **settings, **flags})).state()["params"]
    actor = {name: p[0] for name, p in agent["actor"].items()}
    mean, _ = cql.gaussian(actor, torch.randn(100, 3, generator=torch.Generator().manual_seed(1)))
    return (2 * mean.tanh()).mean().item()


def test_takes_the_better_of_the_data_s_actions_and_none_beyond(tmp_path: Path, small: None) -> None:
    """Rewards rise with the action, which the data know up to -0.5 only. Without the gap the policy goes far beyond."""
    assert -0.95 < mean_action(tmp_path / "cql") < -0.4
    assert mean_action(tmp_path / "sac", cql_alpha=0.0) > 1.0


def test_with_the_gap_s_sign_wrong_it_leaves_the_data(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    weight = cql.gap_weight
    monkeypatch.setattr(cql, "gap_weight", lambda *given: -weight(*given))
    assert mean_action(tmp_path) > 1.0


def test_warm_up_clones_behaviour(tmp_path: Path, small: None) -> None:
    """The data's mean action is -1; the critics, which would have the policy at 2 with a weight of 0, do not count."""
    assert mean_action(tmp_path, bc_steps=150, cql_alpha=0.0) == pytest.approx(-1.0, abs=0.15)


def test_warm_up_ends(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    update, cloned = cql.update, []

    def recorded(*given: Any, cloning: bool, **more: Any) -> Any:
        cloned.append(cloning)
        return update(*given, cloning=cloning, **more)

    monkeypatch.setattr(cql, "update", recorded)
    flags = {**SMALL, "total_timesteps": 5, "log_every": 5, "eval_episodes": 0}
    cql.train(Args(dataset="edge", runs_dir=tmp_path, bc_steps=3, **flags))
    assert cloned == [True, True, True, False, False]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, small: None) -> None:
    """Also of its warm-up, which ends between, of what is learned besides and of the normaliser."""
    flags = {**SMALL, "num_seeds": 2, "bc_steps": 15, "lagrange": True, "normalize_obs": True}
    whole = cql.train(Args(dataset="edge", runs_dir=tmp_path / "whole", **flags))
    with pytest.raises(Stopped, match="checkpointed at step 20"):
        cql.train(Args(dataset="edge", runs_dir=tmp_path / "part", stop_at=20, **flags))
    (folder, _) = sorted((tmp_path / "part").iterdir())
    resumed = cql.train(Args(dataset="edge", runs_dir=tmp_path / "part", resume=folder, **flags))
    tensors = [pytree.tree_leaves(run.state()) for run in (resumed, whole)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert resumed.recent == whole.recent
    assert resumed.state()["normalizer"].keys() == {"mean", "scale"}  # which `rl_lab.load` takes from a checkpoint


def test_a_seed_among_others_is_that_seed_alone(tmp_path: Path, small: None) -> None:
    flags = {**SMALL, "total_timesteps": 5, "log_every": 5, "eval_episodes": 0, "lagrange": True}
    both = cql.train(Args(dataset="edge", runs_dir=tmp_path / "both", num_seeds=2, **flags)).state()
    alone = cql.train(Args(dataset="edge", runs_dir=tmp_path / "alone", seed=2, **flags)).state()
    for name in ("params", "target"):
        ours = pytree.tree_map(lambda x: x[1], both[name])
        torch.testing.assert_close(ours, pytree.tree_map(lambda x: x[0], alone[name]), rtol=1e-5, atol=1e-5)


def test_divergence_stops_with_its_cause(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards in [-7.5, -2.5] and half the weight of 10 allow Q from -1250 to 500 at gamma 0.99, 1e4 is beyond."""
    sound = cql.init_params

    def inflated(*args: Any) -> Agent:
        agent = sound(*args)
        agent["critics"]["critic.2.bias"] += 1e4
        return agent

    monkeypatch.setattr(cql, "init_params", inflated)
    with pytest.raises(FloatingPointError, match=r"Q of seed 1 is 1e\+04, the rewards allow -1.25e\+03 to 500"):
        cql.train(Args(dataset="edge", runs_dir=tmp_path, **SMALL))
    for flag in ("backup_entropy", "lagrange"):  # of entropy and of a weight that is learned there may be more
        cql.train(Args(dataset="edge", runs_dir=tmp_path, **{flag: True}, **SMALL))


def test_discrete_actions_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = replace(upper_edge(torch.Generator(), 10), env_id="CartPole-v1")
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    wanted = r"--env CartPole-v1 must be .* a bounded Box, not Discrete\(2\); rl_lab.bc and rl_lab.discrete_cql take"
    with pytest.raises(ValueError, match=wanted):
        cql.train(Args(dataset="edge", runs_dir=tmp_path, device="cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cql_alpha": -1.0}, "--cql-alpha -1.0 must be finite and 0 or more"),
        ({"cql_alpha": 0.0, "lagrange": True}, "--cql-alpha 0.0 must be above 0 with --lagrange"),
        ({"alpha": 0.0}, "--alpha 0.0 must be finite and above 0"),
        ({"policy_lr": 0.0}, "--policy-lr 0.0 must be finite and above 0"),
        ({"q_lr": math.inf}, "--q-lr inf must be finite and above 0"),
        ({"target_action_gap": math.nan}, "--target-action-gap nan must be finite"),
        ({"num_samples": 0}, "--num-samples 0 must be at least 1"),
        ({"bc_steps": -1}, "--bc-steps -1 must be at least 0"),
        ({"tau": 2.0}, r"--tau 2.0 must be in \[0, 1\]"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Args(**{"dataset": "x", **flags})
