"""A run that was killed and resumed is the run that was not: parameters, episodes, events, bit for bit."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import Tensor

from rl_lab import checkpoint

if TYPE_CHECKING:
    from tests.reliability.conftest import Lab

# Kills the process when so many Python and C functions have been called in `train`, and prints how many were in all.
CALLS = """
import os, signal, sys
def count(frame, event, argument, seen=[0]):
    if event in ("call", "c_call"):
        seen[0] += 1
        if seen[0] == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "call" and frame.f_code.co_name == "finish":
            print("count:", seen[0])
import rl_lab.algorithms.{algo} as algo, rl_lab.run
rl_lab.run.FLUSH_EVERY = 1e9  # or a slow machine would make more calls
train = algo.train
algo.train = lambda args: (sys.setprofile(count), train(args))
"""
# The same for the system calls by which files change, so that checkpoints and logs are torn.
WRITES = """
import os, signal, rl_lab.run
rl_lab.run.FLUSH_EVERY = 1e9  # or a slow machine would write more often
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


def killed_and_resumed(
    lab: Lab, runs_dir: Path, algo: str, flags: list[str], before: str, moments: list[int]
) -> list[Path]:
    """The folders of a run killed at each of `moments`, counted from the last start, and then let run to its end.

    A kill before there is a checkpoint loses nothing; the run is started again. Resumes go by each folder in turn.
    """
    folders: list[Path] = []
    reached = set()  # iterations
    for session, moment in enumerate([*moments, 0]):
        injected = before.format(algo=algo, moment=moment)
        if has_checkpoint(folders):
            ended = lab.run("--resume", folders[session % len(folders)], before=injected, algo=algo)
        else:
            ended = lab.train(runs_dir / str(session), *flags, before=injected, algo=algo)
            folders = lab.folders(runs_dir / str(session)) if (runs_dir / str(session)).exists() else []
        assert ended.status == (-signal.SIGKILL if moment else 0), ended.err
        if has_checkpoint(folders):
            with warnings.catch_warnings(action="ignore"):  # of a previous one
                reached.add(checkpoint.load(folders[0])["run"]["iteration"])
    assert len(reached) >= 4, "the kills did not spread over the run"
    return folders


def has_checkpoint(folders: list[Path]) -> bool:
    """A kill between the two renames leaves the previous one only."""
    return any((folder / name).exists() for folder in folders[:1] for name in (checkpoint.NAME, checkpoint.PREVIOUS))


CARTPOLE = ["--env", "CartPole-v1", "--num-seeds", "2", "--checkpoint-every", "32"]
HALFCHEETAH = ["--env", "HalfCheetah-v4", "--num-envs", "1", "--total-timesteps", "160", "--checkpoint-every", "16"]
OFTEN = ["--learning-starts", "32", "--checkpoint-every", "32"]
REPLAY = [*CARTPOLE, "--n-step", "3"]  # which forgets its first steps at a third of the run
SHORT_EPISODES = "from rl_lab.envs.mujoco_tasks import Task; Task.max_episode_steps = 50"
BREAKOUT = ["--env", "BreakoutNoFrameskip-v4", "--checkpoint-every", "32"]
# A killed process loses nothing that it wrote, so the disk need not be waited for.
SHORT_GAMES = "import os, rl_lab.envs.atari as atari; os.fsync, atari.MAX_FRAMES = lambda _: None, 150"


@pytest.mark.parametrize(
    ("algo", "flags"),
    [
        ("ppo", CARTPOLE),
        ("ppo", [*CARTPOLE, "--backend", "gymnasium"]),
        ("ppo", HALFCHEETAH),
        ("dqn", REPLAY),
        ("dqn", [*REPLAY, "--prioritized"]),
        ("rainbow", REPLAY),
        ("sac", ["--env", "HalfCheetah-v4", *OFTEN]),
        ("td3", ["--env", "Pendulum-v1", "--num-seeds", "2", *OFTEN]),
    ],
    ids=["native", "gymnasium", "mujoco", "uniform replay", "prioritized replay", "noisy", "sac", "td3"],
)
def test_killed_at_ten_random_moments(lab: Lab, tmp_path: Path, algo: str, flags: list[str]) -> None:
    """Five of them anywhere, five between two writes."""
    moments = random.Random(0)
    for name, before in (("calls", CALLS + SHORT_EPISODES), ("writes", WRITES + SHORT_EPISODES)):
        kill_five_times(lab, tmp_path / name, algo, flags, before, moments)


