"""Breakout against MinAtar's: what grid_numbers.json recorded of it, and where it is installed itself.

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

from rl_lab.envs.minatar import MINATAR

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "grid_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_grid_numbers", HERE / "make_grid_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # it runs no peer unless called

NEVER = torch.ones(1, 1)  # a draw with which no action sticks


@pytest.fixture
def minatar() -> ModuleType:
    return pytest.importorskip("minatar", reason="needs minatar: pip install minatar")


@pytest.mark.parametrize("game", NUMBERS["breakout"], ids=lambda game: f"{len(game['actions'])}")
def test_recorded_games(game: dict[str, Any]) -> None:
    env = MINATAR["MinAtar/Breakout-v0"]([0], 1)
    images = peers.unpacked(game["images"], (10, 10, 4))
    physics = torch.tensor([game["start"]], dtype=torch.int32)
    assert len(images) == len(game["actions"])
    for t, action in enumerate(game["actions"]):
        physics, rewards, terminated = env.transition(physics, torch.tensor([int(action)]), NEVER)
        np.testing.assert_array_equal(env.observe(physics)[0], images[t])
        assert rewards.tolist() == [float(game["rewards"][t])]
        assert terminated.tolist() == [game["terminated"] and t == len(images) - 1]


@pytest.mark.parametrize(("env_id", "letters"), [("MinAtar/Breakout-v0", "nlurdf"), ("MinAtar/Breakout-v1", "nlr")])
def test_games_equal_minatar(minatar: ModuleType, env_id: str, letters: str) -> None:
    """Good players, whose bricks come back, and bad ones; actions stick at the same steps."""
    env, random, rows, refilled = MINATAR[env_id]([0], 6), np.random.default_rng(0), 6, False
    games = [minatar.Environment("breakout") for _ in range(rows)]
    sixes = ["nlurdf".index(letter) for letter in letters]  # the number that each action has among the six
    env.reset()
    for row, game in enumerate(games):
        peers.place_breakout(game, env.state["physics"][row].tolist())
    for _ in range(900):
        follows = [sixes.index(peers.follow(game)) for game in games]
        noise = random.random(rows) < np.array([0.0, 0.0, 0.02, 0.05, 0.3, 1.0])
        actions = np.where(noise, random.integers(len(letters), size=rows), follows)
        draws = np.where(random.random(rows) < [0.0, 0.0, 0.05, 0.1, 0.2, 0.3], 0.0, 0.5).astype(np.float32)
        before = env.state["physics"][:, 8]
        successor, rewards, terminated = env.transition(
            env.state["physics"], torch.tensor(actions), torch.tensor(draws).unsqueeze(1)
        )
        seen = env.observe(successor)
        refilled |= (successor[:, 8] > before).any().item()
        for row, game in enumerate(games):
            game.random = type("Draw", (), {"rand": lambda self, draw=draws[row]: draw})()
            reward, end = game.act(sixes[actions[row]])
            state = peers.read_breakout(game)
            assert successor[row].tolist() == [*state[:9], sixes.index(state[9])]
            np.testing.assert_array_equal(seen[row], game.state())
            assert (rewards[row].item(), terminated[row].item()) == (reward, end)
        env.state["physics"] = torch.where(terminated[:, None], env.initial(torch.rand(rows, 1)), successor)
        for row in torch.nonzero(terminated).flatten().tolist():  # ours starts without an action before
            peers.place_breakout(games[row], env.state["physics"][row].tolist())
    assert refilled


def test_any_state_steps_as_in_minatar(minatar: ModuleType) -> None:
    """The ball anywhere among half of the bricks, and near the paddle; every second action sticks."""
    n, random, game = 2000, np.random.default_rng(0), minatar.Environment("breakout")
    x, y, near, paddle = random.integers(10, size=n), random.integers(9, size=n), *random.integers(10, size=(2, n))
    paddle = np.where(near < 5, paddle, (x + near - 7).clip(0, 9))
    dx, dy = 2 * random.integers(2, size=(2, n)) - 1
    strike, before = random.integers(2, size=n), random.integers(6, size=n)
    bricks = np.where(random.random(n) < 0.8, random.integers(2**30, size=n), 0)
    states = np.stack([x, y, dx, dy, x, y, paddle, strike, bricks, before], 1)
    actions, draws = random.integers(6, size=n), np.arange(n) % 2
    env = MINATAR["MinAtar/Breakout-v0"]([0], 1)
    physics, rewards, terminated = env.transition(
        torch.tensor(states, dtype=torch.int32), torch.tensor(actions), torch.tensor(draws).unsqueeze(1)
    )
    seen = env.observe(physics)
    assert min(rewards.sum(), terminated.sum()) > 20
    for row in range(n):
        peers.place_breakout(game, states[row].tolist())
        game.random = type("Draw", (), {"rand": lambda self, draw=draws[row]: draw})()
        assert (rewards[row].item(), terminated[row].item()) == game.act(actions[row])
        assert physics[row].tolist() == peers.read_breakout(game)
        np.testing.assert_array_equal(seen[row], game.state())


def test_spaces_and_first_states(minatar: ModuleType) -> None:
    from minatar.gym import BaseEnv

    for env_id, minimal in (("MinAtar/Breakout-v0", False), ("MinAtar/Breakout-v1", True)):
        env, original = MINATAR[env_id]([0], 1), BaseEnv("breakout", use_minimal_action_set=minimal)
        assert env.action_space == original.action_space
        assert env.observation_space == original.observation_space
        starts = set()
        for seed in range(20):
            obs, _ = original.reset(seed=seed)
            starts.add((*peers.read_breakout(original.game)[:9], 0))
            assert obs.shape == env.observation_space.shape
        ours = env.initial(torch.linspace(0, 0.99, 20).unsqueeze(1))
        assert set(map(tuple, ours.tolist())) == starts
        assert len(starts) == 2
