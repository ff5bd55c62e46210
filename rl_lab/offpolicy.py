"""What off-policy training commands share: their flags, and how env steps and gradient steps take turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rl_lab.cli import RunArgs


@dataclass(frozen=True)
class OffPolicyArgs(RunArgs):
    """Flags of a training command that learns from replay.

    Training goes in cycles: some env steps under fixed parameters, then gradient steps. One gradient step comes with
    every `train_frequency` env steps of a seed, over all its environments, however many these are.
    """

    num_envs: int = 1
    """environments of one seed"""
    buffer_size: int = 10_000
    """transitions of one seed that the replay holds"""
    batch_size: int = 128
    """transitions of a gradient step"""
    learning_starts: int = 10_000
    """env steps before the first gradient step"""
    train_frequency: int = 10
    """env steps for each gradient step"""
    log_every: int = 1_000
    """env steps of one seed between entries of the log"""

    may_be_zero: ClassVar[set[str]] = {*RunArgs.may_be_zero, "learning_starts"}

    def __post_init__(self) -> None:
        super().__post_init__()
        either = self.num_envs % self.train_frequency == 0 or self.train_frequency % self.num_envs == 0
        self.require("train_frequency", either, f"a multiple or a divisor of --num-envs {self.num_envs}")
        whole = self.log_every % self.steps_per_cycle == 0
        self.require("log_every", whole, f"a multiple of {self.steps_per_cycle}, the env steps between updates")
        self.require("total_timesteps", self.num_iterations > 0, f"--log-every {self.log_every} or more")
        starts = self.learning_starts < self.total_timesteps
        self.require("learning_starts", starts, f"below --total-timesteps {self.total_timesteps}")
        fits = self.buffer_size % self.num_envs == 0
        self.require("buffer_size", fits, f"a multiple of --num-envs {self.num_envs}")

    @property
    def steps_per_cycle(self) -> int:
        """Env steps of one seed between gradient steps."""
        return max(self.train_frequency, self.num_envs)

    @property
    def rows_per_cycle(self) -> int:
        """Steps of each environment in a cycle."""
        return self.steps_per_cycle // self.num_envs

    @property
    def updates_per_cycle(self) -> int:
        """Gradient steps in a cycle."""
        return self.steps_per_cycle // self.train_frequency

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.log_every
