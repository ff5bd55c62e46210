"""What Gymnasium's MuJoCo tasks, -v4 and -v5, add to the physics: first states, observations, rewards, terminations.

A task is a class of batched functions of arrays, apart from whatever steps the physics. On NumPy arrays they equal
`gymnasium.envs.mujoco` 1.4, from which every constant is taken, bit for bit; on torch tensors to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco  # type: ignore[import-untyped]
import numpy as np

Array = Any  # np.ndarray or torch.Tensor
Arrays = Any  # fields of MjData by name, each (B, *shape): a structured array, or a dict of tensors

ASSETS = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"


class Task:
    """What an environment adds to the physics: first state, observation, reward, termination.

    The arrays `before` and `after` hold `fields` as they stood after the previous step (or reset) and after this one.
    Positions and velocities are then those of the end of the step; what MuJoCo derives from them (xpos, cvel, ...) is
    one physics step older, because `mj_step` derives it before it integrates. Gymnasium reads both, and so do we.
    """

    xml: str
    frame_skip: int  # physics steps per step
    max_episode_steps = 1000
    fields: tuple[str, ...] = ("qpos", "qvel")
    noise: float  # half-width of the first positions' uniform noise, and scale of the first velocities
    normal_velocity = False  # first velocities are normal, not uniform

    def __init__(self, version: int, xp: Any = np, **kind: Any) -> None:
        """Load the model of `version` 4 or 5.

        Args:
            version: as in the id.
            xp: the array library, numpy or torch.
            kind: dtype and device of constant arrays, as `xp.asarray` takes them.
        """
        self.version, self.xp = version, xp
        heard = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda _: None)  # deprecations in Gymnasium's models
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS / self.xml))
        mujoco.set_mju_user_warning(heard)
        # A 0-d array, as NumPy would convert a Python number anew in each operation: 0.5 us of each step.
        self.dt = xp.asarray(self.model.opt.timestep * self.frame_skip)
        self.qpos0 = xp.asarray(self.model.qpos0, **kind)

    def initial(self, rng: Any) -> tuple[Array, Array]:
        """Draw the first positions and velocities of an episode.

        Args:
            rng: a NumPy generator, or what draws (B, size) numbers where that draws (size,).
        Returns:
            (nq,) and (nv,), or (B, nq) and (B, nv).
        """
        qpos = self.qpos0 + rng.uniform(-self.noise, self.noise, self.model.nq)
        if self.normal_velocity:
            return qpos, self.noise * rng.standard_normal(self.model.nv)
        return qpos, rng.uniform(-self.noise, self.noise, self.model.nv)

    def observe(self, s: Arrays) -> Array:
        """Observations, (B, k)."""
        return self.xp.concatenate((s["qpos"], s["qvel"]), 1)

    def reward(self, before: Arrays, after: Arrays, actions: Array, terminated: Array) -> Array:
        """Rewards, (B,); actions are (B, nu) float32, and their cost is summed in float32."""
        raise NotImplementedError

    def terminated(self, s: Arrays) -> Array | None:
        """Whether the task ended, (B,) bool; None if it never does."""
        return None

    def finite(self, s: Arrays) -> Array:
        """Whether all positions and velocities are finite, (B,) bool."""
        return self.xp.isfinite(s["qpos"]).all(1) & self.xp.isfinite(s["qvel"]).all(1)

    def alive(self, terminated: Array, bonus: float) -> Array:
        """The bonus for being alive, (B,), which -v4 pays on the terminating step too."""
        return (~terminated | (self.version == 4)) * bonus


class Locomotion(Task):
    """A task that pays forward velocity and, in some, a bonus for being alive, less costs."""

    hidden = 2  # leading positions (x, or x and y) that are not observed
    control_cost: float
    bonus = 0.0

    def __init__(self, version: int, xp: Any = np, **kind: Any) -> None:
        super().__init__(version, xp, **kind)
        self.control_weight = xp.asarray(self.control_cost, dtype=xp.float32)

    def observe(self, s: Arrays) -> Array:
        return self.xp.concatenate((s["qpos"][:, self.hidden :], s["qvel"]), 1)

    def velocity(self, before: Arrays, after: Arrays) -> Array:
        """Forward velocity, (B,)."""
        return (after["qpos"][:, 0] - before["qpos"][:, 0]) / self.dt

    def costs(self, s: Arrays, actions: Array) -> Array:
        """What the controls, and in some tasks the contact forces, cost, (B,)."""
        return self.control_weight * (actions * actions).sum(1)

    def reward(self, before: Arrays, after: Arrays, actions: Array, terminated: Array) -> Array:
        income = self.velocity(before, after)
        if self.bonus:
            income = income + self.alive(terminated, self.bonus)
        return income - self.costs(after, actions)


class HalfCheetah(Locomotion):
    xml, frame_skip, noise, normal_velocity = "half_cheetah.xml", 5, 0.1, True
    hidden, control_cost = 1, 0.1


class Swimmer(Locomotion):
    xml, frame_skip, noise, control_cost = "swimmer.xml", 4, 0.1, 1e-4


class Hopper(Locomotion):
    xml, frame_skip, noise, control_cost, bonus = "hopper.xml", 4, 5e-3, 1e-3, 1.0

    def observe(self, s: Arrays) -> Array:
        return self.xp.concatenate((s["qpos"][:, 1:], s["qvel"].clip(-10, 10)), 1)

    def terminated(self, s: Arrays) -> Array:
        qpos, qvel = s["qpos"], s["qvel"]
        bounded = (abs(qpos[:, 2:]) < 100).all(1) & (abs(qvel) < 100).all(1)
        return ~(bounded & (qpos[:, 1] > 0.7) & (abs(qpos[:, 2]) < 0.2))


class Walker2d(Hopper):
    xml = "walker2d.xml"

    def __init__(self, version: int, xp: Any = np, **kind: Any) -> None:
        if version == 5:
            self.xml = "walker2d_v5.xml"
        super().__init__(version, xp, **kind)

    def terminated(self, s: Arrays) -> Array:
        z, angle = s["qpos"][:, 1], s["qpos"][:, 2]
        return ~((z > 0.8) & (z < 2.0) & (abs(angle) < 1.0))


class Ant(Locomotion):
    xml, frame_skip, noise, normal_velocity = "ant.xml", 5, 0.1, True
    control_cost, bonus = 0.5, 1.0

    def __init__(self, version: int, xp: Any = np, **kind: Any) -> None:
        super().__init__(version, xp, **kind)
        self.fields = ("qpos", "qvel", "xpos") if version == 4 else ("qpos", "qvel", "xpos", "cfrc_ext")

    def contact(self, s: Arrays) -> Array:
        """Clipped contact forces of all bodies, (B, 6 * nbody)."""
        return s["cfrc_ext"].clip(-1, 1).reshape(len(s["qpos"]), -1)

    def observe(self, s: Arrays) -> Array:
        joints = super().observe(s)
        return joints if self.version == 4 else self.xp.concatenate((joints, self.contact(s)[:, 6:]), 1)  # 6: the world

    def velocity(self, before: Arrays, after: Arrays) -> Array:
        return (after["xpos"][:, 1, 0] - before["xpos"][:, 1, 0]) / self.dt  # of the torso, body 1

    def costs(self, s: Arrays, actions: Array) -> Array:
        control = super().costs(s, actions)
        return control if self.version == 4 else control + 5e-4 * (self.contact(s) ** 2).sum(1)

    def terminated(self, s: Arrays) -> Array:
        z = s["qpos"][:, 2]
        return ~(self.finite(s) & (z >= 0.2) & (z <= 1.0))


class Humanoid(Locomotion):
    xml, frame_skip, noise, control_cost, bonus = "humanoid.xml", 5, 1e-2, 0.1, 5.0
    fields = ("qpos", "qvel", "cinert", "cvel", "qfrc_actuator", "cfrc_ext", "xipos", "ctrl")

    def __init__(self, version: int, xp: Any = np, **kind: Any) -> None:
        super().__init__(version, xp, **kind)
        self.mass = xp.asarray(self.model.body_mass, **kind)

    def observe(self, s: Arrays) -> Array:
        body, dof = (0, 0) if self.version == 4 else (1, 6)  # -v5 leaves out the world and the free joint
        parts = [s[name][:, body:].reshape(len(s["qpos"]), -1) for name in ("cinert", "cvel", "cfrc_ext")]
        parts.insert(2, s["qfrc_actuator"][:, dof:])
        return self.xp.concatenate((s["qpos"][:, 2:], s["qvel"], *parts), 1)

    def velocity(self, before: Arrays, after: Arrays) -> Array:
        return 1.25 * ((self.centre(after) - self.centre(before)) / self.dt)

    def centre(self, s: Arrays) -> Array:
        """Centre of mass, x, (B,)."""
        return self.xp.einsum("b,kbj->kj", self.mass, s["xipos"])[:, 0] / self.mass.sum()

    def costs(self, s: Arrays, actions: Array) -> Array:
        control = self.control_cost * (s["ctrl"] ** 2).sum(1)  # in float64, unlike the other tasks
        if self.version == 4:
            return control
        return control + (5e-7 * (s["cfrc_ext"].reshape(len(actions), -1) ** 2).sum(1)).clip(max=10.0)

    def terminated(self, s: Arrays) -> Array:
        z = s["qpos"][:, 2]
        return ~((z > 1.0) & (z < 2.0))


class Reacher(Task):
    xml, frame_skip, max_episode_steps = "reacher.xml", 2, 50
    fields = ("qpos", "qvel", "xpos")

    def initial(self, rng: Any) -> tuple[Array, Array]:
        qpos = self.qpos0 + rng.uniform(-0.1, 0.1, self.model.nq)
        goal = self.goal(rng)
        qvel = rng.uniform(-0.005, 0.005, self.model.nv)
        qpos[..., -2:], qvel[..., -2:] = goal, 0.0
        return qpos, qvel

    def goal(self, rng: Any) -> Array:
        """Draw the target, (2,) or (B, 2), uniform in a disc; in a batch without repeating what falls outside."""
        if self.xp is not np:
            radius, angle = 0.2 * rng.uniform(0, 1, 1) ** 0.5, rng.uniform(0, 2 * np.pi, 1)
            return self.xp.concatenate((radius * self.xp.cos(angle), radius * self.xp.sin(angle)), 1)
        goal = rng.uniform(-0.2, 0.2, 2)
        while np.linalg.norm(goal) >= 0.2:
            goal = rng.uniform(-0.2, 0.2, 2)
        return goal

    def offset(self, s: Arrays) -> Array:
        """From the target (body 4) to the fingertip (body 3), (B, 3)."""
        return s["xpos"][:, 3] - s["xpos"][:, 4]

    def observe(self, s: Arrays) -> Array:
        angles, offset = s["qpos"][:, :2], self.offset(s) if self.version == 4 else self.offset(s)[:, :2]
        parts = (self.xp.cos(angles), self.xp.sin(angles), s["qpos"][:, 2:], s["qvel"][:, :2], offset)
        return self.xp.concatenate(parts, 1)

    def reward(self, before: Arrays, after: Arrays, actions: Array, terminated: Array) -> Array:
        offset = self.offset(before if self.version == 4 else after)
        return -(self.xp.linalg.vecdot(offset, offset) ** 0.5) - (actions * actions).sum(1)


class InvertedPendulum(Task):
    xml, frame_skip, noise = "inverted_pendulum.xml", 2, 0.01

    def reward(self, before: Arrays, after: Arrays, actions: Array, terminated: Array) -> Array:
        return self.alive(terminated, 1.0)

    def terminated(self, s: Arrays) -> Array:
        return ~(self.finite(s) & (abs(s["qpos"][:, 1]) <= 0.2))


class InvertedDoublePendulum(Task):
    xml, frame_skip, noise, normal_velocity = "inverted_double_pendulum.xml", 5, 0.1, True
    fields = ("qpos", "qvel", "qfrc_constraint", "site_xpos")

    def observe(self, s: Arrays) -> Array:
        angles, forces = s["qpos"][:, 1:], s["qfrc_constraint"] if self.version == 4 else s["qfrc_constraint"][:, :1]
        parts = (s["qpos"][:, :1], self.xp.sin(angles), self.xp.cos(angles), s["qvel"].clip(-10, 10))
        return self.xp.concatenate((*parts, forces.clip(-10, 10)), 1)

    def reward(self, before: Arrays, after: Arrays, actions: Array, terminated: Array) -> Array:
        tip, qvel = after["site_xpos"][:, 0], after["qvel"]
        distance = 0.01 * squared(tip[:, 0]) + squared(tip[:, 2] - 2)
        velocity = 1e-3 * squared(qvel[:, 1]) + 5e-3 * squared(qvel[:, 2])
        return self.alive(terminated, 10.0) - distance - velocity

    def terminated(self, s: Arrays) -> Array:
        return s["site_xpos"][:, 0, 2] <= 1


def squared(x: Array) -> Array:
    """x ** 2, on NumPy by C's pow: Gymnasium squares scalars, which at times rounds differently from a product."""
    return np.array([v**2 for v in x.tolist()]) if isinstance(x, np.ndarray) else x * x


LOCOMOTION = (HalfCheetah, Hopper, Walker2d, Ant, Humanoid, Swimmer)
CONTROL = (Reacher, InvertedPendulum, InvertedDoublePendulum)
TASKS: dict[str, Callable[..., Task]] = {  # Gymnasium's id -> constructor, which takes `xp` and `kind`
    f"{task.__name__}-v{version}": partial(task, version) for task in LOCOMOTION + CONTROL for version in (4, 5)
}
