"""rl_lab/log.py: what readers find in a run folder, also after a kill, a full disk and a resume."""

from __future__ import annotations

import gzip
import json
import math
import re
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from rl_lab import log as log_module
from rl_lab.log import Progress, RunLog, run_name

HEADER = "global_step,episodic_return,episodic_length\n"


def make(tmp_path: Path, seeds: tuple[int, ...] = (1,)) -> RunLog:
    return RunLog.create(tmp_path, "CartPole-v1", "ppo", seeds, {"learning_rate": 0.001, "runs_dir": tmp_path})


def events_file(folder: Path) -> Path:
    (path,) = folder.glob("events.out.tfevents.*")
    return path


def events(folder: Path) -> list[Event]:
    """Events without their wall times; reads the framing itself, so it shares nothing with the writer."""
    data, found = events_file(folder).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        assert event.wall_time == pytest.approx(time.time(), abs=600)
        event.ClearField("wall_time")
        found.append(event)
        data = data[16 + length :]
    return found


def rows(folder: Path) -> str:
    return gzip.decompress((folder / "episodes.csv.gz").read_bytes()).decode()


def accumulate(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def add_episodes(log: RunLog, index: int, *episodes: tuple[int, float, int]) -> None:
    steps, returns, lengths = zip(*episodes, strict=True)
    log.episodes(index, np.array(steps, np.int64), np.array(returns, np.float64), np.array(lengths, np.int64))


@pytest.fixture
def refuse_writes_beyond() -> Iterator[Callable[[int], None]]:
    """The kernel takes part of a write, then refuses the rest, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_run_name() -> None:
    assert run_name("ALE/Breakout-v5", "ppo", 3, 1700000000) == "ALE-Breakout-v5__ppo__3__1700000000"


def test_folders_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/somewhere/bin/python", "-m", "rl_lab.ppo", "--env", "a b"])
    log = make(tmp_path, (4, 5))
    created = log.config["created"]
    names = [f"CartPole-v1__ppo__{seed}__{created}" for seed in (4, 5)]
    assert [folder.name for folder in log.folders] == names and log.checkpoint_folder == log.folders[0]
    assert abs(created - time.time()) < 60
    for seed, folder in zip((4, 5), log.folders, strict=True):
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "episodes.csv.gz",
            f"events.out.tfevents.{created}.ppo.{seed}",
        ]
        config = json.loads((folder / "config.json").read_text())
        assert config["env"] == "CartPole-v1" and config["algo"] == "ppo" and config["learning_rate"] == 0.001
        assert config["seed"] == seed and config["seeds"] == [4, 5] and config["group"] == names
        assert config["versions"]["numpy"] == np.__version__ and "python" in config["versions"]
        assert config["command"] == "python -m rl_lab.ppo --env 'a b'"
        assert set(config["hardware"]) == {"machine", "cpu", "cores", "gpu"} and "git_commit" in config
        assert rows(folder) == HEADER
    assert log.config["seed"] == 4


def test_runs_begun_in_one_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1700000000.0)
    taken = tmp_path / "CartPole-v1__ppo__2__1700000000"
    taken.mkdir()
    (taken / "mine").touch()
    log = make(tmp_path, (1, 2))
    assert log.config["created"] == 1700000001 and [path.name for path in taken.iterdir()] == ["mine"]
    assert log.config["group"] == [f"CartPole-v1__ppo__{seed}__1700000001" for seed in (1, 2)]
    assert {path.name for path in tmp_path.iterdir()} == {taken.name, *log.config["group"]}  # no half of a group


def test_a_failure_half_way_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *chunks: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(log_module, "replace_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*config\.json"):
        make(tmp_path, (1, 2))
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    log = make(tmp_path, (1, 2))
    log.text(0, "hyperparameters", "|param|value|\n|-|-|\n" + "|long|" + "x" * 3000 + "|")
    log.scalars(0, 2048, {"losses/value_loss": 0.5, "charts/SPS": 9000.0})
    log.scalars(0, 4096, {"losses/value_loss": math.nan, "charts/SPS": 9001.0})
    log.scalars(1, 2048, {f"tag/{number}": number for number in range(40)})  # a record beyond 512 bytes
    add_episodes(log, 0, (17, -1.5, 17), (40, 22.0, 23))
    log.close()

    read = accumulate(log.folders[0])
    assert read.file_version == 2.0
    assert sorted(read.Tags()["scalars"]) == [
        "charts/SPS",
        "charts/episodic_length",
        "charts/episodic_return",
        "losses/value_loss",
    ]
    assert [(event.step, event.value) for event in read.Scalars("charts/SPS")] == [(2048, 9000.0), (4096, 9001.0)]
    assert math.isnan(read.Scalars("losses/value_loss")[1].value)
    assert [(event.step, event.value) for event in read.Scalars("charts/episodic_return")] == [(17, -1.5), (40, 22.0)]
    assert [(event.step, event.value) for event in read.Scalars("charts/episodic_length")] == [(17, 17.0), (40, 23.0)]
    assert abs(read.Scalars("charts/SPS")[0].wall_time - time.time()) < 60
    (text,) = read.Tensors("hyperparameters/text_summary")
    assert text.tensor_proto.string_val[0].startswith(b"|param|value|") and len(text.tensor_proto.string_val[0]) > 3000
    assert read.SummaryMetadata("hyperparameters/text_summary").plugin_data.plugin_name == "text"

    other = accumulate(log.folders[1])
    assert [other.Scalars(f"tag/{number}")[0].value for number in (0, 39)] == [0.0, 39.0]
    (version, update) = events(log.folders[1])
    assert version.file_version == "brain.Event:2"
    assert [value.tag for value in update.summary.value] == [f"tag/{number}" for number in range(40)]


def test_checksum_against_its_published_value() -> None:
    """CRC-32C of "123456789" is 0xE3069283; its lower 15 bits put in front give 0x2507C60D, and 0xA282EAD8 is added."""
    assert log_module._masked_crc32c(b"123456789") == 0xC78AB0E5.to_bytes(4, "little")


def test_returns_keep_every_digit(tmp_path: Path) -> None:
    log = make(tmp_path)
    values = [0.1, 1 / 3, float(np.float32(4312.0461)), 1e-310, 500.0, -1.7976931348623157e308]
    add_episodes(log, 0, *((step, value, 2**40) for step, value in enumerate(values)))
    log.close()
    lines = rows(log.folders[0]).splitlines()
    assert lines[0] + "\n" == HEADER and lines[1] == "0,0.1,1099511627776" and lines[5] == "4,500.0,1099511627776"
    assert [float(line.split(",")[1]) for line in lines[1:]] == values


def write_part(log: RunLog, part: int) -> None:
    for index in range(2):
        log.scalars(index, 100 * part, {"losses/value_loss": part + index / 2, "losses/entropy": 0.25})
        add_episodes(log, index, (100 * part - 3, part / 3, 9), (100 * part, 7.0, 3))


def test_a_resumed_run_has_the_logs_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", (1, 2))
    for part in (1, 2, 3):
        write_part(whole, part)
    whole.close()

    log = make(tmp_path / "resumed", (1, 2))
    write_part(log, 1)
    state = log.state_dict()
    write_part(log, 2)
    log.flush()
    log.scalars(1, 999, {"lost": 1.0})  # never flushed: the process dies here
    with events_file(log.folders[1]).open("ab") as torn:
        torn.write(b"\x30\x00")

    resumed = RunLog.open(log.folders[1])  # any folder of the group will do
    assert resumed.folders == log.folders and resumed.config == log.config
    resumed.rewind(json.loads(json.dumps(state)))
    for part in (2, 3):
        write_part(resumed, part)
    resumed.close()
    for one, other in zip(whole.folders, resumed.folders, strict=True):
        assert events(one) == events(other) and len(events(one)) == 1 + 3 * 3
        assert rows(one) == rows(other)
    assert rows(whole.folders[0]).splitlines()[1:3] == ["97,0.3333333333333333,9", "100,7.0,3"]


def test_rewind_drops_what_was_not_flushed(tmp_path: Path) -> None:
    log = make(tmp_path)
    state = log.state_dict()
    log.scalars(0, 5, {"a": 1.0})
    add_episodes(log, 0, (5, 1.0, 5))
    log.rewind(state)
    log.close()
    assert len(events(log.folders[0])) == 1 and rows(log.folders[0]) == HEADER


def test_rewind_refuses_a_file_that_is_too_short_and_cuts_none(tmp_path: Path) -> None:
    log = make(tmp_path)
    add_episodes(log, 0, (5, 1.0, 5))
    state = log.state_dict()
    add_episodes(log, 0, (9, 1.0, 4))
    log.close()
    path = log.folders[0] / "episodes.csv.gz"
    path.write_bytes(path.read_bytes()[:30])
    size = events_file(log.folders[0]).stat().st_size
    with pytest.raises(ValueError, match=rf"episodes\.csv\.gz has 30 bytes but had {state['episodes'][0]}"):
        RunLog.open(log.folders[0]).rewind(state)
    assert events_file(log.folders[0]).stat().st_size == size


def test_open_refuses_what_is_no_complete_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no complete run folder.*config\.json"):
        RunLog.open(tmp_path)
    log = make(tmp_path / "runs", (1, 2))
    log.close()
    monkeypatch.chdir(log.folders[1])
    assert RunLog.open(Path(".")).folders == log.folders
    log.folders[0].rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=f"no complete run folder.*{log.folders[0].name}"):
        RunLog.open(log.folders[1])
    (log.folders[1] / "config.json").write_text('{"seed": 1}')
    with pytest.raises(ValueError, match="KeyError: 'group'"):
        RunLog.open(log.folders[1])


def test_a_torn_tail_hides_nothing_before_it(tmp_path: Path) -> None:
    log = make(tmp_path)
    for step in (10, 20):
        add_episodes(log, 0, (step, 1.5, 10))
        log.flush()
    log.close()
    for path in (events_file(log.folders[0]), log.folders[0] / "episodes.csv.gz"):
        path.write_bytes(path.read_bytes()[:-3])
    assert [event.step for event in accumulate(log.folders[0]).Scalars("charts/episodic_return")] == [10]
    data, text = (log.folders[0] / "episodes.csv.gz").read_bytes(), b""
    while data:
        member = zlib.decompressobj(wbits=31)
        content = member.decompress(data)
        if not member.eof:
            break
        data, text = member.unused_data, text + content
    assert text.decode() == HEADER + "10,1.5,10\n"


@pytest.mark.parametrize("kind", ["events", "episodes"])
def test_a_full_disk_names_the_file_and_leaves_it_readable(
    tmp_path: Path, kind: str, refuse_writes_beyond: Callable[[int], None]
) -> None:
    log = make(tmp_path)
    add_episodes(log, 0, (10, 1.5, 10))
    state = log.state_dict()
    if kind == "events":
        log.scalars(0, 20, {"a": 1.0})
    else:
        log._episodes[0].pending += b"20,2.5,10\n"  # without the event, which would fail before it
    refuse_writes_beyond(state[kind][0] + 5)
    with pytest.raises(OSError, match="events" if kind == "events" else "episodes"):
        log.flush()
    assert log._events[0].path.stat().st_size == state["events"][0]
    assert log._episodes[0].path.stat().st_size == state["episodes"][0]
    refuse_writes_beyond(resource.RLIM_INFINITY)
    log.close()  # what could not be written then is written now
    assert rows(log.folders[0]) == HEADER + "10,1.5,10\n" + ("" if kind == "events" else "20,2.5,10\n")
    assert [event.step for event in events(log.folders[0])] == ([0, 10, 20] if kind == "events" else [0, 10])


def test_git_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that a recipe wrote makes no other code; a changed line does."""
    (tmp_path / "rl_lab").mkdir()
    for name in ("rl_lab/log.py", "README.md"):
        (tmp_path / name).write_text("as it was\n")
    monkeypatch.setattr(log_module, "__file__", str(tmp_path / "rl_lab/log.py"))
    assert log_module._git_commit() is None

    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init")
    git("add", ".")
    git("commit", "--message", "first")
    head = git("rev-parse", "HEAD").strip()
    (tmp_path / "README.md").write_text("a table\n")
    assert log_module._git_commit() == head
    (tmp_path / "rl_lab/log.py").write_text("changed\n")
    assert log_module._git_commit() == head + "-dirty"


def test_progress_in_a_file_prints_plain_lines_ten_seconds_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total_steps=1000, num_seeds=5)
    progress.update(0, 0.0, [math.nan] * 5)
    for step in range(1, 501):
        now[0] = 100 + step / 25  # 20 s in all
        progress.update(step, 50.0, [10.0, 20.0, 60.0, 30.0, 1000.0], "kl 0.010")
    progress.close()
    progress.close()
    # 750 steps of five seeds are left at 50 steps a second: 75 s. The middle three of the returns average 36.67.
    assert capsys.readouterr().out.splitlines() == [
        "0/1,000 steps, 0%, 0 SPS, ? left",
        "250/1,000 steps, 25%, 50 SPS, 0:01:15 left, return 36.7 (10.0 to 1,000.0, 5 seeds), kl 0.010",
        "500/1,000 steps, 50%, 50 SPS, 0:00:50 left, return 36.7 (10.0 to 1,000.0, 5 seeds), kl 0.010",
    ]


