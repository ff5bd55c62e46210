"""Writes dqn_numbers.json: three updates of CleanRL's dqn.py on given batches, observed from outside.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 gymnasium==0.29.1 tyro tensorboard
    peers/bin/python tests/parity/make_dqn_numbers.py cleanrl

The script runs as it is, as `__main__`. The weights are set when it builds its optimizer, before it copies them to the
target network; its replay gives the batches below; loss, gradients and weights are read where it computes or applies
them. After each update the target network moves a quarter of the way. Gradients and weights are stored as digests.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

NAMES = [f"{layer}.{kind}" for layer in ("trunk.0", "trunk.1", "q.0") for kind in ("weight", "bias")]
FLAGS = {"learning_rate": 1e-2, "gamma": 0.9, "tau": 0.25}
UPDATES, BATCH = 3, 8


def initial(name: str, shape: Iterable[int]) -> np.ndarray:
    """Weights by our name for them; RandomState's streams are frozen."""
    return 0.15 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)


def digest(name: str, x: np.ndarray) -> list[float]:
    """Norm of a tensor, and its products with three random directions: any entry that differs shows."""
    x = np.asarray(x, np.float64).ravel()
    directions = np.random.RandomState(zlib.crc32(name.encode()) ^ 1).standard_normal((3, x.size))
    return [float(f"{value:.9g}") for value in (np.linalg.norm(x), *(directions @ x))]


def digests(tensors: Iterable[Any]) -> dict[str, list[float]]:
    return {name: digest(name, x.detach().numpy()) for name, x in zip(NAMES, tensors, strict=True)}


def batches() -> list[dict[str, np.ndarray]]:
    """Of CartPole's shapes; two rows of each batch have terminated."""
    random, found = np.random.RandomState(7), []
    for _ in range(UPDATES):
        obs, next_obs = random.standard_normal((2, BATCH, 4)).astype(np.float32)
        actions, rewards = random.randint(2, size=BATCH), random.standard_normal(BATCH).astype(np.float32)
        terminated = np.arange(BATCH) % 4 == 1
        columns = {"obs": obs, "next_obs": next_obs, "actions": actions, "rewards": rewards, "terminated": terminated}
        found.append(columns)
    return found


def cleanrl(checkout: Path) -> list[dict[str, Any]]:
    """Loss, gradients and weights of each update."""
    script, rows, given = checkout / "cleanrl" / "dqn.py", [], iter(batches())
    sys.path[:0] = [str(checkout), str(script.parent)]
    from cleanrl_utils import buffers

    def sample(*_: Any) -> SimpleNamespace:
        batch = {name: torch.as_tensor(x) for name, x in next(given).items()}
        column = {name: batch[name].reshape(-1, 1) for name in ("actions", "rewards", "terminated")}
        return SimpleNamespace(
            observations=batch["obs"],
            next_observations=batch["next_obs"],
            actions=column["actions"],
            rewards=column["rewards"],
            dones=column["terminated"].float(),
        )

    class Adam(torch.optim.Adam):
        def __init__(self, params: Any, **flags: Any) -> None:
            self.mine = list(params)
            for name, p in zip(NAMES, self.mine, strict=True):
                p.data = torch.as_tensor(initial(name, p.shape))
            super().__init__(self.mine, **flags)

        def step(self) -> None:  # type: ignore[override]
            rows[-1]["gradients"] = digests(p.grad for p in self.mine)
            super().step()
            rows[-1]["params"] = digests(self.mine)

    loss = torch.nn.functional.mse_loss

    def mse_loss(target: Any, value: Any) -> Any:
        rows.append({"td_loss": float(f"{loss(target, value).item():.9g}"), "q_values": value.mean().item()})
        return loss(target, value)

    every_step = ["--learning-starts", "0", "--train-frequency", "1", "--target-network-frequency", "1"]
    flags = [word for name, x in FLAGS.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    command = [str(script), "--no-cuda", "--total-timesteps", str(1 + UPDATES), *every_step, *flags]
    with (
        mock.patch.object(buffers.ReplayBuffer, "sample", sample),
        mock.patch.object(torch.optim, "Adam", Adam),
        mock.patch.object(torch.nn.functional, "mse_loss", mse_loss),
        mock.patch.object(sys, "argv", command),
    ):
        runpy.run_path(str(script), run_name="__main__")
    return rows


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    target = Path(__file__).resolve().with_name("dqn_numbers.json")
    torch.set_num_threads(1)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    versions = {"cleanrl": commit} | {name: version(name) for name in ("torch", "numpy", "gymnasium")}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # CleanRL writes its logs here
        updates = cleanrl(checkout)
        os.chdir(target.parent)
    target.write_text(json.dumps({"versions": versions, "updates": updates}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
