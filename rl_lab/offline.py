"""Offline data: a Minari data set or a D4RL file as columns of transitions, checked where it comes in.

    dataset = load("mujoco/hopper/medium-v0")           # Minari's: the local one, else downloaded once
    dataset = load("path/to/minari/folder")             # HDF5 or Arrow
    dataset = load("halfcheetah-medium-v2.hdf5")        # a D4RL file
    dataset.columns["obs"], dataset.normalized(dataset.episode_returns)

Nothing is unpickled: both formats hold arrays, spaces are JSON, and no environment that a data set describes is made.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import math
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from rl_lab import require

Arrays = dict[str, NDArray[Any]]
Returns = TypeVar("Returns", float, Tensor)

D4RL_COLUMNS = {
    "obs": "observations",
    "actions": "actions",
    "rewards": "rewards",
    "next_obs": "next_observations",
    "terminated": "terminals",
    "truncated": "timeouts",
}
SCORES_FLAG = "--scores RANDOM EXPERT (in Python scores=(random, expert))"
ROUNDING = 1e-5  # of an action's range, beyond its bounds: float32's rounding, with room


@dataclass(frozen=True, eq=False)
class Dataset:
    """Transitions in time order, one episode after the other.

    Attributes:
        name: as it was given to `load`.
        env_id: of the environment that the data are of, where it is known.
        columns: (n, ...) on the CPU: obs, actions, next_obs (floating ones as float32, others as in their space),
            rewards float32, terminated and truncated bool. At least one of the two is set in each episode's last step.
        observation_space, action_space: a Box; a Box or Discrete.
        scores: mean returns of a random and of an expert policy, where they are known.
        checksum: SHA-256 of the columns, whatever format they came in.
        notes: what was changed or assumed, a sentence each, to be shown to the user.
    """

    name: str
    env_id: str | None
    columns: dict[str, Tensor]
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    scores: tuple[float, float] | None
    checksum: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Transitions."""
        return len(self.columns["rewards"])

    @property
    def _ends(self) -> Tensor:
        return (self.columns["terminated"] | self.columns["truncated"]).nonzero().squeeze(1)

    @property
    def episode_lengths(self) -> Tensor:
        """(E,) int64, steps."""
        return self._ends.diff(prepend=torch.tensor([-1]))

    @property
    def episode_returns(self) -> Tensor:
        """(E,) float64, undiscounted."""
        lengths = self.episode_lengths
        episodes = torch.arange(len(lengths)).repeat_interleave(lengths)
        return torch.zeros(len(lengths), dtype=torch.float64).index_add_(0, episodes, self.columns["rewards"].double())

    def normalized(self, returns: Returns) -> Returns:
        """Scores of returns: 100 * (returns - random) / (expert - random) [Fu et al. 2020, section 5].

        Raises:
            ValueError: if the reference scores are unknown.
        """
        if self.scores is None:
            raise ValueError(f"{self.name} has no reference scores; pass {SCORES_FLAG}")
        return normalized(returns, self.scores)

    def require_env(self, env_id: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        """Raise a ValueError unless the data fit an environment with these spaces."""
        ours, theirs = (self.observation_space, self.action_space), (observation_space, action_space)
        for what, mine, other in zip(("observations", "actions"), ours, theirs, strict=True):
            same = mine.shape == other.shape and type(mine) is type(other)
            if what == "actions" and same:  # of another environment, though as wide, where their range is another
                same = np.allclose(_bounds(mine), _bounds(other))
            if not same:
                where = f"; the data are of {self.env_id}" if self.env_id not in (None, env_id) else ""
                raise ValueError(f"--env {env_id} has {what} {other}, {self.name} has {mine}{where}")


def normalized(returns: Returns, scores: tuple[float, float]) -> Returns:
    """100 * (returns - random) / (expert - random), by the mean returns of the two."""
    random, expert = scores
    return 100 * (returns - random) / (expert - random)


class Source(NamedTuple):
    """What a file says, before it is checked."""

    env_id: str | None
    columns: Arrays
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    scores: tuple[float | None, float | None]  # its own
    notes: tuple[str, ...] = ()
    d4rl_scores: tuple[float, float] | None = None  # of the task that it is named after
    in_a_row: bool = False  # one episode's rows after another's, which flags alone tell apart


def load(name: str, scores: tuple[float, float] | None = None, env_id: str | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: a Minari id, downloaded where it is not on this machine; a Minari folder; or a D4RL file. The file's name
            tells the environment, as in halfcheetah-medium-v2.hdf5. Where it holds no next_observations, the true
            successors of time-outs are unknown: these transitions are left out, as D4RL's `qlearning_dataset` does.
        scores: mean returns of a random and of an expert policy, instead of D4RL's or, where D4RL lacks the task, the
            data set's own.
        env_id: of the environment to judge in, if not the data's own, of the same task; whether it has the data's
            spaces is for `Dataset.require_env`. A D4RL file takes its spaces, where Gymnasium can make it.
    Raises:
        ValueError: if a package or the data set is missing, or it cannot be read, is damaged or does not fit.
    """
    try:
        source = _read_d4rl(name, env_id) if name.endswith((".hdf5", ".h5")) else _read_minari(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: {error}") from None
    except (OSError, RuntimeError, KeyError) as error:  # HDF5 raises them, the last for a link to nothing
        raise ValueError(f"{name} cannot be read ({_line(error)}); a whole file that you may read works") from error
    own = source.env_id or env_id or ""
    if env_id and ":" not in own + env_id and _task(own) != _task(env_id):  # module:Class may be of any task
        raise ValueError(f"--env {env_id}: {name} is of {own}, of which this is no version; leave --env out")
    columns, notes = _checked(name, source), list(source.notes)
    if source.in_a_row:
        notes += _check_successors(columns)
    if "next_obs" not in columns:
        notes.append(_drop_time_outs(columns))
    if not len(columns["rewards"]):
        raise ValueError(f"{name} holds no transition")
    if not (columns["terminated"] | columns["truncated"])[-1]:
        columns["truncated"][-1] = True
        notes.append("The data end within an episode; its last step counts as truncated.")
    table = source.d4rl_scores or reference_scores(own)
    known = _scores(name, scores or table or source.scores)
    if known and table:
        others = {"D4RL's": table, "the data set's own": source.scores}
        told = [f"{whose} {a} and {b}" for whose, (a, b) in others.items() if (a, b) != known and None not in (a, b)]
        if told:
            notes.append(f"Normalized scores are by {known[0]:g} and {known[1]:g}, not by {' or '.join(told)}.")
    if env_id and env_id != own:
        notes.append(f"The data are of {own}, judged in {env_id}.")
    spaces = source.observation_space, source.action_space
    data = Dataset(name, own or None, columns, *spaces, known, checksum(columns), tuple(notes))
    if source.in_a_row and own in {row["env_id"] for row in _d4rl_tasks().values()}:  # other files' limits are unknown
        limit, longest = gym.spec(own).max_episode_steps or math.inf, int(data.episode_lengths.max())
        if longest > limit:
            length = f"an episode of {longest:,} steps, {own} ends after {limit:,}"
            raise ValueError(f"{name} has {length}: flag every time-out in `timeouts`, or add next_observations")
    return data


def _task(env_id: str) -> str:
    """An environment's id without its version, of which a task has several."""
    return re.sub(r"-v\d+$", "", env_id)


def reference_scores(task: str) -> tuple[float, float] | None:
    """D4RL's random and expert returns of a task, such as "hopper", or of an environment, such as "Hopper-v4".

    D4RL's are of the -v2 tasks; -v3, -v4 and -v5 have the same ones, so that all versions share a scale.
    """
    row = _d4rl_tasks().get(task.partition("-")[0].lower())
    return (float(row["random"]), float(row["expert"])) if row else None


def _d4rl_tasks() -> dict[str, dict[str, str]]:
    with Path(__file__).with_name("d4rl_scores.csv").open(encoding="utf-8") as file:
        next(file)  # the source
        return {row["task"]: row for row in csv.DictReader(file)}


def _scores(name: str, found: tuple[float | None, float | None]) -> tuple[float, float] | None:
    random, expert = found
    if random is None and expert is None:
        return None
    if random is None or expert is None:
        known = f"ref_min_score {random}" if expert is None else f"ref_max_score {expert}"
        raise ValueError(f"{name} has only one reference score, {known}; pass both by {SCORES_FLAG}")
    if not isinstance(random, int | float) or not isinstance(expert, int | float):
        raise ValueError(f"{name}: its scores {random!r} and {expert!r} are no numbers; pass both by {SCORES_FLAG}")
    if not -math.inf < random < expert < math.inf:
        raise ValueError(f"{name}: scores {random} and {expert} must be finite, the expert's the larger one")
    return random, expert


def _read_d4rl(name: str, env_id: str | None) -> Source:
    path, h5py = Path(name).expanduser(), require("h5py", "offline")
    if not path.is_file():
        raise ValueError(f"{name} is no file; D4RL's are at http://rail.eecs.berkeley.edu/datasets/offline_rl")
    task = re.split("[-_]", path.name)[0]
    own = _d4rl_tasks().get(task, {"env_id": ""})["env_id"] or env_id
    if not own:
        known = ", ".join(task for task, row in _d4rl_tasks().items() if row["env_id"])
        raise ValueError(f"{name}: the file's name begins with none of {known}; say the environment by --env")
    with h5py.File(path) as file:
        there = {ours: file[theirs] for ours, theirs in D4RL_COLUMNS.items() if theirs in file}
        columns = {ours: column[()] for ours, column in there.items() if isinstance(column, h5py.Dataset)}
        if missing := D4RL_COLUMNS.keys() - columns.keys() - {"next_obs"}:
            found = ", ".join(list(file)[:5]) or "nothing"
            needed = ", ".join(sorted(D4RL_COLUMNS[ours] for ours in missing))
            raise ValueError(f"{name} is no D4RL file: it lacks {needed} and holds {found}")
    scores = reference_scores(task) if task in _d4rl_tasks() else None  # none of Ant_maze_..., another task
    return Source(own, columns, *_spaces(own, env_id or own), (None, None), d4rl_scores=scores, in_a_row=True)


def _check_successors(columns: dict[str, Tensor]) -> list[str]:
    """Hold next_obs, where a D4RL file gives it, against the next row's obs; returns what was done.

    A break within an episode is a time-out that its file does not flag. Where all time-outs lead on to the next
    episode's first observation, next_obs is but the next row's, and no true successor.
    """
    if "next_obs" not in columns:
        return []
    terminated, truncated = columns["terminated"], columns["truncated"]
    goes_on = torch.isclose(columns["next_obs"][:-1], columns["obs"][1:], atol=1e-6).flatten(1).all(1)
    broken, timed_out = ~(goes_on | terminated[:-1] | truncated[:-1]), (truncated & ~terminated)[:-1]
    if timed_out.any() and goes_on[timed_out].all():
        del columns["next_obs"]
        return ["At all time-outs next_observations hold the next row's observation; they are not used."]
    truncated[:-1] |= broken
    told = f"Rows within an episode that do not lead to the next one: {broken.sum():,}; they count as truncated."
    return [told] if broken.any() else []


def _drop_time_outs(columns: dict[str, Tensor]) -> str:
    """Derive next_obs from the order of the rows, without those to which it gives none; returns what was done."""
    obs, terminated, truncated = (columns[key] for key in ("obs", "terminated", "truncated"))
    kept = terminated | ~truncated
    kept[-1:] = terminated[-1:]
    next_obs = obs.roll(-1, 0)
    next_obs[terminated] = obs[terminated]  # the next row is another episode's, and a termination's target needs none
    truncated[:-1] |= ~kept[1:] & ~terminated[:-1]  # what comes before a row left out is its episode's last one now
    columns["next_obs"] = next_obs
    columns.update({key: column[kept] for key, column in columns.items()})
    return (
        f"Without next_observations {len(kept) - kept.sum():,} of {len(kept):,} transitions are left out, whose true "
        "successors are unknown: time-outs and an open end. Returns of their episodes lack the last reward; next_obs "
        "of a terminated step is its obs."
    )


def _read_minari(name: str) -> Source:
    minari, folder = require("minari", "offline"), _minari_folder(name)
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        require("h5py" if metadata["data_format"] == "hdf5" else "pyarrow", "offline")
        if missing := {"observation_space", "action_space"} - metadata.keys():  # Minari would make the environment
            raise ValueError(f"its metadata lack {' and '.join(sorted(missing))}")
        data = minari.MinariDataset(folder)
        _require_kinds(data.observation_space, data.action_space)
        episodes = [
            (x.observations, x.actions, x.rewards, x.terminations, x.truncations) for x in data.iterate_episodes()
        ]
        total = f"{len(episodes)} episodes, {sum(len(x[2]) for x in episodes)} steps"
        if total != (said := f"{metadata['total_episodes']} episodes, {metadata['total_steps']} steps"):
            raise ValueError(f"it holds {total}, its metadata say {said}")
        for i, (obs, *others) in enumerate(episodes):
            if {len(obs) - 1} != set(map(len, others)):
                lengths = ", ".join(str(len(x)) for x in others)
                raise ValueError(
                    f"episode {i} has {len(obs)} observations for {lengths} actions, rewards, terminations, truncations"
                )
        obs, *columns = zip(*episodes, strict=True)
        arrays = dict(zip(("actions", "rewards", "terminated", "truncated"), map(np.concatenate, columns), strict=True))
        arrays |= {"obs": np.concatenate([x[:-1] for x in obs]), "next_obs": np.concatenate([x[1:] for x in obs])}
        steps = np.array([len(x[2]) for x in episodes])
        last = steps.cumsum()[steps > 0] - 1
        unended = last[(arrays["terminated"][last] == 0) & (arrays["truncated"][last] == 0)]
        arrays["truncated"][unended] = True
        spec, ours = metadata.get("env_spec"), metadata.get("rl_lab", {})  # an id unknown to Gymnasium has no spec
        env_id = json.loads(spec)["id"] if spec else ours.get("env")
        settings = [*_settings(json.loads(spec or "{}")), *["an eval_env_spec"] * bool(metadata.get("eval_env_spec"))]
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of JSON, HDF5, Arrow and Minari, which have no base in common
        raise ValueError(
            f"{name}: {folder} cannot be loaded ({_line(error)}); a complete Minari data set of Box observations works"
        ) from error
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    told = f"{len(unended)} of {len(episodes)} episodes end neither terminated nor truncated; their last steps"
    notes = [f"{told} count as truncated."] if len(unended) else []
    if settings:
        told = f"The data set names {', '.join(settings)} besides {env_id}"
        notes.append(f"{told}; agents are judged in {env_id} as it is registered.")
    return Source(env_id, arrays, data.observation_space, data.action_space, scores, tuple(notes))


def _settings(spec: dict[str, Any]) -> list[str]:
    """What a recorded environment's spec has that one made by its id would not."""
    own = gym.registry.get(spec.get("id", ""))
    known: dict[str, Any] = own.kwargs if own else {}
    kwargs, limit = spec.get("kwargs", {}), spec.get("max_episode_steps")
    found = [f"{name}={x}" for name, x in kwargs.items() if name not in known or known[name] != x]
    if own and limit != own.max_episode_steps:
        found.append(f"max_episode_steps={limit}")
    return found + [wrapper["name"] for wrapper in spec.get("additional_wrappers") or []]


def _minari_folder(name: str) -> Path:
    """Where a Minari data set's metadata.json is, downloaded if need be."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    path, home = Path(name).expanduser(), root / name / "data"
    for folder in (path, path / "data", home):
        if (folder / "metadata.json").is_file():
            return folder
    if path.is_file():
        raise ValueError(f"{name} is no data set: D4RL's files end in .hdf5 or .h5, Minari's sets are folders")
    if path.exists():
        raise ValueError(f"{name} is no Minari folder: metadata.json is neither in it nor in its data")
    if not re.fullmatch(r"([-\w]+/)*[-\w]+-v\d+", name):
        raise ValueError(f"{name} is no file, no folder and no Minari id; mujoco/hopper/medium-v0 would be one")
    local = name.startswith("lab/")  # as `collect` and the recipe name their sets, which no hub has
    anew = "make it anew, by runs/make_offline_data.sh or rl_lab.collect" if local else f"minari download {name}"
    if home.parent.exists():
        raise ValueError(f"{home.parent} is incomplete: remove it, then: {anew}")
    if local:
        there = [str(path.parents[1].relative_to(root)) for path in root.glob("**/data/metadata.json")]
        nearest = difflib.get_close_matches(name, there)
        hint = f"the nearest there are {', '.join(nearest)}" if nearest else anew
        raise ValueError(f"{name} is not in {root}: {hint}; or set MINARI_DATASETS_PATH to the folder that has it")
    try:
        require("minari", "offline").download_dataset(name)
    except Exception as error:  # of Minari, its hub and the network, which have no base in common
        raise ValueError(
            f"{name} is not in {root} and could not be downloaded ({_line(error)}); where the network allows: minari "
            f"download {name}; or set MINARI_DATASETS_PATH to the folder that has it, or give a path"
        ) from error
    return home


def _spaces(own: str, env_id: str) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """Those of `env_id`, or of `own` where that is module:Class, which Gymnasium cannot make."""
    try:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # -v4, which D4RL's stand for
            env = gym.make(env_id, disable_env_checker=True)
    except (gym.error.Error, ImportError) as error:
        if ":" in env_id and own != env_id:
            return _spaces(own, own)
        raise ValueError(f"--env {env_id} cannot be made: {_line(error)}") from error
    env.close()
    return env.observation_space, env.action_space


def _require_kinds(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    if not isinstance(observation_space, spaces.Box) or not isinstance(action_space, spaces.Box | spaces.Discrete):
        raise ValueError(f"{observation_space}, {action_space}: a Box and a Box or Discrete are supported")


def _kind(space: gym.Space[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of what is kept of a space's elements."""
    floating = np.issubdtype(space.dtype, np.floating)
    return space.shape or (), np.dtype(np.float32 if floating else space.dtype)


def _bounds(space: gym.Space[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Least and largest action."""
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    assert isinstance(space, spaces.Box)
    return space.low, space.high


def _checked(name: str, source: Source) -> dict[str, Tensor]:
    """The columns as tensors, after every check that needs no environment."""
    _require_kinds(source.observation_space, source.action_space)
    obs, actions = _kind(source.observation_space), _kind(source.action_space)
    kinds = {"obs": obs, "actions": actions, "rewards": ((), np.dtype(np.float32)), "next_obs": obs}
    count, checked = len(np.atleast_1d(source.columns["rewards"])), {}
    for key, column in sorted(source.columns.items(), key=lambda item: item[0] != "rewards"):  # which count the rest
        shape, dtype = kinds.get(key, ((), np.dtype(np.bool_)))
        if column.shape != (count, *shape):
            raise ValueError(
                f"{name}: {key} has shape {column.shape}; {(count, *shape)} fits the space and the {count:,} rewards"
            )
        flags = dtype == np.bool_ and column.dtype.kind in "biuf" and np.isin(column, (0, 1)).all()
        if not flags and not np.can_cast(column.dtype, dtype, "same_kind"):
            raise ValueError(f"{name}: {key} holds {column.dtype} values that are no {dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            x = torch.from_numpy(np.ascontiguousarray(column, dtype))
        _refuse(name, key, x, ~x.isfinite(), "not finite")
        checked[key] = x
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in _bounds(source.action_space))
    room = ROUNDING * (high - low).nan_to_num(posinf=0.0)
    outside = (checked["actions"] < low - room) | (checked["actions"] > high + room)
    _refuse(name, "actions", checked["actions"], outside, f"outside of {source.action_space}")
    return checked


def _refuse(name: str, key: str, x: Tensor, bad: Tensor, what: str) -> None:
    """Raise a ValueError that shows the first of the bad values (n, ...), if there are any."""
    if bad.any():
        step = int(bad.nonzero()[0, 0])
        raise ValueError(f"{name}: {key} of step {step} is {x[step][bad[step]][0]:g}, {what}")


def checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors of the CPU with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.contiguous().numpy().data)
    return digest.hexdigest()


def _line(error: Exception) -> str:
    """The first line of an error, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
