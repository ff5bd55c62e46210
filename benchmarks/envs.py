"""Env steps per CPU-second of the native environments beside Gymnasium's own, stepped in turn in one process.

    python -m benchmarks.envs --envs CartPole-v1 HalfCheetah-v4 --num-envs 1 8 64

Random actions drawn beforehand, episodes reset where they end, no policy and no logging. Classic control runs here as a
rollout runs it, 128 steps in one compiled graph; MuJoCo's tasks and Atari are stepped from Python on one thread. Of
Gymnasium's SyncVectorEnv and, where it has one (CartPole-v1), its own vector implementation, the faster one counts. For
Atari (`--envs BreakoutNoFrameskip-v4`) it is ale_py's own vector environment, on one thread: it does less, as it
makes its images grey before it resizes them, and shows other frames than CleanRL's wrappers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rl_lab.compiler import Compiled, scan
from rl_lab.envs import make
from rl_lab.vector import State, TensorEnv

STEPS = 128  # of each environment, in one call of what is measured


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    envs: tuple[str, ...] = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "HalfCheetah-v4", "Hopper-v4")
    """environment ids of Gymnasium that have a native implementation"""
    num_envs: tuple[int, ...] = (1, 8, 64)
    """environments side by side"""
    seconds: float = 0.5
    """CPU seconds of a turn, at least"""
    slices: int = 5
    """turns of each"""


def native(env_id: str, num_envs: int, actions: Tensor) -> Callable[[], object]:
    """A function that takes STEPS steps in each of the native environments; actions (STEPS, num_envs, ...)."""
    env = make(env_id, (0,), num_envs, backend="native")
    env.reset()
    if not isinstance(env, TensorEnv):
        return lambda: [env.step(row) for row in actions]

    def step(state: State, actions: Tensor) -> tuple[State, tuple[Tensor, ...]]:
        state, result = env.dynamics(state, actions)
        return state, tuple(result)

    compiled = Compiled(partial(scan, step), ("benchmarks.envs", env.key))

    def run() -> None:
        env.state, _ = compiled(env.state, actions)

    return run


def original(env_id: str, num_envs: int, actions: Tensor, mode: str) -> Callable[[], object]:
    """The same of Gymnasium's environments, vectorised by its `mode`; of Atari's, ale_py's."""
    if env_id.endswith("NoFrameskip-v4"):
        from ale_py import AtariVectorEnv

        env = AtariVectorEnv(gym.spec(env_id).kwargs["game"], num_envs, num_threads=1, episodic_life=True)
    else:
        env = gym.make_vec(env_id, num_envs, mode)
    env.reset(seed=0)
    rows = list(actions.numpy())
    return lambda: [env.step(row) for row in rows]


def sps(run: Callable[[], object], num_envs: int, seconds: float) -> float:
    """Env steps per CPU-second over a turn."""
    calls, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        run()
        calls += 1
    return calls * STEPS * num_envs / spent


def main() -> None:
    """Parse, measure and print."""
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(1)
    table = Table("", "envs", title="Env steps per CPU-second: medians, and median of the ratios")
    for column in ("native", "Gymnasium", "×"):
        table.add_column(column, justify="right")
    for env_id in flags.envs:
        for num_envs in flags.num_envs:
            space = make(env_id, (0,), 1).action_space
            space.seed(0)
            actions = torch.as_tensor(np.stack([[space.sample() for _ in range(num_envs)] for _ in range(STEPS)]))
            modes = ["sync"] if gym.spec(env_id).vector_entry_point is None else ["sync", "vector_entry_point"]
            runs = [native(env_id, num_envs, actions), *(original(env_id, num_envs, actions, m) for m in modes)]
            for run in runs:
                run()  # warm-up, and compilation
            turns = [[sps(run, num_envs, flags.seconds) for run in runs] for _ in range(flags.slices)]
            ours, *theirs = zip(*turns, strict=True)
            peer = max(theirs, key=statistics.median)
            ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
            speeds = (f"{statistics.median(x):,.0f}" for x in (ours, peer))
            table.add_row(env_id, str(num_envs), *speeds, f"{ratio:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
