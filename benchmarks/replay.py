"""Sampling from and adding to the replay here, in Stable-Baselines3 and in TorchRL, in turn in one process.

    python -m benchmarks.replay --save benchmarks/results/replay.json

All hold the same number of transitions of random content, are full, and give torch tensors. What is measured draws the
indices, and sets new priorities of the batch where it is prioritized. Transitions are added ten at a time, which are
DQN's env steps between two gradient steps; Stable-Baselines3 takes them one by one.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from rich.table import Table
from stable_baselines3.common.buffers import ReplayBuffer
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictPrioritizedReplayBuffer, TensorDictReplayBuffer

from benchmarks.report import machine, publish
from rl_lab.replay import Replay, Spec, draw_uniform

ADDED = 10  # transitions at a time
ALPHA, BETA = 0.6, 0.4  # of prioritized replay [Schaul et al. 2016, Table 3]
PACKAGES = ("torch", "numpy", "stable-baselines3", "torchrl", "tensordict")
CONTENDERS = ("rl_lab", "Stable-Baselines3", "TorchRL")


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    seconds: float = 0.3
    """CPU seconds of a turn, at least"""
    slices: int = 9
    """turns of each"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


@dataclass(frozen=True)
class Case:
    """What is stored, and how many of it a batch has."""

    name: str
    obs: gym.spaces.Box
    action: gym.Space[Any]
    capacity: int
    batch_size: int

    @property
    def stack(self) -> int:
        return 4 if self.obs.dtype == np.uint8 else 0


def vectors(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1, 1, shape)


CASES = [
    Case("CartPole, 10,000", vectors(4), gym.spaces.Discrete(2), 10_000, 128),
    Case("HalfCheetah, 1,000,000", vectors(17), vectors(6), 1_000_000, 256),
    Case("Atari, 100,000", gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), gym.spaces.Discrete(4), 100_000, 32),
]


def stream(case: Case, length: int) -> dict[str, torch.Tensor]:
    """(length, 1, ...) steps of one environment, whose episodes have 40 of them."""
    case.obs.seed(0), case.action.seed(0)
    last = torch.arange(1, length + 1).unsqueeze(1) % 40 == 0
    steps = {
        name: torch.as_tensor(np.stack([case.obs.sample() for _ in range(length)])) for name in ("obs", "next_obs")
    }
    steps["actions"] = torch.as_tensor(np.stack([case.action.sample() for _ in range(length)]))
    steps = {name: x.unsqueeze(1) for name, x in steps.items()}
    return {**steps, "rewards": torch.ones(length, 1), "terminated": last, "truncated": torch.zeros_like(last)}


Calls = dict[str, Callable[[], object]]  # "sample" a batch, "add" ADDED transitions


