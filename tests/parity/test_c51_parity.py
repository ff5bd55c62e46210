"""Two gradient steps of C51 against CleanRL's own lines, from the same weights on the same batches: vectors and images.

categorical_numbers.json holds what they computed, with the versions; make_categorical_numbers.py wrote it. Rewards lie
between atoms, on atoms, and beyond the last; some transitions end an episode. The target network is another network.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.func import grad_and_value

from rl_lab.algorithms import c51
from rl_lab.algorithms.c51 import Args
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.replay import Batch

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "categorical_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_categorical_numbers", HERE / "make_categorical_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights, images and digests; it runs no peer unless called

VECTORS = gym.spaces.Box(-9.0, 9.0, (3,))
IMAGES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    assert tensors.keys() - {"atoms"} == expected.keys()
    for name, numbers in expected.items():
        digest = peers.digest(name, tensors[name].numpy())
        np.testing.assert_allclose(digest, numbers, rtol=0, atol=5e-6 * numbers[0], err_msg=name)  # of the norm


def network(prefix: str, space: gym.spaces.Box, args: Args) -> Params:
    params = c51.init_params(space, Actions((2,), ()), args, torch.Generator())
    weights = {name: torch.from_numpy(peers.initial(prefix + name, p.shape)) for name, p in params.items()}
    return {**weights, "atoms": params["atoms"]}


def as_batch(columns: dict[str, list[Any]], args: Args) -> Batch:
    batch = {name: torch.tensor(column) for name, column in columns.items()}
    return {**batch, "discounts": args.gamma * (~batch["terminated"]).float()}


@pytest.mark.parametrize(("name", "space"), [("c51", VECTORS), ("c51_images", IMAGES)], ids=["vectors", "images"])
def test_two_steps(name: str, space: gym.spaces.Box) -> None:
    """Guards the network, the projection, the target's greedy action, the cross-entropy, its gradient, and Adam."""
    numbers = NUMBERS[name]
    args = Args(**numbers["flags"], batch_size=12)
    params, target = network("", space, args), network("target.", space, args)
    opt = init_adam(params)
    for t, columns in enumerate(numbers["batches"]):
        batch = as_batch(columns, args) | (peers.images(t) if space is IMAGES else {})
        grads, (total, _) = grad_and_value(c51.loss, has_aux=True)(params, target, batch, args)
        assert total.item() == pytest.approx(numbers["loss"][t], rel=1e-6)
        assert_digests(grads, numbers["gradients"][t])
        params, opt, metrics = c51.update(params, target, opt, batch, args)
        assert torch.equal(metrics["loss"], total)
        assert_digests(params, numbers["params"][t])
