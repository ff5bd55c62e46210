"""One way to parse, validate, seed and run: every training command is `run(train, Args, defaults)`.

`BaseArgs` holds the flags that all training commands share, `RunArgs` also those of the ones that have an environment;
an algorithm's frozen `Args` extends either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import tyro

from rl_lab.compiler import NoCompiler
from rl_lab.distributions import Actions, sample
from rl_lab.episodes import evaluation_seeds
from rl_lab.log import RunLog
from rl_lab.memory import require_memory
from rl_lab.networks import NATURE_CNN_SIZE, is_image
from rl_lab.vector import VectorEnv

_ONE_PROCESS = {"resume", "stop_at"}  # flags of a process, not of its run
_UNIT = ("in [0, 1]", lambda x: 0 <= x <= 1)
_POSITIVE = ("finite and above 0", lambda x: 0 < x < math.inf)
_WEIGHT = ("finite and 0 or more", lambda x: 0 <= x < math.inf)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {  # of settings that algorithms share
    **dict.fromkeys(("gamma", "gae_lambda", "tau", "start_e", "end_e", "priority_alpha", "priority_beta"), _UNIT),
    **dict.fromkeys(("learning_rate", "clip_coef", "clip_coef_high", "max_grad_norm", "target_kl"), _POSITIVE),
    "exploration_fraction": _POSITIVE,
    **dict.fromkeys(("ent_coef", "vf_coef"), _WEIGHT),
}


@dataclass(frozen=True, kw_only=True)
class BaseArgs:
    """Flags of every training command. Steps are env steps of one seed, or gradient steps where nothing is played."""

    seed: int = 1
    """seed of the first agent"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes cuda where the machine has it"""
    torch_threads: int = 1
    """CPU threads of torch; one is fastest for small networks"""
    runs_dir: Path = Path("runs")
    """where run folders are made"""
    checkpoint_every: int = 100_000
    """steps between checkpoints; 0 for the first and last only"""
    eval_every: int = 0
    """steps between evaluations; 0 for none"""
    stop_at: int = 0
    """step to stop at, checkpointed; --resume goes on from there; 0 for the end"""
    resume: Path | None = None
    """run folder to continue; its flags hold, and those given must agree with them, but for --checkpoint-every, the
    place of what it learns from, and a larger --total-timesteps where nothing is annealed, which prolongs the run"""

    may_be_zero: ClassVar[set[str]] = {"seed", "checkpoint_every", "eval_every", "stop_at"}
    may_change: ClassVar[set[str]] = {"checkpoint_every"}  # in a resumed run

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int":
                least = int(field.name not in self.may_be_zero)
                self.require(field.name, getattr(self, field.name) >= least, f"at least {least}")
            elif field.name in _RANGES and (value := getattr(self, field.name)) is not None:
                wanted, valid = _RANGES[field.name]
                self.require(field.name, valid(value), wanted)
        self.require("stop_at", self.stop_at <= self.total_steps, f"at most {self.total_steps}, the whole run")
        self.require("seed", self.seed + len(self.seeds) <= 2**63, "below 2**63, the last one too")
        if self.device == "cuda" and not torch.cuda.is_available():
            ways = "--device cpu works for a new run, one to resume goes on where there is one"
            raise ValueError(f"--device cuda: torch finds no CUDA device here; {ways}")

    def require(self, field: str, valid: bool, wanted: str) -> None:
        """Raise a ValueError that names the flag of `field`, what was given and what would work, unless it is valid."""
        if not valid:
            raise ValueError(f"{flag(field)} {getattr(self, field)} must be {wanted}")

    @property
    def name(self) -> str:
        """What is trained on, or what is trained: the first part of a run folder's name."""
        raise NotImplementedError

    @property
    def total_steps(self) -> int:
        """Steps of one seed in the whole run."""
        raise NotImplementedError

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.seed,)

    @property
    def torch_device(self) -> torch.device:
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")

    @property
    def annealed(self) -> bool:
        """Whether anything is scheduled over the whole run, so that it cannot be prolonged."""
        return True

    def generators(self, rank: int) -> list[torch.Generator]:
        """One a seed for the agents, independent of the environments', which start from the seeds themselves."""
        keys = [(seed, 1, rank) if rank else (seed, 1) for seed in self.seeds]
        states = [np.random.SeedSequence(key).generate_state(1, np.uint64)[0] for key in keys]
        return [torch.Generator(self.torch_device).manual_seed(int(state)) for state in states]

    def algorithm_fields(self) -> tuple[tuple[str, Any], ...]:
        """The fields that an algorithm adds."""
        shared = {field.name for base in (BaseArgs, RunArgs) for field in dataclasses.fields(base)}
        return tuple((f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in shared)

    def to_json(self) -> dict[str, Any]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _ONE_PROCESS}
        return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}


