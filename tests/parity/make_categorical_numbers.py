"""Writes categorical_numbers.json: gradient steps by the lines of CleanRL's c51.py, c51_atari.py and rainbow_atari.py.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 gymnasium==0.29.1 numpy==1.26.4 opencv-python-headless tyro tensorboard
    peers/bin/python tests/parity/make_categorical_numbers.py cleanrl

The scripts' own statements run, taken out of their loops: the one that makes the optimizer, and those of a gradient
step. Their replay hands out the batches made here, weights are set before, so is Rainbow's noise, to a factorised one.
Rainbow's network is compared twice: as it is, on images, and on vectors with smaller layers and a linear trunk in place
of the convolutions. What is read off: the loss, the gradients, the weights after each of two steps, as digests
(`make_ppo_numbers.digest`).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("make_ppo_images_numbers", HERE / "make_ppo_images_numbers.py")
assert spec and spec.loader
ppo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ppo)
initial, digest = ppo.initial, ppo.vectors.digest

OBS, ACTIONS, BATCH = 3, 2, 12
C51_FLAGS = {"n_atoms": 101, "v_min": -100.0, "v_max": 100.0, "gamma": 0.99, "learning_rate": 2.5e-4}
# 41 atoms, not 51: c51_atari.py has the difference of the first two float32 atoms for their distance. Of 51 it is
# 0.39999962, not 0.4, which moves some 2e-5 of the probabilities, more than the rest differs by.
ATARI_FLAGS = {**C51_FLAGS, "n_atoms": 41, "v_min": -10.0, "v_max": 10.0}
RAINBOW_FLAGS = {**ATARI_FLAGS, "n_atoms": 51, "learning_rate": 6.25e-5, "n_step": 3}
SIZES = {False: (6, 5), True: (3136, 512)}  # of Rainbow's streams on vectors and on images: inputs, hidden units
NOISY = ["value.0", "value.1", "advantage.0", "advantage.1"]
HEADS = [("value", 0), ("value", 2), ("advantage", 0), ("advantage", 2)]  # CleanRL's places of the same
KINDS = {"weight": "weight_mu", "weight_sigma": "weight_sigma", "bias": "bias_mu", "bias_sigma": "bias_sigma"}


def batch(seed: int, scale: float) -> dict[str, list[Any]]:
    """Transitions of vectors; `scale` is the last atom. Some rewards lie on an atom or beyond the last, some end an
    episode."""
    random = np.random.RandomState(seed)
    columns = {name: np.round(random.standard_normal((BATCH, OBS)), 3) for name in ("obs", "next_obs")}
    columns["actions"] = random.randint(0, ACTIONS, BATCH)
    columns["rewards"] = np.round(random.standard_normal(BATCH), 2)
    columns["rewards"][:5] = np.array([0.0, 0.4, 1.5, -1.5, -0.2]) * scale
    columns["terminated"] = np.arange(BATCH) % 5 < 2
    columns["weights"] = np.round(random.uniform(0.2, 1, BATCH), 3)
    return {name: column.tolist() for name, column in columns.items()}


def images(seed: int) -> dict[str, torch.Tensor]:
    """obs, next_obs (BATCH, 4, 84, 84) of random blocks."""
    blocks = np.random.RandomState(100 + seed).randint(0, 256, (2, BATCH, 4, 12, 12)).astype(np.uint8)
    obs, next_obs = torch.from_numpy(blocks.repeat(7, axis=3).repeat(7, axis=4))
    return {"obs": obs, "next_obs": next_obs}


def factorised(seed: int, on_images: bool) -> dict[str, list[np.ndarray]]:
    """For each noisy layer f(e) of its inputs and of its outputs, f(x) = sgn(x) sqrt(|x|)."""
    random, (inputs, hidden), n_atoms = np.random.RandomState(seed), SIZES[on_images], int(RAINBOW_FLAGS["n_atoms"])
    sizes = [(inputs, hidden), (hidden, n_atoms), (inputs, hidden), (hidden, n_atoms * ACTIONS)]
    draws = {name: [random.standard_normal(n) for n in size] for name, size in zip(NOISY, sizes, strict=True)}
    return {name: [(np.sign(x) * np.sqrt(abs(x))).astype(np.float32) for x in pair] for name, pair in draws.items()}


def statements(module: ModuleType, name: str) -> list[ast.stmt]:
    """Of the script's main part: the assignment to `name`, or the body of its `if` with the condition `name`."""
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return [node]
        if isinstance(node, ast.If) and ast.unparse(node.test) == name:
            return node.body
    raise ValueError(f"{module.__file__} has no {name}")


