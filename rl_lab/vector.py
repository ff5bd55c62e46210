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
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an environment made with the same arguments."""

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
    """

    max_episode_steps: int
    reset_draws: int  # uniform numbers in [0, 1) that one reset consumes

    def __init__(self, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu") -> None:
        self.seeds = tuple(seeds)
        self.num_envs = num_envs
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(seed) for seed in self.seeds]
        self.state: State = {}

    @abc.abstractmethod
    def initial(self, draws: Tensor) -> Tensor:
        """First physical states (B, k) from `draws`, (B, reset_draws) uniform in [0, 1); keeps the dtype of `draws`."""

    @abc.abstractmethod
    def transition(self, physics: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the task: (B, k), (B, ...) -> next physics (B, k), rewards (B,), terminated (B,) bool."""

    @abc.abstractmethod
    def observe(self, physics: Tensor) -> Tensor:
        """(B, k) -> observations (B, *obs)."""

    def mask(self, physics: Tensor) -> Tensor | None:
        """(B, k) -> (B, A) bool as in `action_mask`, or None."""
        return None

    def dynamics(self, state: State, actions: Tensor, draws: Tensor) -> tuple[State, Step]:
        """One pure step: `state` as in `self.state`, `draws` (B, reset_draws) used where an episode ended."""
        fresh = state["done"]  # the step before ended an episode, so its totals are over
        physics, rewards, terminated = self.transition(state["physics"], actions)
        lengths = torch.where(fresh, 0, state["episode_lengths"]) + 1
        returns = torch.where(fresh, 0.0, state["episode_returns"]) + rewards
        truncated = lengths >= self.max_episode_steps
        done = terminated | truncated
        next_obs = self.observe(physics)
        physics = torch.where(done.unsqueeze(-1), self.initial(draws), physics)
        state = {"physics": physics, "done": done, "episode_returns": returns, "episode_lengths": lengths}
        return state, Step(next_obs, rewards, terminated, truncated, self.observe(physics))

    def draw(self, num_steps: int) -> Tensor:
        """(num_steps, B, reset_draws) uniform numbers, each seed's from its own generator."""
        shape = (num_steps, self.num_envs, self.reset_draws)
        return torch.cat([torch.rand(shape, generator=g, device=self.device) for g in self.generators], dim=1)

    def reset(self) -> Tensor:
        physics = self.initial(self.draw(1)[0])
        rows = len(self.seeds) * self.num_envs
        self.state = {
            "physics": physics,
            "done": torch.zeros(rows, dtype=torch.bool, device=self.device),
            "episode_returns": torch.zeros(rows, dtype=torch.float64, device=self.device),
            "episode_lengths": torch.zeros(rows, dtype=torch.int64, device=self.device),
        }
        return self.observe(physics)

    def step(self, actions: Tensor) -> Step:
        self.state, step = self.dynamics(self.state, actions, self.draw(1)[0])
        return step

    @property
    def action_mask(self) -> Tensor | None:
        return self.mask(self.state["physics"])

    @property
    def key(self) -> tuple[object, ...]:
        """What a compiled `dynamics` depends on: the class, its module's source and the instance's plain settings."""
        plain = {name: x for name, x in vars(self).items() if isinstance(x, int | float | str | bool | tuple)}
        source = inspect.getsource(sys.modules[type(self).__module__])
        return type(self).__qualname__, source, sorted(plain.items(), key=str)

    @property
    def episode_returns(self) -> Tensor:  # type: ignore[override]
        return self.state["episode_returns"]

    @property
    def episode_lengths(self) -> Tensor:  # type: ignore[override]
        return self.state["episode_lengths"]

    def state_dict(self) -> dict[str, Any]:
        generators = {str(seed): g.get_state() for seed, g in zip(self.seeds, self.generators, strict=True)}
        return {"state": dict(self.state), "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = {name: value.to(self.device) for name, value in state["state"].items()}
        for seed, generator in zip(self.seeds, self.generators, strict=True):
            generator.set_state(state["generators"][str(seed)].cpu())