def ours(case: Case, prioritized: bool) -> Calls:
    """This package's replay, as training has it."""
    steps, priorities = stream(case, ADDED * 20), torch.rand(1, case.batch_size)
    spec: Spec = {name: (tuple(x.shape[2:]), x.dtype) for name, x in steps.items()}
    alpha = ALPHA if prioritized else 0.0
    replay = Replay(spec, 1, 1, case.capacity, 0.99, alpha=alpha, stack=case.stack, compile=True)
    for _ in range(2 * case.capacity // len(steps["rewards"])):
        replay.add(steps)
    generators, ten = [torch.Generator()], {name: x[-ADDED:] for name, x in steps.items()}

    def sample() -> None:
        batch = replay.sample(draw_uniform((case.batch_size,), generators), BETA)
        if prioritized:
            replay.prioritize(batch["leaves"], priorities)

    return {"sample": sample, "add": lambda: replay.add(ten)}


def stable_baselines3(case: Case) -> Calls:
    """Its uniform buffer; images without a copy of the next observation, as CleanRL takes them."""
    flags = {"optimize_memory_usage": bool(case.stack), "handle_timeout_termination": not case.stack}
    buffer = ReplayBuffer(case.capacity, case.obs, case.action, "cpu", **flags)
    steps = {name: x.numpy() for name, x in stream(case, ADDED).items()}
    rows = [[steps[name][t] for name in ("obs", "next_obs", "actions", "rewards", "terminated")] for t in range(ADDED)]
    buffer.observations[:] = steps["obs"][0]  # touched, as a full one's memory is
    if not case.stack:
        buffer.next_observations[:] = steps["next_obs"][0]

    def add() -> None:
        for row in rows:
            buffer.add(*row, [{}])

    for _ in range(100):
        add()
    buffer.full = True
    return {"sample": lambda: buffer.sample(case.batch_size), "add": add}


def torchrl(case: Case, prioritized: bool) -> Calls:
    """Its buffer of tensor dictionaries in memory."""
    steps, priorities = stream(case, ADDED * 20), torch.rand(case.batch_size)
    columns = {name: steps[name].squeeze(1) for name in steps}
    successor = {"observation": columns["next_obs"], "reward": columns["rewards"].unsqueeze(1)}
    successor |= {name: columns[name].unsqueeze(1) for name in ("terminated", "truncated")}
    data = TensorDict(
        {
            "observation": columns["obs"],
            "action": columns["actions"],
            "next": TensorDict(successor, len(columns["obs"])),
        },
        len(columns["obs"]),
    )
    shared = {"storage": LazyTensorStorage(case.capacity), "batch_size": case.batch_size}
    kind = TensorDictPrioritizedReplayBuffer if prioritized else TensorDictReplayBuffer
    buffer = kind(**shared, **({"alpha": ALPHA, "beta": BETA} if prioritized else {}))
    for _ in range(case.capacity // len(data) + 1):
        buffer.extend(data)
    ten = data[:ADDED].clone()

    def sample() -> None:
        batch = buffer.sample()
        if prioritized:
            batch["td_error"] = priorities
            buffer.update_tensordict_priority(batch)

    return {"sample": sample, "add": lambda: buffer.extend(ten)}


def speed(call: Callable[[], object], seconds: float) -> float:
    """Calls per CPU-second over a turn."""
    calls, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < seconds:
        for _ in range(10):
            call()
        calls += 10
    return calls / spent


def measure(flags: Flags) -> dict[str, Any]:
    """Speeds by row of the table, of every turn of every contender."""
    results: dict[str, dict[str, list[float]]] = {}
    for case in CASES:
        for prioritized in (False, True):
            field = {"rl_lab": ours(case, prioritized), "TorchRL": torchrl(case, prioritized)}
            if not prioritized:
                field["Stable-Baselines3"] = stable_baselines3(case)
            kind = "prioritized" if prioritized else "uniform"
            for act, scale in (("sample", 1), ("add", ADDED)):
                speeds: dict[str, list[float]] = {name: [] for name in field}
                for turn in range(flags.slices + 1):  # the first is warm-up
                    for name, calls in field.items():
                        found = scale * speed(calls[act], flags.seconds)
                        speeds[name] += [found] if turn else []
                unit = f"batches of {case.batch_size}" if act == "sample" else "transitions added"
                results[f"{case.name}, {kind}: {unit}"] = speeds
            del field
    return {
        "results": results,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> Table:
    """The result for people: medians, and the medians of our ratio to each peer in the same turn."""
    found = Table("", title="Replay: batches, or transitions added, per CPU-second of one thread")
    for column in (*CONTENDERS, *(f"× {peer}" for peer in CONTENDERS[1:])):
        found.add_column(column, justify="right")
    for name, speeds in report["results"].items():
        medians = [f"{statistics.median(speeds[c]):,.0f}" if c in speeds else "–" for c in CONTENDERS]
        ratios = []
        for peer in CONTENDERS[1:]:
            pairs = zip(speeds["rl_lab"], speeds.get(peer, []), strict=False)
            ratios.append(f"{statistics.median(a / b for a, b in pairs):.2f}" if peer in speeds else "–")
        found.add_row(name, *medians, *ratios)
    return found


def main() -> None:
    """Parse, measure, print and save."""
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(1)
    report = measure(flags)
    publish(report, [table(report)], ("versions", "machine"), flags.save, width=140)


if __name__ == "__main__":
    main()