def steps(
    module: ModuleType, networks: list[nn.Module], names: list[str], flags: Any, on_images: bool
) -> dict[str, Any]:
    """Two gradient steps of `module` with everything seen. Weights go by the names' order in `parameters()`."""
    online, target = networks
    found: dict[str, Any] = {"flags": flags, "batches": [], "loss": [], "gradients": [], "params": []}
    fill(online, names, "")
    fill(target, names, "target.")

    def sample(_: int) -> SimpleNamespace:
        columns, seen = batch(len(found["batches"]), flags["v_max"]), {}
        if on_images:  # which are not written down
            seen = images(len(found["batches"]))
            columns = {name: column for name, column in columns.items() if name not in seen}
        found["batches"].append(columns)
        tensors = {name: torch.tensor(column) for name, column in columns.items()}
        tensors = {name: x.float() if x.is_floating_point() else x for name, x in tensors.items()} | seen
        column = {name: tensors[name].unsqueeze(1) for name in ("actions", "rewards", "weights")}
        obs = {"observations": tensors["obs"], "next_observations": tensors["next_obs"]}
        return SimpleNamespace(**obs, **column, dones=tensors["terminated"].float().unsqueeze(1), indices=None)

    def update_priorities(_: None, priorities: np.ndarray) -> None:
        found.setdefault("priorities", []).append((np.abs(priorities) + 1e-6).tolist())

    scope = {**vars(module), "args": SimpleNamespace(**flags, batch_size=BATCH), "global_step": 1}
    scope |= {"q_network": online, "target_network": target}
    scope["rb"] = SimpleNamespace(sample=sample, update_priorities=update_priorities)
    run = [statements(module, "optimizer"), *[statements(module, "global_step % args.train_frequency == 0")] * 2]
    for body in run:
        exec(compile(ast.Module(body, []), str(module.__file__), "exec"), scope)
        if "loss" in scope:
            found["loss"].append(scope["loss"].item())
            found["gradients"].append(digests(names, (p.grad for p in online.parameters())))
            found["params"].append(digests(names, online.parameters()))
    return found


def fill(network: nn.Module, names: list[str], prefix: str) -> None:
    for name, p in zip(names, network.parameters(), strict=True):
        p.data.copy_(torch.from_numpy(initial(prefix + name, p.shape)))


def digests(names: list[str], tensors: Any) -> dict[str, list[float]]:
    return {name: digest(name, x.detach().numpy()) for name, x in zip(names, tensors, strict=True)}


def named(layers: list[str], kinds: Any = ("weight", "bias")) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in kinds]


def c51(module: ModuleType, on_images: bool) -> dict[str, Any]:
    space = SimpleNamespace(n=ACTIONS)
    env = SimpleNamespace(single_action_space=space, single_observation_space=SimpleNamespace(shape=(OBS,)))
    flags = ATARI_FLAGS if on_images else C51_FLAGS
    networks = [module.QNetwork(env, *(flags[name] for name in ("n_atoms", "v_min", "v_max"))) for _ in range(2)]
    layers = [f"trunk.{layer}" for layer in range(4 if on_images else 2)]
    return steps(module, networks, named([*layers, "q.0"]), flags, on_images)


def rainbow(module: ModuleType, on_images: bool) -> dict[str, Any]:
    env = SimpleNamespace(single_action_space=SimpleNamespace(n=ACTIONS))
    settings = [RAINBOW_FLAGS[name] for name in ("n_atoms", "v_min", "v_max")]
    networks = []
    for seed in (10, 11):  # of the online and of the target network
        networks.append(module.NoisyDuelingDistributionalNetwork(env, *settings))
        if not on_images:
            shrink(networks[-1], module)
        set_noise(networks[-1], factorised(seed, on_images))
        networks[-1].reset_noise = lambda: None  # it would draw anew
    trunk = range(3 if on_images else 1)
    theirs = named([f"network.{2 * layer}" for layer in trunk])
    theirs += named([f"{head}_head.{place}" for head, place in HEADS], KINDS.values())
    assert [name for name, _ in networks[0].named_parameters()] == theirs
    names = named([f"trunk.{layer}" for layer in trunk]) + named(NOISY, KINDS)
    return steps(module, networks, names, RAINBOW_FLAGS, on_images)


def shrink(network: nn.Module, module: ModuleType) -> None:
    """To vectors."""
    (inputs, hidden), n_atoms = SIZES[False], network.n_atoms

    class Trunk(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(255.0 * x).relu()  # it divides by 255

    network.network = nn.Sequential(Trunk(OBS, inputs))
    for name, outputs in (("value_head", n_atoms), ("advantage_head", n_atoms * ACTIONS)):
        layers = module.NoisyLinear(inputs, hidden), nn.ReLU(), module.NoisyLinear(hidden, outputs)
        setattr(network, name, nn.Sequential(*layers))


def set_noise(network: nn.Module, noise: dict[str, list[np.ndarray]]) -> None:
    layers = [getattr(network, f"{head}_head")[place] for head, place in HEADS]
    for layer, (inputs, outputs) in zip(layers, noise.values(), strict=True):
        layer.weight_epsilon.copy_(torch.from_numpy(np.outer(outputs, inputs)))
        layer.bias_epsilon.copy_(torch.from_numpy(outputs))


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    sys.path[:0] = [str(checkout), str(checkout / "cleanrl")]
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    numbers: dict[str, Any] = {"versions": {"cleanrl": commit} | {name: version(name) for name in ("torch", "numpy")}}
    numbers["c51"] = c51(importlib.import_module("c51"), on_images=False)
    numbers["c51_images"] = c51(importlib.import_module("c51_atari"), on_images=True)
    for name, on_images in (("rainbow", False), ("rainbow_images", True)):
        numbers[name] = rainbow(importlib.import_module("rainbow_atari"), on_images)
    target = HERE / "categorical_numbers.json"
    target.write_text(json.dumps(ppo.vectors.rounded(numbers), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
