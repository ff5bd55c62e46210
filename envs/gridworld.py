"""MiniGrid's grid worlds as pure functions of tensors, batched on any device.

Rules, encoding and reset distributions are MiniGrid 3.2's (Chevalier-Boisvert et al. 2023, Minigrid & Miniworld,
arXiv:2306.13831), observations those of its ImgObsWrapper; each class equals its original step by step, from the same
state and action (tested). No grid is stored: a state is a few integers, from which `cell` says what lies where. Where
the originals draw positions until one is free, here one draw picks among the free ones, which is the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rl_lab.vector import TensorEnv

VIEW = 7  # cells along each side of what the agent sees
LEFT, RIGHT, FORWARD, PICK_UP, DROP, TOGGLE, DONE = range(7)


def code(kind: int, color: int, state: int = 0) -> int:
    """What lies in a cell as one number; MiniGrid's observations show the three."""
    return kind | color << 4 | state << 8


UNSEEN, EMPTY, WALL, KEY, GOAL = code(0, 0), code(1, 0), code(2, 5), code(5, 4), code(8, 1)
OPEN, CLOSED, LOCKED = (code(4, 4, state) for state in range(3))  # the yellow door


def pick(draws: Tensor, number: Tensor | int) -> Tensor:
    """Uniform in [0, 1) to uniform among 0 ... number - 1, int32."""
    return (draws * number).int()


def heading(direction: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dy) of directions 0 to 3: right, down (y grows downwards), left, up."""
    vertical = direction % 2
    return (1 - direction) * (1 - vertical), (2 - direction) * vertical


def visible(clear: Tensor) -> Tensor:
    """Which cells the agent sees, (B, 7, 7) bool, given which let light through, likewise; it stands at [3, 6].

    MiniGrid's Grid.process_vis. From the agent's row (the last) upwards, light spreads sideways through clear cells as
    far as it gets, and from each clear cell it has reached to the three next ones in the row above. A row is the seven
    lowest bits of an integer, so that all its cells spread at once; bit 7 takes what runs off and leads nowhere.
    """
    place = torch.arange(VIEW, dtype=torch.int32, device=clear.device).unsqueeze(1)
    rows = (clear.int() << place).sum(1, dtype=torch.int32).unbind(1)
    reached = torch.full_like(rows[0], 1 << VIEW // 2)
    seen = []
    for row in reversed(rows):
        for _ in range(VIEW - 1):
            through = reached & row
            reached = reached | through << 1 | through >> 1
            # The same tensor. The compiler keeps it in memory, where otherwise it would write out all that led to it
            # at each of its uses, which are three a step.
            reached = reached.as_strided(reached.shape, reached.stride())
        seen.append(reached)
        through = reached & row
        reached = through | through << 1 | through >> 1
    return (torch.stack(seen[::-1], -1).unsqueeze(1) >> place) & 1 == 1


class GridWorld(TensorEnv):
    """Reach the goal; reward 1 - 0.9 * steps / max_episode_steps there. Square, with walls around.

    Physics, int32: x, y, direction, steps taken, and what a task adds.
    Observation: for each cell of the 7x7 in front of the agent, itself at [3, 6] looking to lower second indices, kind,
    colour and state (of a door); in its own cell what it carries.

    Args:
        size: cells along each side, walls included.
        max_episode_steps: time limit.
    """

    observation_space = gym.spaces.Box(0, 255, (VIEW, VIEW, 3), np.uint8)
    action_space = gym.spaces.Discrete(7)
    see_through_walls = False

    def __init__(
        self,
        seeds: Sequence[int],
        num_envs: int,
        device: torch.device | str = "cpu",
        *,
        size: int,
        max_episode_steps: int,
    ) -> None:
        super().__init__(seeds, num_envs, device)
        self.size, self.max_episode_steps = size, max_episode_steps

    def cell(self, physics: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What lies at (x, y), any integers: (..., k), (...) -> (...) codes. Here walls, and nothing between."""
        last = self.size - 1
        return torch.where((x <= 0) | (y <= 0) | (x >= last) | (y >= last), WALL, EMPTY).int()

    def objects(self, physics: Tensor, agent: Tensor, front: Tensor, actions: Tensor) -> Tensor:
        """What a task added to `physics`, (B, k - 4), after the agent came to be `agent`, (B, 4); `front` was there."""
        return physics[:, 4:]

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, direction, steps = physics[:, :4].unbind(-1)
        dx, dy = heading(direction)
        front = self.cell(physics, x + dx, y + dy)
        forward, steps = actions == FORWARD, steps + 1
        moved = forward & ((front == EMPTY) | (front == GOAL) | (front == OPEN))
        direction = (direction + (actions == RIGHT).int() - (actions == LEFT).int()) % 4
        agent = torch.stack([x + dx * moved, y + dy * moved, direction, steps], -1)
        terminated = forward & (front == GOAL)
        rewards = torch.where(terminated, 1 - 0.9 * (steps / self.max_episode_steps), 0.0)
        return torch.cat([agent, self.objects(physics, agent, front, actions)], -1), rewards, terminated

    def observe(self, physics: Tensor) -> Tensor:
        x, y, direction, _ = physics[:, :4, None, None].unbind(1)
        dx, dy = heading(direction)
        place = torch.arange(VIEW, dtype=torch.int32, device=physics.device)
        ahead, right = VIEW - 1 - place, place.unsqueeze(1) - VIEW // 2
        cells = self.cell(physics[:, None, None], x + dx * ahead - dy * right, y + dy * ahead + dx * right)
        own = (ahead == 0) & (right == 0)
        cells = torch.where(own & (cells != KEY), EMPTY, cells)
        if not self.see_through_walls:
            clear = (cells != WALL) & (cells != CLOSED) & (cells != LOCKED)
            cells = torch.where(visible(clear), cells, UNSEEN)
        return torch.stack([cells & 15, cells >> 4 & 15, cells >> 8], -1).to(torch.uint8)


