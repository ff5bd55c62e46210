"""Env steps per CPU-second of the native environments beside Gymnasium's own and gymnax's, in turn in one process.

    python -m benchmarks.envs --envs CartPole-v1 HalfCheetah-v4 --num-envs 1 8 64

Random actions drawn beforehand, episodes reset where they end, no policy and no logging. Environments on tensors run
here as a rollout runs them, 128 steps in one compiled graph; MuJoCo's tasks and Atari are stepped from Python on one
thread.
Of Gymnasium's SyncVectorEnv and, where it has one (CartPole-v1), its own vector implementation, the faster one counts.
gymnax, where it is installed, likewise compiles 128 steps, and hands out observations, rewards and ends. For
Atari (`--envs BreakoutNoFrameskip-v4`) the peers are ale_py's own vector environment and, where it is installed,
EnvPool, on one thread each: they do less, as they make images grey before they take the maximum of two, and show other
frames than CleanRL's wrappers.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.table import Table
from torch import Tensor

from benchmarks.report import machine, publish
from rl_lab.compiler import Compiled, scan
from rl_lab.envs import make
from rl_lab.vector import State, TensorEnv

STEPS = 128  # of each environment, in one call of what is measured
GYMNAX = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0")


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
    device: Literal["cpu", "cuda"] = "cpu"
    """of the native environments; on a GPU all figures are steps per second of wall time, as it does the work"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


def native(env_id: str, num_envs: int, actions: Tensor) -> Callable[[], object]:
    """A function that takes STEPS steps in each of the native environments; actions (STEPS, num_envs, ...)."""
    env = make(env_id, (0,), num_envs, actions.device, backend="native")
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


def envpool(env_id: str, num_envs: int, actions: Tensor) -> Callable[[], object]:
    """The same of EnvPool's games."""
    import envpool

    name = env_id.replace("NoFrameskip-v4", "-v5")
    env = envpool.make_gymnasium(name, num_envs=num_envs, num_threads=1, episodic_life=True, reward_clip=True)
    env.reset()
    rows = list(actions.numpy())
    return lambda: [env.step(row) for row in rows]


def gymnax(env_id: str, num_envs: int, actions: Tensor) -> Callable[[], object]:
    """The same of gymnax's."""
    import gymnax
    import jax

    env, params = gymnax.make(env_id)
    key = jax.random.key(0)
    states = jax.vmap(env.reset, (0, None))(jax.random.split(key, num_envs), params)[1]
    given = jax.numpy.asarray(actions.numpy())

    def step(carry: Any, actions: Any) -> Any:
        key, states = carry
        key, draw = jax.random.split(key)
        keys = jax.random.split(draw, num_envs)
        obs, states, rewards, *ends, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, states, actions, params)
        return (key, states), (obs, rewards, ends)

    steps = jax.jit(lambda carry: jax.lax.scan(step, carry, given))

    def run() -> None:
        nonlocal key, states
        (key, states), rows = steps((key, states))
        jax.block_until_ready(rows)

    return run


def gpu_time() -> float:
    """Wall seconds, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def sps(run: Callable[[], object], num_envs: int, seconds: float, clock: Callable[[], float]) -> float:
    """Env steps per second of the clock over a turn."""
    calls, begin = 0, clock()
    while (spent := clock() - begin) < seconds:
        run()
        calls += 1
    return calls * STEPS * num_envs / spent


def measure(flags: Flags) -> dict[str, Any]:
    """Speeds of every turn, by environment, number of environments, and contender."""
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    clock = gpu_time if flags.device == "cuda" else time.process_time
    for env_id in flags.envs:
        for num_envs in flags.num_envs:
            space = make(env_id, (0,), 1).action_space
            space.seed(0)
            actions = torch.as_tensor(np.stack([[space.sample() for _ in range(num_envs)] for _ in range(STEPS)]))
            own = gym.spec(env_id).vector_entry_point is not None
            modes = ["vector_entry_point"] * own + ["sync"] * (not own or num_envs <= 64)  # else minutes behind its own
            field = {"rl_lab": native(env_id, num_envs, actions.to(flags.device))}
            field |= {f"Gymnasium, {mode}": original(env_id, num_envs, actions, mode) for mode in modes}
            if env_id in GYMNAX and importlib.util.find_spec("gymnax"):
                field["gymnax"] = gymnax(env_id, num_envs, actions)
            if env_id.endswith("NoFrameskip-v4") and importlib.util.find_spec("envpool"):
                field["EnvPool"] = envpool(env_id, num_envs, actions)
            speeds: dict[str, list[float]] = {name: [] for name in field}
            for turn in range(flags.slices + 1):  # the first is warm-up, and compilation
                for name, run in field.items():
                    found = sps(run, num_envs, flags.seconds, clock)
                    speeds[name] += [found] if turn else []
            results.setdefault(env_id, {})[str(num_envs)] = speeds
    names = ["torch", "numpy", "gymnasium", "mujoco"]
    names += [name for name in ("ale_py", "envpool", "jax", "gymnax") if importlib.util.find_spec(name)]
    gpu = {"gpu": torch.cuda.get_device_name()} if flags.device == "cuda" else {}
    return {
        "results": results,
        "per": "second" if gpu else "CPU-second",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "machine": gpu | machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> Table:
    """The result for people: medians, and the medians of our ratio to each peer in the same turn."""
    found = Table("", "envs", title=f"Env steps per {report['per']}: medians, and medians of the ratios")
    for column in ("rl_lab", "Gymnasium or ale_py", "×", "gymnax or EnvPool", "×"):
        found.add_column(column, justify="right")
    for env_id, by_number in report["results"].items():
        for number, speeds in by_number.items():
            originals = [name for name in speeds if name.startswith("Gymnasium")]
            cells = [f"{statistics.median(speeds['rl_lab']):,.0f}"]
            other = next((name for name in ("gymnax", "EnvPool") if name in speeds), "")
            for peer in (max(originals, key=lambda name: statistics.median(speeds[name])), other):
                theirs = speeds.get(peer)
                ratio = theirs and statistics.median(a / b for a, b in zip(speeds["rl_lab"], theirs, strict=True))
                cells += [f"{statistics.median(theirs):,.0f}", f"{ratio:.2f}"] if theirs else ["–", "–"]
            found.add_row(env_id, f"{int(number):,}", *cells)
    return found


def main() -> None:
    """Parse, measure, print and save."""
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(1)
    report = measure(flags)
    publish(report, [table(report)], ("versions", "machine"), flags.save, width=110)


if __name__ == "__main__":
    main()