@pytest.mark.parametrize("algo", ["iql", "td3_bc"])
def test_killed_while_it_learns_from_a_data_set(lab: Lab, tmp_path: Path, algo: str) -> None:
    """Batches, noise, schedules, statistics of the data and evaluations go on as they were."""
    h5py = pytest.importorskip("h5py", reason="data sets need h5py")
    numbers = np.random.default_rng(0)
    with h5py.File(tmp_path / "halfcheetah-random-v2.hdf5", "w") as file:
        for name, width in (("observations", 17), ("next_observations", 17), ("actions", 6)):
            file[name] = numbers.uniform(-1, 1, (64, width)).astype(np.float32)
        file["rewards"] = numbers.normal(size=64).astype(np.float32)
        file["terminals"], file["timeouts"] = np.arange(64) % 8 == 7, np.arange(64) % 16 == 11
    flags = ["--dataset", str(tmp_path / "halfcheetah-random-v2.hdf5"), "--num-seeds", "2"]
    moments = random.Random(0)
    for name, before in (("calls", CALLS + SHORT_EPISODES), ("writes", WRITES + SHORT_EPISODES)):
        kill_five_times(lab, tmp_path / name, algo, flags, before, moments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "flags"),
    [("ppo", []), ("dqn", ["--buffer-size", "160"])],
    ids=["ppo", "dqn"],
)
def test_killed_while_it_plays_atari(lab: Lab, tmp_path: Path, algo: str, flags: list[str]) -> None:
    """Games, stacked frames and a replay of single frames go on as they were."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    kill_five_times(lab, tmp_path, algo, [*BREAKOUT, *flags], CALLS + SHORT_GAMES, random.Random(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algo", "flags"),
    [("ppo", CARTPOLE), ("ppo", HALFCHEETAH), ("dqn", [*REPLAY, "--prioritized"])],
    ids=["native", "mujoco", "replay"],
)
def test_killed_while_compiled(lab: Lab, tmp_path: Path, algo: str, flags: list[str]) -> None:
    flags = [*flags, "--compile"]
    lab.train(tmp_path / "cache", *flags, algo=algo)  # so that the compiler's own files do not count
    kill_five_times(lab, tmp_path / "writes", algo, flags, WRITES, random.Random(0))


def kill_five_times(lab: Lab, runs_dir: Path, algo: str, flags: list[str], before: str, random_: random.Random) -> None:
    whole = lab.train(runs_dir / "whole", *flags, before=before.format(algo=algo, moment=0), algo=algo)
    count = int(whole.out.rpartition("count: ")[2].split()[0])
    moments = [random_.randrange(1, count // 3) for _ in range(5)]
    folders = killed_and_resumed(lab, runs_dir, algo, flags, before, moments)
    assert record(folders) == record(lab.folders(runs_dir / "whole")), moments


def test_a_replay_in_files_goes_on_from_its_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """Killed between two checkpoints, with rows in the files that the last one does not know."""
    flags = [*REPLAY, "--prioritized", "--checkpoint-every", "96", "--replay-folder"]
    before = CALLS.format(algo="dqn", moment=0)
    ended = lab.train(tmp_path / "whole", *flags, tmp_path / "files", before=before, algo="dqn")
    count = int(ended.out.rpartition("count: ")[2].split()[0])
    before = CALLS.format(algo="dqn", moment=count // 2)
    ended = lab.train(tmp_path / "killed", *flags, tmp_path / "other files", before=before, algo="dqn")
    assert ended.status == -signal.SIGKILL
    folders = lab.folders(tmp_path / "killed")
    reached = checkpoint.load(folders[0])
    assert 0 < reached["run"]["iteration"] < 10 and not reached["state"]["replay"]["columns"]
    assert lab.run("--resume", folders[0], algo="dqn").status == 0
    assert record(folders) == record(lab.folders(tmp_path / "whole"))

    before = CALLS.format(algo="dqn", moment=count * 4 // 5)
    lab.train(tmp_path / "damaged", *flags, tmp_path / "third files", before=before, algo="dqn")
    folders = lab.folders(tmp_path / "damaged")
    assert checkpoint.load(folders[0])["run"]["iteration"] == 6
    (folders[0] / checkpoint.NAME).write_bytes(b"torn")
    (tmp_path / "third files").rename(tmp_path / "moved")
    refused = lab.run("--resume", folders[0], algo="dqn")
    assert refused.status == 1 and "third files has none of the run's files: put them back" in refused.err
    (tmp_path / "moved").rename(tmp_path / "third files")  # for which the refusal has made no empty folder
    assert lab.run("--resume", folders[0], algo="dqn").status == 0  # from the checkpoint before
    assert record(folders) == record(lab.folders(tmp_path / "whole"))


@pytest.fixture(scope="module")
def whole(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted tiny run of two seeds leaves."""
    return record(lab.trained(tmp_path_factory.mktemp("whole"), "--num-seeds", 2))


