"""A run that was killed and resumed is the run that was not: parameters, episodes, events, bit for bit."""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor

from rl_lab import checkpoint

if TYPE_CHECKING:
    from tests.reliability.conftest import Lab

# Kills the process when so many Python and C functions have been called, and prints how many were until the end.
CALLS = """
import os, signal, sys
def count(frame, event, argument, seen=[0]):
    if event in ("call", "c_call"):
        seen[0] += 1
        if seen[0] == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "call" and frame.f_code.co_name == "finish":
            print("count:", seen[0])
sys.setprofile(count)
"""
# The same for the system calls by which files change, so that checkpoints and logs are torn.
WRITES = """
import os, signal
def counted(name, seen=[0]):
    call = getattr(os, name)
    def wrapper(*arguments):
        seen[0] += 1
        if seen[0] == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "replace" and "model" in str(arguments[1]):
            print("count:", seen[0])
        return call(*arguments)
    setattr(os, name, wrapper)
for name in ("write", "fsync", "replace", "ftruncate"):
    counted(name)
"""


def frozen(tree: Any) -> Any:
    """Nested dicts of tensors as something that `==` compares bit for bit."""
    if isinstance(tree, dict):
        return {name: frozen(child) for name, child in tree.items()}
    return (str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()) if isinstance(tree, Tensor) else tree


def record(folders: list[Path]) -> dict[str, Any]:
    """All that runs leave, but wall times and speeds."""
    found: dict[str, Any] = {"checkpoint": frozen(checkpoint.load(folders[0])["state"])}
    for index, folder in enumerate(folders):
        found[f"model {index}"] = frozen(checkpoint.load_tensors(folder / "model.safetensors")[0])
        found[f"episodes {index}"] = gzip.decompress((folder / "episodes.csv.gz").read_bytes()).decode()
        found[f"events {index}"] = [(e.step, v.tag, v.simple_value) for e in events(folder) for v in scalars(e)]
    return found


def events(folder: Path) -> list[Event]:
    (path,) = folder.glob("events.out.tfevents.*")
    return [Event.FromString(data) for data in RawEventFileLoader(str(path)).Load()]


def scalars(event: Event) -> list[Any]:
    return [value for value in event.summary.value if value.HasField("simple_value") and value.tag != "charts/SPS"]


def killed_and_resumed(lab: Lab, runs_dir: Path, flags: list[str], before: str, moments: list[int]) -> list[Path]:
    """The folders of a run killed at each of `moments`, counted from the last start, and then let run to its end.

    A kill before there is a checkpoint loses nothing; the run is started again. Resumes go by each folder in turn.
    """
    folders: list[Path] = []
    for session, moment in enumerate([*moments, 0]):
        if folders and (folders[0] / checkpoint.NAME).exists():
            ended = lab.run("--resume", folders[session % len(folders)], before=before.format(moment=moment))
        else:
            ended = lab.train(runs_dir / str(session), *flags, before=before.format(moment=moment))
            folders = lab.folders(runs_dir / str(session)) if (runs_dir / str(session)).exists() else []
        assert ended.status == (-signal.SIGKILL if moment else 0), ended.err
    return folders


CARTPOLE = ["--env", "CartPole-v1", "--num-seeds", "2", "--total-timesteps", "640"]
HALFCHEETAH = ["--env", "HalfCheetah-v4", "--num-envs", "1", "--normalize"]


@pytest.mark.parametrize(
    "flags",
    [CARTPOLE, [*CARTPOLE, "--backend", "gymnasium"], HALFCHEETAH],
    ids=["native", "gymnasium", "mujoco"],
)
def test_killed_at_ten_random_moments(lab: Lab, tmp_path: Path, flags: list[str]) -> None:
    """Five of them anywhere, five between two writes."""
    moments = random.Random(0)
    for name, before in (("calls", CALLS), ("writes", WRITES)):
        whole = lab.train(tmp_path / name / "whole", *flags, before=before.format(moment=0))
        count = int(whole.out.rpartition("count: ")[2].split()[0])
        parts = [moments.randrange(1, count // 5) for _ in range(5)]
        folders = killed_and_resumed(lab, tmp_path / name, flags, before, parts)
        assert record(folders) == record(lab.folders(tmp_path / name / "whole")), parts
