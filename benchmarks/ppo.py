"""PPO here, in Stable-Baselines3 and in CleanRL, side by side: env steps per CPU-second, and time to result.

    python -m benchmarks.ppo --env HalfCheetah-v4 --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python

Each contender is an ordinary training process, logging as it always does, stopped (SIGSTOP) except while it is its
turn: all train one slice, then all the next, so that a slow minute of the machine falls on all of them. Every one
prints a line "SPS: ..." after an iteration; these lines mark how far it is, and the kernel's clock of the process what
that cost. The first iteration is warm-up. README.md here says what the numbers mean.
"""

from __future__ import annotations

import atexit
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from rl_lab.algorithms.ppo import Args, defaults

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "stable-baselines3", "tensorboard")


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
    """agents of the contender that trains many at once"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


@dataclass(frozen=True)
class Contender:
    """A training command: `seeds` agents, `batch` env steps of each in an iteration."""

    name: str
    command: list[str]
    cwd: Path
    batch: int
    seeds: int = 1


class Trainee:
    """The process of a contender, stopped except in `advance` and `finish`; `wall` counts the seconds it may run."""

    def __init__(self, contender: Contender, environ: dict[str, str]) -> None:
        self.contender, self.iteration, self.wall = contender, 0, 0.0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the object)
        self._begin = time.perf_counter()
        self.process = subprocess.Popen(
            contender.command, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=contender.cwd, env=environ
        )
        atexit.register(self.process.kill)  # a stopped process would stay; one that has ended is left alone
        assert self.process.stdout is not None
        self._lines = self.process.stdout

    def advance(self, iteration: int) -> float:
        """Run to the end of this iteration, counted from 1; return the CPU seconds of the process so far."""
        self._continue()
        while self.iteration < iteration:
            if not (line := self._lines.readline()):
                self.finish()
                raise RuntimeError(f"{self.contender.name} ended after {self.iteration} of {iteration} iterations")
            self.iteration += line.startswith("SPS:")
        # The CPU clock of another process: clock_getcpuclockid(3), by the kernel's encoding of process ids.
        cpu = time.clock_gettime((~self.process.pid << 3) | 2)
        self.process.send_signal(signal.SIGSTOP)
        self.wall += time.perf_counter() - self._begin
        self._begin = 0.0
        return cpu

    def finish(self) -> dict[str, float]:
        """Let it end; return the seconds of the whole process, with those of the compilers it has called."""
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


def contenders(args: Args, flags: Flags, steps: int, runs: Path) -> list[Contender]:
    """Everyone's command for `steps` env steps a seed, with logs in `runs`."""
    batch, shared = args.num_envs * args.num_steps, ["--total-timesteps", str(steps)]
    ours = [sys.executable, "-m", "benchmarks.ppo_ours", "--env", args.env, "--runs-dir", str(runs), *shared]
    fields = asdict(args) | {"total_timesteps": steps, "runs_dir": str(runs)}
    sb3 = [sys.executable, "-m", "benchmarks.ppo_sb3", json.dumps(fields, default=str)]
    found = [Contender("rl_lab", ours, ROOT, batch), Contender("Stable-Baselines3", sb3, ROOT, batch)]
    if flags.cleanrl and flags.cleanrl_python:
        script = flags.cleanrl.resolve() / "cleanrl" / ("ppo_continuous_action.py" if args.normalize else "ppo.py")
        python = str(flags.cleanrl_python.absolute())  # not resolved: a link to it would lose its venv
        found.append(Contender("CleanRL", [python, str(script), "--env-id", args.env, *shared], runs, batch))
    many = [*ours, "--seed", "101", "--num-seeds", str(flags.num_seeds)]  # run folders of its own
    return [*found, Contender(f"rl_lab, {flags.num_seeds} seeds", many, ROOT, batch, flags.num_seeds)]


