"""Grid worlds against MiniGrid's: what grid_numbers.json recorded of it, and where it is installed itself.

make_grid_numbers.py wrote the numbers, with their versions.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.envs import make
from rl_lab.envs.gridworld import CLOSED, GRIDWORLDS, LOCKED, OPEN, visible
from rl_lab.vector import TensorEnv, uniform

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "grid_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_grid_numbers", HERE / "make_grid_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # it runs no peer unless called

IDS, ROWS = sorted(GRIDWORLDS), 4


@pytest.fixture
def minigrid() -> ModuleType:
    return pytest.importorskip("minigrid", reason="needs minigrid: pip install minigrid")


def cells(bits: list[int]) -> Tensor:
    """(n, 7, 7) bool of recorded views."""
    return torch.tensor([[bit >> k & 1 for k in range(49)] for bit in bits]).reshape(-1, 7, 7) == 1


def play(env: TensorEnv, start: list[int], actions: list[int]) -> list[tuple[Any, ...]]:
    """The steps of one row from `start`."""
    env.reset()
    env.state |= {"physics": torch.tensor([start], dtype=torch.int32), "episode_lengths": torch.tensor([start[3]])}
    return [tuple(env.step(torch.tensor([action]))) for action in actions]


@pytest.mark.parametrize("episode", NUMBERS["minigrid"], ids=lambda e: f"{e['env']}-{e['terminated']}")
def test_recorded_episodes(episode: dict[str, Any]) -> None:
    actions = list(map(int, episode["actions"]))
    steps = play(make(episode["env"], [0], 1), episode["start"], actions)
    images = peers.unpacked(episode["images"], (7, 7, 3))
    assert len(images) == len(actions)
    np.testing.assert_array_equal(torch.cat([step[0] for step in steps]), images)
    rewards, terminated, truncated = (torch.cat([step[k] for step in steps]).tolist() for k in (1, 2, 3))
    still = len(actions) - 1
    np.testing.assert_allclose(rewards, [0.0] * still + [episode["reward"]], rtol=0, atol=1e-6)
    assert terminated == [False] * still + [episode["terminated"]]
    assert truncated == [False] * still + [episode["truncated"]]


def test_recorded_views() -> None:
    opaque, seen = zip(*NUMBERS["occlusion"], strict=True)
    assert torch.equal(visible(~cells(opaque)), cells(seen))


def test_views(minigrid: ModuleType) -> None:
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Wall

    random = np.random.default_rng(0)
    opaque = random.random((3000, 7, 7)) < random.uniform(0, 0.7, (3000, 1, 1))
    seen = visible(torch.from_numpy(~opaque)).numpy()
    for row, blocked in zip(seen, opaque, strict=True):
        grid = Grid(7, 7)
        grid.grid = [Wall() if blocked[i, j] else None for j in range(7) for i in range(7)]
        np.testing.assert_array_equal(row, grid.process_vis((3, 6)))


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_equal_minigrid(minigrid: ModuleType, env_id: str) -> None:
    """States are handed over where an episode starts, in half of the rows shortly before the time limit."""
    env, originals = make(env_id, [1], ROWS), [peers.minigrid(env_id) for _ in range(ROWS)]
    assert isinstance(env, TensorEnv)
    obs, random, ends = env.reset(), np.random.default_rng(2), set[tuple[bool, bool]]()
    for original in originals:
        original.reset()
    fresh = list(range(ROWS))
    for _ in range(300):
        for row in fresh:
            if row % 2:
                env.state["physics"][row, 3] = env.max_episode_steps - 40
                env.state["episode_lengths"][row] = env.max_episode_steps - 40
            peers.place_minigrid(originals[row], env.state["physics"][row].tolist())
            np.testing.assert_array_equal(obs[row], originals[row].unwrapped.gen_obs()["image"])
        actions = random.choice(7, ROWS, p=peers.OFTEN)
        successor = env.transition(env.state["physics"], torch.tensor(actions), torch.zeros(ROWS, 0))[0]
        next_obs, rewards, terminated, truncated, obs = env.step(torch.tensor(actions))
        for row, original in enumerate(originals):
            image, reward, *end, _ = original.step(actions[row])
            assert successor[row].tolist() == peers.read_minigrid(original)
            np.testing.assert_array_equal(next_obs[row], image)
            np.testing.assert_allclose(rewards[row], reward, rtol=0, atol=1e-6)
            assert [terminated[row].item(), truncated[row].item()] == end
            ends.add((bool(end[0]), bool(end[1])))
        fresh = torch.nonzero(terminated | truncated).flatten().tolist()
        env.state["done"][:] = False  # or the next step would set the lengths to 0, those set above too
        env.state["episode_lengths"][fresh] = 0
    assert (False, True) in ends


def test_any_state_of_a_door_key_world_steps_as_in_minigrid(minigrid: ModuleType) -> None:
    """Random walks seldom carry a key through a door, close it behind them or reach the goal: here many start there."""
    env, original = make("MiniGrid-DoorKey-6x6-v0", [0], 1500), peers.minigrid("MiniGrid-DoorKey-6x6-v0")
    assert isinstance(env, TensorEnv)
    random = np.random.default_rng(0)
    env.reset()
    original.reset()
    for physics in env.state["physics"]:
        wall, y = physics[6:8].tolist()
        lock = int(random.choice([OPEN, CLOSED, LOCKED]))
        free = [(x, y) for x in range(1, 5) for y in range(1, 5) if x != wall and (x, y) != (4, 4)]
        agents = [(*place, direction) for place in free for direction in range(4)]
        agents += [(wall - 1, y, 0), (wall + 1, y, 2), (4, 3, 1), (3, 4, 0) if wall != 3 else (4, 3, 1)] * 10
        agents += [(wall, y, 0), (wall, y, 2)] * 10 if lock == OPEN else []
        agent = agents[random.integers(len(agents))]
        key = agent[:2] if random.random() < 0.5 else free[random.integers(len(free))]
        physics[:] = torch.tensor([*agent, random.integers(360), *key, wall, y, lock])
    actions = torch.from_numpy(random.integers(7, size=1500))
    seen = env.observe(env.state["physics"])
    physics, rewards, terminated = env.transition(env.state["physics"], actions, torch.zeros(1500, 0))
    changed = (physics != env.state["physics"]).sum(0)
    assert (changed[[0, 1, 2, 4, 5, 8]] > 20).all() and terminated.sum() > 10
    for row in range(1500):
        peers.place_minigrid(original, env.state["physics"][row].tolist())
        np.testing.assert_array_equal(seen[row], original.unwrapped.gen_obs()["image"])
        _, reward, end, _, _ = original.step(actions[row].item())
        assert physics[row].tolist() == peers.read_minigrid(original)
        np.testing.assert_allclose(rewards[row], reward, rtol=0, atol=1e-6)
        assert terminated[row].item() == end


@pytest.mark.parametrize("env_id", IDS)
def test_spaces_and_time_limit(minigrid: ModuleType, env_id: str) -> None:
    env, original = make(env_id, [0], 1), peers.minigrid(env_id)
    assert isinstance(env, TensorEnv)
    assert env.observation_space == original.observation_space
    assert env.action_space == original.action_space
    assert env.max_episode_steps == original.unwrapped.max_steps


@pytest.mark.parametrize("env_id", ["MiniGrid-Empty-Random-5x5-v0", "MiniGrid-DoorKey-5x5-v0", "MiniGrid-FourRooms-v0"])
def test_first_states_are_minigrids(minigrid: ModuleType, env_id: str) -> None:
    """Where all states are few, each must come as often; else each part of the state, and agent with goal."""
    env, original, n = make(env_id, [0], 1), peers.minigrid(env_id), 2000
    assert isinstance(env, TensorEnv)
    original.reset(seed=0)
    theirs = torch.tensor([(original.reset(), peers.read_minigrid(original))[1] for _ in range(n)])
    ours = env.initial(uniform(torch.arange(10 * n), env.reset_draws)[0])
    parts = [[0, 1], [2], [0, 4], [1, 5], [6], [7], [8], [9]] if "Four" in env_id else [list(range(theirs.shape[1]))]
    for part in parts:
        states, index = torch.cat([ours[:, part], theirs[:, part]]).unique(dim=0, return_inverse=True)
        ours_counts, counts = (torch.bincount(x, minlength=len(states)).double() for x in index.split([10 * n, n]))
        assert (ours_counts > 0).all()  # theirs are among ours
        pooled = (ours_counts + counts) / (11 * n)
        chi_square = sum(((c - c.sum() * pooled).square() / (c.sum() * pooled)).sum() for c in (ours_counts, counts))
        freedom = len(states) - 1  # mean of the statistic; its variance is twice that
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 1e-6, part
