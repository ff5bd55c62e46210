"""One way to parse, validate, seed and run: every training command is `run(train, Args, defaults)`.

`RunArgs` holds the flags that all algorithms share; an algorithm's frozen `Args` extends it. `Run` is one process's
training run: its folders, logs, checkpoints, signals, and the order in which they happen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.func import vmap

from rl_lab import checkpoint
from rl_lab.compiler import NoCompiler
from rl_lab.episodes import evaluate, evaluation_seeds
from rl_lab.log import Progress, RunLog
from rl_lab.rollout import merge_seeds, split_seeds
from rl_lab.vector import VectorEnv

_UNIT = ("in [0, 1]", lambda x: 0 <= x <= 1)
_POSITIVE = ("finite and above 0", lambda x: 0 < x < math.inf)
_WEIGHT = ("finite and 0 or more", lambda x: 0 <= x < math.inf)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {  # of settings that algorithms share
    **dict.fromkeys(("gamma", "gae_lambda"), _UNIT),
    **dict.fromkeys(("learning_rate", "clip_coef", "max_grad_norm", "target_kl"), _POSITIVE),
    **dict.fromkeys(("ent_coef", "vf_coef"), _WEIGHT),
}


@dataclass(frozen=True)
class RunArgs:
    """Flags of every training command."""

    env: str
    """environment id of Gymnasium"""
    total_timesteps: int
    """env steps of one seed, over all its environments"""
    seed: int = 1
    """seed of the first agent"""
    num_seeds: int = 1
    """agents trained side by side in this process, with seeds seed, seed + 1, ...; each gets a run folder"""
    backend: Literal["auto", "native", "gymnasium"] = "auto"
    """implementation of the environment: auto takes the native batched one where there is one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where the machine has it"""
    compile: bool = True
    """compile with AOTInductor; --no-compile is for debugging"""
    torch_threads: int = 1
    """CPU threads of torch; one is fastest for small networks"""
    env_threads: int = 1
    """CPU threads that step native MuJoCo environments"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    checkpoint_every: int = 100_000
    """env steps of one seed between checkpoints; 0 for the first and last only"""
    eval_every: int = 0
    """env steps of one seed between evaluations of 10 episodes, logged as eval/episodic_return; 0 for none"""
    resume: Path | None = None
    """run folder to continue; its flags hold, and those given must agree with them, but for --checkpoint-every, and a
    larger --total-timesteps where nothing is annealed, which prolongs the run"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                least = int(field.name not in self.may_be_zero)
                self.require(field.name, getattr(self, field.name) >= least, f"at least {least}")
            elif field.name in _RANGES and (value := getattr(self, field.name)) is not None:
                wanted, valid = _RANGES[field.name]
                self.require(field.name, valid(value), wanted)
        self.require("seed", self.seed + self.num_seeds <= 2**63, "below 2**63, the last one too")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA device here; --device cpu works")

    def require(self, field: str, valid: bool, wanted: str) -> None:
        """Raise a ValueError that names the flag of `field`, what was given and what would work, unless it is valid."""
        if not valid:
            raise ValueError(f"{flag(field)} {getattr(self, field)} must be {wanted}")

    may_be_zero: ClassVar[set[str]] = {"seed", "checkpoint_every", "eval_every"}

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.num_seeds))

    @property
    def evaluation_seeds(self) -> tuple[int, ...]:
        return evaluation_seeds(self.seeds)

    @property
    def torch_device(self) -> torch.device:
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")

    @property
    def annealed(self) -> bool:
        """Whether anything is scheduled over total_timesteps, so that a run cannot be prolonged."""
        return True

    def env_seeds(self, rank: int) -> tuple[int, ...]:
        """The environments' seeds: the seeds themselves, others on further ranks of a data-parallel run."""
        others = (np.random.SeedSequence((seed, 2, rank)).generate_state(1, np.uint64)[0] for seed in self.seeds)
        return tuple(int(seed) for seed in others) if rank else self.seeds

    def generators(self, rank: int) -> list[torch.Generator]:
        """One a seed for the agents, independent of the environments', which start from the seeds themselves."""
        keys = [(seed, 1, rank) if rank else (seed, 1) for seed in self.seeds]
        states = [np.random.SeedSequence(key).generate_state(1, np.uint64)[0] for key in keys]
        return [torch.Generator(self.torch_device).manual_seed(int(state)) for state in states]

    def algorithm_fields(self) -> tuple[tuple[str, Any], ...]:
        """The fields that an algorithm adds: what its compiled functions may depend on."""
        shared = {field.name for field in dataclasses.fields(RunArgs)}
        return tuple((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in shared)

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "resume"}
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


SMALLER = "a smaller --learning-rate is the usual cure"


def flag(field: str) -> str:
    """The flag of a field of `Args`."""
    return f"--{field.replace('_', '-')}"


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop. No `Exception`, which a compiler at work would take for its own.

    Args:
        message: how to continue.
        status: exit status of the process, 128 and the signal's number as in a shell.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Run:
    """A training run of `len(args.seeds)` agents.

    Args:
        args: all flags; `args.resume` names a run to continue.
        algo: name of the algorithm.
        env: whose rows are seeds by environments.
        state: gives the training state as nested dicts of tensors and JSON values.

    `saved` is the state to continue from, None for a new run. A new run's folders and first checkpoint exist when the
    constructor returns.

    Raises:
        ValueError: if `args.runs_dir` cannot be written, or `args.resume` has no good checkpoint of its own.
    """

    def __init__(self, args: RunArgs, algo: str, env: VectorEnv, state: Callable[[], dict[str, Any]]) -> None:
        self.args, self.env, self.state = args, env, state
        self.iteration, self.elapsed = 0, 0.0
        self.recent: list[list[float]] = [[] for _ in args.seeds]
        self.saved: dict[str, Any] | None = None
        if args.resume is None:
            space = type(env.action_space).__name__
            flags = args.to_json() | {"device": args.torch_device.type}  # not "auto": generators differ by device
            config = {"total_timesteps": args.total_timesteps, "action_space": space, "args": flags}
            config["semantics"] = getattr(args, "semantics", "")
            try:
                self.logs = RunLog.create(args.runs_dir, args.env, algo, args.seeds, config)
                for index in range(len(args.seeds)):
                    rows = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
                    self.logs.text(index, "hyperparameters", f"|param|value|\n|-|-|\n{rows}")
                self.checkpoint()
            except OSError as error:
                raise ValueError(f"--runs-dir {args.runs_dir}: {error}; name a folder with room to write") from None
        else:
            self.logs = RunLog.open(args.resume)
            loaded = checkpoint.load(self.logs.checkpoint_folder)
            progress = loaded.get("run", {})
            if progress.get("group") != self.logs.config["group"]:
                raise ValueError(f"--resume {args.resume}: its checkpoint is of another run; put its own back")
            self.saved = loaded["state"]
            self.iteration, self.elapsed, self.recent = progress["iteration"], progress["elapsed"], progress["recent"]
            self.checkpointed = self.iteration
            self.logs.rewind(progress["logs"])
            if args.total_timesteps != self.logs.config["total_timesteps"]:
                self.logs.prolong(args.total_timesteps)

    def iterations(self, num_iterations: int, steps: int) -> Iterator[int]:
        """Indices of the iterations to do, each of `steps` env steps a seed; checkpoints between them.

        Raises:
            Stopped: after SIGINT or SIGTERM, once the running iteration is finished and checkpointed; at once for a
                second signal, and in the first iteration, which may be compiling for long and has little to lose.
        """
        self.steps_per_iteration = steps
        first, caught = self.iteration, []
        if first >= num_iterations:
            print(f"{self.logs.folders[0]} is finished: {first * steps} steps")

        def stop(number: int, _: object) -> None:
            caught.append(number)
            if len(caught) > 1 or self.iteration == first:
                raise self._stopped(number)

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.progress = Progress(num_iterations * steps, len(self.args.seeds))
        self.started, self.flushed = time.monotonic() - self.elapsed, time.monotonic()
        try:
            while self.iteration < num_iterations:
                yield self.iteration
                self.iteration += 1
                self.elapsed = time.monotonic() - self.started
                if caught or self._due(self.args.checkpoint_every) or self.iteration == num_iterations:
                    self.checkpoint()
                if caught:
                    raise self._stopped(caught[0])
        except OSError as error:
            raise self._refused(error) from None
        finally:
            self.progress.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def evaluation_due(self) -> bool:
        """Whether the iteration now running ends at or past a multiple of --eval-every."""
        return _crosses(self.iteration, self.steps_per_iteration, self.args.eval_every)

    def log(self, rollout: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        """Log one iteration: the episodes that ended in it, and the metrics.

        Args:
            rollout: (T, B, ...) terminated, truncated, episode_returns, episode_lengths.
            metrics: tag -> (S,).
        Raises:
            FloatingPointError: if a loss is not finite; this iteration is neither logged nor checkpointed.
        """
        num_seeds = len(self.args.seeds)
        num_envs = rollout["terminated"].shape[1] // num_seeds
        names, table = list(metrics), torch.stack([x.float() for x in metrics.values()]).tolist()
        for name, row in zip(names, table, strict=True):
            if name.endswith("_loss") and not all(map(math.isfinite, row)):
                seed = self.args.seeds[[math.isfinite(x) for x in row].index(False)]
                sound = all(torch.isfinite(rollout[column]).all() for column in ("obs", "next_obs", "rewards"))
                cause = SMALLER if sound else f"nor is what --env {self.args.env} gave"
                raise self._diverged(f"{name} of seed {seed}", cause)
        begin = self.iteration * self.steps_per_iteration
        end = begin + self.steps_per_iteration
        done = (rollout["terminated"] | rollout["truncated"]).cpu().numpy()
        times, rows = done.nonzero()
        returns = rollout["episode_returns"].cpu().numpy()[times, rows]
        lengths = rollout["episode_lengths"].cpu().numpy()[times, rows]
        sps = end / (time.monotonic() - self.started)
        for index in range(num_seeds):
            mine = rows // num_envs == index
            if mine.any():
                self.logs.episodes(index, begin + (times[mine] + 1) * num_envs, returns[mine], lengths[mine])
                self.recent[index] = [*self.recent[index], *returns[mine].tolist()][-100:]
            values = {name: row[index] for name, row in zip(names, table, strict=True)}
            self.logs.scalars(index, end, {**values, "charts/SPS": float(int(sps))})
        if time.monotonic() - self.flushed > 10:  # for whoever watches TensorBoard
            try:
                self.logs.flush()
            except OSError as error:
                raise self._refused(error) from None
            self.flushed = time.monotonic()
        self.progress.update(end, sps * num_seeds, [sum(r) / len(r) if r else math.nan for r in self.recent])

    def evaluate(self, policy: Callable[..., Tensor], params: Any, normalizer: Any, env: VectorEnv) -> None:
        """Log the mean of one episode in each row of `env`, at the end of the iteration now running.

        Args:
            policy: (params, normalizer, inputs) of one agent to actions for its environments.
            params, normalizer: trees with a leading seed axis S.
            env: new, seeded by `args.evaluation_seeds`, and closed here: each evaluation starts from the same states,
                so a resumed run need not know of earlier ones.
        """

        def act(inputs: dict[str, Tensor]) -> Tensor:
            inputs = split_seeds(inputs, len(self.args.seeds))
            return merge_seeds(vmap(policy)(params, normalizer, inputs))  # type: ignore[no-any-return]

        returns, lengths = evaluate(act, env, episodes=1)
        env.close()
        table = np.stack([returns, lengths]).reshape(2, len(self.args.seeds), -1).mean(2)
        end = (self.iteration + 1) * self.steps_per_iteration
        for index, (value, length) in enumerate(table.T.tolist()):
            self.logs.scalars(index, end, {"eval/episodic_return": value, "eval/episodic_length": length})

    def checkpoint(self) -> None:
        """Save the training state, and where the logs stood.

        Raises:
            FloatingPointError: if a parameter is not finite; the last checkpoint stays.
            OSError: if the disk refuses; the last checkpoint and the logs until then stay.
        """
        state = self.state()
        if not all(torch.isfinite(x).all() for x in flatten(state["params"]).values()):
            raise self._diverged("a parameter", SMALLER)
        progress = {
            "group": self.logs.config["group"],
            "iteration": self.iteration,
            "elapsed": self.elapsed,
            "recent": self.recent,
            "logs": self.logs.state_dict(),
        }
        checkpoint.save(self.logs.checkpoint_folder, {"state": state, "run": progress})
        self.checkpointed = self.iteration

    def finish(self, params: dict[str, Tensor], normalizer: Any) -> None:
        """Write each seed's parameters and statistics as model.safetensors, and say where everything is."""
        for index, folder in enumerate(self.logs.folders):
            tensors = flatten({"params": params, "normalizer": normalizer})
            model = {name: x[index] for name, x in tensors.items()}
            checkpoint.save_tensors(folder / "model.safetensors", model, {"algo": self.logs.config["algo"]})
            recent = self.recent[index]
            score = (
                f"{sum(recent) / len(recent):.1f} over the last {len(recent)} episodes"
                if recent
                else "no episode ended"
            )
            print(f"{folder}: {score}")
        self.logs.close()

    def _due(self, every: int) -> bool:
        return _crosses(self.iteration - 1, self.steps_per_iteration, every)

    def _stopped(self, number: int) -> Stopped:
        step = self.checkpointed * self.steps_per_iteration
        how = f"checkpointed at step {step}; continue with --resume {self.logs.folders[0]}"
        return Stopped(f"{signal.Signals(number).name}: stopped, {how}", 128 + number)

    def _refused(self, error: OSError) -> OSError:
        return OSError(f"{error}; make room, then continue with --resume {self.logs.folders[0]}")

    def _diverged(self, what: str, cause: str) -> FloatingPointError:
        self.logs.flush()  # the way there
        begin, saved = (i * self.steps_per_iteration for i in (self.iteration, self.checkpointed))
        where = f"{self.logs.checkpoint_folder} keeps the checkpoint of step {saved}"
        return FloatingPointError(f"{what} is not finite after step {begin}; {cause}; {where}")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors to one dict with names like "params/actor.0.weight"."""
    flat: dict[str, Tensor] = {}
    for name, node in tree.items():
        flat |= flatten(node, f"{prefix}{name}/") if isinstance(node, dict) else {prefix + name: node}
    return flat


def _crosses(iteration: int, steps: int, every: int) -> bool:
    """Whether iteration number `iteration`, of `steps` steps, reaches a multiple of `every`."""
    return every > 0 and (iteration + 1) * steps // every > iteration * steps // every


def run(train: Callable[[Any], Any], args_type: type[RunArgs], defaults: Callable[[str], RunArgs]) -> None:
    """Parse the command line and train; every expected fault ends in one line and exit status 1 (2 for flags).

    Args:
        train: takes the parsed flags.
        args_type: the algorithm's Args.
        defaults: gives its defaults for an environment id.
    """
    status = 2
    try:
        args = parse(sys.argv[1:], args_type, defaults)
        status = 1
        torch.set_num_threads(args.torch_threads)
        train(args)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(stop.status if isinstance(stop, Stopped) else 128 + signal.SIGINT) from None
    except (ValueError, OSError, FloatingPointError, NoCompiler) as error:
        if os.environ.get("RL_LAB_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status) from None


def parse(argv: Sequence[str], args_type: type[RunArgs], defaults: Callable[[str], RunArgs]) -> RunArgs:
    """Flags to Args: defaults by environment, or a run's own for --resume; ValueError says which flag is wrong."""
    folder = _given(argv, "--resume")
    if folder is None:
        env_id = _given(argv, "--env")
        try:
            default = defaults(env_id) if env_id else None
        except ValueError as error:
            raise ValueError(f"--env {env_id}: {error}") from None
        args = _parse(argv, args_type, default)
        print("  ".join(f"{name}={value}" for name, value in args.algorithm_fields()))
        return args
    try:
        config = RunLog.open(Path(folder)).config
    except ValueError as error:
        raise ValueError(f"--resume {error}; name one that training made") from None
    fields = {field.name for field in dataclasses.fields(args_type)} - {"resume"}
    if config.get("args", {}).keys() != fields:
        raise ValueError(f"--resume {folder}: a run of {config.get('algo')} with other flags than this command's")
    saved = args_type(**config["args"] | {"runs_dir": Path(config["args"]["runs_dir"])})
    args = _parse(argv, args_type, saved)
    free = {"checkpoint_every"}
    if args.total_timesteps > saved.total_timesteps and not saved.annealed:
        free.add("total_timesteps")
    for name in sorted(fields - free):
        if (was := getattr(saved, name)) != (now := getattr(args, name)):
            prolonged = name == "total_timesteps" and now > was
            why = "which its annealing follows (--no-anneal-lr)" if prolonged else "and a resumed run keeps its flags"
            raise ValueError(f"{flag(name)} {now}: the run in {folder} has {was}, {why}; leave the flag out")
    return args


def _parse(argv: Sequence[str], args_type: type[RunArgs], default: Any) -> RunArgs:
    """Flags to Args by tyro, which exits with its own message; but what Args refuses is raised here."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            args: RunArgs = tyro.cli(args_type, args=argv, default=default)
            return args
    except SystemExit as exit:
        if isinstance(exit.__context__, ValueError):
            raise exit.__context__ from None
        sys.stderr.write(shown.getvalue())
        raise


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The value of `flag` on a command line, before it is parsed."""
    for word, value in zip(argv, [*argv[1:], None], strict=True):
        if word == flag:
            return value
        if word.startswith(flag + "="):
            return word.removeprefix(flag + "=")
    return None
