"""Gymnasium's classic control tasks as pure functions of tensors, batched on any device.

Each class equals its Gymnasium original step by step, from the same state and action, to rounding (tested): the same
reward, termination, reset distribution and time limit. Constants are read from an instance of the original (`original`)
where it exposes them. Gymnasium keeps most of these states in float64; here the state has the dtype of the draws it
started from, float32 in use.
"""

from __future__ import annotations

import math

import torch
from gymnasium.envs.classic_control import (
    AcrobotEnv,
    CartPoleEnv,
    Continuous_MountainCarEnv,
    MountainCarEnv,
    PendulumEnv,
)
from torch import Tensor

from rl_lab.vector import TensorEnv


def wrap(angle: Tensor) -> Tensor:
    """Bring an angle in radians into [-pi, pi]; angles already there come back unchanged, to the last bit."""
    return angle - 2 * math.pi * torch.round(angle / (2 * math.pi))


class CartPole(TensorEnv):
    """CartPole-v1: keep the pole up; reward 1 per step. Physics: x, x_dot, theta, theta_dot (m, rad, s)."""

    original = CartPoleEnv()
    observation_space, action_space = original.observation_space, original.action_space
    max_episode_steps, reset_draws = 500, 4

    def initial(self, draws: Tensor) -> Tensor:
        return 0.1 * draws - 0.05  # the bounds of CartPoleEnv.reset

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.original
        _, x_dot, theta, theta_dot = physics.unbind(-1)
        sin, cos = theta.sin(), theta.cos()
        force = c.force_mag * (2 * actions - 1)
        push = (force + c.polemass_length * theta_dot.square() * sin) / c.total_mass
        theta_acc = c.gravity * sin - cos * push
        theta_acc = theta_acc / (c.length * 4 / 3 - c.length * c.masspole / c.total_mass * cos.square())
        x_acc = push - c.polemass_length / c.total_mass * theta_acc * cos
        physics = physics + c.tau * torch.stack([x_dot, x_acc, theta_dot, theta_acc], -1)  # explicit Euler
        x, _, theta, _ = physics.unbind(-1)
        terminated = (x.abs() > c.x_threshold) | (theta.abs() > c.theta_threshold_radians)
        return physics, torch.ones_like(x), terminated

    def observe(self, physics: Tensor) -> Tensor:
        return physics


