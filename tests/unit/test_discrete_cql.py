"""Discrete CQL's loss by hand, and a task where being conservative must pay."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad

from rl_lab.algorithms import discrete_cql
from rl_lab.algorithms.discrete_cql import Args
from rl_lab.cli import Stopped
from rl_lab.distributions import Actions
from rl_lab.networks import Params, init_uniform
from rl_lab.offline import Dataset
from rl_lab.optim import init_adam


def constant(*q: float) -> Params:
    """Q that is the same everywhere, one number for each action."""
    params = init_uniform("q", (4, *discrete_cql.HIDDEN, len(q)), torch.Generator())
    zero = {name: torch.zeros_like(p) for name, p in params.items()}
    return zero | {"q.2.bias": torch.tensor(q)}


def transitions(actions: list[int], rewards: list[float], discounts: list[float]) -> dict[str, Tensor]:
    obs = torch.zeros(len(actions), 4)
    columns = {"rewards": torch.tensor(rewards), "discounts": torch.tensor(discounts)}
    return {"obs": obs, "next_obs": obs, "actions": torch.tensor(actions), **columns}


def test_loss_by_hand() -> None:
    """Q = 0, log 2, log 3, whose exponentials sum to 6; the target network says 7, 5, 4, and the online one chooses 4.

    At the end the target is r = log 2 + 0.5, of action 1: residual 0.5, Huber 0.125. At a time limit it is
    r + 0.9 * 4 = 3.6, of action 0: residual 3.6, Huber 3.1. The gaps are log 6 - log 2 and log 6; their weight is 2.
    """
    batch = transitions([1, 0], [math.log(2) + 0.5, 0.0], [0.0, 0.9])
    params, target = constant(0.0, math.log(2), math.log(3)), constant(7.0, 5.0, 4.0)
    loss, metrics = discrete_cql.loss(params, target, batch, alpha=2.0)
    residual, gap = (0.125 + 3.1) / 2, (math.log(3) + math.log(6)) / 2
    assert metrics["td_loss"].item() == pytest.approx(residual, rel=1e-6)
    assert metrics["gap"].item() == pytest.approx(gap, rel=1e-6)
    assert metrics["q"].item() == pytest.approx(math.log(2) / 2, rel=1e-6)
    assert loss.item() == pytest.approx(residual + 2 * gap, rel=1e-6)


def test_each_state_where_it_belongs() -> None:
    """Q of action 0 is what is seen first, 5 at s and 2 at s'; of action 1 it is 3, which is chosen at s' therefore.

    The target network says 2 - 7 of it, so the residual is 0 at r = 10. The gap is log(exp(5) + exp(3)) - 5.
    """
    params, target = constant(0.0, 3.0), constant(-9.0, -7.0)
    for layer in range(3):
        params[f"q.{layer}.weight"][0, 0] = target[f"q.{layer}.weight"][0, 0] = 1.0
    target["q.2.weight"][1, 0] = 1.0
    batch = transitions([0], [10.0], [1.0])
    batch |= {"obs": torch.tensor([[5.0, 0, 0, 0]]), "next_obs": torch.tensor([[2.0, 0, 0, 0]])}
    _, metrics = discrete_cql.loss(params, target, batch, 1.0)
    assert metrics["td_loss"].item() == 0.0
    assert metrics["gap"].item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-5)


def test_gradient_by_hand() -> None:
    """In the biases: softmax (1/6, 2/6, 3/6) less the data's action, times 2, and the residual of that action alone.

    Q(s, 1) = log 2 is 0.25 above its target, r = log 2 - 0.25 at the end; then Huber's slope is that residual.
    """
    batch, target = transitions([1], [math.log(2) - 0.25], [0.0]), constant(7.0, 5.0, 4.0)
    params = constant(0.0, math.log(2), math.log(3))
    slopes, _ = grad(discrete_cql.loss, has_aux=True)(params, target, batch, 2.0)
    torch.testing.assert_close(slopes["q.2.bias"], torch.tensor([1 / 3, 2 / 3 - 2 + 0.25, 1.0]))


def test_far_from_the_target_the_slope_is_one() -> None:
    """Huber's, whatever the distance; and none through the target, though the same network gives it."""
    batch, params = transitions([0], [10.0], [0.9]), constant(0.0, 1.0)
    slopes, _ = grad(discrete_cql.loss, has_aux=True)(params, params, batch, 0.0)
    torch.testing.assert_close(slopes["q.2.bias"], torch.tensor([-1.0, 0.0]))


