"""Writes td3_bc_numbers.json: two gradient steps of CORL's TD3_BC and of its BC, in float64.

    git clone https://github.com/tinkoff-ai/CORL && git -C CORL checkout 6afec90
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy
    peers/bin/python tests/parity/make_td3_bc_numbers.py CORL

Its classes run as they are, taken out of algorithms/offline/td3_bc.py and any_percent_bc.py as make_iql_numbers.py
takes IQL's; only the noise on target actions is given. What is read off: losses, and the weights after each step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn as nn
from make_iql_numbers import ACTIONS, BATCH, OBS, batch, classes, digest, initial

HERE = Path(__file__).resolve().parent
FLAGS = {"discount": 0.96875, "tau": 0.1, "policy_noise": 0.3, "noise_clip": 0.4, "alpha": 2.0}
RATE = 3e-4


def fill(name: str, module: nn.Module) -> None:
    for key, p in module.named_parameters():
        _, layer, kind = key.split(".")
        p.data.copy_(torch.from_numpy(initial(f"{name}.{int(layer) // 2}.{kind}", tuple(p.shape))))


def digests(modules: dict[str, nn.Module]) -> dict[str, list[float]]:
    found = {}
    for name, module in modules.items():
        for key, p in module.named_parameters():
            _, layer, kind = key.split(".")
            found[f"{name}.{int(layer) // 2}.{kind}"] = digest(f"{name}.{int(layer) // 2}.{kind}", p.detach().numpy())
    return found


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=RATE)


def main() -> None:
    corl = Path(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    peer = classes(corl / "algorithms/offline/td3_bc.py", {"TD3_BC", "Actor", "Critic", "soft_update", "TensorBatch"})
    actor, *critics = peer.Actor(OBS, ACTIONS, 1.0), peer.Critic(OBS, ACTIONS), peer.Critic(OBS, ACTIONS)
    agent = peer.TD3_BC(1.0, actor, adam(actor), critics[0], adam(critics[0]), critics[1], adam(critics[1]), **FLAGS)
    modules = {"actor": agent.actor, "critic0": agent.critic_1, "critic1": agent.critic_2}
    modules |= {"target.actor": agent.actor_target, "target.critic0": agent.critic_1_target}
    modules |= {"target.critic1": agent.critic_2_target}
    for name, module in modules.items():
        fill(name, module)
    cloner = classes(corl / "algorithms/offline/any_percent_bc.py", {"BC", "Actor", "TensorBatch"})
    clone = cloner.Actor(OBS, ACTIONS, 1.0)
    fill("actor", clone)
    bc = cloner.BC(1.0, clone, adam(clone))

    found: dict[str, Any] = {"flags": {**FLAGS, "learning_rate": RATE}, "batches": [], "td3_bc": [], "bc": []}
    for seed in range(2):
        columns = batch(seed)
        columns["noise"] = np.round(np.random.RandomState(seed + 9).standard_normal((BATCH, ACTIONS)), 3).tolist()
        found["batches"].append(columns)
        obs, actions, rewards, next_obs, dones, noise = (
            torch.tensor(columns[name]) for name in ("obs", "actions", "rewards", "next_obs", "terminated", "noise")
        )
        data = [obs, actions, rewards.unsqueeze(1), next_obs, dones.unsqueeze(1)]
        with mock.patch.object(torch, "randn_like", lambda _, noise=noise: noise):
            found["td3_bc"].append({"losses": agent.train(data), "params": digests(modules)})
        found["bc"].append({"losses": bc.train(data), "params": digests({"actor": clone})})
    commit = subprocess.run(["git", "-C", str(corl), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found["versions"] = {"corl": commit.strip(), "torch": torch.__version__, "numpy": np.__version__}
    (HERE / "td3_bc_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
