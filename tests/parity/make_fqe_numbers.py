"""Writes fqe_numbers.json: three gradient steps of d3rlpy's FQE and DiscreteFQE, in float64.

    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy
    peers/bin/pip install d3rlpy==2.8.1
    peers/bin/python tests/parity/make_fqe_numbers.py

Their classes run as they are, with a policy that takes the actions written down here. What is read off: losses,
gradients, and the weights after each step, as digests; and the mean value of a few states at the end. Their target
network becomes a copy after the second step.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
OBS, ACTIONS, BATCH, STEPS = 3, 2, 12, 3
FLAGS = {"learning_rate": 1e-3, "gamma": 0.96875, "target_update_interval": 2}


def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small, so that no error reaches 1, where Huber's loss would stop to be half the square."""
    return 0.05 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def digest(name: str, x: np.ndarray) -> list[float]:
    """As make_ppo_numbers.digest."""
    x = np.asarray(x, np.float64).ravel()
    directions = np.random.RandomState(zlib.crc32(name.encode()) ^ 1).standard_normal((3, x.size))
    return [round(float(value), 9) for value in (np.linalg.norm(x), *(directions @ x))]


def batch(seed: int, discrete: bool) -> dict[str, list[Any]]:
    """Transitions, a third of which end an episode; and the policy's actions that follow."""
    random = np.random.RandomState(seed)
    columns = {name: np.round(random.standard_normal((BATCH, OBS)), 3) for name in ("obs", "next_obs")}
    for name in ("actions", "next_actions"):
        boxed, chosen = np.round(random.uniform(-1, 1, (BATCH, ACTIONS)), 3), random.randint(ACTIONS, size=BATCH)
        columns[name] = chosen if discrete else boxed
    columns["rewards"] = np.round(random.uniform(-0.5, 0.5, BATCH), 3)
    columns["terminated"] = (np.arange(BATCH) % 3 == 0).astype(float)
    return {name: column.tolist() for name, column in columns.items()}


def parameters(critic: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """By our names: critic.<layer>.<kind>."""
    layers = {"_encoder._layers.0": 0, "_encoder._layers.2": 1, "_fc": 2}
    names = {name: name.rpartition(".") for name, _ in critic.named_parameters()}
    return {f"critic.{layers[names[n][0]]}.{names[n][2]}": p for n, p in critic.named_parameters()}


def steps(discrete: bool) -> dict[str, Any]:
    from d3rlpy.ope import FQE, DiscreteFQE, FQEConfig
    from d3rlpy.torch_utility import TorchMiniBatch

    following: list[torch.Tensor] = []
    policy = SimpleNamespace(impl=SimpleNamespace(predict_best_action=lambda obs: following[-1]))
    agent: Any = (DiscreteFQE if discrete else FQE)(policy, FQEConfig(**FLAGS), "cpu:0")
    agent.create_impl((OBS,), ACTIONS)
    modules = agent.impl.modules
    for prefix, network in (("", modules.q_funcs[0]), ("target.", modules.targ_q_funcs[0])):
        for name, p in parameters(network).items():
            p.data.copy_(torch.from_numpy(initial(prefix + name, tuple(p.shape))))
    found: dict[str, Any] = {"batches": [], "steps": []}
    for step in range(STEPS):
        columns = batch(step, discrete)
        found["batches"].append(columns)
        x = {name: torch.tensor(column) for name, column in columns.items()}
        following.append(x["next_actions"])
        ones, rewards, ends = torch.ones(BATCH, 1), x["rewards"].unsqueeze(1), x["terminated"].unsqueeze(1)
        given = (x["obs"], x["actions"], rewards, x["next_obs"], x["next_actions"], ones, ends, ones, "cpu:0")
        losses = agent.impl.inner_update(TorchMiniBatch(*given), step + 1)
        tensors = {name: (p.grad, p) for name, p in parameters(modules.q_funcs[0]).items()}
        gradients, params = ({name: digest(name, t[i].detach().numpy()) for name, t in tensors.items()} for i in (0, 1))
        found["steps"].append({"losses": losses, "gradients": gradients, "params": params})
    with torch.no_grad():
        found["value"] = agent.impl.inner_predict_value(x["obs"], x["next_actions"]).mean().item()
    return found


def main() -> None:
    import d3rlpy

    torch.set_default_dtype(torch.float64)
    versions = {"d3rlpy": d3rlpy.__version__, "torch": torch.__version__, "numpy": np.__version__}
    found = {"flags": FLAGS, "box": steps(False), "discrete": steps(True), "versions": versions}
    (HERE / "fqe_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