SPOILED = """
import torch
from rl_lab.envs.classic import CLASSIC
task, seen = CLASSIC["CartPole-v1"], [0]
whole = task.{part}
def spoiled(self, *arguments):
    seen[0] += 1
    found = whole(self, *arguments)
    if seen[0] < {calls}:
        return found
    return found * torch.nan if "{part}" == "observe" else (found[0], found[1] * torch.nan, found[2])
task.{part} = spoiled
"""
# The logs are flushed after each iteration that comes ten seconds after the last flush.
LATE = """
import itertools, time
clock = itertools.count(0, 11)
time.monotonic = lambda: float(next(clock))
"""
FULL = """
import resource, rl_lab.log, rl_lab.checkpoint
whole, seen = {module}.{name}, [0]
def full(*arguments, **named):
    seen[0] += 1
    if seen[0] == {calls}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
    return whole(*arguments, **named)
{module}.{name} = full
"""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SPOILED.format(part="transition", calls=16 * 6 + 3), "nor is what --env CartPole-v1 gave; .* of step 128"),
        (SPOILED.format(part="observe", calls=16 * 6 * 3 + 3), "nor is what --env CartPole-v1 gave; .* of step"),
        (
            FULL.format(module="rl_lab.checkpoint", name="save", calls=3, size=9000),
            "File too large: .*checkpoint.*--resume",
        ),
        (
            FULL.format(module="rl_lab.log.RunLog", name="flush", calls=3, size=3000),
            "File too large: .*events.*--resume",
        ),
        (
            LATE + FULL.format(module="rl_lab.log.RunLog", name="flush", calls=3, size=1500),
            "File too large: .*events.*--resume",
        ),
    ],
    ids=["NaN reward", "NaN observation", "no room for a checkpoint", "nor for its events", "nor between checkpoints"],
)
def test_nothing_is_lost_by_a_fault(lab: Lab, tmp_path: Path, whole: dict[str, Any], fault: str, message: str) -> None:
    ended = lab.train(tmp_path, "--num-seeds", 2, before=fault)
    assert ended.status == 1 and re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ended.err), ended.err
    folders = lab.folders(tmp_path)
    assert lab.run("--resume", folders[1]).status == 0
    assert record(folders) == whole


def test_a_damaged_checkpoint_gives_way_to_the_one_before(lab: Lab, tmp_path: Path, whole: dict[str, Any]) -> None:
    folders = lab.trained(tmp_path, "--num-seeds", 2)
    path = folders[0] / checkpoint.NAME
    path.write_bytes(path.read_bytes()[:-9])
    ended = lab.run("--resume", folders[0])
    assert ended.status == 0 and f"{path} is damaged" in ended.err and checkpoint.PREVIOUS in ended.err
    assert "is finished" not in ended.out
    assert record(folders) == whole


def test_a_finished_run_says_so_and_stays(lab: Lab, tmp_path: Path, whole: dict[str, Any]) -> None:
    folders = lab.trained(tmp_path, "--num-seeds", 2)
    ended = lab.run("--resume", folders[1])
    assert (ended.status, ended.err) == (0, "") and f"{folders[0]} is finished: 320 steps" in ended.out
    assert record(folders) == whole


def test_a_run_that_returned_enough_is_finished(lab: Lab, tmp_path: Path) -> None:
    folders = lab.trained(tmp_path, "--num-seeds", 2, "--eval-every", 64, "--until-return", 1)
    before = record(folders)
    ended = lab.run("--resume", folders[1])
    assert (ended.status, ended.err) == (0, "") and f"{folders[0]} is finished: 64 steps" in ended.out
    assert record(folders) == before
    refused = lab.run("--resume", folders[1], "--until-return", 2)
    assert refused.status == 2 and "--until-return 2.0: the run in" in refused.err


