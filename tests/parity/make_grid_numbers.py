"""Writes grid_numbers.json: states, actions and what MiniGrid and MinAtar make of them.

    python3.11 -m venv peers
    peers/bin/pip install minigrid==3.2.0 minatar==1.0.15 gymnasium==1.4.0
    peers/bin/python tests/parity/make_grid_numbers.py

The functions that read and set the originals' states, in the form that envs/ keeps them in, serve the tests too.
"""

from __future__ import annotations

import base64
import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

MINIGRID = ("Empty-6x6", "Empty-Random-5x5", "DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "FourRooms")
OFTEN = [0.15, 0.15, 0.35, 0.12, 0.06, 0.12, 0.05]  # of MiniGrid's actions: walks, and uses things now and then


def minigrid(env_id: str) -> Any:
    """The original as ImgObsWrapper shows it."""
    import gymnasium
    import minigrid.wrappers

    return minigrid.wrappers.ImgObsWrapper(gymnasium.make(env_id, disable_env_checker=True))


def objects(env: Any) -> dict[str, list[Any]]:
    """What lies in the original's grid by kind, as (x, y, object)."""
    found: dict[str, list[Any]] = {}
    for place, thing in enumerate(env.grid.grid):
        if thing is not None:
            found.setdefault(thing.type, []).append((place % env.width, place // env.width, thing))
    return found


def read_minigrid(env: Any) -> list[int]:
    """The original's state as `physics`; the carried key lies in the agent's cell."""
    env = env.unwrapped
    agent, things = [*env.agent_pos, env.agent_dir, env.step_count], objects(env)
    if "FourRooms" in type(env).__name__:
        up, down = (y for y in range(1, 18) if env.grid.get(9, y) is None or env.grid.get(9, y).type == "goal")
        left, right = (x for x in range(1, 18) if env.grid.get(x, 9) is None or env.grid.get(x, 9).type == "goal")
        agent += [*things["goal"][0][:2], up, left, right, down]
    elif "DoorKey" in type(env).__name__:
        [(x, y, door)] = things["door"]
        key = things["key"][0][:2] if env.carrying is None else env.agent_pos
        agent += [*key, x, y, 4 | 4 << 4 | door.encode()[2] << 8]
    return [int(value) for value in agent]


def place_minigrid(env: Any, physics: list[int]) -> None:
    """Set the original's state from `physics`."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Door, Goal, Key

    env = env.unwrapped
    x, y, env.agent_dir, env.step_count, *rest = physics
    env.agent_pos, env.carrying, size = (x, y), None, env.width
    env.grid = Grid(size, size)
    env.grid.wall_rect(0, 0, size, size)
    if "FourRooms" in type(env).__name__:
        goal_x, goal_y, up, left, right, down = rest
        env.grid.horz_wall(0, 9)
        env.grid.vert_wall(9, 0)
        for gap in ((9, up), (left, 9), (right, 9), (9, down)):
            env.grid.set(*gap, None)
        env.put_obj(Goal(), goal_x, goal_y)
        return
    env.put_obj(Goal(), size - 2, size - 2)
    if "DoorKey" in type(env).__name__:
        key_x, key_y, door_x, door_y, door = rest
        env.grid.vert_wall(door_x, 0)
        env.put_obj(Door("yellow", is_open=door >> 8 == 0, is_locked=door >> 8 == 2), door_x, door_y)
        if (key_x, key_y) == (x, y):
            env.carrying = Key("yellow")
        else:
            env.put_obj(Key("yellow"), key_x, key_y)


DIRECTIONS = [(-1, -1), (1, -1), (1, 1), (-1, 1)]  # MinAtar's ball_dir as (dx, dy)


def read_breakout(game: Any) -> list[int]:
    """The original's state as `physics`, the action before as the number of all six."""
    env = game.env
    bricks = sum(1 << i for i, brick in enumerate(env.brick_map[1:4].flatten()) if brick)
    ball = [env.ball_x, env.ball_y, *DIRECTIONS[env.ball_dir], env.last_x, env.last_y]
    return [int(value) for value in [*ball, env.pos, env.strike, bricks, game.last_action]]


def place_breakout(game: Any, physics: list[int]) -> None:
    """Set the original's state from `physics`."""
    env = game.env
    env.ball_x, env.ball_y, dx, dy, env.last_x, env.last_y, env.pos, strike, bricks, game.last_action = physics
    env.ball_dir, env.strike, env.terminal = DIRECTIONS.index((dx, dy)), bool(strike), False
    env.brick_map[1:4] = [[bricks >> 10 * row + column & 1 for column in range(10)] for row in range(3)]


def packed(images: list[np.ndarray]) -> str:
    return base64.b85encode(zlib.compress(np.array(images, np.uint8).tobytes(), 9)).decode()


def unpacked(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8).reshape(-1, *shape)


def minigrid_episode(env_id: str, random: np.random.RandomState, reach_goal: bool) -> dict[str, Any]:
    """At most the last 120 steps of an episode under random actions; with `reach_goal` the first that does."""
    env = minigrid(env_id)
    env.reset(seed=int(random.randint(2**31)))
    while True:
        env.reset()
        steps, done = [], False
        while not done:
            before, action = read_minigrid(env), int(random.choice(7, p=OFTEN))
            image, reward, terminated, truncated, _ = env.step(action)
            steps.append((before, action, image, reward, terminated, truncated))
            done = terminated or truncated
        if terminated or not reach_goal:
            break
    starts, actions, images, rewards, terminations, truncations = zip(*steps[-120:], strict=True)
    text = "".join(map(str, actions))
    ends = {"reward": rewards[-1], "terminated": terminations[-1], "truncated": truncations[-1]}
    return {"env": env_id, "start": starts[0], "actions": text, "images": packed(images), **ends}


def follow(game: Any) -> int:
    """The action that keeps the paddle under the ball: 0 nothing, 1 left, 3 right."""
    offset = np.sign(game.env.ball_x - game.env.pos)
    return {-1: 1, 0: 0, 1: 3}[int(offset)]


def breakout_game(random: np.random.RandomState, noise: float) -> dict[str, Any]:
    """A game whose paddle follows the ball, but for a share of random actions: its first 400 steps, at least 60.

    None is sticky. A repeated action could as well have been chosen.
    """
    from minatar import Environment

    game = Environment("breakout", sticky_action_prob=0.0)
    game.seed(int(random.randint(2**31)))
    actions = ""
    while len(actions) < 60:
        game.reset()
        start, actions, images, rewards, done = read_breakout(game), "", [], "", False
        while not done and len(actions) < 400:
            action = int(random.randint(6)) if random.rand() < noise else follow(game)
            reward, done = game.act(action)
            actions, rewards = actions + str(action), rewards + str(reward)
            images.append(game.state())
    return {"start": start, "actions": actions, "images": packed(images), "rewards": rewards, "terminated": done}


def occlusion(random: np.random.RandomState) -> list[list[int]]:
    """Of 300 random views, what blocks the light and what is seen: bit 7 * i + j is cell [i, j]."""
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Wall

    pairs = []
    for _ in range(300):
        opaque = random.rand(7, 7) < random.uniform(0.05, 0.6)
        grid = Grid(7, 7)
        for i, j in zip(*np.nonzero(opaque), strict=True):
            grid.set(int(i), int(j), Wall())
        pairs.append([sum(1 << int(k) for k in np.flatnonzero(x)) for x in (opaque, grid.process_vis((3, 6)))])
    return pairs


def main() -> None:
    random = np.random.RandomState(0)  # its streams are frozen
    numbers: dict[str, Any] = {"versions": {name: version(name) for name in ("minigrid", "minatar", "numpy")}}
    episodes = [minigrid_episode(f"MiniGrid-{name}-v0", random, goal) for name in MINIGRID for goal in (True, False)]
    numbers["minigrid"], numbers["occlusion"] = episodes, occlusion(random)
    numbers["breakout"] = [breakout_game(random, noise) for noise in (0.0, 0.1, 0.3)]
    target = Path(__file__).resolve().with_name("grid_numbers.json")
    target.write_text(json.dumps(numbers, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
