"""Training here, in Stable-Baselines3 and in CleanRL, side by side: env steps per CPU-second, and time to result.

Each contender is an ordinary training process, logging as it always does, stopped (SIGSTOP) except while it is its
turn: all train one slice, then all the next, so that a slow minute of the machine falls on all of them. Every one
prints lines "SPS: ..." at known env steps; these mark how far it is, and the kernel's clock of the process what that
cost. The steps before the first slice are warm-up. README.md here says what the numbers mean.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from benchmarks.report import machine, publish

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "numpy", "gymnasium", "mujoco", "ale-py", "stable-baselines3", "d3rlpy", "tensorboard", "transformers",
    "trl",
)  # fmt: skip


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    env: str = "CartPole-v1"
    """environment id of Gymnasium, for all"""
    cleanrl: Path | None = None
    """checkout of CleanRL; without it CleanRL is left out"""
    cleanrl_python: Path | None = None
    """interpreter with what its scripts need"""
    steps: int | None = None
    """env steps of one seed; None for CleanRL's budget, which time to result is extrapolated to from fewer"""
    slices: int = 5
    """turns of each contender"""
    num_seeds: int = 10
    """agents of the contender that trains many at once; 1 leaves it out"""
    settings: tuple[str, ...] = ()
    """NAME=NUMBER each, for everyone, where not the defaults, as num_envs=1024"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""

    @property
    def changed(self) -> dict[str, int]:
        """The settings."""
        return {name: int(number) for name, _, number in (word.partition("=") for word in self.settings)}


@dataclass(frozen=True)
class Contender:
    """A training command of `seeds` agents. Its lines mark env steps first + batch, first + 2 * batch, ... of each."""

    name: str
    command: list[str]
    cwd: Path
    batch: int
    first: int = 0
    seeds: int = 1


Contenders = Callable[[Any, Flags, int, Path], list[Contender]]


def field(
    algo: str,
    script: str,
    args: Any,
    flags: Flags,
    steps: int,
    runs: Path,
    batch: int,
    cleanrl: tuple[int, int],
    more: dict[str, int] | None = None,
) -> list[Contender]:
    """Ours with one seed and with many, Stable-Baselines3's and CleanRL's `script`; logs go to `runs`.

    Of Atari games without Stable-Baselines3, whose wrappers are CleanRL's.

    Args:
        batch: env steps between our marks, and Stable-Baselines3's.
        cleanrl: env steps between CleanRL's marks, and the one that these are counted from.
        more: settings of `args` that are not the defaults; CleanRL's flags have the same names.
    """
    shared = [f"--{name.replace('_', '-')}={x}" for name, x in {"total_timesteps": steps, **(more or {})}.items()]
    ours = [sys.executable, "-m", "benchmarks.ours", algo, "--env", args.env, "--runs-dir", str(runs), *shared]
    fields = asdict(args) | {"total_timesteps": steps, "runs_dir": str(runs), "mark_every": batch}
    found = [Contender("rl_lab", ours, ROOT, batch)]
    if not atari(args.env):
        sb3 = [sys.executable, "-m", "benchmarks.sb3", algo, json.dumps(fields, default=str)]
        found.append(Contender("Stable-Baselines3", sb3, ROOT, batch))
    if flags.cleanrl and flags.cleanrl_python:
        checkout, python = flags.cleanrl.resolve(), flags.cleanrl_python.absolute()  # a link resolved loses its venv
        command = ["env", f"PYTHONPATH={checkout}", str(python), str(checkout / "cleanrl" / script)]
        found.append(Contender("CleanRL", [*command, "--env-id", args.env, *shared], runs, *cleanrl))
    if flags.num_seeds > 1:
        many = [*ours, "--seed", "101", "--num-seeds", str(flags.num_seeds)]  # run folders of its own
        found.append(Contender(f"rl_lab, {flags.num_seeds} seeds", many, ROOT, batch, seeds=flags.num_seeds))
    return found


def atari(env: str) -> str:
    """What CleanRL's scripts for this environment have in their names."""
    return "_atari" if env.endswith("NoFrameskip-v4") else ""


