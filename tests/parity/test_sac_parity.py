"""Three gradient steps of SAC against CleanRL's own lines, from the same weights on the same batches and noise.

actor_critic_numbers.json holds what they computed, in float64, with the versions; make_actor_critic_numbers.py wrote
it. Some transitions end an episode, the bounds of the actions differ, and the target critics are other networks.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from rl_lab.algorithms import sac
from rl_lab.algorithms.sac import Agent
from rl_lab.distributions import Actions
from rl_lab.networks import Params, stack
from rl_lab.optim import AdamState, init_adam
from rl_lab.replay import Batch

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "actor_critic_numbers.json").read_text())["sac"]
ACTIONS = Actions((2,), (2,), *map(tuple, NUMBERS["bounds"]))
spec = importlib.util.spec_from_file_location("make_ppo_numbers", HERE / "make_ppo_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights and digests; it runs no peer unless called


def actor() -> Params:
    """Our last layer is their two, side by side."""
    params = sac.init_params(3, ACTIONS, 1.0, torch.Generator())["actor"]
    found = {}
    for name, p in params.items():
        layer = name.removeprefix("actor.")
        parts = [f"2.{part}.{layer[2:]}" for part in ("mean", "logstd")] if layer[0] == "2" else [layer]
        shape = (len(p) // len(parts), *p.shape[1:])
        found[name] = torch.cat([torch.from_numpy(peers.initial(f"actor.{part}", shape)).double() for part in parts])
    return found


def critics(suffix: str = "") -> Params:
    params = sac.init_params(3, ACTIONS, 1.0, torch.Generator())["critics"]

    def initial(network: str, name: str) -> Tensor:
        return torch.from_numpy(
            peers.initial(name.replace("critic", network + suffix), params[name].shape[1:])
        ).double()

    return stack([{name: initial(network, name) for name in params} for network in ("qf1", "qf2")])


def assert_digests(tensors: Params, expected: dict[str, list[float]], suffix: str = "") -> None:
    """Compare tensors under our names with digests under theirs."""
    theirs: Params = {}
    for name, x in tensors.items():
        network, *layer = name.split(".")
        if network == "critic":
            theirs |= {".".join([f"qf{e + 1}{suffix}", *layer]): x[e] for e in range(2)}
        elif name.startswith("actor.2"):
            theirs |= {f"actor.2.{part}.{layer[1]}": y for part, y in zip(("mean", "logstd"), x.chunk(2), strict=True)}
        else:
            theirs[name] = x
    assert theirs.keys() == expected.keys()
    for name, x in theirs.items():
        np.testing.assert_allclose(peers.digest(name, x.numpy()), expected[name], rtol=1e-8, atol=1e-8, err_msg=name)


def as_batch(columns: dict[str, list[Any]]) -> Batch:
    batch = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    return {**batch, "discounts": NUMBERS["flags"]["gamma"] * (1 - batch["terminated"])}


def beginning() -> tuple[Agent, Params, dict[str, AdamState]]:
    """Agent, target critics and states of Adam before the first step."""
    agent = {"actor": actor(), "critics": critics(), "temperature": {"log_alpha": torch.tensor(0.0).double()}}
    return agent, critics("_target"), {name: init_adam(params) for name, params in agent.items()}


def test_three_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the minimum over twins, entropy and its sign, the tanh correction, bounds, targets, Adam, every order."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    agent, target, opts = beginning()
    policy_lr, q_lr, tau = (
        torch.tensor(NUMBERS["flags"][name], dtype=torch.float64) for name in ("policy_lr", "q_lr", "tau")
    )
    steps, noise = iter(NUMBERS["steps"]), (torch.tensor(x, dtype=torch.float64) for x in NUMBERS["noise"])
    for step, (columns, losses) in enumerate(zip(NUMBERS["batches"], NUMBERS["losses"], strict=True), start=1):
        batch, eps, seen = as_batch(columns), next(noise), next(steps)
        gradient = grad_and_value(sac.critic_loss, has_aux=True)
        grads, (total, _) = gradient(agent["critics"], target, agent, batch, eps, ACTIONS)
        assert_digests(grads, seen["gradients"])
        assert total.item() == pytest.approx(losses["qf_loss"], rel=1e-8)
        agent["critics"], target, opts["critics"], metrics = sac.update_critics(
            agent, target, opts["critics"], batch, eps, q_lr, tau, ACTIONS
        )
        assert_digests(agent["critics"], seen["params"])
        for name in ("qf1_loss", "qf2_loss"):
            assert metrics[name].item() == pytest.approx(losses[name], rel=1e-8)
        assert metrics["qf_loss"].item() == pytest.approx(losses["qf_loss"] / 2, rel=1e-8)  # as they log it
        for _ in range(2 if step == 2 else 0):
            both = torch.stack([next(noise), next(noise)])
            seen, temperature_seen = next(steps), next(steps)
            grads = torch.func.grad(sac.actor_loss)(agent["actor"], agent, batch["obs"], both[0], ACTIONS)
            assert_digests(grads, seen["gradients"])
            new, more, metrics = sac.update_policy(agent, opts, batch["obs"], both, policy_lr, q_lr, ACTIONS, True)
            agent, opts = agent | new, opts | more
            assert_digests(agent["actor"], seen["params"])
            assert_digests(agent["temperature"], temperature_seen["params"])
        if step == 2:
            for name in ("actor_loss", "alpha_loss", "alpha"):
                assert metrics[name].item() == pytest.approx(losses[name], rel=1e-8)
    assert_digests(target, NUMBERS["targets"], "_target")
    assert next(steps, None) is next(noise, None) is None


def test_three_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same by the function that trains: guards which rate, noise and target network goes where."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    agent, target, opts = beginning()
    args = sac.Args(**NUMBERS["flags"])
    tau = torch.tensor(args.tau, dtype=torch.float64)
    steps, noise = iter(NUMBERS["steps"]), (torch.tensor(x, dtype=torch.float64) for x in NUMBERS["noise"])
    for step, (columns, losses) in enumerate(zip(NUMBERS["batches"], NUMBERS["losses"], strict=True), start=1):
        policy_steps = 0 if step % args.policy_frequency else args.policy_frequency
        drawn = torch.stack([next(noise) for _ in range(1 + 2 * policy_steps)])
        agent, target, opts, metrics = sac.update(agent, target, opts, as_batch(columns), drawn, tau, ACTIONS, args)
        assert_digests(agent["critics"], next(steps)["params"])
        for name in ("qf1_loss", "qf2_loss"):
            assert metrics[name].item() == pytest.approx(losses[name], rel=1e-8)
        for i in range(policy_steps):
            actor_seen, temperature_seen = next(steps), next(steps)
            if i == policy_steps - 1:
                assert_digests(agent["actor"], actor_seen["params"])
                assert_digests(agent["temperature"], temperature_seen["params"])
    assert_digests(target, NUMBERS["targets"], "_target")
    assert next(steps, None) is next(noise, None) is None
