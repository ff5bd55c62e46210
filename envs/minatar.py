"""MinAtar's Breakout as pure functions of tensors, batched on any device.

Rules are MinAtar 1.0's (Young and Tian 2019, MinAtar: an Atari-inspired testbed for thorough and reproducible
reinforcement learning experiments, arXiv:1903.03176), sticky actions included; it equals the original step by step,
from the same state and action (tested). One thing differs: MinAtar's first action of a game may be replaced by the last
one of the game before, here by doing nothing, as in MinAtar's first game.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lab.vector import TensorEnv

STICKY = 0.1  # probability that the action before is repeated instead
BRICKS = 2**30 - 1  # three rows of ten, one bit each


class Breakout(TensorEnv):
    """MinAtar/Breakout: move the paddle so that the ball comes back; reward 1 for a brick, and new rows after the last.

    Physics, int32: ball's x, y, its last step's dx, dy (1 or -1), the place before, x, y, paddle's x, whether a brick
    was struck at the step before, the bricks as bits (row by row from the upper left), the action before.
    Observation: 10x10 cells [y, x], four layers: paddle, ball, the ball's place before, bricks.
    The original has no time limit.

    Args:
        moves: the actions by MinAtar's letters: "nlurdf" for all six, of which three do nothing, "nlr" for the others.
    """

    observation_space = gym.spaces.Box(0.0, 1.0, (10, 10, 4), bool)
    max_episode_steps, reset_draws, step_draws = 2**62, 1, 1

    def __init__(self, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu", *, moves: str) -> None:
        super().__init__(seeds, num_envs, device)
        self.moves, self.action_space = moves, gym.spaces.Discrete(len(moves))

    def initial(self, draws: Tensor) -> Tensor:
        right = (2 * draws[:, 0]).int()  # the side where the ball starts
        x, zero = 9 * right, torch.zeros_like(right)
        return torch.stack([x, zero + 3, 1 - 2 * right, zero + 1, x, zero + 3, zero + 4, zero, zero + BRICKS, zero], -1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, dx, dy, _, _, paddle, struck, bricks, before = physics.unbind(-1)
        actions = torch.where(draws[:, 0] < STICKY, before, actions.int())
        step = (actions == self.moves.index("r")).int() - (actions == self.moves.index("l")).int()
        paddle = (paddle + step).clamp(0, 9)

        new_x, new_y = x + dx, y + dy
        side = (new_x < 0) | (new_x > 9)
        new_x = new_x.clamp(0, 9)
        top, bottom = new_y < 0, new_y == 9
        place = 10 * (new_y - 1) + new_x
        brick = torch.where((new_y >= 1) & (new_y <= 3), torch.ones_like(place) << place.clamp(0, 29), 0)
        hit = bricks & brick != 0
        broken = hit & (struck == 0)  # once struck, the ball passes bricks until it has left them
        bricks = torch.where(broken, bricks & ~brick, torch.where(bottom & (bricks == 0), BRICKS, bricks))
        centre = bottom & (x == paddle)
        corner = bottom & ~centre & (new_x == paddle)  # sends the ball back where it came from
        back = broken | centre | corner

        dx = torch.where(side ^ corner, -dx, dx)
        dy = torch.where(top | back, -dy, dy)
        new_y = torch.where(back, y, new_y.clamp(min=0))
        physics = torch.stack([new_x, new_y, dx, dy, x, y, paddle, hit.int(), bricks, actions], -1)
        return physics, broken.float(), bottom & ~centre & ~corner

    def observe(self, physics: Tensor) -> Tensor:
        x, y, _, _, last_x, last_y, paddle, _, bricks, _ = physics[:, :, None, None].unbind(1)
        column = torch.arange(10, dtype=torch.int32, device=physics.device)
        row = column.unsqueeze(1)
        layers = [(row == 9) & (column == paddle), (row == y) & (column == x), (row == last_y) & (column == last_x)]
        rows = (bricks >> (10 * row[:3] + column)) & 1
        return torch.stack([*layers, F.pad(rows, (0, 0, 1, 6)) == 1], -1)


MINATAR: dict[str, Callable[..., TensorEnv]] = {
    "MinAtar/Breakout-v0": partial(Breakout, moves="nlurdf"),
    "MinAtar/Breakout-v1": partial(Breakout, moves="nlr"),
}
