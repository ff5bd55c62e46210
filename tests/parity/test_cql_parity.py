"""Two gradient steps of CQL against CORL's own class, and of discrete CQL against d3rlpy's, from the same weights.

They see the same batches and noise. cql_numbers.json holds what they computed, in float64, with the versions;
make_cql_numbers.py wrote it. CORL's multiplier starts at e; ours is set to that.
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

from rl_lab.algorithms import cql, discrete_cql
from rl_lab.distributions import Actions
from rl_lab.networks import Params, init_uniform, polyak, stack
from rl_lab.optim import init_adam
from rl_lab.replay import Batch

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "cql_numbers.json").read_text())
ACTIONS = Actions((2,), (2,), (-1.0, -1.0), (1.0, 1.0))
spec = importlib.util.spec_from_file_location("make_cql_numbers", HERE / "make_cql_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights and digests; it runs nothing unless called


@pytest.fixture(autouse=True)
def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32's rounding would hide faults of its size."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)


def filled(network: str, params: Params, prefix: str = "") -> Params:
    """Parameters of our shapes and names with their values."""
    return {
        name: torch.from_numpy(peer.initial(f"{prefix}{network}.{name.partition('.')[2]}", tuple(p.shape))).double()
        for name, p in params.items()
    }


def twins(prefix: str = "") -> Params:
    blank = cql.init_params(3, ACTIONS, 1.0, torch.Generator())["critics"]
    return stack([filled(f"critic{e}", {name: p[e] for name, p in blank.items()}, prefix) for e in range(2)])


def as_batch(columns: dict[str, list[Any]], discount: float) -> Batch:
    batch = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    return batch | {"discounts": discount * (1 - batch["terminated"])}


def assert_digests(expected: dict[str, list[float]], params: Params) -> None:
    """Compare parameters, those of twins by network, with digests under their names."""
    found = {}
    for name, x in params.items():
        network, _, place = name.partition(".")
        found |= {f"critic{e}.{place}": x[e] for e in range(2)} if network == "critic" else {name: x}
    assert found.keys() <= expected.keys()
    for name, x in found.items():
        np.testing.assert_allclose(peer.digest(name, x.numpy()), expected[name], rtol=1e-7, atol=1e-8, err_msg=name)


def gradient(before: Params, after: Params) -> Params:
    """What Adam was given, from its first moments: m' = 0.9 m + 0.1 g."""
    return {name: (after[name] - 0.9 * m) / 0.1 for name, m in before.items()}


@pytest.mark.parametrize("variant", ["plain", "lagrange"])
def test_two_steps(variant: str) -> None:
    """Guards every sign and detachment, the proposals and their log-probabilities, the targets, Adam, the order."""
    numbers = NUMBERS[variant]
    flags = numbers["flags"]
    actor = filled("actor", cql.init_params(3, ACTIONS, 1.0, torch.Generator())["actor"])
    agent = {"actor": actor, "critics": twins(), "temperature": {"log_alpha": torch.tensor(0.0).double()}}
    agent["multiplier"] = {"log_weight": torch.tensor(1.0 if flags["cql_lagrange"] else 0.0).double()}
    target, opts = twins("target."), {name: init_adam(params) for name, params in agent.items()}
    renamed = {"q_lr": "qf_lr", "tau": "soft_target_update_rate", "num_samples": "cql_n_actions",
               "lagrange": "cql_lagrange", **{x: x for x in ("policy_lr", "cql_alpha", "backup_entropy")}}  # fmt: skip
    ours: dict[str, Any] = {name: flags[theirs] for name, theirs in renamed.items()}
    if flags["cql_lagrange"]:
        ours |= {"target_action_gap": flags["cql_target_action_gap"]}
    args = cql.Args(dataset="x", **ours)
    for columns, noise, seen in zip(numbers["batches"], numbers["noise"], numbers["steps"], strict=True):
        before = opts
        agent, target, opts, metrics = cql.update(
            agent,
            target,
            opts,
            as_batch(columns, flags["discount"]),
            torch.tensor(noise, dtype=torch.float64),
            ACTIONS,
            args,
            False,
        )
        theirs = seen["losses"]
        expected = {"actor_loss": theirs["policy_loss"], "alpha_loss": theirs["alpha_loss"], "alpha": theirs["alpha"]}
        expected |= {"qf_loss": theirs["qf1_loss"] + theirs["qf2_loss"], "weight": flags["cql_alpha"]}
        expected |= {"gap": (theirs["cql_qf1_diff"] + theirs["cql_qf2_diff"]) / 2}
        expected |= {"q": (theirs["average_qf1"] + theirs["average_qf2"]) / 2}
        if flags["cql_lagrange"]:
            expected |= {"weight_loss": theirs["alpha_prime_loss"], "weight": 3.0 * theirs["alpha_prime"]}
        assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for name in ("actor", "critics"):
            assert_digests(seen["gradients"], gradient(before[name]["first"], opts[name]["first"]))
            assert_digests(seen["params"], agent[name])
        assert_digests(seen["targets"], target)
        assert agent["temperature"]["log_alpha"].item() == pytest.approx(seen["scalars"]["log_alpha"], rel=1e-9)
        if flags["cql_lagrange"]:
            assert agent["multiplier"]["log_weight"].item() == pytest.approx(seen["scalars"]["log_weight"], rel=1e-9)


def test_two_steps_of_discrete_cql() -> None:
    """Guards the Huber loss, the double target, the gap's sign and weight, terminals, Adam, the hard update."""
    numbers = NUMBERS["discrete"]
    flags = numbers["flags"]
    blank = init_uniform("q", (3, *discrete_cql.HIDDEN, 3), torch.Generator())
    params, target = filled("q", blank), filled("q", blank, "target.")
    opt = init_adam(params)
    args = discrete_cql.Args(dataset="x", learning_rate=flags["learning_rate"], cql_alpha=flags["alpha"])
    for step, (columns, seen) in enumerate(zip(numbers["batches"], numbers["steps"], strict=True)):
        before, batch = opt, as_batch(columns, flags["gamma"])
        loss, _ = discrete_cql.loss(params, target, batch, args.cql_alpha)
        params, opt, metrics = discrete_cql.update(params, target, opt, batch, args)
        if (step + 1) % flags["target_update_interval"] == 0:
            target = polyak(target, params, 1.0)
        # theirs sums the errors of its critics, here one, in float32
        assert loss.item() == pytest.approx(seen["losses"]["loss"], rel=1e-7)
        assert metrics["td_loss"].item() == pytest.approx(seen["losses"]["td_loss"], rel=1e-7)
        assert metrics["gap"].item() == pytest.approx(seen["losses"]["conservative_loss"], rel=1e-9)
        assert_digests(seen["gradients"], gradient(before["first"], opt["first"]))
        assert_digests(seen["params"], params)
        assert_digests(seen["targets"], target)
