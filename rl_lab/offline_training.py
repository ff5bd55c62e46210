"""What training commands share that learn from a fixed data set: their flags, their batches, their judgement.

The protocol of the judgement is one for all: the parameters after the last gradient step, `--eval-episodes` episodes of
likeliest actions in environments that no agent has seen, D4RL's normalized score. Every episode played is in the run's
episodes.csv.gz, so that `rl_lab.compare` judges such runs as it does others. The best evaluation is logged apart: to
report it is to choose by the test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rl_lab.cli import RunArgs
from rl_lab.distributions import Actions
from rl_lab.memory import free_memory
from rl_lab.offline import Dataset, load
from rl_lab.replay import Batch, Replay, draw_uniform
from rl_lab.rollout import on_device
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
    """mean returns of a random policy and of an expert, instead of D4RL's for the task or else the data set's own"""
    eval_every: int = 50_000
    """gradient steps between evaluations of 10 episodes; 0 for none"""
    eval_episodes: int = 100
    """episodes that judge what was learned, at the end"""
    log_every: int = 1_000
    """gradient steps between entries of the log"""

    may_be_zero: ClassVar[set[str]] = {*RunArgs.may_be_zero, "eval_episodes"}
    may_change: ClassVar[set[str]] = {*RunArgs.may_change, "dataset"}  # a run knows its data by their checksum

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("until_return", self.until_return is None, "left out: to end by what is played is to choose by it")
        whole = self.total_timesteps % self.log_every == 0
        self.require("total_timesteps", whole, f"a multiple of --log-every {self.log_every}")

    @property
    def annealed(self) -> bool:
        return False

    @property
    def key(self) -> tuple[str, Any]:
        """Without what no compiled function depends on: data sets are many."""
        source, fields = super().key
        return source, tuple(x for x in fields if x[0] not in ("dataset", "scores", "eval_episodes", "log_every"))

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.log_every


A = TypeVar("A", bound=OfflineArgs)


def open_dataset(args: A, scored: bool = True) -> tuple[A, Dataset]:
    """The data set that the flags name, and the flags with its environment's id.

    Args:
        scored: whether what is learned is judged by normalized scores, so that the reference scores must be known.
    """
    if not args.dataset:
        raise ValueError("--dataset is missing: a Minari id or a path")
    data = load(args.dataset, args.scores, args.env or None)
    for note in data.notes:
        print(note)
    env_id = args.env or data.env_id or ""
    args.require("env", bool(env_id), f"given: {args.dataset} does not say what it is of")
    unknown = f"neither D4RL nor {args.dataset} has the mean returns of a random policy and of an expert on {env_id}"
    args.require("scores", data.scores is not None or not scored, f"two numbers: {unknown}")
    return dataclasses.replace(args, env=env_id), data


def bounded_actions(args: OfflineArgs, env: VectorEnv) -> Actions:
    """The environment's actions; a ValueError unless they have bounds."""
    actions = Actions.of(env.action_space)
    others = "; rl_lab.bc and rl_lab.discrete_cql take those" if isinstance(env.action_space, spaces.Discrete) else ""
    args.require("env", actions.bounded, f"one with actions in a bounded Box, not {env.action_space}{others}")
    return actions


def standardized(data: Dataset, num_seeds: int) -> tuple[Dataset, dict[str, Tensor]]:
    """The data with observations (s - mean) / (std + 1e-3) over all transitions [Fujimoto and Gu 2021, Eq. 4].

    Also returns what `standardize` takes, mean and scale, with a leading seed axis (S, *obs).
    """
    obs = data.columns["obs"].double()
    moments = {"mean": obs.mean(0).float(), "scale": (obs.std(0, correction=0) + 1e-3).float()}
    columns = {name: standardize(moments, data.columns[name]) for name in ("obs", "next_obs")}
    normalizer = {name: x.expand(num_seeds, *x.shape).contiguous() for name, x in moments.items()}
    return dataclasses.replace(data, columns=data.columns | columns), normalizer


def standardize(normalizer: dict[str, Tensor], obs: Tensor) -> Tensor:
    """Observations (..., *obs) as those that were learned from; as they are where nothing is normalised."""
    return (obs.float() - normalizer["mean"]) / normalizer["scale"] if normalizer else obs


