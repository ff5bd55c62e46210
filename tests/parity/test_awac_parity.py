"""Two gradient steps of AWAC against CORL's own class, from the same weights on the same batches and noise.

awac_numbers.json holds what it computed, in float64, with the versions; make_awac_numbers.py wrote it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import awac
from rl_lab.distributions import Actions
from rl_lab.networks import Params, stack
from rl_lab.optim import init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "awac_numbers.json").read_text())
FLAGS, ACTIONS = NUMBERS["flags"], Actions((2,), (2,), (-1.0, -1.0), (1.0, 1.0))
spec = importlib.util.spec_from_file_location("make_iql_numbers", HERE / "make_iql_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights and digests, which AWAC's numbers are made with too


def weights(prefix: str = "") -> awac.Agent:
    """Ours, filled as theirs."""
    blank = awac.init_params(3, ACTIONS, torch.Generator())

    def fill(network: str, params: Params) -> Params:
        names = {name: f"{prefix}{network}.{name.removeprefix('actor.').removeprefix('critic.')}" for name in params}
        return {k: torch.from_numpy(peer.initial(names[k], tuple(p.shape))).double() for k, p in params.items()}

    critics = [fill(f"critic{e}", {name: p[e] for name, p in blank["critics"].items()}) for e in range(2)]
    return {"actor": fill("actor", blank["actor"]), "critics": stack(critics)}


def assert_digests(networks: dict[str, Params], expected: dict[str, list[float]]) -> None:
    found: dict[str, Tensor] = {}
    for network, params in networks.items():
        for name, x in params.items():
            place = name.removeprefix("actor.").removeprefix("critic.")
            if network.endswith("critics"):
                found |= {f"{network.removesuffix('s')}{e}.{place}": x[e] for e in range(2)}
            else:
                found[f"{network}.{place}"] = x
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(peer.digest(name, x.numpy()), expected[name], rtol=1e-7, atol=1e-8, err_msg=name)


def gradient(before: Params, after: Params) -> Params:
    """What Adam was given, from its first moments: m' = 0.9 m + 0.1 g."""
    return {name: (after[name] - 0.9 * m) / 0.1 for name, m in before.items()}


def test_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards every sign and detachment, both minima, clipped actions, weights, terminals, targets, Adam, the order."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    rates = {name: FLAGS[name] for name in ("learning_rate", "tau", "awac_lambda")}
    args = awac.Args(dataset="x", **rates)
    agent, target = weights(), weights("target.")["critics"]
    opts = {name: init_adam(params) for name, params in agent.items()}
    for columns, seen in zip(NUMBERS["batches"], NUMBERS["steps"], strict=True):
        batch = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
        batch["discounts"] = FLAGS["gamma"] * (1 - batch["terminated"])
        before = opts
        agent, target, opts, metrics = awac.update(agent, target, opts, batch, batch["noise"], ACTIONS, args)
        assert metrics["qf_loss"].item() == pytest.approx(seen["losses"]["critic_loss"], rel=1e-9)
        assert metrics["actor_loss"].item() == pytest.approx(seen["losses"]["actor_loss"], rel=1e-9)
        grads = {name: gradient(before[name]["first"], opts[name]["first"]) for name in agent}
        assert_digests(grads, seen["gradients"])
        assert_digests(agent | {"target.critics": target}, seen["params"])
