"""Offline learning here and in d3rlpy, side by side: gradient steps per CPU-second, on a GPU per second.

    python3.11 -m venv ../d3rlpy
    ../d3rlpy/bin/pip install torch==2.13.0 d3rlpy==2.8.1
    python -m benchmarks.offline --d3rlpy-python ../d3rlpy/bin/python --save benchmarks/results/offline.json

Both learn from one D4RL file of random transitions in HalfCheetah's sizes (17 observations, 6 actions), with batches of
256, networks of 256-256 and the same hyper-parameters, one thread each, in turns (`race.py`). Neither plays episodes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import tyro
from rich.table import Table

from benchmarks import race
from benchmarks.report import machine, publish

ALGORITHMS = ("iql", "td3_bc", "cql", "bc")
TRANSITIONS, EPISODE, OBS, ACTIONS = 100_000, 1_000, 17, 6


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    d3rlpy_python: Path | None = None
    """interpreter with d3rlpy; without it d3rlpy is left out"""
    algorithms: tuple[str, ...] = ALGORITHMS
    """which ones"""
    steps: int = 600
    """gradient steps of one seed; of CQL a fifth"""
    slices: int = 5
    """turns of each contender"""
    num_seeds: int = 5
    """agents of the contender that trains many at once; 1 leaves it out"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where all learn; processors of the GPU have no clock of a process, so that its seconds are those of the clock"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


def write_data(path: Path) -> None:
    """A D4RL file of random content, episodes of equal length that end at time-outs."""
    random = np.random.default_rng(0)
    obs = random.standard_normal((TRANSITIONS + 1, OBS)).astype(np.float32)
    with h5py.File(path, "w") as file:
        file["observations"], file["next_observations"] = obs[:-1], obs[1:]
        file["actions"] = random.uniform(-1, 1, (TRANSITIONS, ACTIONS)).astype(np.float32)
        file["rewards"] = random.standard_normal(TRANSITIONS).astype(np.float32)
        file["terminals"] = np.zeros(TRANSITIONS, bool)
        file["timeouts"] = np.arange(1, TRANSITIONS + 1) % EPISODE == 0


def contenders(algo: str, flags: Flags, steps: int, mark: int, folder: Path) -> list[race.Contender]:
    """Ours with one seed and with many, and d3rlpy's; each marks every `mark` gradient steps."""
    data = folder / "halfcheetah-random-v2.hdf5"
    ours = [sys.executable, "-m", "benchmarks.ours", algo, "--dataset", str(data), "--runs-dir", str(folder / "runs")]
    ours += ["--total-timesteps", str(steps), "--log-every", str(mark), "--eval-every", "0", "--eval-episodes", "0"]
    ours += ["--device", flags.device]
    found = [race.Contender("rl_lab", ours, race.ROOT, mark)]
    if flags.d3rlpy_python:
        peer = str(Path(__file__).with_name("d3rlpy_peer.py"))
        python = [str(flags.d3rlpy_python.absolute()), "-P"]  # or profile.py beside it would stand for Python's own
        command = [*python, peer, algo, str(data), str(steps), str(mark), flags.device]
        found.append(race.Contender("d3rlpy", command, folder, mark))
    if flags.num_seeds > 1:
        many = [*ours, "--seed", "101", "--num-seeds", str(flags.num_seeds)]  # run folders of its own
        found.append(race.Contender(f"rl_lab, {flags.num_seeds} seeds", many, race.ROOT, mark, seeds=flags.num_seeds))
    return found


def measure(flags: Flags) -> dict[str, Any]:
    """Run the benchmark."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "halfcheetah-random-v2.hdf5")
        environ = os.environ | {"RL_LAB_CACHE": f"{name}/graphs", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for algo in flags.algorithms:
            steps = flags.steps // 5 if algo == "cql" else flags.steps
            mark = steps // (flags.slices + 2)  # the first is warm-up; a process at its end has no clock
            ends = [mark * (i + 1) for i in range(flags.slices + 1)]
            found[algo] = race.race(
                contenders(algo, flags, mark * (flags.slices + 2), mark, folder), environ, ends, flags.device
            )
    peer = race.versions(str(flags.d3rlpy_python), race.ROOT) if flags.d3rlpy_python else None
    return {
        "results": found,
        "versions": race.versions(sys.executable, race.ROOT),
        "d3rlpy": peer,
        "machine": machine(flags.device),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> Table:
    """Gradient steps per CPU-second of all agents together, and how many times d3rlpy's."""
    seconds = "second on the GPU" if "gpu" in report["machine"] else "CPU-second"
    shown = Table("", title=f"gradient steps per {seconds}, median (least to most); × d3rlpy")
    names = list(next(iter(report["results"].values())))
    for name in names:
        shown.add_column(name, justify="right")
    for algo, results in report["results"].items():
        cells = []
        for name in names:
            sps = results[name]["sps"]
            cell = f"{np.median(sps):,.1f} ({min(sps):,.1f} to {max(sps):,.1f})"
            if "d3rlpy" in results and name != "d3rlpy":
                cell += f"; {np.median(np.divide(sps, results['d3rlpy']['sps'])):.2f} ×"
            cells.append(cell)
        shown.add_row(algo, *cells)
    return shown


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    if unknown := set(flags.algorithms) - set(ALGORITHMS):
        raise SystemExit(f"--algorithms {' '.join(sorted(unknown))}: known are {' '.join(ALGORITHMS)}")
    try:
        report = measure(flags)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    publish(report, [table(report)], ("versions", "d3rlpy", "machine"), flags.save, 140)


if __name__ == "__main__":
    main()
