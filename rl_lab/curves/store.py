"""Reads training runs: this project's run folders, CleanRL's TensorBoard folders, CSV files; and writes reference sets.

A run is its episodes: the step at which each ended and its return. What is read:

    {env}__{algo}__{seed}__{time}/config.json, episodes.csv.gz      this project's run folder
    {env}__{script}__{seed}__{time}/events.out.tfevents*            CleanRL's run folder, tag charts/episodic_return
    {script}__{env}__{seed}.csv[.gz]                                columns global_step, episodic_return
    {script}__{env}.csv[.gz]                                        the same with a column seed: a reference set, with
                                                                    its provenance in {script}__{env}.json
    a folder of any of these
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader  # type: ignore[import-untyped]

REFERENCE = Path(__file__).parent / "reference"
FINISHED = 0.98  # of the budget: where no file tells that a run was not stopped, its last episode ends later than this

# Which CleanRL script an algorithm of ours is compared with, where the names differ.
SCRIPTS = {(algo, "Box"): f"{algo}_continuous_action" for algo in ("ppo", "sac", "td3")}
ATARI_SCRIPTS = {"ppo_lstm": "ppo_atari_lstm"}  # others have _atari at their end


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        algo: our algorithm or the script that ran.
        steps, returns: (E,) env step at which an episode ended, increasing, and its undiscounted return.
        total_timesteps: the budget asked for, None where the files do not tell.
        finished: whether they tell that it was trained to its end.
        config: config.json of a run of ours, else empty.
    """

    path: Path
    env: str
    algo: str
    seed: int
    steps: NDArray[np.float64]
    returns: NDArray[np.float64]
    total_timesteps: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @property
    def script(self) -> str:
        """The CleanRL script that this run is compared with."""
        if "script" in self.config:  # of results that were kept
            return str(self.config["script"])
        if self.config and self.env.endswith("NoFrameskip-v4"):
            return ATARI_SCRIPTS.get(self.algo, f"{self.algo}_atari")
        return SCRIPTS.get((self.algo, self.config.get("action_space", "")), self.algo)


def load(path: Path) -> list[Run]:
    """All runs at `path`: a run folder, a file, or a folder of these.

    Raises:
        ValueError: if there are none, or one cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file():
        return _load_csv(path)
    if _is_run(path):
        return [_load_folder(path)]
    names = sorted(child for child in path.iterdir() if _is_run(child) or _is_csv(child))
    runs = [run for name in names for run in load(name)]
    if not runs:
        raise ValueError(f"{path}: no config.json, no events.out.tfevents file, no run folder or episode CSV inside")
    return runs


def read_episodes(path: Path) -> dict[str, NDArray[np.float64]]:
    """Columns of an episode CSV; of a gzip file that breaks off, every whole row before the break.

    Raises:
        ValueError: if a column is missing or the file is damaged.
    """
    data, whole = path.read_bytes(), True
    if path.suffix == ".gz":
        data, whole = _gunzip(path, data)
    try:
        text = data.decode() if whole else data[: data.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None
    header, _, body = text.partition("\n")
    names = header.strip().split(",")
    if not {"global_step", "episodic_return"} <= set(names):
        raise ValueError(f"{path}: columns are {header!r}, needed are global_step and episodic_return")
    if not body.strip():
        return {name: np.empty(0) for name in names}
    try:
        table = np.loadtxt(io.StringIO(body), delimiter=",", ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dict(zip(names, table.T, strict=True))


def provenance(path: Path) -> dict[str, Any]:
    """What is known of a reference set's origin: its JSON file, or nothing."""
    note = path.parent / f"{path.name.removesuffix('.gz').removesuffix('.csv')}.json"
    return dict(json.loads(note.read_text())) if note.is_file() else {}


def write_set(path: Path, note: dict[str, Any], episodes: dict[int, tuple[NDArray[Any], NDArray[Any]]]) -> None:
    """Write a reference set, and its provenance beside it; equal input gives equal bytes.

    Args:
        path: {script}__{env}.csv.gz, in a folder that is there.
        note: its provenance.
        episodes: seed -> (E,) steps and returns.
    """
    lines = ["seed,global_step,episodic_return"]
    for seed, table in episodes.items():
        lines += [f"{seed},{int(step)},{value:.9g}" for step, value in zip(*table, strict=True)]
    replace(path.with_name(f"{path.name.removesuffix('.csv.gz')}.json"), (json.dumps(note, indent=1) + "\n").encode())
    replace(path, gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))  # last: the set is there if it is


def replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)


def published(script: str, env: str) -> list[dict[str, str]]:
    """Rows of CleanRL's documented results for a script and environment: mean, std, seeds, metric, source, commit."""
    with (REFERENCE / "published.csv").open() as file:
        return [row for row in csv.DictReader(file) if (row["script"], row["env"]) == (script, env)]


def set_name(data: str) -> str:
    """A data set's id or path as a name for files: lab-hopper-medium-v0, or of a file hopper-medium-v2."""
    file = re.fullmatch(r"(?:.*/)?([^/]+)\.(?:hdf5|h5)", data)
    return file[1] if file else data.strip("./~").replace("/", "-")