@dataclass(frozen=True, kw_only=True)
class RunArgs(BaseArgs):
    """Flags of every training command with an environment."""

    env: str
    """environment id of Gymnasium"""
    total_timesteps: int
    """env steps of one seed, over all its environments"""
    num_seeds: int = 1
    """agents trained side by side in this process, with seeds seed, seed + 1, ...; each gets a run folder"""
    backend: Literal["auto", "native", "gymnasium", "mujoco-warp"] = "auto"
    """implementation of the environment: auto takes the native batched one where there is one, mujoco-warp simulates
    MuJoCo's on the device"""
    compile: bool = True
    """compile with AOTInductor, on a GPU capture CUDA graphs; --no-compile is for debugging"""
    env_threads: int = 1
    """CPU threads that step native MuJoCo environments, or processes that step native Atari games"""
    sticky_actions: float = 0.0
    """probability that a native Atari game repeats the frame before's action, whatever the agent chose"""
    eval_every: int = 0
    """env steps of one seed between evaluations of 10 episodes, logged as eval/episodic_return; 0 for none"""
    until_return: float | None = None
    """end the run, as finished, after the first evaluation at which every seed's mean return is at least this"""

    def __post_init__(self) -> None:
        super().__post_init__()
        judged = self.until_return is None or (math.isfinite(self.until_return) and self.eval_every > 0)
        self.require("until_return", judged, "finite, with --eval-every above 0")

    def require_rollouts(self, steps: int) -> None:
        """Raise a ValueError unless rollouts of so many steps make up the budget, but for 2 % that are left out."""
        enough = self.total_timesteps % steps <= self.total_timesteps / 50
        wanted = f"a multiple of num_envs * num_steps = {steps}, or at most 2 % above one"
        self.require("total_timesteps", enough, f"{wanted}: {math.ceil(self.total_timesteps / steps) * steps} is next")

    def require_room(self, env: VectorEnv, num_envs: int, num_steps: int, hidden: int) -> None:
        """Raise a ValueError that says how many environments would fit, unless rollouts and their updates do.

        Args:
            env: of one row, as a sample; is reset and stepped.
            num_envs, num_steps: of one seed's rollout.
            hidden: numbers in the networks' hidden layers for one observation; images have the Nature CNN's.
        """
        rows = [env.reset(), torch.as_tensor(np.array(env.action_space.sample()), device=env.device).unsqueeze(0)]
        if (mask := env.action_mask) is not None:
            allowed = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)
            rows[1], _ = sample({"logits": allowed}, None, Actions.of(env.action_space))
        rows += [*env.step(rows[1])[:4], env.episode_returns, env.episode_lengths]
        row = sum(x.nbytes for x in rows)  # of single steps, then of the rollout, then what minibatches are drawn from
        hidden = NATURE_CNN_SIZE if is_image(env.observation_space) else hidden
        require_memory(num_envs, self.num_seeds, num_steps * (3 * row + 4 * hidden), self.torch_device)

    @property
    def name(self) -> str:
        return self.env

    @property
    def total_steps(self) -> int:
        return self.total_timesteps

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.num_seeds))

    @property
    def evaluation_seeds(self) -> tuple[int, ...]:
        return evaluation_seeds(self.seeds)

    @property
    def make_options(self) -> tuple[torch.device, str, int, float]:
        """What `make` takes after the id, the seeds and the number of environments."""
        return self.torch_device, self.backend, self.env_threads, self.sticky_actions

    def env_seeds(self, rank: int) -> tuple[int, ...]:
        """The environments' seeds: the seeds themselves, others on further ranks of a data-parallel run."""
        others = (np.random.SeedSequence((seed, 2, rank)).generate_state(1, np.uint64)[0] for seed in self.seeds)
        return tuple(int(seed) for seed in others) if rank else self.seeds

    @property
    def key(self) -> tuple[str, Any]:
        """What an algorithm's compiled functions depend on: its source and its fields."""
        return inspect.getsource(sys.modules[type(self).__module__]), self.algorithm_fields()


def flag(field: str) -> str:
    """The flag of a field of `Args`."""
    return f"--{field.replace('_', '-')}"