class OfflineRun(Run):
    """A training run on a data set, which is kept once for all its agents.

    Args:
        args, algo, env: as `Run` takes them; nothing is played in `env`.
        data: what to learn from.
        generators: of the agents, one a seed; each draws its agent's batches.
        state: gives what is learned as nested dicts of tensors: params, and what the algorithm has besides.
    """

    args: OfflineArgs

    def __init__(
        self,
        args: OfflineArgs,
        algo: str,
        data: Dataset,
        env: VectorEnv,
        generators: Sequence[torch.Generator],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        data.require_env(args.env, env.observation_space, env.action_space)
        env.reset()  # which shows its masks
        args.require("env", env.action_mask is None, "one without masks of actions, which no policy here would heed")
        self.data, self.generators, self.learned = data, generators, state
        need, room = sum(x.nbytes for x in data.columns.values()), free_memory(args.torch_device)
        # Of the batches, and of what draws them: a number for each of their transitions between two entries of the log.
        batches = args.num_seeds * args.batch_size * (need // len(data) + 8 * args.log_every)
        for name, nbytes in (("dataset", need), ("batch_size", need + batches)):
            told = f"it takes {nbytes / 1e9:.1f} GB, {room / 1e9:.1f} GB are free on {args.torch_device}"
            args.require(name, nbytes <= room, f"one for which there is room: {told}")
        spec = {name: (tuple(x.shape[1:]), x.dtype) for name, x in data.columns.items()}
        self.replay = Replay(spec, 1, 1, len(data), args.gamma, device=args.torch_device, compile=args.compile)
        self.replay.add({name: x.unsqueeze(1) for name, x in data.columns.items()})
        self.best = torch.full((args.num_seeds,), -torch.inf, dtype=torch.float64)  # mean return of an evaluation
        origin = {
            "name": data.name,
            "env": data.env_id,
            "checksum": data.checksum,
            "transitions": len(data),
            "scores": data.scores,
        }
        super().__init__(args, algo, env, self._state, {"data": origin})
        if self.saved:
            if self.saved["checksum"] != data.checksum:
                raise ValueError(f"--dataset {args.dataset} is not what the run has learned from: put that back")
            self.best = self.saved["best"]
            for seed, generator in zip(args.seeds, generators, strict=True):
                generator.set_state(self.saved["generators"][str(seed)].cpu())

    def _state(self) -> dict[str, Any]:
        random = {str(seed): g.get_state() for seed, g in zip(self.args.seeds, self.generators, strict=True)}
        return {**self.learned(), "generators": random, "checksum": self.data.checksum, "best": self.best}

    def intervals(self) -> Iterator[Iterator[tuple[int, Batch]]]:
        """What there is to do between two entries of the log, again and again: gradient steps, numbered from 0, each
        with its batch, columns (S, batch, ...)."""
        for iteration in self.iterations(self.args.num_iterations, self.args.log_every):
            yield enumerate(self._batches(), iteration * self.args.log_every)

    def _batches(self) -> Iterator[Batch]:
        for points in draw_uniform((self.args.log_every, self.args.batch_size), self.generators):
            flat = self.replay.sample(points.reshape(1, -1))
            yield {name: x.view(len(points), -1, *x.shape[2:]) for name, x in flat.items()}

    def log_losses(self, metrics: dict[str, Tensor], extra: float = 0.0) -> None:
        """Log the metrics of a gradient step, (S,) each, at the end of an interval.

        Args:
            extra: the most that the loss may add to a step's reward in Q, `q`, or take from it; infinite if unknown.
        Raises:
            FloatingPointError: if one is not finite, or the mean Q of a seed is not a discounted sum of such rewards,
                by more than a tenth of these sums' range and 1: estimates err, and so does an untrained network.
        """
        seeds, device = len(self.args.seeds), self.args.torch_device
        done, total = torch.zeros(0, seeds, dtype=torch.bool, device=device), torch.zeros(0, seeds, device=device)
        nothing = {"terminated": done, "truncated": done, "episode_returns": total, "episode_lengths": total}
        self.log(nothing, {f"losses/{name}": x for name, x in metrics.items()})
        if "q" in metrics and self.args.gamma < 1:
            rewards, horizon = self.data.columns["rewards"], 1 / (1 - self.args.gamma)
            least = (min(float(rewards.min()), 0.0) - extra) * horizon
            most = (max(float(rewards.max()), 0.0) + extra) * horizon
            slack = (most - least) / 10 + 1
            for seed, value in zip(self.args.seeds, metrics["q"].tolist(), strict=True):
                if not least - slack <= value <= most + slack:
                    what = f"Q of seed {seed} is {value:.3g}, the rewards allow {least:.3g} to {most:.3g}"
                    raise self.diverged(what, "values of actions that the data do not have feed on themselves")

    @property
    def episodes_due(self) -> int:
        """Episodes of each agent to play at the end of the interval now running: `eval_episodes` after the last."""
        last = self.iteration + 1 == self.args.num_iterations
        return self.args.eval_episodes if last else 10 * self.evaluation_due

    def judge(self, policy: Callable[..., Any], agent: Any, normalizer: Any, env: VectorEnv) -> None:
        """Play an episode in each row of `env` and log them, also as D4RL's normalized scores.

        Args:
            policy, agent, normalizer, env: as `Run.evaluate` takes them.
        """
        returns, lengths = self.evaluate(policy, agent, on_device(normalizer, env.device), env)
        means = torch.from_numpy(returns.mean(1))
        self.best = torch.maximum(self.best, means)
        self.recent = returns.tolist()  # what the console shows, and the end of the run prints
        table = {"eval/best_return": self.best}
        for name, x in (("normalized_score", means), ("best_normalized_score", self.best)):
            table[f"eval/{name}"] = self.data.normalized(x)
        for index in range(len(means)):
            steps = np.full(returns.shape[1], self.end)
            self.logs.episodes(index, steps, returns[index], lengths[index].astype(np.int64))
            self.logs.scalars(index, self.end, {name: float(x[index]) for name, x in table.items()})

    def score(self, index: int) -> str:
        if not self.recent[index] or not self.args.eval_episodes:
            return "not judged"
        returns = np.array(self.recent[index])
        mean, spread, what = float(returns.mean()), f"{returns.std():,.1f}", "the last parameters' likeliest actions"
        told = f"return {mean:,.1f} ± {spread} in {len(returns)} episodes of {what}"
        score, best = self.data.normalized(mean), self.data.normalized(float(self.best[index]))
        return f"normalized score {score:.1f}, {told}; best evaluation {best:.1f}"