def test_a_run_that_reached_its_return_is_not_prolonged(lab: Lab, tmp_path: Path) -> None:
    """Guards against a run that is called finished, and has a new length, though nothing was done."""
    flags = ["--no-anneal-lr", "--eval-every", 64, "--until-return", 1]
    (folder,) = lab.trained(tmp_path, *flags)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused = lab.run("--resume", folder, "--total-timesteps", 640)
    assert refused.status == 1 and refused.err.count("\n") == 1
    assert f"--total-timesteps 640: the run in {folder} has reached its --until-return" in refused.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_killed_after_its_last_checkpoint_gets_its_model(lab: Lab, tmp_path: Path, whole: dict[str, Any]) -> None:
    folders = lab.trained(tmp_path, "--num-seeds", 2)
    for folder in folders:
        (folder / "model.safetensors").unlink()
    assert lab.run("--resume", folders[0]).status == 0
    assert record(folders) == whole


def test_a_run_without_annealing_can_be_prolonged(lab: Lab, tmp_path: Path) -> None:
    flags = ["--num-seeds", 2, "--no-anneal-lr"]
    long = record(lab.trained(tmp_path / "long", *flags, "--total-timesteps", 640))
    folders = lab.trained(tmp_path / "short", *flags)
    for folder in folders:
        (folder / "verdict.json").write_text("{}")
    ended = lab.run("--resume", folders[1], "--total-timesteps", 640, before=WRITES.format(moment=14))
    assert ended.status == -signal.SIGKILL
    old = ("model.safetensors", "verdict.json")  # which would pass for the new ones
    assert not any((folder / name).exists() for folder in folders for name in old)
    assert lab.run("--resume", folders[1]).status == 0  # the longer aim is remembered
    assert record(folders) == long
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        assert (config["total_timesteps"], config["args"]["total_timesteps"]) == (640, 640)
        assert re.findall(r"--total-timesteps.(\d+)", config["command"]) == ["640"]  # which makes the same run
    assert "is finished: 640 steps" in lab.run("--resume", folders[0]).out


def test_a_seed_decides_everything(lab: Lab, tmp_path: Path, whole: dict[str, Any]) -> None:
    assert record(lab.trained(tmp_path / "again", "--num-seeds", 2)) == whole
    other = record(lab.trained(tmp_path / "other", "--seed", 2))
    for name in ("episodes 0", "events 0", "model 0"):
        assert other[name] != whole[name]
    assert other["episodes 0"] == whole["episodes 1"]  # seed 2, alone and beside seed 1


def test_logs_are_cleanrls(lab: Lab, tmp_path: Path) -> None:
    """Its tags, and its global_step: the steps of the seed's two environments together.

    Both time limits are five steps, so that episodes end at steps 10, 10, 20, 20, ... of 320.
    """
    limit = "from rl_lab.envs.classic import CLASSIC; CLASSIC['CartPole-v1'].max_episode_steps = 5"
    (folder,) = lab.trained(tmp_path, before=limit)
    rows = [f"{step},5.0,5" for step in range(10, 321, 10) for _ in range(2)]
    episodes = gzip.decompress((folder / "episodes.csv.gz").read_bytes()).decode().splitlines()
    assert episodes == ["global_step,episodic_return,episodic_length", *rows]
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    losses = ["value_loss", "policy_loss", "entropy", "old_approx_kl", "approx_kl", "clipfrac", "explained_variance"]
    charts = ["episodic_return", "episodic_length", "learning_rate", "SPS"]
    tags = {*(f"losses/{name}" for name in losses), *(f"charts/{name}" for name in charts)}
    assert found.keys() == tags | {"hyperparameters/text_summary"}
    for tag in ("charts/episodic_return", "charts/episodic_length"):
        assert found[tag] == [(step, 5.0) for step in range(10, 321, 10)]  # one for both, with their mean
    for tag in tags - {"charts/episodic_return", "charts/episodic_length"}:
        assert [step for step, _ in found[tag]] == list(range(32, 321, 32)), tag
    rates = [value for _, value in found["charts/learning_rate"]]
    assert rates == pytest.approx([2.5e-4, 2.25e-4, 2e-4, 1.75e-4, 1.5e-4, 1.25e-4, 1e-4, 7.5e-5, 5e-5, 2.5e-5])
    assert all(math.isfinite(value) for tag in tags for _, value in found[tag])