class Stopped(KeyboardInterrupt):
    """A signal, or --stop-at, asked the run to stop. No `Exception`, which a compiler at work would take for its own.

    Args:
        message: how to continue.
        status: exit status of the process: 128 and the signal's number as in a shell, or 0.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run(
    train: Callable[[Any], Any],
    args_type: type[BaseArgs],
    defaults: Callable[[str], BaseArgs] | None = None,
    data_parallel: bool = False,
) -> None:
    """Parse the command line and train; every expected fault ends in one line and exit status 1 (2 for flags).

    Args:
        train: takes the parsed flags.
        args_type: the algorithm's Args.
        defaults: gives its defaults for an environment id; None where they are the same for everything.
        data_parallel: whether the ranks of torchrun share the work; else they are refused.
    """
    status = 2
    try:
        if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1 and not data_parallel:
            raise ValueError(f"torchrun's {size} ranks would each train the same: start this command without it")
        args = parse(sys.argv[1:], args_type, defaults)
        status = 1
        torch.set_num_threads(args.torch_threads)
        train(args)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(stop.status if isinstance(stop, Stopped) else 128 + signal.SIGINT) from None
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError, NoCompiler) as error:
        if os.environ.get("RL_LAB_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(status) from None


def parse(
    argv: Sequence[str], args_type: type[BaseArgs], defaults: Callable[[str], BaseArgs] | None = None
) -> BaseArgs:
    """Flags to Args: defaults by environment, or a run's own for --resume; ValueError says which flag is wrong."""
    require_one_path_each(argv, args_type)
    folder = _given(argv, "--resume")
    if folder is None:
        env_id = _given(argv, "--env")
        try:
            default = defaults(env_id) if env_id and defaults else None
        except ValueError as error:
            raise ValueError(f"--env {env_id}: {error}") from None
        args = _parse(argv, args_type, default)
        print("  ".join(f"{name}={value}" for name, value in args.algorithm_fields()))
        return args
    try:
        config = RunLog.open(Path(folder)).config
    except ValueError as error:
        raise ValueError(f"--resume {error}; name one that training made") from None
    fields = {field.name for field in dataclasses.fields(args_type)} - _ONE_PROCESS
    if config.get("args", {}).keys() != fields:
        raise ValueError(f"--resume {folder}: a run of {config.get('algo')} with other flags than this command's")
    paths = {f.name for f in dataclasses.fields(args_type) if "Path" in str(f.type)}
    given: Any = {name: Path(x) if name in paths and x else x for name, x in config["args"].items()}
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    saved = args_type(**given)
    args = _parse(argv, args_type, saved)
    free = set(args_type.may_change)
    if args.total_steps > saved.total_steps and not saved.annealed:
        free.add("total_timesteps")
    for name in sorted(fields - free):
        if (was := getattr(saved, name)) != (now := getattr(args, name)):
            prolonged = name == "total_timesteps" and now > was
            schedules = "its annealing follows (--no-anneal-lr)" if "anneal_lr" in fields else "its schedules follow"
            why = f"which {schedules}" if prolonged else "and a resumed run keeps its flags"
            raise ValueError(f"{flag(name)} {now}: the run in {folder} has {was}, {why}; leave the flag out")
    return args


def require_one_path_each(argv: Sequence[str], args_type: type[Any]) -> None:
    """Raise a ValueError where a flag of one path is followed by several, as a shell's pattern may match."""
    flags = {flag(field.name) for field in dataclasses.fields(args_type) if field.type in ("Path", "Path | None")}
    for word, first, second in zip(argv, argv[1:], argv[2:], strict=False):
        if word in flags and not second.startswith("-"):
            raise ValueError(f"{word} takes one path, not {first} and {second}: name one of them")


def _parse(argv: Sequence[str], args_type: type[BaseArgs], default: Any) -> BaseArgs:
    """Flags to Args by tyro, which exits with its own message; but what Args refuses is raised here."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            name = args_type.__module__.rpartition(".")[2]
            args: BaseArgs = tyro.cli(args_type, prog=f"python -m rl_lab.{name}", args=argv, default=default)
            return args
    except SystemExit as exit:
        if isinstance(exit.__context__, ValueError):
            raise exit.__context__ from None
        sys.stderr.write(shown.getvalue())
        raise


def _given(argv: Sequence[str], flag: str) -> str | None:
    """The last value of `flag` on a command line, which counts, before it is parsed."""
    found = None
    for word, value in zip(argv, [*argv[1:], None], strict=False):  # an empty line has no words, but the None
        if word == flag:
            found = value
        if word.startswith(flag + "="):
            found = word.removeprefix(flag + "=")
    return found