def other_versions(env: str, known: Iterable[str]) -> list[str]:
    """The ids in `known` that are the same task in another version: HalfCheetah-v4 for HalfCheetah-v5."""
    task = env.rpartition("-v")[0]
    return sorted({other for other in known if other != env and other.rpartition("-v")[0] == task})


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").is_file() or any(path.glob("events.out.tfevents*")))


def _is_csv(path: Path) -> bool:
    return "__" in path.name and path.name.endswith((".csv", ".csv.gz"))


def _load_folder(path: Path) -> Run:
    if not (path / "config.json").is_file():
        return _load_events(path)
    try:
        config = json.loads((path / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    missing = {"env", "algo", "seed", "total_timesteps"} - set(config)
    if missing:
        raise ValueError(f"{path / 'config.json'} lacks {', '.join(sorted(missing))}")
    if not isinstance(config["seed"], int) or not isinstance(config["total_timesteps"], int):
        raise ValueError(f"{path / 'config.json'}: seed and total_timesteps must be whole numbers")
    table = read_episodes(path / "episodes.csv.gz")
    # A run that --until-return ended has a model, too.
    done = (path / "model.safetensors").is_file() and config.get("args", {}).get("until_return") is None
    return _run(path, config["env"], config["algo"], config["seed"], table, config["total_timesteps"], config, done)


def _load_events(path: Path) -> Run:
    name = re.fullmatch(r"(.+)__(.+)__(\d+)__(\d+)", path.resolve().name)
    if not name:
        raise ValueError(f"{path}: the folder is not named {{env}}__{{script}}__{{seed}}__{{time}}")
    points: list[tuple[int, float]] = []
    budget: int | None = None
    for file in sorted(path.glob("events.out.tfevents*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == "charts/episodic_return":
                    points.append((event.step, value.tensor.float_val[0]))
                elif value.tag == "hyperparameters/text_summary":
                    asked = re.search(rb"\|total_timesteps\|(\d+)\|", value.tensor.string_val[0])
                    budget = int(asked[1]) if asked else None
    steps, returns = np.array(points, dtype=np.float64).reshape(-1, 2).T
    table = {"global_step": steps, "episodic_return": returns}
    return _run(path, name[1], name[2], int(name[3]), table, budget)


def read_scalars(run: Path, tags: Sequence[str]) -> dict[str, list[float]]:
    """What a run folder's TensorBoard events say of these tags, in the order of steps; of a step's several, the last.

    Raises:
        ValueError: if a tag is missing.
    """
    found: dict[str, dict[int, float]] = {tag: {} for tag in tags}
    for file in sorted(run.glob("events.out.tfevents*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag in found:
                    found[value.tag][event.step] = value.tensor.float_val[0]
    if missing := [tag for tag, points in found.items() if not points]:
        raise ValueError(f"{run}: its events have no {', '.join(missing)}")
    return {tag: [points[step] for step in sorted(points)] for tag, points in found.items()}


def _load_csv(path: Path) -> list[Run]:
    table = read_episodes(path)
    name = re.fullmatch(r"(\w+?)__([^_].*?)(?:__(\d+))?\.csv(?:\.gz)?", path.name)
    if not name or (name[3] is None) != ("seed" in table):
        raise ValueError(
            f"{path}: name an episode file {{script}}__{{env}}__{{seed}}.csv[.gz], or {{script}}__{{env}}.csv[.gz] if "
            "it has a column seed"
        )
    if name[3] is not None:
        return [_run(path, name[2], name[1], int(name[3]), table)]
    note, seeds = provenance(path), table["seed"]
    env, budget, done = str(note.get("env", name[2])), note.get("total_timesteps"), note.get("finished", False)
    rows = {int(s): {k: column[seeds == s] for k, column in table.items()} for s in np.unique(seeds)}
    return [_run(path, env, name[1], s, episodes, budget, finished=done) for s, episodes in rows.items()]


def _run(
    path: Path,
    env: str,
    algo: str,
    seed: int,
    table: dict[str, NDArray[np.float64]],
    budget: int | None = None,
    config: dict[str, Any] | None = None,
    finished: bool = False,
) -> Run:
    steps, returns = table["global_step"], table["episodic_return"]
    if not len(steps):
        raise ValueError(f"{path}: no episode has ended")
    if not np.isfinite(returns).all() or (np.diff(steps) < 0).any():
        raise ValueError(f"{path}: an episode's return is not finite, or its steps decrease")
    return Run(path, env, algo, seed, steps, returns, budget, config or {}, finished)


def _gunzip(path: Path, data: bytes) -> tuple[bytes, bool]:
    """Content of gzip members one after the other, and whether the last one is whole."""
    parts, whole = [], True
    while data and whole:
        member = zlib.decompressobj(wbits=31)
        try:
            parts.append(member.decompress(data))
        except zlib.error as error:
            raise ValueError(f"{path}: {error}") from None
        data, whole = member.unused_data, member.eof
    return b"".join(parts), whole