def test_update_is_a_step_of_adam() -> None:
    params, target = constant(0.0, 1.0), constant(0.0, 0.0)
    batch, args = transitions([0], [0.0], [0.0]), Args(dataset="x", learning_rate=0.1)
    new, opt, _ = discrete_cql.update(params, target, init_adam(params), batch, args)
    torch.testing.assert_close(new["q.2.bias"], torch.tensor([0.1, 0.9]))  # towards the data's action, from the other
    assert opt["step"].item() == 1


def test_policy() -> None:
    """The best action of normalised observations; with noise, exp Q at most: 1/4 and 3/4."""
    params, actions, obs = constant(0.0, math.log(3)), Actions((2,), ()), torch.zeros(4000, 4)
    assert discrete_cql.policy(params, {}, {"obs": obs}, None, actions).unique().tolist() == [1]
    noise = torch.empty(4000, 2).exponential_(generator=torch.Generator().manual_seed(0))
    drawn = discrete_cql.policy(params, {}, {"obs": obs}, noise, actions)
    assert drawn.double().mean().item() == pytest.approx(0.75, abs=0.02)
    for layer in range(3):
        params[f"q.{layer}.weight"][0, 0] = 1.0  # Q of action 0 is what is seen first
    moments = {"mean": torch.full((4,), 3.0), "scale": torch.full((4,), 2.0)}
    seen = torch.tensor([[5.0, 0, 0, 0], [6.0, 0, 0, 0]])  # 1 and 1.5 by these, and log 3 = 1.0986
    assert discrete_cql.policy(params, moments, {"obs": seen}, None, actions).tolist() == [1, 0]


def unseen_action(random: torch.Generator, num_episodes: int = 1000) -> Dataset:
    """Acrobot's spaces; episodes of one step, in which actions 0 and 1 give -2 and -1; 2 was never taken."""
    obs, actions = torch.randn(num_episodes, 6, generator=random), torch.randint(2, (num_episodes,), generator=random)
    flags = torch.ones(num_episodes, dtype=torch.bool)
    columns = {"obs": obs, "actions": actions, "rewards": actions - 2.0, "next_obs": obs}
    columns |= {"terminated": flags, "truncated": ~flags}
    peer = gym.make("Acrobot-v1")
    return Dataset("unseen", "Acrobot-v1", columns, peer.observation_space, peer.action_space, (-500.0, 0.0), "none")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of 32 units, and the data set above."""
    monkeypatch.setattr(discrete_cql, "HIDDEN", (32, 32))
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: unseen_action(torch.Generator().manual_seed(0)))


SMALL: dict[str, Any] = {"total_timesteps": 30, "log_every": 10, "batch_size": 8, "target_network_frequency": 4}
SMALL |= {"eval_every": 0, "eval_episodes": 2, "compile": False, "device": "cpu"}


def shares(tmp_path: Path, **flags: Any) -> list[float]:
    """How often the policy takes each action after training on `unseen_action`."""
    settings = {"total_timesteps": 200, "log_every": 50, "eval_episodes": 0, "batch_size": 64, "learning_rate": 1e-2}
    settings |= {"cql_alpha": 0.3}
    run = discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path, **{**SMALL, **settings, **flags}))
    params = {name: p[0] for name, p in run.state()["params"].items()}
    obs = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    taken = discrete_cql.policy(params, {}, {"obs": obs}, None, Actions((3,), ()))
    return (taken.bincount(minlength=3) / 200).tolist()


def test_takes_the_best_of_the_data_s_actions(tmp_path: Path, small: None) -> None:
    """Nothing contradicts that the unseen action's value is near 0: without the gap, the policy believes it."""
    assert shares(tmp_path / "cql")[1] > 0.95
    assert shares(tmp_path / "dqn", cql_alpha=0.0)[2] > 0.5


