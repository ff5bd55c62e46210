"""Writes ppo_numbers.json: one iteration of the peers' own PPO, observed from outside, on recorded streams.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 stable-baselines3==2.9.2 gymnasium==0.29.1 tyro tensorboard
    peers/bin/python tests/parity/make_ppo_numbers.py cleanrl

The peers run as they are: CleanRL's scripts from the checkout as `__main__`, Stable-Baselines3 by `PPO.learn`. Their
environment is a stream of numbers that ignores actions; the weights are set when they build their optimizer; gradients
are read where they clip them, weights after each step. Gradients and weights are stored as digests (see `digest`).
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
from typing import Any
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

CRITIC = [f"critic.{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
ACTOR = [name.replace("critic", "actor") for name in CRITIC]
FLAGS = {"learning_rate": 5e-4, "gamma": 0.97, "gae_lambda": 0.9, "num_minibatches": 4, "update_epochs": 2}
FLAGS |= {"ent_coef": 0.02, "vf_coef": 0.5, "max_grad_norm": 0.5, "clip_coef": 0.1}


def initial(name: str, shape: Iterable[int]) -> np.ndarray:
    """Weights by our name for them; RandomState's streams are frozen."""
    return 0.15 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)


def digest(name: str, x: np.ndarray) -> list[float]:
    """Norm of a tensor, and its products with three random directions: any entry that differs shows."""
    x = np.asarray(x, np.float64).ravel()
    directions = np.random.RandomState(zlib.crc32(name.encode()) ^ 1).standard_normal((3, x.size))
    return [round(float(value), 9) for value in (np.linalg.norm(x), *(directions @ x))]


class Recorded(gym.Env):
    """Observations, rewards and endings from a stream, whatever the action; remembers what it gave."""

    made: list[Recorded] = []  # noqa: RUF012

    def __init__(self, box: bool) -> None:
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (3 + box,), np.float64)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32) if box else gym.spaces.Discrete(3)
        self.random = np.random.RandomState(100 + len(self.made))
        self.rows: list[dict[str, Any]] = []
        self.made.append(self)

    def observe(self) -> np.ndarray:
        size = self.observation_space.shape[0]
        return np.round(self.random.standard_normal(size) * [1, 5, 0.2, 1][:size], 3)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        obs = self.observe()
        if self.rows:
            self.rows[-1]["obs"] = obs
        else:
            self.first = obs
        return obs, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        obs, reward = self.observe(), round(float(self.random.standard_normal()) + 0.5, 3)
        terminated, truncated = (bool(x) for x in self.random.random_sample(2) < 0.2)
        row = {"rewards": reward, "terminated": terminated, "truncated": truncated}
        self.rows.append({"next_obs": obs, "obs": obs, **row})
        return obs, reward, terminated, truncated, {}

    @classmethod
    def stream(cls, num_steps: int) -> dict[str, Any]:
        envs = [env for env in cls.made if env.rows]
        rows = [[env.rows[t] for env in envs] for t in range(num_steps)]
        columns = {name: [[np.asarray(x[name]).tolist() for x in row] for row in rows] for name in rows[0][0]}
        return {"first": [env.first.tolist() for env in envs], **columns}


