"""Recurrent PPO against CleanRL's, from the same weights on the same streams: two iterations on vectors, one on images.

ppo_lstm_numbers.json holds what CleanRL computed, and make_ppo_lstm_numbers.py wrote it. The streams have steps that
terminate, so the memory is cleared within sequences; that of vectors has steps that are truncated too, and its second
rollout starts from a memory that is not zero.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad_and_value

from rl_lab.algorithms import ppo_lstm
from rl_lab.distributions import Actions
from rl_lab.networks import Params, pack, unpack
from rl_lab.optim import init_adam
from rl_lab.rollout import Rollout

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "ppo_lstm_numbers.json").read_text())
ARGS = ppo_lstm.Args(**NUMBERS["flags"], lstm_size=128)
ACTIONS = Actions((3,), ())


def beside(name: str) -> ModuleType:
    """A file of this folder, which is no package; none runs a peer unless called."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers, images = beside("make_ppo_numbers"), beside("test_ppo_images_parity")


def rollouts() -> list[Rollout]:
    """The stream's two rollouts, (T, N, ...)."""
    stream = {name: torch.tensor(column) for name, column in NUMBERS["stream"].items()}
    first = stream.pop("first")
    stream["obs"] = torch.cat([first.unsqueeze(0), stream["obs"][:-1]])
    assert (stream["terminated"] & ~stream["truncated"]).any() and (stream["truncated"] & ~stream["terminated"]).any()
    return [{name: x[start : start + ARGS.num_steps] for name, x in stream.items()} for start in (0, ARGS.num_steps)]


def memory_after(params: Params, rollout: Rollout, memory: ppo_lstm.Memory) -> ppo_lstm.Memory:
    """Acting's memory at the end of a rollout."""
    for t in range(ARGS.num_steps):
        memory = ppo_lstm.remember(params, rollout["obs"][t], memory)
        keep = ~(rollout["terminated"] | rollout["truncated"])[t].unsqueeze(1)
        memory = {name: x * keep for name, x in memory.items()}
    return memory


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        assert peers.digest(name, x.numpy()) == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_two_iterations() -> None:
    params = ppo_lstm.init_params(gym.spaces.Box(-1, 1, (3,)), ACTIONS, ARGS, torch.Generator(), 1)
    layout = {name: p.shape for name, p in params.items()}
    params = {name: torch.from_numpy(peers.initial(name, p.shape)) for name, p in params.items()}
    opt, memory = init_adam({"all": pack(params)}), ppo_lstm.init_memory(params, ARGS.num_envs)
    shuffles = torch.tensor(NUMBERS["shuffles"]).reshape(2, 4, 1, ARGS.num_envs // ARGS.num_minibatches)
    expected = zip(NUMBERS["gradients"], NUMBERS["params"], strict=True)
    for iteration, rollout in enumerate(rollouts()):
        rate = torch.tensor(ARGS.learning_rate * (1 - iteration / 2))
        agents, opts = ({name: x.unsqueeze(0) for name, x in params.items()}, pytree.tree_map(lambda x: x[None], opt))
        learned, _, metrics = ppo_lstm.learn(agents, opts, rollout, memory, shuffles[iteration], rate, ACTIONS, ARGS)
        data = ppo_lstm.targets(params, rollout, memory, ACTIONS, ARGS)
        following = memory_after(params, rollout, memory)
        for envs in shuffles[iteration, :, 0]:
            batch = {name: x[:, envs] for name, x in data.items()}, {name: x[envs] for name, x in memory.items()}
            grads, (loss, _) = grad_and_value(ppo_lstm.loss, has_aux=True)(params, *batch, ACTIONS, ARGS)
            packed, opt = ppo_lstm.step({"all": pack(params)}, opt, {"all": pack(grads)}, rate, ARGS)
            params = unpack(packed["all"], layout)
            for found, stored in zip((grads, params), next(expected), strict=True):
                assert_digests(found, stored)
        for name, p in params.items():
            torch.testing.assert_close(learned[name][0], p, rtol=0, atol=1e-6)
        before, memory = memory, following
    begun = (before["hidden"].norm(dim=1) > 0).float()  # CleanRL clears at the next step, not at the end of this one
    assert 0 < begun.sum() < ARGS.num_envs
    for name, norms in zip(("hidden", "cell"), NUMBERS["memory"], strict=True):
        torch.testing.assert_close(before[name].norm(dim=1), begun * torch.tensor(norms), rtol=1e-5, atol=0)
    for name, column in NUMBERS["last"].items():
        np.testing.assert_allclose(data[name].numpy(), column, rtol=1e-5, atol=1e-6, err_msg=name)
    assert loss.item() == pytest.approx(NUMBERS["metrics"]["loss"], rel=1e-5, abs=1e-6)
    names = {"approx_kl": "approx_kl", "old_approx_kl": "old_approx_kl", "v_loss": "value_loss"}
    names |= {"pg_loss": "policy_loss", "entropy_loss": "entropy", "explained_var": "explained_variance"}
    for theirs, ours in names.items():
        assert metrics[f"losses/{ours}"].item() == pytest.approx(NUMBERS["metrics"][theirs], rel=1e-5, abs=1e-6), ours


def test_images() -> None:
    """Guards the network of images, and that it sees the newest of their four frames: CleanRL's was shown no other."""
    numbers, space = NUMBERS["images"], images.peers.Images.observation_space
    args = ppo_lstm.Args(**numbers["flags"], semantics="cleanrl", lstm_size=128)
    params = ppo_lstm.init_params(space, ACTIONS, args, torch.Generator(), 1)
    params = {name: torch.from_numpy(images.peers.initial(name, p.shape)) for name, p in params.items()}
    opt, memory = init_adam(params), ppo_lstm.init_memory(params, args.num_envs)
    rollout = images.stream() | {"actions": torch.tensor(numbers["rollout"]["actions"]).long()}
    assert rollout["terminated"][:-1].any(0).sum() > 1  # sequences within which the memory is cleared
    data = ppo_lstm.targets(params, rollout, memory, ACTIONS, args)
    for name in ("logprobs", "values", "advantages"):
        peer = torch.tensor(numbers["rollout"][name])
        assert peer.std() > 0.01
        torch.testing.assert_close(data[name], peer, rtol=1e-5, atol=1e-5)
    for t, envs in enumerate(torch.tensor(numbers["shuffles"])):
        batch = {name: x[:, envs] for name, x in data.items()}, {name: x[envs] for name, x in memory.items()}
        grads, (_, metrics) = grad_and_value(ppo_lstm.loss, has_aux=True)(params, *batch, ACTIONS, args)
        # Adam's first steps are signs of gradients, so what rounding leaves of small ones grows from step to step.
        images.assert_digests(grads, numbers["gradients"][t], tolerance=1e-5 if t == 0 else 1e-4)
        params, opt = ppo_lstm.step(params, opt, grads, torch.tensor(args.learning_rate), args)
    images.assert_digests(params, numbers["params"], tolerance=1e-4)
    for name, number in numbers["last"].items():
        assert metrics[name].item() == pytest.approx(number, rel=1e-5, abs=1e-5), name
