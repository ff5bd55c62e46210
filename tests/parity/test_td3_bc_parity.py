"""Two gradient steps of TD3+BC and of BC against CORL's own classes, from the same weights on the same batches.

td3_bc_numbers.json holds what they computed, in float64, with the versions; make_td3_bc_numbers.py wrote it.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.algorithms import bc, td3_bc
from rl_lab.distributions import Actions
from rl_lab.networks import Params, stack
from rl_lab.optim import init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "td3_bc_numbers.json").read_text())
FLAGS, ACTIONS = NUMBERS["flags"], Actions((2,), (2,), (-1.0, -1.0), (1.0, 1.0))
spec = importlib.util.spec_from_file_location("make_iql_numbers", HERE / "make_iql_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights and digests; it runs nothing unless called


def weights(prefix: str = "") -> td3_bc.Agent:
    """Ours, filled as theirs."""
    blank = td3_bc.init_params(3, ACTIONS, torch.Generator())

    def fill(network: str, params: Params) -> Params:
        names = {name: f"{prefix}{network}.{name.partition('.')[2]}" for name in params}
        return {k: torch.from_numpy(peer.initial(names[k], tuple(p.shape))).double() for k, p in params.items()}

    critics = [fill(f"critic{e}", {name: p[e] for name, p in blank["critics"].items()}) for e in range(2)]
    return {"actor": fill("actor", blank["actor"]), "critics": stack(critics)}


def assert_digests(networks: dict[str, Params], expected: dict[str, list[float]]) -> None:
    found: dict[str, Tensor] = {}
    for network, params in networks.items():
        for name, x in params.items():
            place = name.partition(".")[2]
            if network.endswith("critics"):
                found |= {f"{network.removesuffix('s')}{e}.{place}": x[e] for e in range(2)}
            else:
                found[f"{network}.{place}"] = x
    assert found.keys() == expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(peer.digest(name, x.numpy()), expected[name], rtol=1e-7, atol=1e-8, err_msg=name)


def batches() -> list[dict[str, Tensor]]:
    tables = [{k: torch.tensor(v, dtype=torch.float64) for k, v in table.items()} for table in NUMBERS["batches"]]
    return [table | {"discounts": FLAGS["discount"] * (1 - table["terminated"])} for table in tables]


def test_two_steps_of_td3_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the noise's clip, the lesser of the targets, lambda and its detachment, delay, targets, Adam.

    CORL's first step is a delayed one, its second has the actor's.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    settings: dict[str, Any] = {name: FLAGS[name] for name in ("tau", "policy_noise", "noise_clip", "alpha")}
    args = replace(td3_bc.Args(dataset="x", learning_rate=FLAGS["learning_rate"]), **settings)
    agent, target = weights(), weights("target.")
    opts = {name: init_adam(params) for name, params in agent.items()}
    for delayed, batch, seen in zip((True, False), batches(), NUMBERS["td3_bc"], strict=True):
        agent, target, opts, metrics = td3_bc.update(agent, target, opts, batch, batch["noise"], ACTIONS, args, delayed)
        assert metrics["qf_loss"].item() == pytest.approx(seen["losses"]["critic_loss"], rel=1e-9)
        assert ("actor_loss" in metrics) == ("actor_loss" in seen["losses"]) == (not delayed)
        if not delayed:
            assert metrics["actor_loss"].item() == pytest.approx(seen["losses"]["actor_loss"], rel=1e-9)
        networks = agent | {f"target.{name}": params for name, params in target.items()}
        assert_digests(networks, seen["params"])


def test_two_steps_of_bc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the loss's mean, tanh, Adam."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    actor = weights()["actor"]
    opt = init_adam(actor)
    for batch, seen in zip(batches(), NUMBERS["bc"], strict=True):
        actor, opt, metrics = bc.update(actor, opt, batch, ACTIONS, FLAGS["learning_rate"])
        assert metrics["actor_loss"].item() == pytest.approx(seen["losses"]["actor_loss"], rel=1e-9)
        assert_digests({"actor": actor}, seen["params"])
