"""Two gradient steps of Rainbow against CleanRL's own lines, with the same weights, batches and noise: as it is, on
images, and on vectors with smaller layers and a linear trunk.

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
NUMBERS = json.loads((HERE / "categorical_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_categorical_numbers", HERE / "make_categorical_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights, images, noise and digests; it runs no peer unless called

VECTORS = {"trunk.0": (6, 3), "value.0": (5, 6), "value.1": (51, 5), "advantage.0": (5, 6), "advantage.1": (102, 5)}
IMAGES = {
    "trunk.0": (32, 4, 8, 8),
    "trunk.1": (64, 32, 4, 4),
    "trunk.2": (64, 64, 3, 3),
    "value.0": (512, 3136),
    "value.1": (51, 512),
    "advantage.0": (512, 3136),
    "advantage.1": (102, 512),
}
Layers = dict[str, tuple[int, ...]]


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    assert tensors.keys() - {"atoms"} == expected.keys()
    for name, numbers in expected.items():
        digest = peers.digest(name, tensors[name].numpy())
        np.testing.assert_allclose(digest, numbers, rtol=0, atol=5e-6 * numbers[0], err_msg=name)  # of the norm


def network(prefix: str, layers: Layers, args: Args) -> Params:
    params = {"atoms": torch.linspace(args.v_min, args.v_max, args.n_atoms)}
    for layer, shape in layers.items():
        for part in ("weight", "bias") if layer.startswith("trunk") else peers.KINDS:
            name = f"{layer}.{part}"
            size = shape if part.startswith("weight") else shape[:1]
            params[name] = torch.from_numpy(peers.initial(prefix + name, size))
    return params


def as_batch(columns: dict[str, list[Any]], args: Args) -> Batch:
    batch = {name: torch.tensor(column) for name, column in columns.items()}
    return {**batch, "discounts": args.gamma**3 * (~batch["terminated"]).float()}


def packed(seed: int, on_images: bool) -> Tensor:
    noise = peers.factorised(seed, on_images)
    return torch.cat([torch.from_numpy(x) for layer in rainbow.NOISY for x in noise[layer]])


@pytest.mark.parametrize(
    ("name", "layers"), [("rainbow", VECTORS), ("rainbow_images", IMAGES)], ids=["vectors", "images"]
)
def test_two_steps(name: str, layers: Layers) -> None:
    """Guards noisy layers, dueling streams, the projection, double Q-learning, importance weights, priorities, Adam."""
    numbers, on_images = NUMBERS[name], layers is IMAGES
    args = Args(**numbers["flags"], batch_size=12)
    params, target = network("", layers, args), network("target.", layers, args)
    online, other = (packed(seed, on_images) for seed in (10, 11))
    noise = torch.stack([online, online, other])
    opt = init_adam(params)
    for t, columns in enumerate(numbers["batches"]):
        batch = as_batch(columns, args) | (peers.images(t) if on_images else {})
        grads, (total, _) = grad_and_value(rainbow.loss, has_aux=True)(params, target, batch, noise, args)
        assert total.item() == pytest.approx(numbers["loss"][t], rel=1e-6)
        assert_digests(grads, numbers["gradients"][t])
        params, opt, metrics = rainbow.update(params, target, opt, batch, noise, args)
        np.testing.assert_allclose(metrics["priorities"], numbers["priorities"][t], rtol=1e-6)
        assert_digests(params, numbers["params"][t])