def test_with_the_gap_s_sign_wrong_it_takes_the_unseen_action(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above."""
    loss = discrete_cql.loss
    monkeypatch.setattr(discrete_cql, "loss", lambda *given: loss(*given[:3], -given[3]))
    assert shares(tmp_path)[2] > 0.95


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path: Path, small: None) -> None:
    """Guards what users run, which is compiled: two agents, the weight of the gap not the default."""
    flags = {**SMALL, "total_timesteps": 5, "log_every": 5, "eval_episodes": 0, "num_seeds": 2, "cql_alpha": 0.3}
    eager, compiled = (
        discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / str(x), **{**flags, "compile": x})).state()
        for x in (False, True)
    )
    for name, p in eager["params"].items():
        torch.testing.assert_close(compiled["params"][name], p, rtol=0, atol=1e-5, msg=name)


def test_the_target_network_is_replaced_at_its_time(tmp_path: Path, small: None) -> None:
    """After gradient steps 4 and 8; not after 10, nor between."""
    flags = {**SMALL, "log_every": 1, "eval_episodes": 0}
    at = {}
    for steps in (3, 4, 7, 8, 10):
        args = Args(dataset="unseen", runs_dir=tmp_path / str(steps), **{**flags, "total_timesteps": steps})
        state = discrete_cql.train(args).state()
        at[steps] = {name: state[name]["q.2.bias"] for name in ("params", "target")}
    assert torch.equal(at[4]["target"], at[4]["params"]) and torch.equal(at[8]["target"], at[8]["params"])
    assert torch.equal(at[7]["target"], at[4]["params"]) and torch.equal(at[10]["target"], at[8]["params"])
    assert not torch.equal(at[3]["target"], at[3]["params"]) and not torch.equal(at[4]["params"], at[8]["params"])


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also between two target networks, which count as all episodes end by a time limit."""
    data = unseen_action(torch.Generator().manual_seed(0))
    flipped = {"terminated": data.columns["truncated"], "truncated": data.columns["terminated"]}
    cut = replace(data, columns=data.columns | flipped)
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: cut)
    flags = {**SMALL, "num_seeds": 2, "normalize_obs": True, "target_network_frequency": 7}
    whole = discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / "whole", **flags))
    with pytest.raises(Stopped, match="checkpointed at step 20"):
        discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / "part", stop_at=20, **flags))
    (folder, _) = sorted((tmp_path / "part").iterdir())
    resumed = discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / "part", resume=folder, **flags))
    tensors = [pytree.tree_leaves(run.state()) for run in (resumed, whole)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert resumed.recent == whole.recent
    assert resumed.state()["normalizer"].keys() == {"mean", "scale"}  # which `rl_lab.load` takes from a checkpoint


def test_a_seed_among_others_is_that_seed_alone(tmp_path: Path, small: None) -> None:
    flags = {**SMALL, "total_timesteps": 5, "log_every": 5, "eval_episodes": 0}
    both = discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / "both", num_seeds=2, **flags)).state()
    alone = discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path / "alone", seed=2, **flags)).state()
    for name in ("params", "target"):
        ours = pytree.tree_map(lambda x: x[1], both[name])
        torch.testing.assert_close(ours, pytree.tree_map(lambda x: x[0], alone[name]), rtol=1e-5, atol=1e-5)


def test_divergence_stops_with_its_cause(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards of -2 and -1 and the weight of 1 allow Q from -300 to 100 at gamma 0.99, 1e4 is beyond."""
    sound = discrete_cql.init_uniform

    def inflated(*args: Any) -> Params:
        params = sound(*args)
        return params | {"q.2.bias": params["q.2.bias"] + 1e4}

    monkeypatch.setattr(discrete_cql, "init_uniform", inflated)
    with pytest.raises(FloatingPointError, match=r"Q of seed 1 is 1e\+04, the rewards allow -300 to 100"):
        discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path, **SMALL))


def test_continuous_actions_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = replace(unseen_action(torch.Generator(), 10), env_id="Pendulum-v1")
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    wanted = r"--env Pendulum-v1 must be one with Discrete actions, not Box\(.*; rl_lab.cql takes a bounded Box"
    with pytest.raises(ValueError, match=wanted):
        discrete_cql.train(Args(dataset="unseen", runs_dir=tmp_path, device="cpu"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cql_alpha": -1.0}, "--cql-alpha -1.0 must be finite and 0 or more"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be finite and above 0"),
        ({"target_network_frequency": 0}, "--target-network-frequency 0 must be at least 1"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Args(**{"dataset": "x", **flags})
