"""Gymnasium's MuJoCo environments in batches, on CPU threads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import gymnasium as gym
import mujoco  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from rl_lab.envs.mujoco_tasks import TASKS, Array, Arrays
from rl_lab.vector import Step, VectorEnv

STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # time, positions, velocities, controls, applied forces, warm start


class MujocoEnv(VectorEnv):
    """One of `TASKS`: a shared model, one `MjData` per row, so that each keeps its solver's warm start.

    Equal to Gymnasium's environment bit for bit, observations and rewards in float64. A simulation that becomes
    unstable is reset by MuJoCo itself, which warns in MUJOCO_LOG.TXT, as under Gymnasium.
    """

    def __init__(
        self, env_id: str, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu", num_threads: int = 1
    ) -> None:
        """Build the environments; `reset` starts them.

        Args:
            env_id: a key of TASKS.
            seeds: S non-negative integers, each seeding one generator as Gymnasium's `reset(seed=...)` does.
            num_envs: N, environments per seed, which draw their first states in row order.
            device: where the tensors live; the physics runs on the CPU.
            num_threads: threads that share the rows.
        Raises:
            ValueError: if env_id is not in TASKS, or num_envs or num_threads is below 1.
        """
        if env_id not in TASKS:
            raise ValueError(f"env_id={env_id!r} is no batched MuJoCo environment; there are {', '.join(TASKS)}")
        if num_envs < 1 or num_threads < 1:
            raise ValueError(f"num_envs={num_envs} and num_threads={num_threads} must be at least 1")
        self.seeds, self.num_envs, self.device = tuple(seeds), num_envs, torch.device(device)
        self.generators = [np.random.default_rng(seed) for seed in self.seeds]
        self.task = TASKS[env_id]()
        model, fields, rows = self.task.model, self.task.fields, len(self.seeds) * num_envs
        self.data = [mujoco.MjData(model) for _ in range(rows)]

        # Views of MuJoCo's memory, which stays where it is: one concatenation reads all fields of all rows.
        self._views = [getattr(data, name).reshape(-1) for data in self.data for name in fields]
        self._layout: list[tuple[str, slice, tuple[int, ...]]] = []
        start = 0
        for name in fields:
            shape = getattr(self.data[0], name).shape
            self._layout.append((name, slice(start, start + math.prod(shape)), (rows, *shape)))
            start += math.prod(shape)
        work = [(row, data, data.ctrl) for row, data in enumerate(self.data)]
        self._chunks = [work[i::num_threads] for i in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

        self._done = np.zeros(rows, bool)
        self._returns, self._lengths = np.zeros(rows), np.zeros(rows, np.int64)
        low, high = model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        width = self.task.observe(self._read()).shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float64)

    def reset(self) -> Tensor:
        self._done[:], self._returns[:], self._lengths[:] = False, 0.0, 0
        return self._tensor(self._begin(range(len(self.data))))

    def step(self, actions: Tensor) -> Step:
        controls = actions.cpu().numpy()
        if controls.shape != (len(self.data), self.task.model.nu):
            raise ValueError(f"actions of shape {controls.shape} must be {(len(self.data), self.task.model.nu)}")
        if self._pool is None:
            self._advance(self._chunks[0], controls)
        else:
            list(self._pool.map(self._advance, self._chunks, repeat(controls)))
        before, after = self._arrays, self._read()
        terminated = self.task.terminated(after)
        rewards = self.task.reward(before, after, controls, terminated)
        next_obs = self._tensor(self.task.observe(after))

        if np.count_nonzero(self._done):  # the step before ended these episodes, so their totals are over
            self._returns[self._done], self._lengths[self._done] = 0.0, 0
        self._returns += rewards
        self._lengths += 1
        truncated = self._lengths >= self.task.max_episode_steps
        self._done = terminated | truncated
        ended = np.flatnonzero(self._done) if np.count_nonzero(self._done) else ()
        obs = self._tensor(self._begin(ended)) if len(ended) else next_obs
        return Step(next_obs, self._tensor(rewards), self._tensor(terminated), self._tensor(truncated), obs)

    def _advance(self, work: list[tuple[int, mujoco.MjData, np.ndarray]], controls: np.ndarray) -> None:
        model, frame_skip = self.task.model, self.task.frame_skip
        contacts = "cfrc_ext" in self.task.fields
        for row, data, ctrl in work:
            ctrl[:] = controls[row]
            mujoco.mj_step(model, data, frame_skip)
            if contacts:
                mujoco.mj_rnePostConstraint(model, data)  # what mj_step leaves out: cfrc_ext

    def _read(self) -> Arrays:
        """Copy the task's fields of all rows; they are the next step's `before`."""
        return self._hold(np.concatenate(self._views).reshape(len(self.data), -1))

    def _hold(self, flat: np.ndarray) -> Arrays:
        self._flat = flat
        self._arrays = {name: flat[:, part].reshape(shape) for name, part, shape in self._layout}
        return self._arrays

    def _begin(self, rows: Iterable[int]) -> Array:
        """Start an episode in each of `rows`; return the observations of all rows."""
        for row in rows:
            data = self.data[row]
            mujoco.mj_resetData(self.task.model, data)
            data.qpos[:], data.qvel[:] = self.task.initial(self.generators[row // self.num_envs])
            mujoco.mj_forward(self.task.model, data)
        return self.task.observe(self._read())

    def _tensor(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def episode_returns(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._returns)

    @property
    def episode_lengths(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._lengths)

    def state_dict(self) -> dict[str, Any]:
        model = self.task.model
        physics = np.empty((len(self.data), mujoco.mj_stateSize(model, STATE)))
        for data, row in zip(self.data, physics, strict=True):
            mujoco.mj_getState(model, data, row, STATE)
        arrays = {
            "physics": physics,
            "fields": self._flat,  # the next reward reads them, and they do not follow from the physics' state
            "done": self._done,
            "episode_returns": self._returns,
            "episode_lengths": self._lengths,
        }
        generators = {str(seed): g.bit_generator.state for seed, g in zip(self.seeds, self.generators, strict=True)}
        return {name: torch.tensor(array) for name, array in arrays.items()} | {"generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        physics = state["physics"].numpy()
        if physics.shape != (len(self.data), mujoco.mj_stateSize(self.task.model, STATE)):
            raise ValueError(f"a state of shape {physics.shape} is of other environments than these")
        for data, row in zip(self.data, physics, strict=True):
            mujoco.mj_setState(self.task.model, data, row, STATE)
        self._hold(state["fields"].numpy())
        self._done = state["done"].numpy()
        self._returns[:] = state["episode_returns"].numpy()
        self._lengths[:] = state["episode_lengths"].numpy()
        for seed, generator in zip(self.seeds, self.generators, strict=True):
            generator.bit_generator.state = state["generators"][str(seed)]