class Acrobot(TensorEnv):
    """Acrobot-v1: swing the tip one link above the base; reward -1 per step, 0 on arrival.

    Physics: theta1, theta2, and their velocities (rad, s); theta1 from hanging down, theta2 relative to the first link.
    """

    original = AcrobotEnv()
    observation_space, action_space = original.observation_space, original.action_space
    max_episode_steps, reset_draws = 500, 4

    GRAVITY = 9.8  # a local of AcrobotEnv._dsdt
    COUPLING = original.LINK_MASS_2 * original.LINK_LENGTH_1 * original.LINK_COM_POS_2
    INERTIA_2 = original.LINK_MASS_2 * original.LINK_COM_POS_2**2 + original.LINK_MOI
    MOMENT_1 = original.LINK_MASS_1 * original.LINK_COM_POS_1 + original.LINK_MASS_2 * original.LINK_LENGTH_1
    MOMENT_2 = original.LINK_MASS_2 * original.LINK_COM_POS_2
    INERTIA_1 = (
        original.LINK_MASS_1 * original.LINK_COM_POS_1**2
        + original.LINK_MASS_2 * original.LINK_LENGTH_1**2
        + original.LINK_MOI
        + INERTIA_2
    )

    def initial(self, draws: Tensor) -> Tensor:
        return 0.2 * draws - 0.1  # the bounds of AcrobotEnv.reset

    def derivative(self, physics: Tensor, torque: Tensor) -> Tensor:
        """Equations of motion, (B, 4), (B,) -> (B, 4)            [Sutton and Barto 2018; the "book" variant]."""
        theta1, theta2, dtheta1, dtheta2 = physics.unbind(-1)
        bend = self.COUPLING * theta2.cos()
        twist = self.COUPLING * theta2.sin()
        d1 = self.INERTIA_1 + 2 * bend
        d2 = self.INERTIA_2 + bend
        phi2 = self.MOMENT_2 * self.GRAVITY * (theta1 + theta2).sin()
        phi1 = self.MOMENT_1 * self.GRAVITY * theta1.sin() + phi2 - twist * dtheta2 * (dtheta2 + 2 * dtheta1)
        ratio = d2 / d1
        ddtheta2 = torque + ratio * phi1 - twist * dtheta1.square() - phi2
        ddtheta2 = ddtheta2 / (self.INERTIA_2 - ratio * d2)
        ddtheta1 = -ratio * ddtheta2 - phi1 / d1
        return torch.stack([dtheta1, dtheta2, ddtheta1, ddtheta2], -1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.original
        torque = actions - 1.0  # AVAIL_TORQUE = [-1, 0, 1]
        k1 = self.derivative(physics, torque)  # classical Runge-Kutta of order 4
        k2 = self.derivative(physics + c.dt / 2 * k1, torque)
        k3 = self.derivative(physics + c.dt / 2 * k2, torque)
        k4 = self.derivative(physics + c.dt * k3, torque)
        physics = physics + c.dt / 6 * (k1 + 2 * (k2 + k3) + k4)
        theta = wrap(physics[..., :2])
        dtheta1 = physics[..., 2:3].clamp(-c.MAX_VEL_1, c.MAX_VEL_1)
        dtheta2 = physics[..., 3:].clamp(-c.MAX_VEL_2, c.MAX_VEL_2)
        height = -theta[..., 0].cos() - theta.sum(-1).cos()  # of the tip above the base, in links
        terminated = height > 1.0
        return torch.cat([theta, dtheta1, dtheta2], -1), terminated.to(physics.dtype) - 1.0, terminated

    def observe(self, physics: Tensor) -> Tensor:
        theta = physics[..., :2]
        directions = torch.stack([theta.cos(), theta.sin()], -1).flatten(-2)  # cos and sin of theta1, then of theta2
        return torch.cat([directions, physics[..., 2:]], -1)


class MountainCar(TensorEnv):
    """MountainCar-v0: reach the flag; reward -1 per step. Physics: position, velocity."""

    original: MountainCarEnv | Continuous_MountainCarEnv = MountainCarEnv()
    observation_space, action_space = original.observation_space, original.action_space
    max_episode_steps, reset_draws = 200, 1
    FORCE, GRAVITY = MountainCarEnv().force, MountainCarEnv().gravity

    def initial(self, draws: Tensor) -> Tensor:
        return torch.cat([0.2 * draws - 0.6, torch.zeros_like(draws)], -1)  # the bounds of MountainCarEnv.reset

    def drive(self, physics: Tensor, push: Tensor) -> tuple[Tensor, Tensor]:
        """One step under the acceleration `push`, (B, 2), (B,) -> next physics (B, 2), terminated (B,) bool."""
        c = self.original
        position, velocity = physics.unbind(-1)
        velocity = (velocity + push - self.GRAVITY * torch.cos(3 * position)).clamp(-c.max_speed, c.max_speed)
        position = (position + velocity).clamp(c.min_position, c.max_position)
        velocity = torch.where(position <= c.min_position, velocity.clamp(min=0.0), velocity)  # the wall stops the car
        terminated = (position >= c.goal_position) & (velocity >= c.goal_velocity)
        return torch.stack([position, velocity], -1), terminated

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics, terminated = self.drive(physics, self.FORCE * (actions - 1).to(physics.dtype))
        return physics, torch.full_like(physics[..., 0], -1.0), terminated

    def observe(self, physics: Tensor) -> Tensor:
        return physics


class MountainCarContinuous(MountainCar):
    """MountainCarContinuous-v0: as MountainCar-v0 with a force in [-1, 1]; reward 100 at the flag - 0.1 * force^2."""

    original = Continuous_MountainCarEnv()
    observation_space, action_space = original.observation_space, original.action_space
    max_episode_steps = 999
    FORCE = original.power  # GRAVITY stays: the original has the same number as a literal in step

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        force = actions.squeeze(-1)
        physics, terminated = self.drive(physics, self.FORCE * force.clamp(-1.0, 1.0))
        return physics, 100.0 * terminated - 0.1 * force.square(), terminated


class Pendulum(TensorEnv):
    """Pendulum-v1: swing up and hold; no termination. Physics: theta from upright, theta_dot (rad, s)."""

    original = PendulumEnv()
    observation_space, action_space = original.observation_space, original.action_space
    max_episode_steps, reset_draws = 200, 2

    def initial(self, draws: Tensor) -> Tensor:
        theta, theta_dot = (2 * draws - 1).unbind(-1)
        return torch.stack([math.pi * theta, theta_dot], -1)  # DEFAULT_X and DEFAULT_Y of the original's module

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.original
        theta, theta_dot = physics.unbind(-1)
        torque = actions.squeeze(-1).clamp(-c.max_torque, c.max_torque)
        costs = wrap(theta).square() + 0.1 * theta_dot.square() + 0.001 * torque.square()
        acceleration = 3 * c.g / (2 * c.l) * theta.sin() + 3 / (c.m * c.l**2) * torque
        theta_dot = (theta_dot + c.dt * acceleration).clamp(-c.max_speed, c.max_speed)
        physics = torch.stack([theta + c.dt * theta_dot, theta_dot], -1)
        return physics, -costs, torch.zeros_like(costs, dtype=torch.bool)

    def observe(self, physics: Tensor) -> Tensor:
        theta, theta_dot = physics.unbind(-1)
        return torch.stack([theta.cos(), theta.sin(), theta_dot], -1)


CLASSIC: dict[str, type[TensorEnv]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v1": CartPole,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
}
