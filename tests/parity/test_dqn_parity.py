"""Three updates of DQN against CleanRL's dqn.py, from the same weights on the same batches.

dqn_numbers.json holds what CleanRL computed, with the versions; make_dqn_numbers.py wrote it. Two rows of each batch of
eight terminate, and the target network moves a quarter of the way after each update, so it is never the online one.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl_lab.algorithms import dqn
from rl_lab.distributions import Actions
from rl_lab.networks import Params, polyak
from rl_lab.optim import init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "dqn_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_dqn_numbers", HERE / "make_dqn_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights, batches and digests; CleanRL does not run


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    assert tensors.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_allclose(
            peer.digest(name, tensors[name].numpy()), numbers, rtol=1e-6, atol=1e-6, err_msg=name
        )


def test_each_update_equals_cleanrls() -> None:
    """Guards loss, gradient, Adam and target network: their values, their order, and what they are applied to."""
    args = dqn.Args(**peer.FLAGS)
    params = dqn.init_params(gym.spaces.Box(-1, 1, (4,)), Actions((2,), ()), args.dueling, torch.Generator())
    params = {name: torch.from_numpy(peer.initial(name, p.shape)) for name, p in params.items()}
    target, opt = params, init_adam(params)
    for given, expected in zip(peer.batches(), NUMBERS["updates"], strict=True):
        batch = {name: torch.as_tensor(x) for name, x in given.items()}
        batch["discounts"] = args.gamma * (~batch["terminated"]).float()
        grads, _ = torch.func.grad_and_value(lambda p, t, b: dqn.loss(p, t, b, args)[0])(params, target, batch)
        assert_digests(grads, expected["gradients"])
        params, opt, metrics = dqn.update(params, target, opt, batch, args)
        target = polyak(target, params, args.tau)
        assert_digests(params, expected["params"])
        for name in ("td_loss", "q_values"):
            assert metrics[name].item() == pytest.approx(expected[name], rel=1e-6, abs=1e-6)
