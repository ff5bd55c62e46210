"""Run folders, TensorBoard events, episodes and the console: all that a run writes for people and for the harness."""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c  # type: ignore[import-untyped]

from rl_lab import __version__
from rl_lab.checkpoint import replace_file

_gzip_member = functools.partial(gzip.compress, compresslevel=1, mtime=0)  # no time stamp: equal rows, equal bytes


def rate(sps: float) -> float:
    """Steps per second as they are logged: whole, as CleanRL does, but below 10 with two significant digits."""
    return float(int(sps)) if sps >= 10 else float(f"{sps:.2g}")


def run_name(env_id: str, algo: str, seed: int, when: int) -> str:
    """The name of a run's folder; `when` in unix seconds."""
    return f"{re.sub('[/:]', '-', env_id)}__{algo}__{seed}__{when}"


class RunLog:
    """The logs of one process: one ordinary run folder per seed, `index` counting them.

    Events and episodes gather in memory until `flush`. A killed process loses what came after it, nothing before.

    Attributes:
        folders: the run folders, in the order of the seeds.
        config: config.json of the first one.
        checkpoint_folder: the first one, which holds the checkpoint of all.
    """

    def __init__(self, folders: list[Path], config: dict[str, Any]) -> None:
        self.folders, self.config, self.checkpoint_folder = folders, config, folders[0]
        names = [_events_name(config, seed) for seed in config["seeds"]]
        self._events = [_File(folder / name, bytes) for folder, name in zip(folders, names, strict=True)]
        self._episodes = [_File(folder / "episodes.csv.gz", _gzip_member) for folder in folders]
        self._files = self._events + self._episodes

    @classmethod
    def create(cls, runs_dir: Path, env_id: str, algo: str, seeds: Sequence[int], config: dict[str, Any]) -> RunLog:
        """Make the run folders; config.json gets `config` and what it takes to do the run again.

        They are named by the second in which the run began, or by the next one for which none of them exists, as runs
        of one script often begin at once. A failure leaves none behind.
        """
        runs_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            for created in itertools.count(int(time.time())):
                group = [run_name(env_id, algo, seed, created) for seed in seeds]
                try:
                    for name in group:
                        (runs_dir / name).mkdir()
                        undo.callback(shutil.rmtree, runs_dir / name)
                    break
                except FileExistsError:
                    undo.close()
            config = {**config, "env": env_id, "algo": algo, "seeds": list(seeds), "group": group, "created": created}
            config |= provenance()
            for name, seed in zip(group, seeds, strict=True):
                folder = runs_dir / name
                version = Event(wall_time=time.time(), file_version="brain.Event:2")
                (folder / _events_name(config, seed)).write_bytes(_record(version))
                (folder / "episodes.csv.gz").write_bytes(_gzip_member(b"global_step,episodic_return,episodic_length\n"))
                text = json.dumps({**config, "seed": seed}, indent=2, default=str)
                replace_file(folder / "config.json", text.encode())
            undo.pop_all()
        return cls.open(runs_dir / group[0])

    @classmethod
    def open(cls, run: Path) -> RunLog:
        """Open the logs again by any of their folders. To resume, `rewind` comes next.

        Raises:
            ValueError: if `run` is no run folder, or a file of it or of the runs trained with it is missing.
        """
        run = run.resolve()  # so that "." has a parent
        try:
            folders = [run.parent / name for name in json.loads((run / "config.json").read_text())["group"]]
            return cls(folders, json.loads((folders[0] / "config.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} is no complete run folder of rl_lab: {type(error).__name__}: {error}") from None

    def scalars(self, index: int, step: int, values: dict[str, float]) -> None:
        """One event with all tags, in the order of `values`; `step` in env steps of that seed."""
        event = Event(wall_time=time.time(), step=step)
        add = event.summary.value.add
        for tag, value in values.items():
            add(tag=tag, simple_value=value)
        self._events[index].pending += _record(event)

    def text(self, index: int, tag: str, text: str) -> None:
        """Markdown for TensorBoard's text page, at step 0."""
        event = Event(wall_time=time.time())
        value = event.summary.value.add(tag=f"{tag}/text_summary")
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(text.encode())
        self._events[index].pending += _record(event)

    def episodes(self, index: int, steps: NDArray[Any], returns: NDArray[Any], lengths: NDArray[Any]) -> None:
        """A row for each finished episode, (K,) in the order of steps: int64, float64 (written without loss), int64.

        TensorBoard gets an event for each step at which any ended, with their means: with many environments several do.
        """
        table = zip(steps.tolist(), returns.tolist(), lengths.tolist(), strict=True)
        self._episodes[index].pending += "".join(f"{step},{x!r},{length}\n" for step, x, length in table).encode()
        distinct, begins, counts = np.unique(steps, return_index=True, return_counts=True)
        means = (np.add.reduceat(x, begins) / counts for x in (returns, lengths))
        for step, value, length in zip(distinct.tolist(), *(x.tolist() for x in means), strict=True):
            self.scalars(index, step, {"charts/episodic_return": value, "charts/episodic_length": length})

    def flush(self) -> None:
        """Hand what gathered to the operating system. OSError names the file; what it held before stays readable."""
        for file in self._files:
            file.flush()

    def state_dict(self) -> dict[str, list[int]]:
        """The sizes of all files in bytes, once everything is on disk."""
        self.flush()
        for file in self._files:
            os.fsync(file.handle)
        return {"events": [file.size for file in self._events], "episodes": [file.size for file in self._episodes]}

    def rewind(self, state: dict[str, list[int]]) -> None:
        """Cut every file back to its size in `state`. ValueError, before any is cut, if one is shorter."""
        sizes = state["events"] + state["episodes"]
        for file, size in zip(self._files, sizes, strict=True):
            if file.size < size:
                raise ValueError(f"{file.path} has {file.size} bytes but had {size} at the checkpoint: put it back")
        for file, size in zip(self._files, sizes, strict=True):
            file.pending.clear()
            file.cut(size)

    def prolong(self, total_timesteps: int) -> None:
        """Note in every config.json that the run goes on to `total_timesteps`."""
        for folder in reversed(self.folders):  # the first one counts, so it comes last
            config = json.loads((folder / "config.json").read_text())
            config["total_timesteps"] = config["args"]["total_timesteps"] = total_timesteps
            begun = re.sub(r" --total[-_]timesteps[= ]\S+", "", config["command"])
            config["command"] = f"{begun} --total-timesteps {total_timesteps}"  # the same run, as nothing is annealed
            replace_file(folder / "config.json", json.dumps(config, indent=2).encode())

    def close(self) -> None:
        try:
            self.flush()
        finally:
            for file in self._files:
                os.close(file.handle)


class Progress:
    """How a run goes: a few live lines on a terminal, elsewhere a plain line every ten seconds.

    Args:
        total_steps: env steps of one seed.
        num_seeds: how many are trained side by side.
        quiet: print nothing.
    """

    def __init__(self, total_steps: int, num_seeds: int, quiet: bool = False) -> None:
        self._total, self._seeds = total_steps, num_seeds
        self._live = Live(console=Console(), auto_refresh=False)
        self._latest: tuple[int, float, Sequence[float], str] | None = None
        self._due = math.inf if quiet else -math.inf
        if self._live.console.is_terminal and not quiet:
            self._live.start()

    def update(self, step: int, sps: float, returns: Sequence[float], extra: str = "") -> None:
        """Show this state, unless the last one is too recent.

        Args:
            step: env steps of one seed.
            sps: env steps per second, of all seeds together.
            returns: last return of each seed, for example the mean of its last 100 episodes; NaN if it has none.
            extra: what else to say.
        """
        self._latest = (step, sps, returns, extra)
        if time.monotonic() >= self._due:
            self._show(*self._latest)

    def close(self) -> None:
        """Show the last state, if it was not."""
        if self._latest is not None and self._due < math.inf:
            self._show(*self._latest)
        self._live.stop()

    def _show(self, step: int, sps: float, returns: Sequence[float], extra: str) -> None:
        left = timedelta(seconds=int((self._total - step) * self._seeds / sps)) if sps > 0 else "?"
        speed = f"{sps:,.0f}" if sps >= 10 else f"{rate(sps):g}"
        parts = [f"{step:,}/{self._total:,} steps, {step / self._total:.0%}, {speed} SPS, {left} left"]
        known = sorted(value for value in returns if not math.isnan(value))
        if known:
            middle = known[len(known) // 4 : len(known) - len(known) // 4]  # for the interquartile mean
            span = f" ({known[0]:,.1f} to {known[-1]:,.1f}, {len(known)} seeds)" if len(known) > 1 else ""
            parts.append(f"return {sum(middle) / len(middle):,.1f}{span}")
        parts += [extra] if extra else []
        if self._live.is_started:
            lines = Table.grid()
            for line in (ProgressBar(self._total, step), Text(parts[0]), Text(", ".join(parts[1:]))):
                lines.add_row(line)
            self._live.update(lines, refresh=True)
        else:
            print(", ".join(parts), flush=True)
        self._latest = None
        self._due = time.monotonic() + (0.25 if self._live.is_started else 10.0)


class _File:
    """A file that grows at its end: `pending` is what comes next, `pack` makes its bytes on disk."""

    def __init__(self, path: Path, pack: Callable[[bytes], bytes]) -> None:
        self.path, self.pack, self.pending = path, pack, bytearray()
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        self.size = os.fstat(self.handle).st_size

    def flush(self) -> None:
        data = memoryview(self.pack(bytes(self.pending)) if self.pending else b"")
        written = 0
        try:
            while written < len(data):
                written += os.write(self.handle, data[written:])
        except OSError as error:
            self.cut(self.size)  # a part of a record would hide all that follows it
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.size += written
        self.pending.clear()

    def cut(self, size: int) -> None:
        os.ftruncate(self.handle, size)
        self.size = size


def _events_name(config: dict[str, Any], seed: int) -> str:
    return f"events.out.tfevents.{config['created']}.{config['algo']}.{seed}"


def _record(event: Event) -> bytes:
    """TFRecord: length, its checksum, data, its checksum (as in tensorboard/summary/writer/record_writer.py)."""
    data = event.SerializeToString()
    return b"".join((_length(len(data)), data, _masked_crc32c(data)))


@functools.cache
def _length(length: int) -> bytes:
    header = struct.pack("<Q", length)
    return header + _masked_crc32c(header)


@functools.cache
def _contributions() -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """What byte b contributes to a CRC-32C (RFC 3720, B.4) with k bytes behind it, flat, and where each k begins."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)  # the polynomial, bits reversed
    rows = [table]
    for _ in range(1, 512):
        rows.append(table[rows[-1] & 255] ^ (rows[-1] >> 8))
    return np.concatenate(rows), np.arange(511, -1, -1) * 256


def _masked_crc32c(data: bytes) -> bytes:
    """TensorBoard's checksum, which its own writer takes 50 us for. A CRC is the XOR of what the bytes contribute."""
    if not 4 <= len(data) <= 512:
        return struct.pack("<I", masked_crc32c(data))
    table, starts = _contributions()
    places = starts[-len(data) :] + np.frombuffer(data, np.uint8)
    places[:4] ^= 255  # the register starts with all ones, which is the same as inverting the first four bytes
    crc = int(np.bitwise_xor.reduce(table[places])) ^ 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def run_folder(name: str) -> Path:
    """The folder that has a model's flags, if any has: RUN for RUN/model too."""
    folder = Path(name).resolve()
    return folder.parent if folder.name == "model" else folder


def run_flags(folder: Path) -> dict[str, Any] | None:
    """A run folder's flags; None of another folder."""
    try:
        flags = json.loads((folder / "config.json").read_text())["args"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return flags if isinstance(flags, dict) else None


def provenance() -> dict[str, Any]:
    """What it takes to do a run again; neither the environment's variables nor names of people or machines."""
    versions = {"python": platform.python_version(), "rl_lab": __version__}
    for package in ("torch", "numpy", "gymnasium", "mujoco", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "versions": versions,
        "git_commit": _git_commit(),
        "hardware": {"machine": platform.machine(), "cpu": cpu, "cores": os.cpu_count(), "gpu": gpu},
    }


def _git_commit() -> str | None:
    """The commit of the checkout this file lies in, with "-dirty" if tracked files differ from it.

    But for those that recipes write, README.md's tables and runs/results: a run does not depend on them.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package may lie in somebody else's repository
        return None
    code = (".", ":(exclude)README.md", ":(exclude)runs/results")
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("diff", "--name-only", "HEAD", "--", *code))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit
