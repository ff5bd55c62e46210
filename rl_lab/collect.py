"""Record a policy's steps, or what a run has learned from, as a local Minari data set.

Sampled actions by default, as D4RL's (Fu et al. 2020, arXiv:2004.07219). Each environment row plays the same number of
steps: to stop once enough episodes have ended would favour the short ones. docs/collect.md says what is recorded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

from rl_lab import checkpoint, require, sb3
from rl_lab.cli import flag, require_one_path_each
from rl_lab.distributions import Actions, draw_noise, sample, scaled
from rl_lab.envs import make
from rl_lab.episodes import evaluation_seeds
from rl_lab.evaluate import Policy, load
from rl_lab.log import Progress, provenance
from rl_lab.offline import normalized, reference_scores
from rl_lab.replay import Batch
from rl_lab.vector import VectorEnv

WRITE_STEPS = 10_000  # steps of ended episodes that are written at once

Episodes = Iterator[tuple[dict[str, Any], bool]]  # as Minari names what is in one; whether it is whole
Act = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # obs (B, *obs), mask, (B,) bool begins an episode -> actions


@dataclass(frozen=True)
class Args:
    """Record a policy's steps, or a replay, as a Minari data set, in MINARI_DATASETS_PATH or ~/.minari/datasets."""

    dataset: str
    """id of the data set, such as lab/halfcheetah/expert-v0"""
    env: str | None = None
    """environment id of Gymnasium; --run and --replay know their own"""
    sb3: Path | None = None
    """act as this zip of Stable-Baselines3's SAC, TD3 or DDPG or of sb3-contrib's TQC does"""
    run: Path | None = None
    """act as this run folder's policy does"""
    replay: Path | None = None
    """play nothing, take what is in this run folder's replay: what an off-policy agent met as it learned"""
    random: bool = False
    """act uniformly at random"""
    steps: int | None = None
    """env steps to record, over all environments; 200,000 if not given"""
    num_envs: int | None = None
    """environments side by side, each of which plays an equal share of --steps; 10 if not given"""
    deterministic: bool = False
    """play the likeliest actions instead of sampled ones"""
    seed: int = 0
    """another number draws other episodes and actions"""
    scores: tuple[float, float] | None = None
    """returns of a random policy and of an expert, for normalized scores; D4RL's where it has the task"""
    overwrite: bool = False
    """replace a data set of this id"""


class Player(NamedTuple):
    """Whose steps are recorded."""

    env_id: str
    env: VectorEnv
    act: Act
    policy: dict[str, Any]  # what the metadata says about it


class Source(NamedTuple):
    """What is recorded."""

    env_id: str
    env: VectorEnv  # whose spaces the data have
    episodes: Episodes
    steps: int  # of all episodes
    about: dict[str, Any]  # what the metadata says under "rl_lab"


def check(args: Args) -> None:
    """Raise ValueError for flags that do not go together."""
    if sum(x is not None for x in (args.sb3, args.run, args.replay)) + args.random != 1:
        raise ValueError("name whose steps to record: one of --sb3 ZIP, --run FOLDER, --replay FOLDER and --random")
    if args.env is None and args.run is None and args.replay is None:
        raise ValueError("--env is missing, such as --env HalfCheetah-v4; only --run and --replay know their own")
    for name in ("steps", "num_envs", "deterministic", "seed"):
        if args.replay is not None and getattr(args, name) != getattr(Args, name):
            raise ValueError(f"{flag(name)} says how to play, and --replay plays nothing: leave it out")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be 0 or more")
    if args.random and args.deterministic:
        raise ValueError("--deterministic: random actions are sampled; leave it out")
    if args.scores and not (all(map(math.isfinite, args.scores)) and args.scores[0] < args.scores[1]):
        raise ValueError(
            f"--scores {args.scores[0]} {args.scores[1]} must be finite, the random policy's first and smaller"
        )


def source(args: Args) -> Source:
    """What the flags ask for; ValueError says what does not fit."""
    if args.replay is not None:
        return _replayed(args, args.replay)
    steps = 200_000 if args.steps is None else args.steps
    num_envs = 10 if args.num_envs is None else args.num_envs
    if num_envs < 1 or steps < 1 or steps % num_envs:
        raise ValueError(f"--steps {steps} must be a multiple of --num-envs {num_envs}, both at least 1")
    env_id, env, act, policy = player(args, num_envs)
    actions = "deterministic" if args.deterministic else "sampled"
    about = {"policy": policy, "env": env_id, "actions": actions, "seed": args.seed, "num_envs": num_envs}
    return Source(env_id, env, episodes(env, act, steps // num_envs), steps, about)


def player(args: Args, num_envs: int) -> Player:
    """The policy and its environments, both seeded with `args.seed`; ValueError says what does not fit."""
    env_seed, policy_seed = evaluation_seeds([args.seed, args.seed + 2**32], (0, 2))  # independent of each other
    generator = torch.Generator().manual_seed(policy_seed)
    if args.run is not None:
        return _run_player(args, args.run, num_envs, env_seed, generator)
    assert args.env is not None
    env = make(args.env, (env_seed,), num_envs)
    if args.sb3 is not None:
        agent = sb3.load(args.sb3, env.observation_space, env.action_space)
        if agent.algo == "td3" and not args.deterministic:
            raise ValueError(f"{args.sb3} is of TD3 or DDPG, which have no distribution to sample: add --deterministic")
        chosen = None if args.deterministic else generator
        about = {"kind": "sb3", "algo": agent.algo, "file": args.sb3.name, "sha256": _sha256(args.sb3)}
        return Player(args.env, env, lambda obs, mask, begins: agent(obs, chosen), about)
    actions = Actions.of(env.action_space)
    if not all(map(math.isfinite, actions.low + actions.high)):
        raise ValueError(f"--random: {args.env}'s actions have no bounds to draw between: {env.action_space}")
    return Player(
        args.env, env, lambda obs, mask, begins: uniform(actions, mask, len(obs), generator), {"kind": "random"}
    )


def _run_player(args: Args, run: Path, num_envs: int, env_seed: int, generator: torch.Generator) -> Player:
    policy = _loaded(args, run)
    env = policy.environments(env_seed, num_envs)
    policy.generator = generator
    policy.reset(num_envs)

    def act(obs: Tensor, mask: Tensor | None, begins: Tensor) -> Tensor:
        policy.memory = {name: x.masked_fill(begins.unsqueeze(1), 0.0) for name, x in policy.memory.items()}
        actions: Tensor = policy(obs, args.deterministic, mask)
        return actions

    saved = run.resolve().parent / policy.config["group"][0]
    about = {"kind": "run", "algo": policy.algo, "run": run.resolve().name, "parameters": policy.source}
    about["sha256"] = _sha256(run / "model.safetensors", saved / checkpoint.NAME, saved / checkpoint.PREVIOUS)
    return Player(policy.env_id, env, act, about)


def _replayed(args: Args, run: Path) -> Source:
    policy = _loaded(args, run)
    config, folder = policy.config, run.resolve().parent / policy.config["group"][0]
    if not any((folder / name).exists() for name in (checkpoint.NAME, checkpoint.PREVIOUS)):
        raise ValueError(f"--replay {run}: its replay would be in a checkpoint in {folder}, where there is none")
    replay = checkpoint.load(folder)["state"].get("replay")
    if replay is None:
        raise ValueError(f"--replay {run}: {policy.algo} keeps no replay; a run of sac, td3 or dqn does")
    columns, num_envs, seed = replay["columns"], config["args"]["num_envs"], config["seed"]
    if not columns:
        raise ValueError(f"--replay {run}: its replay is in --replay-folder, not in its checkpoint, and is not read")
    if "next_obs" not in columns:
        raise ValueError(f"--replay {run}: its replay keeps frames of stacked images, no transitions")
    if not replay["written"]:
        raise ValueError(f"--replay {run}: its replay is empty, as its checkpoint is of step 0")
    first = config["seeds"].index(seed) * num_envs
    columns = {name: x[:, first : first + num_envs] for name, x in columns.items()}
    origin = {"kind": "replay", "algo": policy.algo, "run": run.resolve().name, "steps": replay["written"] * num_envs}
    origin["sha256"] = _sha256(folder / checkpoint.NAME, folder / checkpoint.PREVIOUS)
    about = {"policy": origin, "env": policy.env_id, "actions": "replayed", "seed": seed, "num_envs": num_envs}
    met = replayed(columns, replay["written"])
    return Source(policy.env_id, policy.environments(0, 1), met, columns["rewards"].numel(), about)


def _loaded(args: Args, run: Path) -> Policy:
    policy = load(run)
    if args.env not in (None, policy.env_id):
        raise ValueError(f"--env {args.env}: {run} learned {policy.env_id}; leave --env out")
    return policy


def uniform(actions: Actions, mask: Tensor | None, rows: int, generator: torch.Generator) -> Tensor:
    """(rows, *shape) actions, all that are allowed equally likely; a Box's bounds are finite."""
    noise = draw_noise(actions, (rows,), generator)
    if actions.low:
        return scaled(torch.erf(noise / 2**0.5), actions)  # the normal distribution function, from -1 to 1
    logits = torch.zeros_like(noise) if mask is None else torch.zeros_like(noise).masked_fill(~mask, -math.inf)
    return sample({"logits": logits}, noise, actions)[0]


def episodes(env: VectorEnv, act: Act, steps: int) -> Episodes:
    """Play `steps` steps in every row, and give each row's episodes as they end.

    What has begun when the steps are up is an episode too: cut, hence truncated.

    Returns:
        observations (T + 1, *obs), of which the last is the true successor; actions (T, *shape), rewards, terminations
        and truncations (T,) as the environment gives them; and whether the episode is whole.
    """
    obs = env.reset()
    rows = len(env.seeds) * env.num_envs
    begins = torch.ones(rows, dtype=torch.bool, device=env.device)
    firsts: list[Any] = list(obs.cpu().numpy())
    played: list[list[tuple[Any, ...]]] = [[] for _ in range(rows)]
    for index in range(1, steps + 1):
        actions = act(obs, env.action_mask, begins)
        step = env.step(actions)
        obs, begins = step.obs, step.terminated | step.truncated
        truncated = step.truncated | ~begins if index == steps else step.truncated
        record = (step.next_obs, actions, step.rewards, step.terminated, truncated)
        columns = [x.cpu().numpy() for x in record]
        fresh, whole = obs.cpu().numpy(), begins.tolist()
        for row in range(rows):
            played[row].append(tuple(column[row] for column in columns))
            if whole[row] or index == steps:
                next_obs, *others = (np.stack(x) for x in zip(*played[row], strict=True))
                names = ("actions", "rewards", "terminations", "truncations")
                observations = np.concatenate([firsts[row][None], next_obs])
                yield {"observations": observations} | dict(zip(names, others, strict=True)), whole[row]
                firsts[row], played[row] = fresh[row], []


def replayed(columns: Batch, written: int) -> Episodes:
    """The episodes in a ring of transitions, row after row of environments, each row's in the order of time.

    A row's last episode, if it has not ended, is cut, hence truncated. Once the ring has come around, its first one may
    have lost its beginning, and counts as cut as well.

    Args:
        columns: (R, N, ...) as `Replay` keeps them.
        written: rows that have come into them, at least R.
    Returns:
        as `episodes`.
    """
    data = {name: x.roll(-(written % len(x)), 0).numpy() for name, x in columns.items()}  # the oldest first
    done = data["terminated"] | data["truncated"]
    for row in range(done.shape[1]):
        begin = 0
        for end in [*(done[:-1, row].nonzero()[0] + 1).tolist(), len(done)]:
            episode = {name: x[begin:end, row] for name, x in data.items()}
            ended = bool(done[end - 1, row])
            episode["truncated"][-1] |= not ended
            yield (
                {
                    "observations": np.concatenate([episode["obs"], episode["next_obs"][-1:]]),
                    "actions": episode["actions"],
                    "rewards": episode["rewards"],
                    "terminations": episode["terminated"],
                    "truncations": episode["truncated"],
                },
                ended and (begin > 0 or written <= len(done)),
            )
            begin = end


def collect(args: Args) -> str:
    """Record the data set and return a line about it; nothing stays behind if anything goes wrong."""
    check(args)
    minari = require("minari", "offline")
    require("h5py", "offline")
    with replacing(dataset_path(args.dataset), args.overwrite) as folder:
        env_id, env, recorded, steps, about = source(args)
        scores = args.scores or reference_scores(env_id)
        if scores is None:
            print(f"no reference scores: D4RL has none for {env_id}, and --scores RANDOM EXPERT was not given")
        (folder / "data").mkdir()
        storage = require("minari.dataset.minari_storage", "offline").MinariStorage.new(
            folder / "data",
            env.observation_space,
            env.action_space,
            gym.registry.get(env_id),  # none of module:Name-v0, which Gymnasium alone could not make again
            data_format="hdf5",
            jpeg_encoding=False,
        )
        storage.update_metadata({"minari_version": minari.__version__, **metadata(args.dataset, steps, about, scores)})
        _require_room(folder, env, steps)
        number, returns = _record(storage, minari.data_collector.EpisodeBuffer, recorded, steps)
        env.close()
    line = f"{args.dataset}: {steps:,} steps, {number:,} episodes, of which {number - len(returns)} cut"
    if len(returns):
        line += f"; whole ones return {returns.mean():.1f} ± {returns.std():.1f}"
        line += f" ({returns.min():.1f} to {returns.max():.1f})"
        if scores is not None:
            line += f", normalized {normalized(float(returns.mean()), scores):.1f}"
    return line


def _require_room(folder: Path, env: VectorEnv, steps: int) -> None:
    """Raise a ValueError unless the folder's disk has room for so many steps: HDF5 breaks down where it has not."""
    step = sum(np.asarray(space.sample()).nbytes for space in (env.observation_space, env.action_space)) + 10
    need, room = steps * step, shutil.disk_usage(folder).free  # 10 for the reward and the two ends
    if need > room:
        raise ValueError(
            f"{steps:,} steps take {need / 1e9:.1f} GB, {room / 1e9:.1f} GB are free: fewer --steps, or another disk"
        )


def metadata(dataset: str, steps: int, about: dict[str, Any], scores: tuple[float, float] | None) -> dict[str, Any]:
    """What Minari's readers look for, and under "rl_lab" what it takes to record the data again."""
    policy, origin = about["policy"], provenance()
    known = {} if scores is None else {"ref_min_score": scores[0], "ref_max_score": scores[1]}
    versions = origin["versions"]
    return {
        "dataset_id": dataset,
        "algorithm_name": policy.get("algo", policy["kind"]),
        "description": f"{steps} {about['actions']} steps of {about['env']}, recorded by rl_lab.collect",
        "requirements": [f"{name}=={versions[name]}" for name in ("gymnasium", "mujoco") if name in versions],
        "rl_lab": about | origin,
        **known,
    }


def _record(storage: Any, buffer: Any, recorded: Episodes, steps: int) -> tuple[int, np.ndarray]:
    """Write episodes as they end; their number, and the returns of the whole ones."""
    started, progress = time.monotonic(), Progress(steps, 1)
    waiting: list[Any] = []
    returns: list[float] = []
    number = done = held = 0
    try:
        for episode, whole in recorded:
            waiting.append(buffer(**episode))
            number += 1
            returns += [float(episode["rewards"].sum())] if whole else []
            held += len(episode["rewards"])
            if held >= WRITE_STEPS:
                _write(storage, waiting)
                done, held, waiting = done + held, 0, []
                sps = done / (time.monotonic() - started)
                progress.update(done, sps, [float(np.mean(returns[-100:] or math.nan))])
        if waiting:
            _write(storage, waiting)
    finally:
        progress.close()
    return number, np.array(returns)


def _write(storage: Any, episodes: list[Any]) -> None:
    try:
        storage.update_episodes(episodes)
    except RuntimeError as error:  # HDF5's, of a full disk
        raise OSError(f"the data set cannot be written: {error}") from error


def dataset_path(dataset_id: str) -> Path:
    """Where Minari looks for a data set; ValueError if the id is malformed or the folder of all cannot be made."""
    minari = require("minari", "offline")
    try:
        minari.dataset.minari_dataset.parse_dataset_id(dataset_id)
    except (ValueError, TypeError):
        raise ValueError(f"--dataset {dataset_id!r} must look like lab/halfcheetah/expert-v0") from None
    try:
        path: Path = minari.storage.get_dataset_path(dataset_id)
    except OSError as error:
        raise _unwritable(error) from None
    return path


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder that becomes `path` if the block ends well, and is removed if not.

    Hidden beside it until then: Minari lists no such folder. What a killed process left there is removed, or put back
    if it is what was there before.

    Raises:
        ValueError: if `path` exists and may not be overwritten, cannot be written, or another process is at it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    new, old = temporary / "new", temporary / "old"
    made = [folder for folder in temporary.parents if not folder.exists()]  # the nearest first
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(error) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another process is recording {path}: wait for it, or choose another --dataset") from None
    try:
        _put_back(old, path)
        if path.exists() and not (path / "data").is_dir():
            raise ValueError(f"{path} is there but holds no data set: choose another --dataset")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists: choose another --dataset, or --overwrite")
        for left in temporary.iterdir():
            shutil.rmtree(left)
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        _put_back(old, path)
        shutil.rmtree(temporary)
        os.close(lock)
        for folder in made:
            with contextlib.suppress(OSError):  # of what is not empty
                folder.rmdir()


def _put_back(old: Path, path: Path) -> None:
    """What was moved away for something new that did not come."""
    if old.exists() and not path.exists():
        old.rename(path)


def _unwritable(error: OSError) -> ValueError:
    reason = f"{error.filename} cannot be written: {error.strerror}"
    return ValueError(f"{reason}; set MINARI_DATASETS_PATH to a folder that can")


def _sha256(*paths: Path) -> str:
    """Of the first file that is there."""
    with next(path for path in paths if path.exists()).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> None:
    """The command; every expected fault ends in one line and exit status 1 (2 for flags)."""

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        require_one_path_each(sys.argv[1:] if argv is None else argv, Args)
        args = tyro.cli(Args, prog="python -m rl_lab.collect", args=argv)
        torch.set_num_threads(1)  # fastest for small networks
        print(collect(args))
    except KeyboardInterrupt as stopped:
        print("interrupted: nothing was recorded", file=sys.stderr)
        raise SystemExit(128 + stopped.args[0]) from None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
