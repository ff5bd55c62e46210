"""The batched environment contract, and nothing else.

An environment object runs B = S * N environments side by side: N for each of S seeds, the rows of one seed next to
each other. All tensors live on one device and have B as their first axis.

    obs = env.reset()                                               # (B, *obs)
    next_obs, rewards, terminated, truncated, obs = env.step(actions)

`next_obs` is always the true successor of the step, also where an episode ended; `obs` is what to act on next: the new
episode's first observation where one ended, `next_obs` elsewhere. So there is no `final_obs`, no fake transition and no
info dictionary. `terminated` (the task ended) and `truncated` (a time limit cut it) are never merged.
"""

from __future__ import annotations

import abc
import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from torch import Tensor

State = dict[str, Tensor]


class Step(NamedTuple):
    """What one step of all B environments returns."""

    next_obs: Tensor  # (B, *obs) the true successor
    rewards: Tensor  # (B,) float32, or float64 where the environment computes in it
    terminated: Tensor  # (B,) bool, the task ended
    truncated: Tensor  # (B,) bool, the time limit cut it; both may be true at once
    obs: Tensor  # (B, *obs) what to act on next


class VectorEnv(abc.ABC):
    """B = len(seeds) * num_envs environments with autoreset. Tensors handed out are new: later steps leave them alone.

    Attributes:
        observation_space, action_space: of one environment.
        seeds: one per agent; each seed has its own generator, so its rows do not depend on the other seeds.
        num_envs: N, environments per seed.
        frame_stack: frames in an observation (frame_stack, ...), the newest last, all the first one where an episode
            begins; a replay keeps each frame once then. 0 where observations are no such stacks.
        device: where every tensor lives.
        episode_returns: (B,) float64 sum of rewards of the running episode. After a step that ended an episode it
            still holds that episode's total; the next step starts the new one at zero.
        episode_lengths: (B,) int64 steps of the running episode, likewise. Both are those of whole games where
            `game_over` is not None.
    """

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    seeds: tuple[int, ...]
    num_envs: int
    frame_stack: int = 0
    device: torch.device
    episode_returns: Tensor
    episode_lengths: Tensor

    @abc.abstractmethod
    def reset(self) -> Tensor:
        """Start a new episode in every environment and return its first observations, (B, *obs)."""

    @abc.abstractmethod
    def step(self, actions: Tensor) -> Step:
        """Step all environments.

        Args:
            actions: (B,) int64 for Discrete, (B, K) int64 for MultiDiscrete, (B, *shape) float32 for Box, in bounds.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit: nested dicts of tensors and JSON values, generators included."""

    @abc.abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> Tensor | None:
        """Continue from `state_dict()` of an environment made with the same arguments.

        Returns:
            None; but an environment that cannot go on where it was begins new episodes, and returns what `reset` does.
        """

    @property
    def action_mask(self) -> Tensor | None:
        """(B, A) bool, True where an action is allowed next (MultiDiscrete: components side by side), or None."""
        return None

    @property
    def game_over(self) -> Tensor | None:
        """(B,) bool, True where the last step ended a whole game, or None where each episode is one.

        Atari's episodes are lives, which is what learning wants; people count games.
        """
        return None

    def close(self) -> None:  # noqa: B027 (most environments hold nothing)
        """Release what the environment holds outside Python."""