class Empty(GridWorld):
    """MiniGrid-Empty: an empty room, the goal in its far corner; walls hide nothing."""

    reset_draws, see_through_walls = 0, True

    def cell(self, physics: Tensor, x: Tensor, y: Tensor) -> Tensor:
        goal = (x == self.size - 2) & (y == self.size - 2)
        return torch.where(goal, GOAL, super().cell(physics, x, y))

    def initial(self, draws: Tensor) -> Tensor:
        one = torch.ones(len(draws), dtype=torch.int32, device=draws.device)
        zero = torch.zeros_like(one)
        return torch.stack([one, one, zero, zero], -1)


class EmptyRandom(Empty):
    """MiniGrid-Empty-Random: likewise, from anywhere but the goal, in any direction."""

    reset_draws = 2

    def initial(self, draws: Tensor) -> Tensor:
        room = self.size - 2
        start, direction = pick(draws[:, 0], room**2 - 1), pick(draws[:, 1], 4)  # the goal's cell is the last
        return torch.stack([1 + start % room, 1 + start // room, direction, torch.zeros_like(start)], -1)


class DoorKey(GridWorld):
    """MiniGrid-DoorKey: fetch the key, unlock the door in the wall, and go to the goal behind it.

    Added to physics: key's x, y, where it is carried the agent's own; door's x, y, and the door's code.
    """

    reset_draws = 5

    def cell(self, physics: Tensor, x: Tensor, y: Tensor) -> Tensor:
        *_, key_x, key_y, door_x, door_y, door = physics.unbind(-1)
        goal = (x == self.size - 2) & (y == self.size - 2)
        cells = torch.where(goal, GOAL, super().cell(physics, x, y))
        cells = torch.where(x == door_x, torch.where(y == door_y, door, WALL), cells)
        return torch.where((x == key_x) & (y == key_y), KEY, cells)

    def initial(self, draws: Tensor) -> Tensor:
        wall, start, direction, door, key = draws.unbind(-1)
        door_x = 2 + pick(wall, self.size - 4)
        width = door_x - 1  # of the room to the left, where agent and key start
        free = width * (self.size - 2)
        start, key = pick(start, free), pick(key, free - 1)
        key = key + (key >= start).int()
        agent = [1 + start % width, 1 + start // width, pick(direction, 4), torch.zeros_like(start)]
        door_y = 1 + pick(door, self.size - 3)
        locked = torch.full_like(start, LOCKED)
        return torch.stack([*agent, 1 + key % width, 1 + key // width, door_x, door_y, locked], -1)

    def objects(self, physics: Tensor, agent: Tensor, front: Tensor, actions: Tensor) -> Tensor:
        x, y, direction, _, key_x, key_y, door_x, door_y, door = physics.unbind(-1)
        dx, dy = heading(direction)
        carried = (key_x == x) & (key_y == y)
        drop = carried & (actions == DROP) & (front == EMPTY)
        held = carried | ((actions == PICK_UP) & (front == KEY))
        key_x = torch.where(drop, x + dx, torch.where(held, agent[:, 0], key_x))
        key_y = torch.where(drop, y + dy, torch.where(held, agent[:, 1], key_y))
        toggle = (actions == TOGGLE) & (front == door) & ((door != LOCKED) | carried)
        door = torch.where(toggle, torch.where(door == OPEN, CLOSED, OPEN).int(), door)
        return torch.stack([key_x, key_y, door_x, door_y, door], -1)


class FourRooms(GridWorld):
    """MiniGrid-FourRooms: four rooms of 8x8, a gap in each wall between two; agent and goal anywhere.

    Added to physics: goal's x, y; y of the upper gap, x of the left and of the right one, y of the lower one.
    """

    reset_draws = 7

    def cell(self, physics: Tensor, x: Tensor, y: Tensor) -> Tensor:
        *_, goal_x, goal_y, upper, left, right, lower = physics.unbind(-1)
        wall = ((x == 9) & (y != upper) & (y != lower)) | ((y == 9) & (x != left) & (x != right))
        cells = torch.where(wall, WALL, super().cell(physics, x, y))
        return torch.where((x == goal_x) & (y == goal_y), GOAL, cells)

    def initial(self, draws: Tensor) -> Tensor:
        upper, left = (1 + pick(draw, 8) for draw in draws[:, :2].unbind(-1))
        right, lower = (10 + pick(draw, 8) for draw in draws[:, 2:4].unbind(-1))
        start, goal = pick(draws[:, 4], 260), pick(draws[:, 6], 259)
        goal = goal + (goal >= start).int()

        def position(free: Tensor) -> tuple[Tensor, Tensor]:
            """Of the 260 free cells: 256 in the rooms, row by row, then the gaps in the order above."""
            column, row, gap = free % 16, free // 16, free - 256
            gap_x = torch.where(gap == 1, left, torch.where(gap == 2, right, 9))
            gap_y = torch.where(gap == 0, upper, torch.where(gap == 3, lower, 9))
            x = torch.where(gap < 0, column + 1 + (column > 7).int(), gap_x)
            return x, torch.where(gap < 0, row + 1 + (row > 7).int(), gap_y)

        agent = [*position(start), pick(draws[:, 5], 4), torch.zeros_like(start)]
        return torch.stack([*agent, *position(goal), upper, left, right, lower], -1)


GRIDWORLDS: dict[str, Callable[..., TensorEnv]] = {
    **{f"MiniGrid-Empty-{n}x{n}-v0": partial(Empty, size=n, max_episode_steps=4 * n**2) for n in (5, 6, 8, 16)},
    **{f"MiniGrid-Empty-Random-{n}x{n}-v0": partial(EmptyRandom, size=n, max_episode_steps=4 * n**2) for n in (5, 6)},
    **{f"MiniGrid-DoorKey-{n}x{n}-v0": partial(DoorKey, size=n, max_episode_steps=10 * n**2) for n in (5, 6, 8, 16)},
    "MiniGrid-FourRooms-v0": partial(FourRooms, size=19, max_episode_steps=100),
}
