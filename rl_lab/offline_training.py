"""What training commands share that learn from a fixed data set: their flags, their batches, their judgement."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from rl_lab.cli import RunArgs
from rl_lab.offline import Dataset, load
from rl_lab.replay import Batch, Replay, draw_uniform
from rl_lab.run import Run
from rl_lab.vector import VectorEnv


@dataclass(frozen=True)
class OfflineArgs(RunArgs):
    """Flags of a training command that learns from a data set. Its steps are gradient steps."""

    env: str = ""
    """environment id to evaluate in; empty for the data set's own"""
    dataset: str = ""
    """a Minari id, a folder of one, or a D4RL file (.hdf5)"""
    total_timesteps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions of a gradient step"""
    gamma: float = 0.99
    """discount per env step"""
    scores: tuple[float, float] | None = None
    """mean returns of a random policy and of an expert, where neither the data set nor D4RL's table has them"""
    eval_every: int = 50_000
    """gradient steps between evaluations of 10 episodes; 0 for none"""
    eval_episodes: int = 100
    """episodes that judge what was learned, at the end"""
    log_every: int = 1_000
    """gradient steps between entries of the log"""

    may_be_zero: ClassVar[set[str]] = {*RunArgs.may_be_zero, "eval_episodes"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("dataset", bool(self.dataset), "a Minari id or a path")
        whole = self.total_timesteps % self.log_every == 0
        self.require("total_timesteps", whole, f"a multiple of --log-every {self.log_every}")

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.log_every

    def episodes_due(self, run: Run) -> int:
        """Episodes of each agent to play after the iteration now running: `eval_episodes` at the end."""
        last = run.iteration + 1 == self.num_iterations
        return self.eval_episodes if last else 10 * run.evaluation_due


A = TypeVar("A", bound=OfflineArgs)


def open_dataset(args: A) -> tuple[A, Dataset]:
    """The data set that the flags name, and the flags with its environment's id."""
    data = load(args.dataset, args.scores, args.env or None)
    for note in data.notes:
        print(note)
    env_id = args.env or data.env_id or ""
    args.require("env", bool(env_id), f"given: {args.dataset} does not say what it is of")
    return dataclasses.replace(args, env=env_id), data


class Batches:
    """Samples of one data set for S agents, each drawn by its agent's own generator; kept once for all of them."""

    def __init__(self, data: Dataset, args: OfflineArgs, generators: list[torch.Generator]) -> None:
        spec = {name: (tuple(x.shape[1:]), x.dtype) for name, x in data.columns.items()}
        self.replay = Replay(spec, 1, 1, len(data), args.gamma, device=args.torch_device, compile=args.compile)
        self.replay.add({name: x.unsqueeze(1).to(args.torch_device) for name, x in data.columns.items()})
        self.args, self.generators, self.checksum = args, generators, data.checksum

    def state_dict(self) -> dict[str, Any]:
        """The generators, and which data they draw from."""
        random = {str(seed): g.get_state() for seed, g in zip(self.args.seeds, self.generators, strict=True)}
        return {"generators": random, "checksum": self.checksum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; ValueError if the data are others."""
        if state["checksum"] != self.checksum:
            raise ValueError(f"--dataset {self.args.dataset} is not what the run has learned from: put that back")
        for seed, generator in zip(self.args.seeds, self.generators, strict=True):
            generator.set_state(state["generators"][str(seed)].cpu())

    def draw(self) -> Iterator[Batch]:
        """As many batches as there are between two entries of the log: columns (S, batch, ...)."""
        shape = (self.args.log_every, self.args.batch_size)
        for points in draw_uniform(shape, self.generators):
            flat = self.replay.sample(points.reshape(1, -1))
            yield {name: x.view(len(points), -1, *x.shape[2:]) for name, x in flat.items()}


def nothing(num_seeds: int, device: torch.device) -> Batch:
    """What `Run.log` takes, without a step in any environment."""
    done, total = torch.zeros(0, num_seeds, dtype=torch.bool, device=device), torch.zeros(0, num_seeds, device=device)
    return {"terminated": done, "truncated": done, "episode_returns": total, "episode_lengths": total}


def require_sound(run: Run, q: Tensor, data: Dataset, gamma: float) -> None:
    """Raise a FloatingPointError where a mean Q, (S,), is beyond what the rewards allow: max |r| / (1 - gamma)."""
    if gamma == 1:
        return
    most = float(data.columns["rewards"].abs().max()) / (1 - gamma)
    for seed, value in zip(run.args.seeds, q.tolist(), strict=True):
        if abs(value) > most:
            cause = "values of actions that the data do not have feed on themselves"
            raise run.diverged(f"Q of seed {seed} is {value:.3g}, the rewards allow {most:.3g}", cause)


def judge(
    run: Run, data: Dataset, policy: Callable[..., Any], agent: Any, normalizer: Any, env: VectorEnv, best: Tensor
) -> Tensor:
    """Evaluate and log, also as D4RL's normalized score where the data set has its two returns.

    Args:
        policy, agent, normalizer, env: as `Run.evaluate` takes them.
        best: (S,) the best mean return so far.
    Returns:
        likewise, with this one.
    """
    returns = run.evaluate(policy, agent, normalizer, env)
    means = torch.from_numpy(returns.mean(1))
    best = torch.maximum(best, means)
    run.recent = returns.tolist()  # what the console shows, and the end of the run prints
    table = {"eval/best_return": best}
    if data.scores is not None:
        table |= {"eval/normalized_score": data.normalized(means), "eval/best_normalized_score": data.normalized(best)}
    for index in range(len(means)):
        run.logs.scalars(index, run.end, {name: float(x[index]) for name, x in table.items()})
    return best
