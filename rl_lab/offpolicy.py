"""What off-policy training commands share: their flags, their replay, how env steps and gradient steps take turns."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from rl_lab.cli import RunArgs
from rl_lab.distributions import Actions
from rl_lab.networks import is_image
from rl_lab.replay import Replay, transitions
from rl_lab.vector import VectorEnv


@dataclass(frozen=True)
class OffPolicyArgs(RunArgs):
    """Flags of a training command that learns from replay.

    Training goes in cycles: some env steps under fixed parameters, then gradient steps. One gradient step comes with
    every `train_frequency` env steps of a seed, over all its environments, however many these are.
    """

    num_envs: int = 1
    """environments of one seed"""
    gamma: float = 0.99
    """discount per env step"""
    buffer_size: int = 10_000
    """transitions of one seed that the replay holds"""
    replay_folder: Path | None = None
    """keep the replay in files of this folder, for what memory does not hold, with room for twice what comes between
    checkpoints besides; they are the run's, and stay with it"""
    batch_size: int = 128
    """transitions of a gradient step"""
    learning_starts: int = 10_000
    """env steps before the first gradient step"""
    train_frequency: int = 10
    """env steps for each gradient step"""
    log_every: int = 1_000
    """env steps of one seed between entries of the log"""

    may_be_zero: ClassVar[set[str]] = {*RunArgs.may_be_zero, "learning_starts"}
    may_change: ClassVar[set[str]] = {*RunArgs.may_change, "replay_folder"}  # files may have moved

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replay_folder:  # a resumed run may start elsewhere
            object.__setattr__(self, "replay_folder", self.replay_folder.absolute())
        either = self.num_envs % self.train_frequency == 0 or self.train_frequency % self.num_envs == 0
        self.require("train_frequency", either, f"a multiple or a divisor of --num-envs {self.num_envs}")
        whole = self.log_every % self.steps_per_cycle == 0
        self.require("log_every", whole, f"a multiple of {self.steps_per_cycle}, the env steps between updates")
        whole = self.total_timesteps % self.log_every == 0
        self.require("total_timesteps", whole, f"a multiple of --log-every {self.log_every}")
        starts = self.learning_starts < self.total_timesteps
        self.require("learning_starts", starts, f"below --total-timesteps {self.total_timesteps}")
        if self.replay_folder:
            self.require("checkpoint_every", self.checkpoint_every > 0, "above 0 with --replay-folder")
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

    @property
    def key(self) -> tuple[str, Any]:
        """Without the folder, which no compiled function depends on."""
        source, fields = super().key
        return source, tuple(x for x in fields if x[0] != "replay_folder")

    def replay(self, env: VectorEnv, n_step: int = 1, alpha: float = 0.0) -> Replay:
        """The replay for `env`: stacked frames are kept once each, files survive a kill between two checkpoints.

        Raises:
            ValueError: if it does not fit, the first batch would find nothing in it, --replay-folder has files of
                another run, or none of the resumed one's, or the environment masks actions, which no target here minds.
        """
        if env.action_mask is not None:
            raise ValueError(f"--env {self.env} masks actions, which this command would not heed; rl_lab.ppo does")
        self._require_first_batch(n_step + bool(env.frame_stack))
        self.require("batch_size", self.batch_size <= self.buffer_size, f"at most --buffer-size {self.buffer_size}")
        if self.replay_folder:
            self.require("replay_folder", env.device.type == "cpu", "left out on a GPU, whose memory no file is")
            if any(self.replay_folder.glob("replay.*")) != (self.resume is not None):
                found = "has files of a run: name another folder, or remove them if that run is not needed"
                missing = "has none of the run's files: put them back"
                raise ValueError(f"--replay-folder {self.replay_folder} {missing if self.resume else found}")
            try:
                self.replay_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--replay-folder {self.replay_folder}: {error}") from None
        # Twice what comes between checkpoints: a run may have to go on from the one before its newest.
        spare = 2 * (self.checkpoint_every + self.log_every) // self.num_envs + 1 if self.replay_folder else 0
        replay = Replay(
            transitions(env), self.num_seeds, self.num_envs, self.buffer_size, self.gamma, n_step, alpha,
            env.frame_stack, env.device, self.replay_folder, spare, self.compile,
        )  # fmt: skip
        if not self.replay_folder and self.resume is None:
            self._require_disk(replay.nbytes * min(1.0, self.total_timesteps / self.buffer_size))
        return replay

    def _require_disk(self, nbytes: float) -> None:
        """Raise a ValueError unless --runs-dir has room for the checkpoints, with the replay's `nbytes` in each.

        While a third one is written, the two before it are there.
        """
        full = 1 + (self.total_timesteps - 1) // self.checkpoint_every if self.checkpoint_every else 1
        there = next(path for path in (self.runs_dir, *self.runs_dir.absolute().parents) if path.is_dir())
        need, room = min(3, full) * nbytes, shutil.disk_usage(there).free
        if need > room:
            needed, free = (f"{x / 1e9:.1f} GB" for x in (need, room))
            ways = "a smaller --buffer-size, --checkpoint-every 0 or --replay-folder"
            raise ValueError(
                f"--runs-dir {self.runs_dir} needs {needed} for checkpoints, {free} are free; {ways} works"
            )

    def _require_first_batch(self, steps: int) -> None:
        """Raise a ValueError unless the first batch finds `steps` steps of each environment, one transition's."""
        least, cycle = steps * self.num_envs, self.steps_per_cycle
        each = f"a transition takes {steps} steps of each environment"
        self.require("buffer_size", self.buffer_size >= least, f"at least {least}: {each}")
        first = (least - 1) // cycle * cycle
        self.require("learning_starts", self.learning_starts >= first, f"at least {first}: {each}")


@dataclass(frozen=True)
class DiscreteArgs(OffPolicyArgs):
    """Flags of a training command that values each of a few actions."""

    target_network_frequency: int = 500
    """env steps between updates of the target network"""
    bf16: bool = False
    """compute the network of images in bfloat16, but for its heads"""

    def __post_init__(self) -> None:
        super().__post_init__()
        synced = self.target_network_frequency % self.steps_per_cycle == 0
        self.require("target_network_frequency", synced, f"a multiple of {self.steps_per_cycle}, the steps of a cycle")

    def actions(self, env: VectorEnv) -> Actions:
        """The actions of `env`; a ValueError unless they are one Discrete choice, and --bf16 has images to work on."""
        of_images = not self.bf16 or is_image(env.observation_space)
        self.require("bf16", of_images, "off for vectors, whose small networks are faster in float32")
        actions = Actions.of(env.action_space)
        if actions.low or actions.shape:
            needed = f"this command needs one Discrete action, not {env.action_space}"
            raise ValueError(f"--env {self.env}: {needed}; rl_lab.sac has Box")
        return actions


def draw_noise(actions: Actions, shape: tuple[int, ...], generator: torch.Generator, epsilon: Any = 0.05) -> Tensor:
    """Random actions (shape), int64; -1, with probability 1 - epsilon, where the policy is to act greedily.

    Args:
        epsilon: number or tensor that broadcasts to `shape`; 0.05 is what CleanRL evaluates with.
    """
    device = generator.device
    choices = torch.randint(actions.num_outputs, shape, generator=generator, device=device)
    return torch.where(torch.rand(shape, generator=generator, device=device) < epsilon, choices, -1)