def race(field: list[Contender], environ: dict[str, str], iterations: int, slices: int) -> dict[str, dict[str, Any]]:
    """Train all contenders in turn; per name, `slices` steps per CPU-second and seconds of the whole run."""
    ends = [1 + round(i * (iterations - 2) / slices) for i in range(slices + 1)]  # a process at its end has no clock
    trainees, clocks, starts, results = [], [], [], {}
    for contender in field:
        trainees.append(Trainee(contender, environ))
        clocks.append([trainees[-1].advance(ends[0])])
        starts.append(trainees[-1].wall)
    for end in ends[1:]:
        for trainee, clock in zip(trainees, clocks, strict=True):
            clock.append(trainee.advance(end))
    for trainee, clock, start in zip(trainees, clocks, starts, strict=True):
        seeds, turns = trainee.contender.seeds, zip(itertools.pairwise(ends), itertools.pairwise(clock), strict=True)
        sps = [trainee.contender.batch * seeds * (b - a) / (after - before) for (a, b), (before, after) in turns]
        loop = {"cpu": clock[-1] - clock[0], "wall": trainee.wall - start}
        results[trainee.contender.name] = {"seeds": seeds, "sps": sps, "loop": loop, "whole": trainee.finish()}
    return results


def measure(flags: Flags) -> dict[str, Any]:
    """Run the benchmark; ValueError if the flags do not fit."""
    if bool(flags.cleanrl) != bool(flags.cleanrl_python):
        raise ValueError("--cleanrl and --cleanrl-python go together: give both or neither")
    if not importlib.util.find_spec("stable_baselines3"):
        raise ValueError("Stable-Baselines3 is missing: pip install -c constraints.txt stable-baselines3")
    args = defaults(flags.env)
    batch = args.num_envs * args.num_steps
    budget, iterations = args.total_timesteps, (flags.steps or args.total_timesteps) // batch
    if iterations < flags.slices + 2:
        raise ValueError(f"--steps {flags.steps} must be at least {flags.slices + 2} iterations of {batch} steps")
    load, cpu = os.getloadavg(), re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        caches = {"RL_LAB_CACHE": f"{folder}/graphs", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        environ = os.environ | caches | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        short = {c.name: c for c in contenders(args, flags, batch, runs) if c.name.startswith("rl_lab")}
        compiling = {}  # what a cold cache costs: the same short run twice
        for name, contender in short.items():
            cold, warm = Trainee(contender, environ).finish(), Trainee(contender, environ).finish()
            compiling[name] = {clock: cold[clock] - warm[clock] for clock in cold}
        results = race(contenders(args, flags, iterations * batch, runs), environ, iterations, flags.slices)
    for name, result in results.items():
        rest = (budget // batch - iterations) / (iterations - 2)
        result["compile"] = compiling.get(name, {"cpu": 0.0, "wall": 0.0})
        result["warm"] = {c: result["whole"][c] + rest * result["loop"][c] for c in result["whole"]}
        result["cold"] = {c: result["warm"][c] + result["compile"][c] for c in result["warm"]}
    return {
        "env": flags.env,
        "steps": iterations * batch,
        "budget": budget,
        "results": results,
        "versions": versions(sys.executable, ROOT),
        "cleanrl": versions(str(flags.cleanrl_python), flags.cleanrl) if flags.cleanrl else None,
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()},
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


def main() -> None:
    """Parse, measure, print and save."""
    flags = tyro.cli(Flags, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # which runs what atexit has
    try:
        report = measure(flags)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    console = Console(width=None if sys.stdout.isatty() else 140, record=True)
    console.print(*tables(report))
    for name in ("versions", "cleanrl", "machine"):
        console.print(f"{name}: {json.dumps(report[name]) if report[name] else 'left out'}")
    if flags.save:
        flags.save.write_text(json.dumps(report, indent=1) + "\n")
        flags.save.with_suffix(".txt").write_text(console.export_text())


if __name__ == "__main__":
    main()
