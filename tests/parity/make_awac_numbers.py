"""Writes awac_numbers.json: two gradient steps of CORL's AdvantageWeightedActorCritic, in float64.

    git clone https://github.com/tinkoff-ai/CORL && git -C CORL checkout 6afec90
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy
    peers/bin/python tests/parity/make_awac_numbers.py CORL

Its classes run as they are, taken out of algorithms/offline/awac.py as make_iql_numbers.py takes IQL's; only the noise
of the actions that it samples is given. What is read off: losses, gradients, and the weights after each step, as
digests.
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
FLAGS = {"gamma": 0.96875, "tau": 0.1, "awac_lambda": 0.25}
RATE = 3e-4
WANTED = {"AdvantageWeightedActorCritic", "Actor", "Critic", "soft_update", "TensorBatch"}


def parameters(networks: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """By our names: <network>.<layer>.<kind>, and actor.logstd."""
    found = {}
    for network, module in networks.items():
        for name, p in module.named_parameters():
            if name == "_log_std":
                found[f"{network}.logstd"] = p
            else:
                _, layer, kind = name.split(".")
                found[f"{network}.{int(layer) // 2}.{kind}"] = p
    return found


def adam(module: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(module.parameters(), lr=RATE)


def main() -> None:
    corl = Path(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    peer = classes(corl / "algorithms/offline/awac.py", WANTED)
    actor, *critics = peer.Actor(OBS, ACTIONS, 256), peer.Critic(OBS, ACTIONS, 256), peer.Critic(OBS, ACTIONS, 256)
    actor._log_std.data = actor._log_std.data.double()
    pairs = (actor, adam(actor), critics[0], adam(critics[0]), critics[1], adam(critics[1]))
    agent = peer.AdvantageWeightedActorCritic(*pairs, **FLAGS)
    params = parameters({"actor": actor, "critic0": critics[0], "critic1": critics[1]})
    targets = parameters({"target.critic0": agent._target_critic_1, "target.critic1": agent._target_critic_2})
    for name, p in (params | targets).items():
        p.data.copy_(torch.from_numpy(initial(name, tuple(p.shape))))

    found: dict[str, Any] = {"flags": {**FLAGS, "learning_rate": RATE}, "batches": [], "steps": []}
    for seed in range(2):
        columns = batch(seed)
        noise = np.round(np.random.RandomState(seed + 9).standard_normal((2, BATCH, ACTIONS)), 3)
        found["batches"].append(columns | {"noise": noise.tolist()})
        obs, actions, rewards, next_obs, dones = (
            torch.tensor(columns[name]) for name in ("obs", "actions", "rewards", "next_obs", "terminated")
        )
        draws = mock.Mock(side_effect=list(torch.tensor(noise)))  # of the next action, then of the one compared with
        with mock.patch.object(torch.distributions.normal, "_standard_normal", draws):
            losses = agent.update([obs, actions, rewards.unsqueeze(1), next_obs, dones.unsqueeze(1)])
        assert draws.call_count == 2
        gradients = {name: digest(name, p.grad.numpy()) for name, p in params.items()}
        after = {name: digest(name, p.detach().numpy()) for name, p in (params | targets).items()}
        found["steps"].append({"losses": losses, "gradients": gradients, "params": after})
    commit = subprocess.run(["git", "-C", str(corl), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found["versions"] = {"corl": commit.strip(), "torch": torch.__version__, "numpy": np.__version__}
    (HERE / "awac_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
