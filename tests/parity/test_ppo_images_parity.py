"""One iteration of PPO on images against CleanRL's ppo_atari.py, from the same weights on the same stream.

ppo_images_numbers.json holds what it computed, with its versions; make_ppo_images_numbers.py wrote it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rl_lab.algorithms import ppo
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.rollout import Rollout

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "ppo_images_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_ppo_images_numbers", HERE / "make_ppo_images_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights, images and digests; it runs no peer unless called
ACTIONS = Actions((3,), ())
ARGS = ppo.Args(**peers.FLAGS, semantics="cleanrl")


def initial_params() -> Params:
    blank = ppo.init_params(peers.Images.observation_space, ACTIONS, torch.Generator())
    return {name: torch.from_numpy(peers.initial(name, p.shape)) for name, p in blank.items()}


def stream() -> Rollout:
    """(T, N, ...) what CleanRL saw, and the actions it took."""
    envs = [peers.Images(row) for row in range(peers.NUM_ENVS)]
    obs, rows = np.stack([env.reset()[0] for env in envs]), []
    for _ in range(peers.NUM_STEPS):
        acted_on = obs
        for env in envs:
            if env.step(None)[2]:
                env.reset()
        last = [env.rows[-1] for env in envs]
        row = {name: np.stack([x[name] for x in last]) for name in ("next_obs", "rewards", "terminated")}
        rows.append(row | {"obs": acted_on})
        obs = np.stack([x["obs"] for x in last])
    rollout = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    actions = torch.tensor(NUMBERS["rollout"]["actions"]).long()
    return rollout | {"actions": actions, "truncated": torch.zeros_like(rollout["terminated"])}


def assert_digests(tensors: Params, expected: dict[str, list[float]], tolerance: float) -> None:
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        norm = expected[name][0]
        digest = peers.vectors.digest(name, x.numpy())
        assert digest == pytest.approx(expected[name], rel=tolerance, abs=tolerance * norm), name


def test_values_and_advantages() -> None:
    """Guards details 21 and 22: layers, their order, the scale of the images; and the end of an episode."""
    data = ppo.targets(initial_params(), stream(), ACTIONS, ARGS)
    for name in ("logprobs", "values", "advantages"):
        peer = torch.tensor(NUMBERS["rollout"][name]).flatten()
        assert peer.std() > 0.01
        torch.testing.assert_close(data[name], peer, rtol=1e-5, atol=1e-5)


def test_each_minibatch() -> None:
    """Guards the gradient through the shared network: eight minibatches in a row, and the weights at the end."""
    params = initial_params()
    data = ppo.targets(params, stream(), ACTIONS, ARGS)
    opt = init_adam(params)
    for t, indices in enumerate(torch.tensor(NUMBERS["shuffles"])):
        batch = {name: column[indices] for name, column in data.items()}
        grads, metrics = ppo.gradient(params, batch, ACTIONS, ARGS)
        # Adam's first steps are signs of gradients, so what rounding leaves of small ones grows from step to step.
        assert_digests(grads, NUMBERS["gradients"][t], tolerance=1e-5 if t == 0 else 1e-4)
        params, opt = ppo.step(params, opt, grads, torch.tensor(ARGS.learning_rate), ARGS)
    assert_digests(params, NUMBERS["params"], tolerance=1e-4)
    for name, number in NUMBERS["last"].items():
        assert metrics[name].item() == pytest.approx(number, rel=1e-5, abs=1e-5), name
