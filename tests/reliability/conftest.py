"""Training commands in processes of their own that start in milliseconds, so that many can be stopped and killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# It imports what takes seconds, computes nothing (a fork after that may hang), and forks a child for each request.
SERVER = """
import json, os, runpy, sys, traceback
import torch._dynamo, {modules}
for request in sys.stdin:
    algo, flags, before, output = json.loads(request)
    if (pid := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, status = [algo, *flags], 1
        try:
            exec(before, {})
            runpy.run_module(f"rl_lab.{algo}", run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)  # the interpreter would take a second to tidy up
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

# Ten iterations of 32 steps, checkpoints after each third or fourth.
SHARED = "--no-compile --device cpu --total-timesteps 320 --num-envs 2 --checkpoint-every 100"
REPLAY = "--log-every 32 --buffer-size 100 --learning-starts 64 --train-frequency 4 --batch-size 8"
DATA = "--no-compile --device cpu --total-timesteps 320 --log-every 32 --batch-size 8 --checkpoint-every 32"
TINY = {
    "ppo": f"{SHARED} --num-steps 16 --num-minibatches 2 --update-epochs 2",
    "dqn": f"{SHARED} {REPLAY} --target-network-frequency 16",
    "c51": f"{SHARED} {REPLAY} --target-network-frequency 16",
    "rainbow": f"{SHARED} {REPLAY} --target-network-frequency 16",
    "sac": f"{SHARED} {REPLAY} --train-frequency 16",
    "td3": f"{SHARED} {REPLAY} --train-frequency 16",
    "iql": f"{DATA} --eval-every 96 --eval-episodes 2",
    "td3_bc": f"{DATA} --eval-every 96 --eval-episodes 2",
}


@dataclass
class Ended:
    """What a command left: its exit status (negative for the signal that killed it), and what it printed."""

    status: int
    out: str
    err: str


class Lab:
    """Runs `python -m rl_lab.ALGO`, one process at a time."""

    def __init__(self, output: Path, modules: str) -> None:
        self._output = output
        code = SERVER.replace("{modules}", modules)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)

    def start(self, *flags: object, before: str = "", algo: str = "ppo") -> int:
        """Start the command after some Python statements and return its process id; `wait` comes next."""
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps((algo, [*map(str, flags)], before, str(self._output))) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> Ended:
        assert self.server.stdout
        status = int(self.server.stdout.readline())
        return Ended(status, *((self._output / name).read_text() for name in ("out", "err")))

    def run(self, *flags: object, before: str = "", algo: str = "ppo") -> Ended:
        self.start(*flags, before=before, algo=algo)
        return self.wait()

    def train(self, runs_dir: Path, *flags: object, before: str = "", algo: str = "ppo") -> Ended:
        """A new run of a few hundred steps."""
        return self.run("--runs-dir", runs_dir, *TINY[algo].split(), *flags, before=before, algo=algo)

    def trained(self, runs_dir: Path, *flags: object, before: str = "", algo: str = "ppo") -> list[Path]:
        """The same, to its end: its run folders."""
        ended = self.train(runs_dir, *flags, before=before, algo=algo)
        assert (ended.status, ended.err) == (0, "")
        return self.folders(runs_dir)

    @staticmethod
    def folders(runs_dir: Path) -> list[Path]:
        """The run folders in `runs_dir`, in the order of their seeds."""
        return sorted(runs_dir.iterdir(), key=lambda folder: int(folder.name.split("__")[2]))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from _open(Lab(tmp_path_factory.mktemp("output"), "rl_lab.algorithms.ppo, rl_lab.envs.mujoco"))


@pytest.fixture(scope="module")
def language_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab that has transformers loaded."""
    pytest.importorskip("transformers")
    methods = [f"rl_lab.preference.{name}" for name in ("dpo", "kto", "grpo")]
    modules = ", ".join([*methods, "transformers.models.llama.modeling_llama"])
    yield from _open(Lab(tmp_path_factory.mktemp("output"), modules))


def _open(lab: Lab) -> Iterator[Lab]:
    yield lab
    assert lab.server.stdin
    lab.server.stdin.close()
    lab.server.wait()
