"""Writes atari_numbers.json: what CleanRL's own Atari environments show for recorded actions.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 gymnasium==0.29.1 ale-py==0.12.1 opencv-python-headless==4.14.0.94
    peers/bin/pip install tyro tensorboard
    peers/bin/python tests/parity/make_atari_numbers.py cleanrl

The environment is `make_env` of ppo_atari.py, its number of no-ops fixed, stepped through the ends of its episodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

NOOPS, EVERY = 7, 50
STEPS = {"breakout": 1000, "pong": 1600}  # a few games, and more than one


def actions(game: str, num_actions: int) -> list[int]:
    """RandomState's streams are frozen."""
    return np.random.RandomState(zlib.crc32(game.encode())).randint(num_actions, size=STEPS[game]).tolist()


class Record:
    """What was seen: checksums of all observations so far, every reward that is not 0, ends and whole games."""

    def __init__(self, first: np.ndarray) -> None:
        self.crc, self.steps = 0, 0
        self.numbers: dict[str, list[Any]] = {"checksums": [], "rewards": [], "ends": [], "games": []}
        self.see(first)

    def see(self, obs: np.ndarray) -> None:
        self.crc = zlib.crc32(np.ascontiguousarray(obs, np.uint8).tobytes(), self.crc)

    def step(self, next_obs: np.ndarray, reward: float, done: bool, obs: np.ndarray, score: float | None) -> None:
        """`score` where a whole game ended."""
        self.steps += 1
        self.see(next_obs)
        if reward:
            self.numbers["rewards"].append([self.steps, int(reward)])
        if done:
            self.numbers["ends"].append(self.steps)
            self.see(obs)
        if score is not None:
            self.numbers["games"].append([self.steps, int(score)])
        if self.steps % EVERY == 0:
            self.numbers["checksums"].append(self.crc)


def cleanrl(game: str) -> dict[str, Any]:
    from cleanrl.ppo_atari import make_env

    env = make_env(f"{game.title()}NoFrameskip-v4", 0, False, "")()
    layer = env
    while type(layer).__name__ != "NoopResetEnv":
        layer = layer.env
    layer.override_num_noops = NOOPS
    record = Record(np.asarray(env.reset(seed=1)[0]))
    for action in actions(game, env.action_space.n):
        next_obs, reward, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        obs = env.reset()[0] if done else next_obs
        score = float(info["episode"]["r"]) if "episode" in info else None
        record.step(np.asarray(next_obs), reward, done, np.asarray(obs), score)
    return record.numbers


def main() -> None:
    import gymnasium

    checkout = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(checkout))
    for game in STEPS:  # ale_py registers its ids with Gymnasium 1 only; these are its arguments
        kwargs = {"game": game, "repeat_action_probability": 0.0, "full_action_space": False, "frameskip": 1}
        kwargs["max_num_frames_per_episode"] = 108_000
        gymnasium.register(f"{game.title()}NoFrameskip-v4", entry_point="ale_py.env:AtariEnv", kwargs=kwargs)
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    packages = ("numpy", "gymnasium", "ale-py", "opencv-python-headless")
    numbers: dict[str, Any] = {"versions": {"cleanrl": commit} | {name: version(name) for name in packages}}
    numbers |= {game: cleanrl(game) for game in STEPS}
    target = Path(__file__).resolve().with_name("atari_numbers.json")
    target.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
