"""Two gradient steps of IQL against CORL's own class, from the same weights on the same batches.

iql_numbers.json holds what it computed, in float64, with the versions; make_iql_numbers.py wrote it. CORL takes the
advantages and the next values before it updates V; the authors' code, and ours, take them after. So the losses are
compared in CORL's order here; tests/unit/test_iql.py has ours. CORL's loss of the critics is the mean over the two,
ours the sum.
"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from rl_lab.algorithms import iql
from rl_lab.distributions import Actions
from rl_lab.networks import Params, polyak, q_values, stack
from rl_lab.optim import adam, init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "iql_numbers.json").read_text())
FLAGS, ACTIONS = NUMBERS["flags"], Actions((2,), (2,), (-1.0, -1.0), (1.0, 1.0))
spec = importlib.util.spec_from_file_location("make_iql_numbers", HERE / "make_iql_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights and digests; it runs nothing unless called


def weights(prefix: str = "") -> dict[str, Params]:
    """Ours, filled as theirs."""
    blank = iql.init_params(3, ACTIONS, torch.Generator())

    def fill(network: str, params: Params) -> Params:
        filled = {}
        for name, p in params.items():
            place = "logstd" if name == "logstd" else name.partition(".")[2]
            filled[name] = torch.from_numpy(peer.initial(f"{prefix}{network}.{place}", tuple(p.shape))).double()
        return filled

    critics = [fill(f"critic{e}", {name: p[e] for name, p in blank["critics"].items()}) for e in range(2)]
    return {"actor": fill("actor", blank["actor"]), "critics": stack(critics), "value": fill("value", blank["value"])}


def assert_digests(tensors: dict[str, Params], expected: dict[str, list[float]], critics: float) -> None:
    """Compare tensors by network with digests under their names; `critics` scales those of the critics."""
    found: dict[str, Tensor] = {}
    for name, x in tensors["critics"].items():
        found |= {f"critic{e}.{name.partition('.')[2]}": critics * x[e] for e in range(2)}
    for network in ("actor", "value"):
        for name, x in tensors[network].items():
            found["actor.logstd" if name == "logstd" else name] = x
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(peer.digest(name, x.numpy()), expected[name], rtol=1e-7, atol=1e-8, err_msg=name)


def test_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the expectile's side, the minimum over the target twins, weights, likelihood, targets, Adam."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    agent, target = weights(), weights("target.")["critics"]
    opts = {name: init_adam(params) for name, params in agent.items()}
    for step, (columns, seen) in enumerate(zip(NUMBERS["batches"], NUMBERS["steps"], strict=True)):
        batch = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        batch["discounts"] = FLAGS["discount"] * (1 - batch["terminated"])
        next_values = iql.values(agent["value"], batch["next_obs"])
        q = q_values(target, batch["obs"], batch["actions"]).amin(0)
        advantages = q - iql.values(agent["value"], batch["obs"])

        losses, grads = {}, {}
        value = grad_and_value(partial(iql.value_loss, q=q, obs=batch["obs"], expectile=FLAGS["iql_tau"]), has_aux=True)
        grads["value"], (losses["value_loss"], _) = value(agent["value"])
        critic = grad_and_value(partial(iql.critic_loss, next_values=next_values, batch=batch), has_aux=True)
        grads["critics"], (losses["q_loss"], _) = critic(agent["critics"])
        actor = partial(iql.actor_loss, advantages=advantages, batch=batch, actions=ACTIONS, beta=FLAGS["beta"])
        grads["actor"], losses["actor_loss"] = grad_and_value(actor)(agent["actor"])
        losses["q_loss"] = losses["q_loss"] / 2
        for name, value in losses.items():
            assert value.item() == pytest.approx(seen["losses"][name], rel=1e-9), name
        assert_digests(grads, seen["gradients"], critics=0.5)

        grads["critics"] = {name: g / 2 for name, g in grads["critics"].items()}
        rates = dict.fromkeys(agent, torch.tensor(FLAGS["learning_rate"], dtype=torch.float64))
        rates["actor"] = rates["actor"] * 0.5 * (1 + np.cos(np.pi * step / FLAGS["max_steps"]))
        for name in agent:
            agent[name], opts[name] = adam(agent[name], grads[name], opts[name], rates[name], eps=1e-8)
        target = polyak(target, agent["critics"], FLAGS["tau"])
        assert_digests(agent, seen["params"], critics=1.0)
