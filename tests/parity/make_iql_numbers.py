"""Writes iql_numbers.json: two gradient steps of CORL's ImplicitQLearning, in float64.

    git clone https://github.com/tinkoff-ai/CORL && git -C CORL checkout 6afec90
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy
    peers/bin/python tests/parity/make_iql_numbers.py CORL

Its classes run as they are, taken out of algorithms/offline/iql.py without the imports of d4rl and of its logger. What
is read off: losses, gradients, and the weights after each step, as digests.
"""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributions import Normal
from torch.optim.lr_scheduler import CosineAnnealingLR

HERE = Path(__file__).resolve().parent
OBS, ACTIONS, BATCH = 3, 2, 12
FLAGS = {"iql_tau": 0.75, "beta": 2.0, "discount": 0.96875, "tau": 0.1, "max_steps": 10}
RATE = 3e-4
NETWORKS = {"critic0": "q1", "critic1": "q2", "value": "v", "actor": "net"}
WANTED = {"ImplicitQLearning", "MLP", "Squeeze", "GaussianPolicy", "TwinQ", "ValueFunction"}
WANTED |= {"asymmetric_l2_loss", "soft_update", "EXP_ADV_MAX", "LOG_STD_MIN", "LOG_STD_MAX", "TensorBatch"}


def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As make_ppo_numbers.initial, which needs packages that this does not."""
    return 0.15 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def digest(name: str, x: np.ndarray) -> list[float]:
    """As make_ppo_numbers.digest."""
    x = np.asarray(x, np.float64).ravel()
    directions = np.random.RandomState(zlib.crc32(name.encode()) ^ 1).standard_normal((3, x.size))
    return [round(float(value), 9) for value in (np.linalg.norm(x), *(directions @ x))]


def batch(seed: int) -> dict[str, list[Any]]:
    """Transitions, a third of which end an episode."""
    random = np.random.RandomState(seed)
    columns = {name: np.round(random.standard_normal((BATCH, OBS)), 3) for name in ("obs", "next_obs")}
    columns["actions"] = np.round(random.uniform(-1, 1, (BATCH, ACTIONS)), 3)
    columns["rewards"] = np.round(random.standard_normal(BATCH), 3)
    columns["terminated"] = (np.arange(BATCH) % 3 == 0).astype(float)
    return {name: column.tolist() for name, column in columns.items()}


def classes(script: Path, wanted: set[str]) -> SimpleNamespace:
    """What the script defines of the names in `wanted`."""

    def name(node: ast.stmt) -> str:
        return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")

    body = [node for node in ast.parse(script.read_text()).body if name(node) in wanted]
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "np": np, "copy": copy, "Normal": Normal}
    scope |= {"deepcopy": copy.deepcopy, "CosineAnnealingLR": CosineAnnealingLR}
    exec("from typing import *", scope)
    exec(compile(ast.Module(body, []), str(script), "exec"), scope)
    return SimpleNamespace(**scope)


def parameters(agent: Any) -> dict[str, nn.Parameter]:
    """By our names: <network>.<layer>.<kind>, and actor.logstd."""
    modules = {"critic0": agent.qf.q1, "critic1": agent.qf.q2, "value": agent.vf.v, "actor": agent.actor.net}
    found = {}
    for network, module in modules.items():
        for name, p in module.named_parameters():
            _, layer, kind = name.split(".")
            found[f"{network}.{int(layer) // 2}.{kind}"] = p
    return found | {"actor.logstd": agent.actor.log_std}


def main() -> None:
    corl = Path(sys.argv[1])
    peer = classes(corl / "algorithms/offline/iql.py", WANTED)
    torch.set_default_dtype(torch.float64)
    actor, critics, value = peer.GaussianPolicy(OBS, ACTIONS, 1.0), peer.TwinQ(OBS, ACTIONS), peer.ValueFunction(OBS)
    actor.log_std.data = actor.log_std.data.double()
    optimizers = [torch.optim.Adam(network.parameters(), lr=RATE) for network in (actor, critics, value)]
    agent = peer.ImplicitQLearning(1.0, actor, optimizers[0], critics, optimizers[1], value, optimizers[2], **FLAGS)
    for name, p in parameters(agent).items():
        p.data.copy_(torch.from_numpy(initial(name, tuple(p.shape))))
    for module, network in ((agent.q_target.q1, "critic0"), (agent.q_target.q2, "critic1")):
        for name, p in module.named_parameters():
            _, layer, kind = name.split(".")
            p.data.copy_(torch.from_numpy(initial(f"target.{network}.{int(layer) // 2}.{kind}", tuple(p.shape))))
    found: dict[str, Any] = {"flags": {**FLAGS, "learning_rate": RATE}, "batches": [], "steps": []}
    for seed in range(2):
        columns = batch(seed)
        found["batches"].append(columns)
        obs, actions, rewards, next_obs, dones = (
            torch.tensor(columns[name]) for name in ("obs", "actions", "rewards", "next_obs", "terminated")
        )
        losses = agent.train([obs, actions, rewards.unsqueeze(1), next_obs, dones.unsqueeze(1)])
        tensors = {name: (p.grad, p) for name, p in parameters(agent).items()}
        gradients, params = ({name: digest(name, x[i].detach().numpy()) for name, x in tensors.items()} for i in (0, 1))
        found["steps"].append({"losses": losses, "gradients": gradients, "params": params})
    commit = subprocess.run(["git", "-C", str(corl), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found["versions"] = {"corl": commit.strip(), "torch": torch.__version__, "numpy": np.__version__}
    (HERE / "iql_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
