"""Ctrl-C and SIGTERM: the iteration is finished, checkpointed, and the way to go on is named."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from rl_lab import checkpoint

if TYPE_CHECKING:
    from tests.reliability.conftest import Lab

ROOT = Path(__file__).resolve().parents[2]

# Sends signals to itself while an iteration, counted from 1, is being logged.
SIGNALS = """
import os, signal
from rl_lab.run import Run
log, seen = Run.log, [0]
def signalling(*arguments):
    seen[0] += 1
    if seen[0] == {iteration}:
        for number in {numbers}:
            os.kill(os.getpid(), number)
    log(*arguments)
Run.log = signalling
"""


@pytest.mark.parametrize(
    ("numbers", "iteration", "step", "status"),
    [
        ([signal.SIGINT], 3, 96, 130),
        ([signal.SIGTERM], 3, 96, 143),
        ([signal.SIGTERM, signal.SIGINT], 6, 128, 130),  # a second one: at once, so the checkpoint is an earlier one
        ([signal.SIGINT], 1, 0, 130),  # at once: the first iteration may be compiling
        ([signal.SIGTERM], 10, 320, 143),  # the last iteration: nothing but the parameters' file is missing
    ],
)
def test_signals(lab: Lab, tmp_path: Path, numbers: list[int], iteration: int, step: int, status: int) -> None:
    ended = lab.train(tmp_path, before=SIGNALS.format(iteration=iteration, numbers=[int(n) for n in numbers]))
    (folder,) = lab.folders(tmp_path)
    name = signal.Signals(numbers[-1]).name
    assert ended.err == f"{name}: stopped, checkpointed at step {step}; continue with --resume {folder}\n"
    assert ended.status == status
    assert checkpoint.load(folder)["run"]["iteration"] == step // 32
    assert not (folder / "model.safetensors").exists()
    assert lab.run("--resume", folder).status == 0
    (whole,) = lab.trained(tmp_path / "whole")
    model, expected = (checkpoint.load_tensors(run / "model.safetensors")[0] for run in (folder, whole))
    assert model.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in model.items())


def test_stop_at(lab: Lab, tmp_path: Path) -> None:
    """--stop-at ends after the iteration that reaches it, again if asked again; then the run goes on to its end."""
    ended = lab.train(tmp_path, "--stop-at", "90")
    (folder,) = lab.folders(tmp_path)
    told = f"--stop-at 90: stopped, checkpointed at step 96; continue with --resume {folder}\n"
    assert (ended.err, ended.status) == (told, 0)
    again = lab.run("--resume", folder, "--stop-at", "90")
    assert (again.err, again.status) == (told, 0)
    assert not (folder / "model.safetensors").exists()
    assert lab.run("--resume", folder).status == 0
    (whole,) = lab.trained(tmp_path / "whole")
    model, expected = (checkpoint.load_tensors(run / "model.safetensors")[0] for run in (folder, whole))
    assert all(torch.equal(x, expected[name]) for name, x in model.items())
    refused = lab.train(tmp_path, "--stop-at", "321")
    assert refused.err == "error: --stop-at 321 must be at most 320, the whole run\n"


def test_ctrl_c_before_the_first_iteration(lab: Lab, tmp_path: Path) -> None:
    early = (  # with Python's handler, which a background process of a shell does not get
        "import signal, rl_lab.envs as e; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "e.GymnasiumEnv = lambda *_: signal.raise_signal(signal.SIGINT)"
    )
    ended = lab.train(tmp_path / "runs", "--env", "CartPole-v0", before=early)
    assert (ended.status, ended.err) == (130, "interrupted\n")


@pytest.mark.parametrize("compile", ["--no-compile", pytest.param("--compile", marks=pytest.mark.slow)])
def test_ctrl_c_on_a_terminal(tmp_path: Path, compile: str) -> None:
    """The key itself, which interrupts the compiler's own processes too. What is shown live ends before the message."""
    cache = {"RL_LAB_CACHE": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    environment = {**os.environ, **cache, "TERM": "xterm", "COLUMNS": "500", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rl_lab.ppo", "--device", "cpu", compile, "--runs-dir", str(tmp_path / "runs")]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, command, environment)
    data, pressed = b"", False
    with contextlib.suppress(OSError):  # that the other end is closed
        while True:
            if select.select([terminal], [], [], 0.1)[0]:
                data += os.read(terminal, 65536)
            compiling = any((tmp_path / "inductor").rglob("*.cpp"))
            if not pressed and (b"SPS" in data or compiling):
                pressed = bool(os.write(terminal, b"\x03"))
    shown = data.decode()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, shown
    (folder,) = (tmp_path / "runs").iterdir()
    step = 512 * checkpoint.load(folder)["run"]["iteration"]
    assert shown.endswith(f"SIGINT: stopped, checkpointed at step {step}; continue with --resume {folder}\r\n")
    assert step == 0 or compile == "--no-compile"
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h")  # the cursor was hidden, and shown again
