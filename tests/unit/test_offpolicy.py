"""What the five off-policy commands share: resuming, compiled graphs, and the files of --replay-folder."""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from rl_lab import cli
from rl_lab.algorithms import c51, dqn, rainbow, sac, td3
from rl_lab.cli import Stopped
from rl_lab.envs import make
from rl_lab.replay import Replay
from rl_lab.rollout import Collector

COMMANDS = [c51, dqn, rainbow, sac, td3]
EACH = pytest.mark.parametrize("command", COMMANDS, ids=["c51", "dqn", "rainbow", "sac", "td3"])
SMALL = {"total_timesteps": 96, "learning_starts": 16, "log_every": 16, "train_frequency": 4, "batch_size": 8}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for algorithm in (sac, td3):
        monkeypatch.setattr(algorithm, "HIDDEN", (32, 32))


def settings(command: ModuleType, folder: Path, **flags: Any) -> Any:
    box = command in (sac, td3)
    given: dict[str, Any] = {"target_network_frequency": 64} if command is not td3 else {}
    given |= {"env": "Pendulum-v1", "target_network_frequency": 1} if command is sac else {}
    given |= {"env": "Pendulum-v1"} if box else {}
    given |= {**SMALL, "buffer_size": 64, "runs_dir": folder, "compile": False, "device": "cpu"}
    return command.Args(**given | flags)


def stopped(command: ModuleType, folder: Path, **flags: Any) -> Path:
    """The folder of a run that stops half-way."""
    with pytest.raises(Stopped):
        command.train(settings(command, folder, stop_at=48, **flags))
    return next(folder.iterdir())


@EACH
def test_a_replay_learns_of_episodes_that_cannot_go_on(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a simulator's state cannot be put back, the step before the checkpoint leads nowhere: replays are told."""
    folder, cuts, successors = stopped(command, tmp_path), list[Any](), torch.zeros(1, 4)
    continued, loaded = Collector.load_state_dict, Replay.load_state_dict

    def cutting(self: Collector, state: dict[str, Any]) -> None:
        continued(self, state)
        self.cut = successors

    def noted(self: Replay, state: dict[str, Any], cut: Tensor | None = None) -> None:
        cuts.append(cut)
        loaded(self, state, cut)

    monkeypatch.setattr(Collector, "load_state_dict", cutting)
    monkeypatch.setattr(Replay, "load_state_dict", noted)
    command.train(settings(command, tmp_path, resume=folder))
    assert len(cuts) == 1 and cuts[0] is successors


@pytest.mark.slow
@pytest.mark.parametrize("command", [c51, sac, td3], ids=["c51", "sac", "td3"])
def test_compiled_equals_eager(command: ModuleType, tmp_path: Path) -> None:
    """Guards what users run, which is compiled: two agents, gradient steps with and without the delayed networks."""
    states = []
    for compile in (False, True):
        args = settings(command, tmp_path / str(compile), num_seeds=2, compile=compile)
        states.append(command.train(args).state())
    for eager, compiled in zip(*(pytree.tree_leaves(state["params"]) for state in states), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_a_replay_that_moved_is_found_where_it_is_said(tmp_path: Path) -> None:
    """The run goes on bit for bit from files that lie elsewhere."""
    flags = {"checkpoint_every": 48, "log_every": 16}
    whole = dqn.train(settings(dqn, tmp_path / "whole", replay_folder=tmp_path / "files", **flags)).state()
    folder = stopped(dqn, tmp_path / "part", replay_folder=tmp_path / "old", **flags)
    (tmp_path / "old").rename(tmp_path / "new")
    args = cli.parse(["--resume", str(folder), "--replay-folder", str(tmp_path / "new")], dqn.Args, dqn.defaults)
    resumed = dqn.train(args).state()  # type: ignore
    for name, p in whole["params"].items():
        assert torch.equal(p, resumed["params"][name]), name


def test_two_processes_do_not_train_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against logs that one cuts while the other writes them. The first keeps it, until it ends."""
    folder, added, seen = stopped(dqn, tmp_path), Replay.add, list[bool]()

    def free() -> bool:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(
                ValueError, match=r"another process is training .*__dqn__1__\d+: wait for it, or stop it"
            ):
                dqn.train(settings(dqn, tmp_path, resume=folder))
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)

    def tried(*given: Any) -> None:
        seen.append(free())
        added(*given)

    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert free() and {path: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr(Replay, "add", tried)
    dqn.train(settings(dqn, tmp_path, resume=folder))
    assert seen and not any(seen) and free()


def test_a_file_that_is_missing_is_not_made_anew(tmp_path: Path) -> None:
    """Guards against learning from zeros."""
    files = tmp_path / "files"
    folder = stopped(dqn, tmp_path / "runs", replay_folder=files, checkpoint_every=48)
    (files / "replay.rewards").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"files/replay\.rewards is missing beside the others: put it back"):
        dqn.train(settings(dqn, tmp_path / "runs", replay_folder=files, checkpoint_every=48, resume=folder))
    assert not (files / "replay.rewards").exists()
    (tmp_path / "kept").rename(files / "replay.rewards")
    dqn.train(settings(dqn, tmp_path / "runs", replay_folder=files, checkpoint_every=48, resume=folder))


def test_a_folder_compiles_nothing_anew_and_is_refused_on_a_gpu(tmp_path: Path) -> None:
    args = settings(dqn, tmp_path, replay_folder=tmp_path / "files")
    assert args.key == replace(args, replay_folder=None).key != replace(args, gamma=0.5).key
    env = make("CartPole-v1", (1,), 1)
    env.reset()
    env.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"--replay-folder .*files must be left out on a GPU"):
        args.replay(env)
    assert not (tmp_path / "files").exists()