class Trace:
    """Sets the weights of an optimizer and follows its steps."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.gradients, self.params = names, [], []
        self.shuffles: list[list[int]] = []

    def fill(self, optimizer: torch.optim.Optimizer) -> None:
        self.tensors = optimizer.param_groups[0]["params"]
        for name, p in zip(self.names, self.tensors, strict=True):
            p.data.copy_(torch.from_numpy(initial(name, p.squeeze(0).shape if name == "logstd" else p.shape)))

    def digests(self, tensors: Iterable[torch.Tensor]) -> dict[str, list[float]]:
        return {name: digest(name, x.detach().numpy()) for name, x in zip(self.names, tensors, strict=True)}

    def patches(self) -> list[Any]:
        init, clip = torch.optim.Adam.__init__, torch.nn.utils.clip_grad_norm_
        shuffle, permutation = np.random.shuffle, np.random.permutation

        def filling_init(optimizer: torch.optim.Adam, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self.fill(optimizer)

        def recording_clip(*args: Any) -> torch.Tensor:
            self.gradients.append(self.digests(p.grad for p in self.tensors))
            return clip(*args)

        def recording_shuffle(indices: np.ndarray) -> None:
            shuffle(indices)
            self.shuffles.append(indices.tolist())

        def recording_permutation(size: int) -> np.ndarray:
            indices = permutation(size)
            self.shuffles.append(indices.tolist())
            return indices

        return [
            mock.patch("torch.optim.Adam.__init__", filling_init),
            mock.patch("torch.nn.utils.clip_grad_norm_", recording_clip),
            mock.patch("numpy.random.shuffle", recording_shuffle),
            mock.patch("numpy.random.permutation", recording_permutation),
        ]

    def __enter__(self) -> Trace:
        self.running = self.patches()
        for patch in self.running:
            patch.start()
        self.hook = register_optimizer_step_post_hook(lambda *_: self.params.append(self.digests(self.tensors)))
        Recorded.made.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.running:
            patch.stop()
        self.hook.remove()

    def numbers(self, num_steps: int) -> dict[str, Any]:
        return {
            "stream": Recorded.stream(num_steps),
            "shuffles": np.reshape(self.shuffles, (8, -1)).tolist(),
            "gradients": self.gradients,
            "params": self.params,
        }


def cleanrl(checkout: Path, box: bool) -> dict[str, Any]:
    script = checkout / "cleanrl" / ("ppo_continuous_action.py" if box else "ppo.py")
    num_envs, num_steps = (1, 64) if box else (4, 16)
    flags = {**FLAGS, "num_envs": num_envs, "num_steps": num_steps, "total_timesteps": 64}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    argv = [str(script), f"--env-id=Recorded{'Box' if box else ''}-v0", "--no-cuda", *words]
    with Trace(["logstd"] * box + CRITIC + ACTOR) as trace, mock.patch("sys.argv", argv):
        end = runpy.run_path(str(script), run_name="__main__")
    columns = ("obs", "rewards", "actions", "logprobs", "values", "advantages", "returns")
    metrics = {name: float(end[name]) for name in ("loss", "approx_kl", "old_approx_kl", "explained_var")}
    metrics |= {"value_loss": float(end["v_loss"]), "policy_loss": float(end["pg_loss"])}
    metrics |= {"entropy": float(end["entropy_loss"]), "clipfrac": float(np.mean(end["clipfracs"]))}
    return {
        "flags": {**flags, "normalize": box, "semantics": "cleanrl"},
        **trace.numbers(num_steps),
        "rollout": {name: end[name].tolist() for name in columns},
        "last": metrics,
    }


def stable_baselines3(box: bool) -> dict[str, Any]:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    num_envs, num_steps = 4, 16
    rename = {"learning_rate": "learning_rate", "gamma": "gamma", "gae_lambda": "gae_lambda", "ent_coef": "ent_coef"}
    rename |= {"max_grad_norm": "max_grad_norm", "clip_coef": "clip_range", "update_epochs": "n_epochs"}
    flags = {theirs: FLAGS[ours] for ours, theirs in rename.items()}
    rollout: dict[str, Any] = {}
    actor, critic = ACTOR, CRITIC
    with Trace(["logstd"] * box + actor[:4] + critic[:4] + actor[4:] + critic[4:]) as trace:
        env = DummyVecEnv([lambda: Recorded(box)] * num_envs)
        # Its value loss is the mean square, not half of it, and clips otherwise: half the weight, and no clipping.
        model = PPO("MlpPolicy", env, n_steps=num_steps, batch_size=16, vf_coef=FLAGS["vf_coef"] / 2, seed=1, **flags)
        train = model.train

        def recording_train() -> None:
            buffer = model.rollout_buffer
            columns = {"actions": "actions", "logprobs": "log_probs", "values": "values"}
            columns |= {"advantages": "advantages", "returns": "returns"}
            rollout.update({ours: getattr(buffer, theirs).tolist() for ours, theirs in columns.items()})
            if not box:
                rollout["actions"] = buffer.actions.squeeze(2).tolist()
            train()

        model.train = recording_train
        model.learn(num_envs * num_steps)
    logged = model.logger.name_to_value
    tags = {
        "loss": "loss",
        "policy_loss": "policy_gradient_loss",
        "value_loss": "value_loss",
        "entropy": "entropy_loss",
    }
    tags |= {"approx_kl": "approx_kl", "clipfrac": "clip_fraction", "explained_var": "explained_variance"}
    numbers = trace.numbers(num_steps)
    shuffles = np.array(numbers["shuffles"])  # its flat index is environment * steps + step, ours step * envs + env
    numbers["shuffles"] = (shuffles % num_steps * num_envs + shuffles // num_steps).tolist()
    return {
        "flags": {**FLAGS, "num_envs": num_envs, "num_steps": num_steps, "total_timesteps": 64, "clip_vloss": False},
        **numbers,
        "rollout": rollout,
        "logged": {ours: float(logged[f"train/{theirs}"]) for ours, theirs in tags.items()},
    }


def rounded(node: Any) -> Any:
    """Nine significant digits, all that a float32 has."""
    if isinstance(node, dict):
        return {name: rounded(x) for name, x in node.items()}
    if isinstance(node, list):
        return [rounded(x) for x in node]
    return float(f"{node:.9g}") if isinstance(node, float) else node


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    gym.register("Recorded-v0", lambda **_: Recorded(False), disable_env_checker=True)
    gym.register("RecordedBox-v0", lambda **_: Recorded(True), disable_env_checker=True)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    packages = ("torch", "numpy", "gymnasium", "stable-baselines3")
    numbers: dict[str, Any] = {"versions": {"cleanrl": commit} | {name: version(name) for name in packages}}
    target = Path(__file__).resolve().with_name("ppo_numbers.json")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # CleanRL writes its logs here
        for box in (False, True):
            kind = "box" if box else "discrete"
            numbers[f"cleanrl_{kind}"] = cleanrl(checkout, box)
            numbers[f"sb3_{kind}"] = stable_baselines3(box)
        os.chdir(target.parent)
    target.write_text(json.dumps(rounded(numbers), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