class TensorEnv(VectorEnv):
    """An environment whose dynamics is a pure function of tensors, on any device.

    A subclass states its spaces, `max_episode_steps`, `reset_draws` and three pure, batched functions without
    data-dependent shapes: `initial`, `transition`, `observe`. From these `dynamics` makes one step with time limit,
    autoreset and episode statistics; it is what a compiled rollout calls, and what `step` calls.

    Randomness is part of the state: each row has a stream of its own, `uniform`, seeded by its seed's generator. So
    nothing is drawn ahead of time, the k-th episode of a row starts from the same state whatever was done before, and
    the streams are the same on every device.
    """

    max_episode_steps: int
    reset_draws: int  # uniform numbers in [0, 1) that one reset consumes
    step_draws: int = 0  # likewise one transition, where it is random

    def __init__(self, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(seeds)
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.state: State = {"stream": streams(self.seeds, num_envs).to(self.device)}

    @abc.abstractmethod
    def initial(self, draws: Tensor) -> Tensor:
        """First physical states (B, k) from `draws`, (B, reset_draws) uniform in [0, 1)."""

    @abc.abstractmethod
    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the task.

        Args:
            physics: (B, k)
            actions: (B, ...)
            draws: (B, step_draws) uniform in [0, 1)
        Returns:
            next physics (B, k), rewards (B,), terminated (B,) bool.
        """

    @abc.abstractmethod
    def observe(self, physics: Tensor) -> Tensor:
        """(B, k) -> observations (B, *obs)."""

    def mask(self, physics: Tensor) -> Tensor | None:
        """(B, k) -> (B, A) bool as in `action_mask`, or None."""
        return None

    def dynamics(self, state: State, actions: Tensor) -> tuple[State, Step]:
        """One pure step from `state`, which is as in `self.state`, to the next."""
        fresh = state["done"]  # the step before ended an episode, so its totals are over
        draws, stream = uniform(state["stream"], self.step_draws)
        physics, rewards, terminated = self.transition(state["physics"], actions, draws)
        lengths = torch.where(fresh, 0, state["episode_lengths"]) + 1
        returns = torch.where(fresh, 0.0, state["episode_returns"]) + rewards
        truncated = lengths >= self.max_episode_steps
        done = terminated | truncated
        next_obs = self.observe(physics)
        draws, later = uniform(stream, self.reset_draws)
        physics = torch.where(done.unsqueeze(-1), self.initial(draws), physics)
        state = {
            "stream": torch.where(done, later, stream),
            "physics": physics,
            "done": done,
            "episode_returns": returns,
            "episode_lengths": lengths,
        }
        return state, Step(next_obs, rewards, terminated, truncated, self.observe(physics))

    def reset(self) -> Tensor:
        draws, stream = uniform(self.state["stream"], self.reset_draws)
        physics = self.initial(draws)
        self.state = {
            "stream": stream,
            "physics": physics,
            "done": torch.zeros(len(stream), dtype=torch.bool, device=self.device),
            "episode_returns": torch.zeros(len(stream), dtype=torch.float64, device=self.device),
            "episode_lengths": torch.zeros(len(stream), dtype=torch.int64, device=self.device),
        }
        return self.observe(physics)

    def step(self, actions: Tensor) -> Step:
        self.state, step = self.dynamics(self.state, actions)
        return step

    @property
    def action_mask(self) -> Tensor | None:
        return self.mask(self.state["physics"])

    @property
    def key(self) -> tuple[object, ...]:
        """What a compiled `dynamics` depends on: the class, sources of it and its bases, the plain settings.

        Raises:
            ValueError: if the object holds anything else, whose change would not show in it.
        """
        plain = {name: x for name, x in vars(self).items() if name not in ("seeds", "device", "state")}
        for name, x in plain.items():
            if not isinstance(x, int | float | str | tuple | gym.Space | None):
                told = (
                    f"{type(self).__name__}.{name} is a {type(x).__name__}, which a compiled step would not see change"
                )
                raise ValueError(f"{told}: make it a number, a string or a tuple, or compute it where it is used")
        modules = {base.__module__ for base in type(self).__mro__ if issubclass(base, TensorEnv)}
        sources = [inspect.getsource(sys.modules[name]) for name in sorted(modules)]
        return type(self).__qualname__, sources, sorted(plain.items(), key=str)

    @property
    def episode_returns(self) -> Tensor:  # type: ignore[override]
        return self.state["episode_returns"]

    @property
    def episode_lengths(self) -> Tensor:  # type: ignore[override]
        return self.state["episode_lengths"]

    def state_dict(self) -> dict[str, Any]:
        return {"state": dict(self.state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = {name: value.to(self.device) for name, value in state["state"].items()}


def streams(seeds: Sequence[int], num_envs: int) -> Tensor:
    """Where each row's random stream starts, as its seed's generator draws it: (S * N,) int64."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.cat([torch.randint(-(2**63), 2**63 - 1, (num_envs,), generator=g) for g in generators])


def uniform(stream: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The next numbers of each row's random stream: SplitMix64 (Steele et al. 2014, Fast splittable generators).

    Args:
        stream: (B,) int64, any value.
    Returns:
        (B, number) float32, uniform in [0, 1) in steps of 2**-24; and the streams after them, (B,).
    """
    states = stream.unsqueeze(-1) + GOLDEN_GAMMA * torch.arange(number + 1, device=stream.device)
    z = states[:, 1:]
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        z = (z ^ _shifted(z, shift)) * factor
    later = states[:, -1].clone(memory_format=torch.contiguous_format)  # compiled functions take dense tensors only
    return _shifted(z, 40).float() * 2.0**-24, later


GOLDEN_GAMMA = -0x61C8864680B583EB  # 2**64 over the golden ratio, as an int64


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
