"""Writes ppo_lstm_numbers.json: CleanRL's recurrent PPO, observed from outside, on streams of vectors and of images.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 stable-baselines3==2.9.2 gymnasium==0.29.1 tyro tensorboard
    peers/bin/python tests/parity/make_ppo_lstm_numbers.py cleanrl

On images its ppo_atari_lstm.py runs as it is, for one iteration; its vector environment holds streams that show it the
newest of their four frames. On vectors, for two iterations, three passages differ: Atari's wrappers are left out, the
convolutional network is two tanh layers, observations are not divided by 255. Weights are set, and gradients read, as
in make_ppo_numbers.py.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium as gym
import make_ppo_images_numbers as images
import numpy as np
import torch
from make_ppo_numbers import FLAGS, Recorded, Trace, rounded

LSTM = [f"lstm.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
NAMES = [f"{part}.{kind}" for part in ("body.0", "body.1") for kind in ("weight", "bias")] + LSTM
NAMES += [f"{part}.0.{kind}" for part in ("actor", "critic") for kind in ("weight", "bias")]
IMAGE_NAMES = images.NAMES[:8] + LSTM + images.NAMES[8:]
NUM_ENVS, NUM_STEPS = 4, 16
IMAGE_FLAGS = {**images.FLAGS, "num_minibatches": 2}


class Acting(Recorded):
    """Remembers the actions too."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        outcome = super().step(action)
        self.rows[-1]["actions"] = int(action)
        return outcome


def adapted(source: str) -> str:
    """The script for vector observations."""
    for pattern, replacement in (
        (r"( +)env = NoopResetEnv.*?(?= +return env)", r""),
        (r"nn\.Sequential\(.*?nn\.Flatten.*?\n        \)\n", "nn.Sequential(nn.Linear(3, 64), nn.Tanh(), "
         "nn.Linear(64, 64), nn.Tanh())\n"),
        (r"nn\.LSTM\(512, 128\)", "nn.LSTM(64, 128)"),
        (r"x / 255\.0", "x"),
    ):  # fmt: skip
        source, count = re.subn(pattern, replacement, source, flags=re.DOTALL)
        assert count == 1, pattern
    return re.sub(r"from cleanrl_utils\.atari_wrappers import \(.*?\)\n", "", source, flags=re.DOTALL)


class Newest(images.Images):
    """The newest frame only, as CleanRL's stack of one gives it."""

    observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)

    def observe(self) -> np.ndarray:
        return super().observe()[-1:]


def on_images(script: Path) -> dict[str, Any]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in IMAGE_FLAGS.items()]
    envs = gym.vector.SyncVectorEnv
    with (
        mock.patch.object(images.vectors, "initial", images.initial),
        mock.patch("gymnasium.vector.SyncVectorEnv", lambda thunks: envs([lambda i=i: Newest(i) for i in range(4)])),
        mock.patch("sys.argv", [str(script), "--no-cuda", *words]),
        images.vectors.Trace(IMAGE_NAMES) as trace,
    ):
        end = runpy.run_path(str(script), run_name="__main__")
    metrics = {"value_loss": end["v_loss"], "policy_loss": end["pg_loss"], "entropy": end["entropy_loss"]}
    return {
        "flags": IMAGE_FLAGS,
        "rollout": {name: end[name].tolist() for name in ("actions", "logprobs", "values", "advantages")},
        "shuffles": np.reshape(trace.shuffles, (4, -1)).tolist(),
        "gradients": trace.gradients,
        "params": trace.params[-1],
        "last": {name: x.item() for name, x in metrics.items()},
    }


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(1)
    gym.register("Recorded-v0", lambda **_: Acting(False), disable_env_checker=True)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    script = checkout / "cleanrl" / "ppo_atari_lstm.py"
    flags = {**FLAGS, "num_envs": NUM_ENVS, "num_steps": NUM_STEPS, "total_timesteps": 2 * NUM_ENVS * NUM_STEPS}
    flags |= {"num_minibatches": 2}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    target = Path(__file__).resolve().with_name("ppo_lstm_numbers.json")
    end: dict[str, Any] = {"__name__": "__main__", "__file__": str(script)}
    argv = mock.patch("sys.argv", [str(script), "--env-id=Recorded-v0", "--no-cuda", *words])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # CleanRL writes its logs here
        on_image_streams = on_images(script)
        with Trace(NAMES) as trace, argv, mock.patch.dict(sys.modules, {"__main__": mock.MagicMock(**end)}):
            exec(compile(adapted(script.read_text()), str(script), "exec"), end)
        os.chdir(target.parent)
    half = NUM_ENVS // 2
    numbers = {
        "versions": {"cleanrl": commit} | {name: version(name) for name in ("torch", "numpy", "gymnasium")},
        "flags": {**flags, "semantics": "cleanrl"},
        "stream": Recorded.stream(2 * NUM_STEPS),
        # The script shuffles an array in place, once an epoch, and halves it.
        "shuffles": [[row[:half], row[half:]] for row in trace.shuffles],
        "gradients": trace.gradients,
        "params": trace.params,
        "last": {name: end[name].tolist() for name in ("logprobs", "values", "advantages", "returns")},
        "memory": [x.squeeze(0).norm(dim=1).tolist() for x in end["initial_lstm_state"]],
        "metrics": {name: float(end[name]) for name in ("loss", "approx_kl", "old_approx_kl", "v_loss", "pg_loss")}
        | {"entropy_loss": float(end["entropy_loss"]), "explained_var": float(end["explained_var"])},
        "images": on_image_streams,
    }
    target.write_text(json.dumps(rounded(numbers), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
