"""Three gradient steps of TD3 against CleanRL's own lines, from the same weights on the same batches and noise.

actor_critic_numbers.json holds what they computed, in float64, with the versions; make_actor_critic_numbers.py wrote
it. Some transitions end an episode, noise and actions reach what they are clipped to, and the targets are other
networks.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, grad_and_value

from rl_lab.algorithms import td3
from rl_lab.algorithms.td3 import Agent, Args
from rl_lab.distributions import Actions
from rl_lab.networks import Params, stack
from rl_lab.optim import init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "actor_critic_numbers.json").read_text())["td3"]
ACTIONS = Actions((2,), (2,), *map(tuple, NUMBERS["bounds"]))
spec = importlib.util.spec_from_file_location("make_ppo_numbers", HERE / "make_ppo_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights and digests; it runs no peer unless called


def agent(actor: str, critics: tuple[str, ...]) -> Agent:
    """Networks with the weights that go by these names of theirs."""
    params = td3.init_params(3, ACTIONS, torch.Generator())

    def initial(name: str, shape: torch.Size) -> Tensor:
        return torch.from_numpy(peers.initial(name, shape)).double()

    return {
        "actor": {name: initial(name.replace("actor", actor), p.shape) for name, p in params["actor"].items()},
        "critics": stack(
            [{n: initial(n.replace("critic", q), p[0].shape) for n, p in params["critics"].items()} for q in critics]
        ),
    }


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    for name, digest in expected.items():
        network, _, layer = name.partition(".")
        x = tensors[f"actor.{layer}"] if "actor" in network else tensors[f"critic.{layer}"][int(network[2]) - 1]
        np.testing.assert_allclose(peers.digest(name, x.numpy()), digest, rtol=1e-8, atol=1e-8, err_msg=name)


def test_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the minimum over twins, both clips, bounds, the delay, all targets moving together, Adam, every order."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    args = Args(**NUMBERS["flags"])
    learner, target = agent("actor", ("qf1", "qf2")), agent("target_actor", ("qf1_target", "qf2_target"))
    opts = {name: init_adam(params) for name, params in learner.items()}
    learning_rate = torch.tensor(args.learning_rate, dtype=torch.float64)
    steps, noise = iter(NUMBERS["steps"]), (torch.tensor(x, dtype=torch.float64) for x in NUMBERS["noise"])
    for step, (columns, losses) in enumerate(zip(NUMBERS["batches"], NUMBERS["losses"], strict=True), start=1):
        batch = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        batch["discounts"] = args.gamma * (1 - batch["terminated"])
        normal, seen = next(noise), next(steps)
        gradient = grad_and_value(td3.critic_loss, has_aux=True)
        grads, (total, _) = gradient(learner["critics"], target, batch, normal, ACTIONS, args)
        assert_digests(grads, seen["gradients"])
        assert total.item() == pytest.approx(losses["qf_loss"], rel=1e-8)
        learner["critics"], opts["critics"], metrics = td3.update_critics(
            learner, target, opts["critics"], batch, normal, learning_rate, ACTIONS, args
        )
        assert_digests(learner["critics"], seen["params"])
        for name in ("qf1_loss", "qf2_loss"):
            assert metrics[name].item() == pytest.approx(losses[name], rel=1e-8)
        if step == 2:
            seen = next(steps)
            grads = grad(td3.actor_loss)(learner["actor"], learner["critics"], batch["obs"], ACTIONS)
            assert_digests(grads, seen["gradients"])
            learner["actor"], target, opts["actor"], metrics = td3.update_policy(
                learner, target, opts["actor"], batch["obs"], learning_rate, ACTIONS, args.tau
            )
            assert_digests(learner["actor"], seen["params"])
            assert metrics["actor_loss"].item() == pytest.approx(losses["actor_loss"], rel=1e-8)
            assert_digests(target["actor"] | target["critics"], NUMBERS["targets"])
    assert next(steps, None) is next(noise, None) is None


def test_three_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the function that trains: guards which network, state and target goes where."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    args = Args(**NUMBERS["flags"])
    learner, target = agent("actor", ("qf1", "qf2")), agent("target_actor", ("qf1_target", "qf2_target"))
    opts = {name: init_adam(params) for name, params in learner.items()}
    steps, noise = iter(NUMBERS["steps"]), (torch.tensor(x, dtype=torch.float64) for x in NUMBERS["noise"])
    for step, (columns, losses) in enumerate(zip(NUMBERS["batches"], NUMBERS["losses"], strict=True), start=1):
        batch = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        batch["discounts"] = args.gamma * (1 - batch["terminated"])
        delayed = step % args.policy_frequency > 0
        learner, target, opts, metrics = td3.update(learner, target, opts, batch, next(noise), ACTIONS, args, delayed)
        assert_digests(learner["critics"], next(steps)["params"])
        for name in ("qf1_loss", "qf2_loss"):
            assert metrics[name].item() == pytest.approx(losses[name], rel=1e-8)
        if not delayed:
            assert_digests(learner["actor"], next(steps)["params"])
            assert_digests(target["actor"] | target["critics"], NUMBERS["targets"])
    assert next(steps, None) is next(noise, None) is None