class Trainee:
    """The process of a contender, stopped except in `advance` and `finish`.

    Attributes:
        wall: seconds it was allowed to run.
        memory: the most bytes it has held until the last mark.
    """

    def __init__(self, contender: Contender, environ: dict[str, str]) -> None:
        self.contender, self.step, self.wall, self.memory = contender, contender.first, 0.0, 0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the object)
        self._begin = time.perf_counter()
        self.process = subprocess.Popen(
            contender.command, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=contender.cwd, env=environ
        )
        atexit.register(self.process.kill)  # a stopped process would stay; one that has ended is left alone
        assert self.process.stdout is not None
        self._lines = self.process.stdout

    def advance(self, step: int) -> dict[str, float]:
        """Run to this env step, which must be marked; return the seconds of the process so far, as `finish` does."""
        self._continue()
        while self.step < step:
            if not (line := self._lines.readline()):
                self.finish()
                raise RuntimeError(f"{self.contender.name} ended at step {self.step} of {step}")
            self.step += self.contender.batch * line.startswith("SPS:")
        # The CPU clock of another process: clock_getcpuclockid(3), by the kernel's encoding of process ids.
        cpu = time.clock_gettime((~self.process.pid << 3) | 2)
        self.process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        self.memory = 1024 * int(status.partition("VmHWM:")[2].split()[0])
        self.wall += time.perf_counter() - self._begin
        self._begin = 0.0
        return {"cpu": cpu, "wall": self.wall}

    def finish(self) -> dict[str, float]:
        """Let it end; return its CPU and wall seconds, with those of the compilers it has called."""
        self._continue()
        self._lines.read()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.wall += time.perf_counter() - self._begin
        if self.process.returncode:
            self._errors.seek(0)
            raise RuntimeError(f"{self.contender.name} failed:\n{self._errors.read()[-2000:]}")
        return {"cpu": usage.ru_utime + usage.ru_stime, "wall": self.wall}

    def _continue(self) -> None:
        if not self._begin:
            self._begin = time.perf_counter()
            self.process.send_signal(signal.SIGCONT)