@pytest.mark.parametrize(
    ("sps", "logged", "shown"),
    [
        (12345.9, 12345.0, "12,346 SPS"),
        (10.6, 10.0, "11 SPS"),
        (9.96, 10.0, "10 SPS"),
        (3.14159, 3.1, "3.1 SPS"),
        (0.08765, 0.088, "0.088 SPS"),
        (2.0, 2.0, "2 SPS"),
        (0.0, 0.0, "0 SPS"),
    ],
)
def test_slow_rates_keep_two_digits(sps: float, logged: float, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A gradient step of a language model may take minutes; whole numbers would be 0."""
    assert log_module.rate(sps) == logged
    progress = Progress(total_steps=100, num_seeds=1)
    progress.update(1, sps, [math.nan])
    progress.close()
    assert f", {shown}, " in capsys.readouterr().out


def test_progress_on_a_terminal_is_live(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1", "COLUMNS": "100", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(total_steps=100, num_seeds=1)
    for step in range(1, 101):
        now[0] = step / 100  # 1 s in all, four refreshes a second
        progress.update(step, 100.0, [7.0])
    progress.close()
    shown = capsys.readouterr().out
    assert list(dict.fromkeys(re.findall(r"\d+(?=/100 steps)", shown))) == ["1", "26", "51", "76", "100"]
    assert "return 7.0" in shown and "\x1b[" in shown


def test_quiet_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total_steps=100, num_seeds=1, quiet=True)
    progress.update(100, 1.0, [1.0])
    progress.close()
    assert capsys.readouterr().out == ""


def test_episodes_that_end_at_one_step_are_one_event_with_their_mean(tmp_path: Path) -> None:
    log = make(tmp_path)
    add_episodes(log, 0, (8, 1.0, 3), (8, 4.0, 4), (12, 7.0, 2))
    log.close()
    assert rows(log.folders[0]) == HEADER + "8,1.0,3\n8,4.0,4\n12,7.0,2\n"
    read = accumulate(log.folders[0])
    assert [(event.step, event.value) for event in read.Scalars("charts/episodic_return")] == [(8, 2.5), (12, 7.0)]
    assert [(event.step, event.value) for event in read.Scalars("charts/episodic_length")] == [(8, 3.5), (12, 2.0)]
