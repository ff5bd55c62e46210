"""Two gradient steps of Rainbow against CleanRL's own lines, with the same weights, batches and noise.

categorical_numbers.json holds what they computed, with the versions; make_categorical_numbers.py wrote it. Rewards lie
between atoms, on atoms, and beyond the last; some transitions end an episode. The target network is another network,
with other noise; the online network has one noise for both its parts, as in CleanRL.
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

from rl_lab.algorithms import rainbow
from rl_lab.algorithms.rainbow import Args
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.replay import Batch

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "categorical_numbers.json").read_text())["rainbow"]
spec = importlib.util.spec_from_file_location("make_ppo_numbers", HERE / "make_ppo_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights and digests; it runs no peer unless called


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    digests = {name: peers.digest(name, x.numpy()) for name, x in tensors.items() if name != "atoms"}
    assert digests.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_allclose(digests[name], numbers, rtol=1e-6, atol=1e-6, err_msg=name)


LAYERS = {  # of the small network that was compared
    "trunk.0": (6, 3),
    "value.0": (5, 6),
    "value.1": (51, 5),
    "advantage.0": (5, 6),
    "advantage.1": (102, 5),
}


def network(prefix: str, args: Args) -> Params:
    params = {"atoms": torch.linspace(args.v_min, args.v_max, args.n_atoms)}
    for layer, shape in LAYERS.items():
        for part in ("weight", "bias") if layer == "trunk.0" else ("weight", "weight_sigma", "bias", "bias_sigma"):
            name = f"{layer}.{part}"
            params[name] = torch.from_numpy(
                peers.initial(prefix + name, shape if part.startswith("weight") else shape[:1])
            )
    return params


def as_batch(columns: dict[str, list[Any]], args: Args) -> Batch:
    batch = {name: torch.tensor(column) for name, column in columns.items()}
    return {**batch, "discounts": args.gamma**3 * (~batch["terminated"]).float()}


def packed(noise: dict[str, list[list[float]]]) -> Tensor:
    return torch.cat([torch.tensor(x) for layer in rainbow.NOISY for x in noise[layer]])


def test_two_steps() -> None:
    """Guards noisy layers, dueling streams, the projection, double Q-learning, importance weights, priorities, Adam."""
    args = Args(**NUMBERS["flags"], batch_size=12)
    params, target = network("", args), network("target.", args)
    online, other = (packed(NUMBERS["noise"][name]) for name in ("online", "target"))
    noise = torch.stack([online, online, other])
    opt = init_adam(params)
    for t, columns in enumerate(NUMBERS["batches"]):
        batch = as_batch(columns, args)
        grads, (total, _) = grad_and_value(rainbow.loss, has_aux=True)(params, target, batch, noise, args)
        assert total.item() == pytest.approx(NUMBERS["loss"][t], abs=1e-6)
        assert_digests(grads, NUMBERS["gradients"][t])
        params, opt, metrics = rainbow.update(params, target, opt, batch, noise, args)
        np.testing.assert_allclose(metrics["priorities"], NUMBERS["priorities"][t], rtol=1e-6)
        assert_digests(params, NUMBERS["params"][t])
