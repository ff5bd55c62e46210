"""Gymnasium's MuJoCo environments in batches on a GPU, by MuJoCo Warp; on the CPU too, for tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, no_type_check

import gymnasium as gym
import mujoco  # type: ignore[import-untyped]
import mujoco_warp as mjw  # type: ignore[import-untyped]
import numpy as np
import torch
import warp as wp
from torch import Tensor

from rl_lab.envs.mujoco_tasks import TASKS, Arrays
from rl_lab.memory import require_memory
from rl_lab.vector import Step, VectorEnv, streams, uniform

wp.config.log_level = wp.LOG_WARNING  # else it prints a line for each kernel it loads
PLANE = wp.constant(int(mujoco.mjtGeom.mjGEOM_PLANE))
CAPSULE = wp.constant(int(mujoco.mjtGeom.mjGEOM_CAPSULE))
LARGEST = 1e10  # of stable positions and velocities: mjMAXVAL of MuJoCo
# What Warp reports as overflow, without the solver's limits of iterations, which are MuJoCo's own.
DROPPED = mjw.OverflowType.ALL & ~(mjw.OverflowType.ITERATIONS | mjw.OverflowType.LS_ITERATIONS)
WITH_SCRATCH = 2  # all memory over that of Warp's `Data`; with the graphs' own it is 1.1 to 1.75, by task


class MujocoWarpEnv(VectorEnv):
    """One of `TASKS`, all rows simulated together in float32.

    Tasks, reset distributions, time limits and the age of what MuJoCo derives from positions are those of `MujocoEnv`,
    to which trajectories agree until float32's rounding has grown (tested). These differ:
    - Humanoid's constraints, which its model gives to MuJoCo's PGS solver, are solved by Newton's method: there is no
      PGS here.
    - First states come from a stream of random numbers that each row has, as in `TensorEnv`.
    - A simulation that becomes unstable is truncated, its last state standing for the successor; MuJoCo would start it
      over in mid-episode.
    - On the CPU a saved state continues bit for bit. On a GPU it does so up to rounding, as a repeated run does, since
      MuJoCo Warp 4.0 takes contacts and constraints in the order in which threads find them.

    A step neither waits for the device nor depends in its shapes on data. Physics is recorded once as Warp's graph and
    launched on torch's current stream; on the CPU, too, where it takes a seventh of the time of separate launches.
    """

    def __init__(self, env_id: str, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu") -> None:
        """Build the environments; `reset` starts them. The first time, Warp compiles for up to a minute, then caches.

        Args:
            env_id: a key of TASKS.
            seeds: S non-negative integers.
            num_envs: N, environments per seed.
            device: where physics and tensors live.
        Raises:
            ValueError: if env_id is not in TASKS, num_envs below 1, or memory short; it says how many would fit.
        """
        if env_id not in TASKS:
            raise ValueError(f"backend='mujoco-warp' has no {env_id}; it has {', '.join(TASKS)}")
        if num_envs < 1:
            raise ValueError(f"num_envs={num_envs} must be at least 1")
        self.seeds, self.num_envs, self.device = tuple(seeds), num_envs, torch.device(device)
        self.task = TASKS[env_id](xp=torch, dtype=torch.float32, device=self.device)
        mj, rows = self.task.model, len(self.seeds) * num_envs
        if mj.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            mj.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        wp.init()
        self._warp = wp.get_device(str(self.device))  # "cuda" has no number yet, which `device_from_torch` wants
        with wp.ScopedDevice(self._warp):
            self.model = mjw.put_model(mj)
            self.model.callback.contactfilter = align_with_capsules
            self.model.opt.warn_overflow = 0  # `state_dict` does
            self.contacts, self.constraints = most_contacts(mj, self.model.nxn_geom_pair_filtered.numpy())
            one, two = (nbytes(self._make_data(rows)) for rows in (1, 2))
            require_memory(num_envs, len(self.seeds), WITH_SCRATCH * (two - one), self.device)
            self.data = self._make_data(rows)
            self._advance = self._captured(mjw.step)
            self._sum_forces = self._captured(mjw.rne_postconstraint) if "cfrc_ext" in self.task.fields else None
            self._derive = self._captured(mjw.forward) if len(self.task.fields) > 2 else None
            wp.synchronize_device()  # torch goes on, on a stream of its own
        self._arrays = {name: wp.to_torch(getattr(self.data, name)) for name in self.task.fields}  # share memory
        names = ("qpos", "qvel", "ctrl", "qacc_warmstart", "cfrc_ext", "overflow")
        self._qpos, self._qvel, self._ctrl, self._warmstart, self._forces, self._overflow = (
            wp.to_torch(getattr(self.data, name)) for name in names
        )
        self._stream = streams(self.seeds, num_envs).to(self.device)

        low, high = mj.actuator_ctrlrange.astype(np.float32).T
        self.action_space = gym.spaces.Box(low, high, dtype=np.float32)
        width = self.task.observe(self._arrays).shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (width,), np.float32)

    def reset(self) -> Tensor:
        self._done = torch.ones(len(self._qpos), dtype=torch.bool, device=self.device)
        self.episode_returns = torch.zeros_like(self._done, dtype=torch.float64)
        self.episode_lengths = torch.zeros_like(self._done, dtype=torch.int64)
        return self._begin(self._arrays)

    def step(self, actions: Tensor) -> Step:
        if actions.shape != self._ctrl.shape:
            raise ValueError(f"actions of shape {tuple(actions.shape)} must be {tuple(self._ctrl.shape)}")
        task, before = self.task, self._fields
        self._ctrl.copy_(actions)
        for _ in range(task.frame_skip):
            self._advance()
        if self._sum_forces:
            self._sum_forces()
        stable = (self._qpos.abs() <= LARGEST).all(1) & (self._qvel.abs() <= LARGEST).all(1)  # False for NaN
        after = {name: where(stable, x, before[name]) for name, x in self._arrays.items()}

        terminated = task.terminated(after)
        if terminated is None:
            terminated = torch.zeros_like(stable)
        rewards, next_obs = task.reward(before, after, actions, terminated), task.observe(after)
        self.episode_returns = torch.where(self._done, 0.0, self.episode_returns) + rewards
        self.episode_lengths = torch.where(self._done, 0, self.episode_lengths) + 1
        truncated = (self.episode_lengths >= task.max_episode_steps) | ~stable
        self._done = terminated | truncated
        return Step(next_obs, rewards, terminated, truncated, self._begin(after))

    def _begin(self, after: Arrays) -> Tensor:
        """Start an episode in each row that is done; return all rows' observations.

        Args:
            after: the task's fields after the step, which the other rows keep.
        """
        draws = Draws(self._stream)
        first = dict(zip(("qpos", "qvel"), self.task.initial(draws), strict=True))
        self._stream = torch.where(self._done, draws.stream, self._stream)
        self._qpos.copy_(where(self._done, first["qpos"], self._qpos))
        self._qvel.copy_(where(self._done, first["qvel"], self._qvel))
        self._warmstart.copy_(where(self._done, 0.0, self._warmstart))
        if self._derive:  # of all rows; the others' is not read
            self._ctrl.zero_()
            self._forces.zero_()
            self._derive()
        self._fields = {name: where(self._done, first.get(name, x), after[name]) for name, x in self._arrays.items()}
        return self.task.observe(self._fields)  # type: ignore[no-any-return]

    def _make_data(self, rows: int) -> Any:
        return mjw.make_data(self.task.model, nworld=rows, nconmax=self.contacts, njmax=self.constraints)

    def _captured(self, work: Callable[[Any, Any], None]) -> Callable[[], None]:
        """Record what `work` launches on model and data; the function returned launches that on torch's stream."""
        work(self.model, self.data)  # compiles its kernels, which a recording cannot
        with wp.ScopedCapture(self._warp) as capture:
            work(self.model, self.data)

        graph, device = capture.graph, self.device  # a reference to self would keep it alive

        def launch() -> None:
            stream = wp.stream_from_torch(torch.cuda.current_stream(device)) if device.type == "cuda" else None
            wp.capture_launch(graph, stream)

        return launch

    def state_dict(self) -> dict[str, Any]:
        if (dropped := self._overflow & DROPPED).any():  # cannot be, by `most_contacts`; to notice if it is
            kinds = mjw.OverflowType(int(dropped.max()))
            raise ValueError(f"the simulation dropped contacts or constraints ({kinds.name}), so what follows is wrong")
        tensors = {"stream": self._stream, "done": self._done, "warmstart": self._warmstart.clone()}
        totals = {"episode_returns": self.episode_returns, "episode_lengths": self.episode_lengths}
        return {"fields": dict(self._fields), **tensors, **totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        given, expected = (tuple(x.shape) for x in (state["fields"]["qpos"], self._qpos))
        if given != expected:
            raise ValueError(f"a state of shape {given} does not fit an environment of {expected}")
        self._fields = {name: x.to(self.device) for name, x in state["fields"].items()}
        names = ("stream", "done", "warmstart", "episode_returns", "episode_lengths")
        self._stream, self._done, warmstart, self.episode_returns, self.episode_lengths = (
            state[name].to(self.device) for name in names
        )
        self._qpos.copy_(self._fields["qpos"])
        self._qvel.copy_(self._fields["qvel"])
        self._warmstart.copy_(warmstart)


class Draws:
    """What `Task.initial` asks of a NumPy generator, for B rows at once, each from its own stream.

    Args:
        stream: (B,) as `uniform` takes it; the attribute moves on as numbers are drawn.
    """

    def __init__(self, stream: Tensor) -> None:
        self.stream = stream

    def uniform(self, low: float, high: float, size: int) -> Tensor:
        """(B, size) float32."""
        numbers, self.stream = uniform(self.stream, size)
        return low + (high - low) * numbers

    def standard_normal(self, size: int) -> Tensor:
        """(B, size) float32, by Box and Muller's transformation (1958, A note on the generation of random normal)."""
        radius, angle = self.uniform(0, 1, 2 * size).chunk(2, 1)
        return (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()


def most_contacts(model: mujoco.MjModel, pairs: np.ndarray) -> tuple[int, int]:
    """How many contacts, and rows of constraints, one environment can ever have, so that none is ever dropped.

    A sphere touches in one point; two capsules, or a capsule and a plane, in at most two. There are no other colliding
    shapes in these models. A contact of dimension d has 2 (d - 1) rows, the edges of its friction's pyramid, or one
    without friction; a joint's limits have one.

    Args:
        pairs: (P, 2) geoms that may collide.
    """
    spheres = (model.geom_type[pairs] == mujoco.mjtGeom.mjGEOM_SPHERE).any(1)
    contacts = np.where(spheres, 1, 2)
    rows = contacts * np.maximum(1, 2 * (model.geom_condim[pairs].max(1) - 1))
    return int(contacts.sum()), int(rows.sum() + model.jnt_limited.sum())


def align_with_capsules(model: Any, data: Any) -> None:
    """Turn the tangents of contacts between plane and capsule along the capsule, as MuJoCo does.

    They give friction's pyramid its edges. MuJoCo Warp 4.0 takes fixed ones for capsules steeper than 60 degrees.
    """
    contact = data.contact
    given = (model.geom_type, data.geom_xmat, contact.geom, contact.worldid, data.nacon)
    wp.launch(_align_with_capsules, data.naconmax, [*given, contact.frame])


@wp.kernel
@no_type_check  # Warp's own language
def _align_with_capsules(
    geom_type: wp.array[int],
    geom_xmat: wp.array2d[wp.mat33],
    geoms: wp.array[wp.vec2i],
    worlds: wp.array[int],
    nacon: wp.array[int],
    frame: wp.array[wp.mat33],
):
    i = wp.tid()
    if i >= nacon[0] or geom_type[geoms[i][0]] != PLANE or geom_type[geoms[i][1]] != CAPSULE:
        return
    xmat = geom_xmat[worlds[i], geoms[i][1]]
    axis = wp.vec3(xmat[0, 2], xmat[1, 2], xmat[2, 2])
    normal = wp.vec3(frame[i][0, 0], frame[i][0, 1], frame[i][0, 2])
    along = axis - wp.dot(axis, normal) * normal
    if wp.length(along) > 1.0e-6:  # else upright, and any tangent will do
        along = wp.normalize(along)
        frame[i] = wp.matrix_from_rows(normal, along, wp.cross(normal, along))


def where(rows: Tensor, x: Tensor | float, y: Tensor) -> Tensor:
    """(B, *shape) x where (B,) `rows`, else y."""
    return torch.where(rows.view(-1, *[1] * (y.dim() - 1)), x, y)


def nbytes(tree: Any) -> int:
    """Bytes of all Warp arrays in a dataclass and the dataclasses in it."""
    if isinstance(tree, wp.array):
        return int(tree.capacity)
    fields = dataclasses.fields(tree) if dataclasses.is_dataclass(tree) else ()
    return sum(nbytes(getattr(tree, field.name)) for field in fields)
