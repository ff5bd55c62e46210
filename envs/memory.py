"""A task that takes memory: what was seen at the first step decides what is right at the last."""

from __future__ import annotations

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lab.vector import TensorEnv


class Recall(TensorEnv):
    """Recall-v0: a cue, one of 4 with equal chances, is shown at the first step only; name it at the last, the 10th.

    Observation: the cue as 4 numbers, one of them 1, at the first step, zeros after it; and the share of the episode
    that has passed, 0 to 0.9. Only the last action counts: reward 1 if it is the cue's number, else 0; then the episode
    terminates. Physics: the cue's number and the steps taken.

    A memoryless policy, pi(a | o), has an expected return of exactly 1/4, whatever it is. The cue and the step count do
    not depend on actions, and the last observation o is the same for every cue, so with P(cue = a) = 1/4 the return is
    sum_a pi(a | o) P(cue = a) = 1/4. With memory 1 is reached.
    """

    num_cues, num_steps = 4, 10
    observation_space = gym.spaces.Box(0.0, 1.0, (num_cues + 1,))
    action_space = gym.spaces.Discrete(num_cues)
    max_episode_steps, reset_draws = 1000, 1  # never reached: episodes terminate

    def initial(self, draws: Tensor) -> Tensor:
        return torch.cat([(self.num_cues * draws).floor(), torch.zeros_like(draws)], -1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cue, steps = physics.unbind(-1)
        terminated = steps + 1 == self.num_steps
        rewards = (terminated & (actions == cue)).to(physics.dtype)
        return torch.stack([cue, steps + 1], -1), rewards, terminated

    def observe(self, physics: Tensor) -> Tensor:
        cue, steps = physics.unbind(-1)
        shown = F.one_hot(cue.long(), self.num_cues) * (steps == 0).unsqueeze(-1)
        return torch.cat([shown.to(physics.dtype), (steps / self.num_steps).unsqueeze(-1)], -1)
