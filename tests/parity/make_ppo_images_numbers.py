"""Writes ppo_images_numbers.json: one iteration of CleanRL's ppo_atari.py, observed as make_ppo_numbers.py does.

    peers/bin/python tests/parity/make_ppo_images_numbers.py cleanrl          (set up as make_ppo_numbers.py says)

The script runs as it is, from the checkout as `__main__`, but its vector environment holds streams of images.
"""

from __future__ import annotations

import importlib.util
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
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location("make_ppo_numbers", HERE / "make_ppo_numbers.py")
assert spec and spec.loader
vectors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vectors)

NUM_ENVS, NUM_STEPS = 4, 8
FLAGS = {**vectors.FLAGS, "num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "total_timesteps": NUM_ENVS * NUM_STEPS}
LAYERS = [f"trunk.{layer}" for layer in range(4)] + ["actor.0", "critic.0"]
NAMES = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]


def initial(name: str, shape: Iterable[int]) -> np.ndarray:
    """Weights by our name for them."""
    weights = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    return (weights / max(1, weights[0].size) ** 0.5).astype(np.float32)


class Images(gym.Env):
    """Images of random blocks, rewards and endings from a stream, whatever the action; keeps what it gave."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, row: int) -> None:
        self.random = np.random.RandomState(row)
        self.rows: list[dict[str, Any]] = []

    def observe(self) -> np.ndarray:
        blocks = self.random.randint(0, 256, (4, 12, 12)).astype(np.uint8)
        return blocks.repeat(7, axis=1).repeat(7, axis=2)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs = self.observe()
        if self.rows:
            self.rows[-1]["obs"] = obs
        else:
            self.first = obs
        return obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward = self.observe(), float(self.random.randint(-1, 2))
        terminated = bool(self.random.random_sample() < 0.2)
        self.rows.append({"next_obs": obs, "obs": obs, "rewards": reward, "terminated": terminated})
        return obs, reward, terminated, False, {}


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    script = checkout / "cleanrl" / "ppo_atari.py"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    envs = gym.vector.SyncVectorEnv
    sys.path.insert(0, str(checkout))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(vectors, "initial", initial),
        mock.patch("gymnasium.vector.SyncVectorEnv", lambda thunks: envs([lambda i=i: Images(i) for i in range(4)])),
        mock.patch("sys.argv", [str(script), "--no-cuda", *words]),
        vectors.Trace(NAMES) as trace,
    ):
        os.chdir(folder)  # CleanRL writes its logs here
        end = runpy.run_path(str(script), run_name="__main__")
        os.chdir(HERE)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    columns = ("actions", "logprobs", "values", "advantages")
    metrics = {"value_loss": end["v_loss"], "policy_loss": end["pg_loss"], "entropy": end["entropy_loss"]}
    numbers = {
        "versions": {"cleanrl": commit} | {name: version(name) for name in ("torch", "numpy", "gymnasium")},
        "rollout": {name: end[name].tolist() for name in columns},
        "shuffles": np.reshape(trace.shuffles, (8, -1)).tolist(),
        "gradients": trace.gradients,
        "params": trace.params[-1],
        "last": {name: x.item() for name, x in metrics.items()},
    }
    target = HERE / "ppo_images_numbers.json"
    target.write_text(json.dumps(vectors.rounded(numbers), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
