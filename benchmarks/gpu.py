"""Training on a GPU: env steps per second of the commands below, their start and the capture of graphs left out.

    python -m benchmarks.gpu --save benchmarks/results/gpu.json

The commands train one after the other, each alone. Seconds are the clock's, between marks that the commands print.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.table import Table

from benchmarks import race
from benchmarks.report import machine, publish


@dataclass(frozen=True)
class Case:
    """A command and its marks, each so many env steps of every agent after the one before."""

    command: str
    steps: int
    warm_up: int
    """marks until what is captured has been, and all learn"""
    seeds: int = 1


BREAKOUT = "--env BreakoutNoFrameskip-v4 --bf16 --env-threads {cores}"
CASES = {
    "ppo-cartpole": Case("ppo --env CartPole-v1 --num-envs 4096 --num-steps 32 --total-timesteps 13107200", 131_072, 5),
    "ppo-breakout": Case(f"ppo {BREAKOUT} --num-envs 128 --total-timesteps 1638400", 16_384, 2),
    "dqn-breakout": Case(
        f"dqn {BREAKOUT} --num-seeds 32 --buffer-size 50000 --learning-starts 800 --log-every 400", 400, 4, seeds=32
    ),
    "sac-halfcheetah": Case("sac --env HalfCheetah-v4 --learning-starts 1000", 1_000, 2),
}


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    cases: tuple[str, ...] = tuple(CASES)
    """which ones"""
    cores: int = os.cpu_count() or 1
    """of the processor, for Atari's games"""
    turns: int = 4
    """marks to measure between"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


def measure(flags: Flags) -> dict[str, Any]:
    """Run the benchmark."""
    environ, found = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, {}
    for name in flags.cases:
        case = CASES[name]
        command = case.command.format(cores=flags.cores)
        with tempfile.TemporaryDirectory() as runs:
            more = ["--device", "cuda", "--checkpoint-every", "0", "--runs-dir", runs]
            words = [sys.executable, "-m", "benchmarks.ours", *command.split(), *more]
            trainee = race.Trainee(race.Contender(name, words, race.ROOT, case.steps), environ)
            ends = [case.steps * (case.warm_up + turn) for turn in range(flags.turns + 1)]
            clock = [trainee.advance(end)["wall"] for end in ends]
            trainee.process.kill()
            trainee.process.wait()
        sps = [case.seeds * case.steps / (after - before) for before, after in itertools.pairwise(clock)]
        found[name] = {"command": command, "sps": sps}
        print(f"{name}: {statistics.median(sps):,.0f} env steps/s", flush=True)
    return {
        "results": found,
        "versions": race.versions(sys.executable, race.ROOT),
        "machine": machine("cuda"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> Table:
    """Env steps per second of all agents together."""
    shown = Table("command, with --device cuda", "median", "least", "most", title="env steps per second")
    for result in report["results"].values():
        sps = result["sps"]
        shown.add_row(result["command"], *(f"{x:,.0f}" for x in (statistics.median(sps), min(sps), max(sps))))
    return shown


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    if unknown := set(flags.cases) - set(CASES):
        raise SystemExit(f"--cases {' '.join(sorted(unknown))}: known are {' '.join(CASES)}")
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU; the other benchmarks measure the CPU")
    try:
        report = measure(flags)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    publish(report, [table(report)], ("versions", "machine"), flags.save, 140)


if __name__ == "__main__":
    main()