def race(
    field: list[Contender], environ: dict[str, str], ends: list[int], device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """Train all contenders in turns that end at these env steps, the first of which are warm-up.

    Returns:
        by name, steps per CPU-second of each turn, on a GPU per second, and seconds of the turns and of the whole run.
    """
    trainees, clocks, results, counted = [], [], {}, "wall" if device == "cuda" else "cpu"
    for contender in field:
        trainees.append(Trainee(contender, environ))
        clocks.append([trainees[-1].advance(ends[0])])
    for end in ends[1:]:
        for trainee, clock in zip(trainees, clocks, strict=True):
            clock.append(trainee.advance(end))
    for trainee, clock in zip(trainees, clocks, strict=True):
        seeds, turns = trainee.contender.seeds, zip(itertools.pairwise(ends), itertools.pairwise(clock), strict=True)
        sps = [seeds * (b - a) / (after[counted] - before[counted]) for (a, b), (before, after) in turns]
        loop = {name: clock[-1][name] - clock[0][name] for name in clock[0]}
        results[trainee.contender.name] = {"seeds": seeds, "sps": sps, "loop": loop, "whole": trainee.finish()}
    return results


def measure(flags: Flags, args: Any, contenders: Contenders, batch: int, first: int) -> dict[str, Any]:
    """Run the benchmark; ValueError if the flags do not fit.

    Args:
        args: our defaults for the environment.
        contenders: everyone's command for a number of env steps a seed, with logs in a folder.
        batch: env steps between which all contenders have marks.
        first: env step of the first turn's start.
    """
    if bool(flags.cleanrl) != bool(flags.cleanrl_python):
        raise ValueError("--cleanrl and --cleanrl-python go together: give both or neither")
    if not importlib.util.find_spec("stable_baselines3"):
        raise ValueError("Stable-Baselines3 is missing: pip install -c constraints.txt stable-baselines3")
    budget, marks = args.total_timesteps, ((flags.steps or args.total_timesteps) - first) // batch
    if marks < flags.slices + 1:
        raise ValueError(f"--steps {flags.steps} must be at least {first + (flags.slices + 1) * batch}")
    # A process at its end has no clock, so the last turn ends before.
    ends = [first + batch * round(i * (marks - 1) / flags.slices) for i in range(flags.slices + 1)]
    steps = first + marks * batch
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        caches = {"RL_LAB_CACHE": f"{folder}/graphs", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        environ = os.environ | caches | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        short = {c.name: c for c in contenders(args, flags, first, runs) if c.name.startswith("rl_lab")}
        compiling = {}  # what a cold cache costs: the same short run twice
        for name, contender in short.items():
            cold, warm = Trainee(contender, environ).finish(), Trainee(contender, environ).finish()
            compiling[name] = {clock: cold[clock] - warm[clock] for clock in cold}
        results = race(contenders(args, flags, steps, runs), environ, ends)
    for name, result in results.items():
        rest = (budget - steps) / (ends[-1] - ends[0])
        result["compile"] = compiling.get(name, {"cpu": 0.0, "wall": 0.0})
        result["warm"] = {c: result["whole"][c] + rest * result["loop"][c] for c in result["whole"]}
        result["cold"] = {c: result["warm"][c] + result["compile"][c] for c in result["warm"]}
    return {
        "env": ", ".join((flags.env, *flags.settings)),
        "steps": steps,
        "budget": budget,
        "results": results,
        "versions": versions(sys.executable, ROOT),
        "cleanrl": versions(str(flags.cleanrl_python), flags.cleanrl) if flags.cleanrl else None,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def versions(python: str, checkout: Path) -> dict[str, str]:
    """Versions of Python and PACKAGES as this interpreter has them, and the commit of the checkout."""
    code = "import importlib.metadata as m, json, platform; names = {d.name.lower() for d in m.distributions()}; "
    code += f"v = {{p: m.version(p) for p in {PACKAGES} if p in names or p.replace('-', '_') in names}}; "
    code += "print(json.dumps({'python': platform.python_version(), **v}))"
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)
    commit = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    return found | {"commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip()}


def tables(report: dict[str, Any]) -> list[Table]:
    """The result for people: speed, and time to result, with ratios per seed."""
    results, budget = report["results"], report["budget"]
    peers = [name for name in results if not name.startswith("rl_lab")]
    title = f"{report['env']}, {report['steps']:,} steps: env steps per CPU-second, start left out"
    speed = _table(title, "median", "least", "most", *(f"× {peer}" for peer in peers))
    for name, result in results.items():
        sps = result["sps"]
        pairs = [zip(sps, results[peer]["sps"], strict=True) for peer in peers]
        ratios = [f"{statistics.median(a / b for a, b in pair):.2f}" for pair in pairs]
        speed.add_row(name, *(f"{x:,.0f}" for x in (statistics.median(sps), min(sps), max(sps))), *ratios)
    how = "" if report["steps"] > 0.99 * budget else f", extrapolated from {report['steps']:,}"
    title = f"CPU and wall seconds to the result of {budget:,} steps, start and logs included{how}"
    whole = _table(title, "compile", "warm: CPU", "wall", "cold: CPU", "wall", *(f"× {p}, warm / cold" for p in peers))
    for name, result in results.items():
        cpu = {start: result[start]["cpu"] for start in ("warm", "cold")}
        times = [result["compile"]["cpu"], *(x for start in cpu for x in (cpu[start], result[start]["wall"]))]
        work = {p: {start: result["seeds"] * results[p][start]["cpu"] for start in cpu} for p in peers}
        ratios = [" / ".join(f"{work[p][start] / cpu[start]:.2f}" for start in cpu) for p in peers]
        whole.add_row(name, *(f"{x:,.1f}" for x in times), *ratios)
    return [speed, whole]


def _table(title: str, *columns: str) -> Table:
    table = Table("", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def main(description: str, measured: Callable[[Flags], dict[str, Any]]) -> None:
    """Parse, measure, print and save."""
    flags = tyro.cli(Flags, description=description)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # which runs what atexit has
    try:
        report = measured(flags)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    width = None if sys.stdout.isatty() else 140
    publish(report, tables(report), ("versions", "cleanrl", "machine"), flags.save, width)
