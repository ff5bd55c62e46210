"""Gymnasium's MuJoCo environments in batches, on CPU threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import gymnasium as gym
import mujoco  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import Tensor

from rl_lab.envs.mujoco_tasks import TASKS, Arrays
from rl_lab.memory import require_memory
from rl_lab.vector import Step, VectorEnv

STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # time, positions, velocities, controls, applied forces, warm start
DATA_BYTES = 550_000  # what of an `MjData` is used, measured: about the same for HalfCheetah and Humanoid


class MujocoEnv(VectorEnv):
    """One of `TASKS`: a shared model, one `MjData` per row, so that each keeps its solver's warm start.

    Equal to Gymnasium's environment bit for bit, observations and rewards in float64. A simulation that becomes
    unstable is reset by MuJoCo itself, which warns (on stderr and in MUJOCO_LOG.TXT), as under Gymnasium.
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
            ValueError: if env_id is not in TASKS, num_envs or num_threads below 1, or memory short.
        """
        if env_id not in TASKS:
            raise ValueError(f"env_id={env_id!r} is no batched MuJoCo environment; there are {', '.join(TASKS)}")
        if num_envs < 1 or num_threads < 1:
            raise ValueError(f"num_envs={num_envs} and num_threads={num_threads} must be at least 1")
        require_memory(num_envs, len(seeds), DATA_BYTES, torch.device("cpu"))
        self.seeds, self.num_envs, self.device = tuple(seeds), num_envs, torch.device(device)
        self.generators = [np.random.default_rng(seed) for seed in self.seeds]
        self.task = TASKS[env_id]()
        model, fields, rows = self.task.model, self.task.fields, len(self.seeds) * num_envs
        self._actions_shape = (rows, model.nu)
        self._remote = self.device.type != "cpu"
        self._tensor: Callable[[np.ndarray], Tensor] = torch.from_numpy
        if self._remote:
            self._tensor = lambda array: torch.from_numpy(array).to(self.device)
        self.data = [mujoco.MjData(model) for _ in range(rows)]

        # Views of MuJoCo's memory, which stays where it is, and two buffers: one concatenation reads all fields of all
        # rows into one of them, while the other holds what the step before has read.
        self._views = [getattr(data, name).reshape(-1) for data in self.data for name in fields]
        record = np.dtype([(name, np.float64, getattr(self.data[0], name).shape) for name in fields])
        records = np.zeros(rows, record), np.zeros(rows, record)
        self._flat, self._flat_before = (array.view(np.float64) for array in records)
        self._fields, self._fields_before = ({name: array[name] for name in fields} for array in records)
        work = [(row, data, data.ctrl) for row, data in enumerate(self.data)]
        self._chunks = [work[i::num_threads] for i in range(num_threads)]
        self._pool = ThreadPoolExecutor(num_threads) if num_threads > 1 else None

        low, high = model.actuator_ctrlrange.astype(np.float32).T
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        width = self.task.observe(self._read()).shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float64)

    def reset(self) -> Tensor:
        rows = np.arange(len(self.data))
        self._clock = 0  # steps since; an episode's length is the time since its start
        self._starts, self._returns = np.zeros(len(rows), np.int64), np.zeros(len(rows))
        self._ended, self._deadline = rows[:0], self.task.max_episode_steps
        return self._tensor(self._begin(rows))

    def step(self, actions: Tensor) -> Step:
        task, tensor, controls = self.task, self._tensor, (actions.cpu() if self._remote else actions).numpy()
        if controls.shape != self._actions_shape:
            raise ValueError(f"actions of shape {controls.shape} must be {self._actions_shape}")
        if self._pool is None:
            self._advance(self._chunks[0], controls)
        else:
            list(self._pool.map(self._advance, self._chunks, repeat(controls)))
        before, after = self._fields, self._read_next()
        terminated, truncated = task.terminated(after), np.zeros(len(controls), bool)
        if terminated is None:
            terminated = np.zeros(len(controls), bool)
        rewards = task.reward(before, after, controls, terminated)
        next_obs = obs = tensor(task.observe(after))

        self._returns = self._returns + rewards
        if len(self._ended):  # by the step before, so their totals are over
            self._returns[self._ended], self._starts[self._ended] = rewards[self._ended], self._clock
            self._ended, self._deadline = self._ended[:0], int(self._starts.min()) + task.max_episode_steps
        self._clock += 1
        late = self._clock >= self._deadline  # no row reaches its time limit before
        if late:
            truncated = self._clock - self._starts >= task.max_episode_steps
        if late or any(terminated.tolist()):
            self._ended = np.flatnonzero(terminated | truncated)
            obs = tensor(self._begin(self._ended))
        return Step(next_obs, tensor(rewards), tensor(terminated), tensor(truncated), obs)

    def _advance(self, work: list[tuple[int, mujoco.MjData, np.ndarray]], controls: np.ndarray) -> None:
        model, frame_skip = self.task.model, self.task.frame_skip
        contacts = "cfrc_ext" in self.task.fields
        for row, data, ctrl in work:
            ctrl[:] = controls[row]
            mujoco.mj_step(model, data, frame_skip)
            if contacts:
                mujoco.mj_rnePostConstraint(model, data)  # what mj_step leaves out: cfrc_ext

    def _read(self) -> Arrays:
        """Read the task's fields of all rows over what was read last."""
        np.concatenate(self._views, out=self._flat)
        return self._fields

    def _read_next(self) -> Arrays:
        """Likewise, but keep what was read last until the next step: it is this one's `before`."""
        self._flat, self._flat_before = self._flat_before, self._flat
        self._fields, self._fields_before = self._fields_before, self._fields
        return self._read()

    def _begin(self, rows: np.ndarray) -> np.ndarray:
        """Start an episode in each of `rows`; return the observations of all rows."""
        for row in rows:
            data = self.data[row]
            mujoco.mj_resetData(self.task.model, data)
            data.qpos[:], data.qvel[:] = self.task.initial(self.generators[row // self.num_envs])
            mujoco.mj_forward(self.task.model, data)
        obs: np.ndarray = self.task.observe(self._read())
        return obs

    @property
    def episode_returns(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._returns)

    @property
    def episode_lengths(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._clock - self._starts)

    def state_dict(self) -> dict[str, Any]:
        model = self.task.model
        physics = np.empty((len(self.data), mujoco.mj_stateSize(model, STATE)))
        for data, row in zip(self.data, physics, strict=True):
            mujoco.mj_getState(model, data, row, STATE)
        arrays = {
            "physics": physics,
            "fields": self._flat,  # what the next reward reads does not all follow from the physics
            "ended": self._ended,
            "starts": self._starts,
            "returns": self._returns,
        }
        generators = {str(seed): g.bit_generator.state for seed, g in zip(self.seeds, self.generators, strict=True)}
        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        return {"arrays": tensors, "clock": self._clock, "generators": generators}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        arrays = {name: tensor.numpy().copy() for name, tensor in state["arrays"].items()}
        expected = (len(self.data), mujoco.mj_stateSize(self.task.model, STATE))
        if arrays["physics"].shape != expected:
            raise ValueError(f"a state of shape {arrays['physics'].shape} does not fit an environment of {expected}")
        for data, row in zip(self.data, arrays["physics"], strict=True):
            mujoco.mj_setState(self.task.model, data, row, STATE)
        self._flat[:] = arrays["fields"]
        self._ended, self._starts, self._returns = arrays["ended"], arrays["starts"], arrays["returns"]
        self._clock, self._deadline = state["clock"], int(self._starts.min()) + self.task.max_episode_steps
        for seed, generator in zip(self.seeds, self.generators, strict=True):
            generator.bit_generator.state = state["generators"][str(seed)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
