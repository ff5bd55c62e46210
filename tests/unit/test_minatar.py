"""Breakout's rules, worked out by hand; tests/parity compares with MinAtar itself."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from rl_lab.compiler import Compiled
from rl_lab.envs import make
from rl_lab.envs.minatar import BRICKS, Breakout
from rl_lab.networks import is_image

NOTHING, LEFT, RIGHT = range(3)  # MinAtar/Breakout-v1
BRICK_2_3 = 1 << 13  # at x = 3 in the second row, which is y = 2


def env_of(num_envs: int = 1, version: int = 1, seed: int = 0) -> Breakout:
    env = make(f"MinAtar/Breakout-v{version}", [seed], num_envs)
    assert isinstance(env, Breakout)
    env.reset()
    return env


def act(physics: list[int], action: int, draw: float = 0.5) -> tuple[list[int], float, bool]:
    state, rewards, terminated = env_of().transition(
        torch.tensor([physics], dtype=torch.int32), torch.tensor([action]), torch.tensor([[draw]])
    )
    assert (state.dtype, rewards.dtype) == (torch.int32, torch.float32)
    return state[0].tolist(), rewards.item(), terminated.item()


@pytest.mark.parametrize(
    ("before", "action", "after", "reward", "terminated"),
    [  # x, y, dx, dy, last x, last y, paddle, struck, bricks, action before
        # In free flight, the paddle between its bounds.
        ([4, 5, 1, 1, 3, 4, 4, 0, 1, 0], RIGHT, [5, 6, 1, 1, 4, 5, 5, 0, 1, RIGHT], 0.0, False),
        ([4, 5, 1, -1, 3, 6, 9, 0, 1, 0], RIGHT, [5, 4, 1, -1, 4, 5, 9, 0, 1, RIGHT], 0.0, False),
        ([4, 5, -1, 1, 5, 4, 0, 0, 1, 0], LEFT, [3, 6, -1, 1, 4, 5, 0, 0, 1, LEFT], 0.0, False),
        # At a side and at the top: it turns, the side's step sideways is lost.
        ([0, 5, -1, 1, 1, 4, 4, 0, 1, 0], NOTHING, [0, 6, 1, 1, 0, 5, 4, 0, 1, 0], 0.0, False),
        ([9, 5, 1, -1, 8, 6, 4, 0, 1, 0], NOTHING, [9, 4, -1, -1, 9, 5, 4, 0, 1, 0], 0.0, False),
        ([5, 0, 1, -1, 4, 1, 4, 0, 1, 0], NOTHING, [6, 0, 1, 1, 5, 0, 4, 0, 1, 0], 0.0, False),
        # A brick breaks, and the ball turns before it; one that follows at once is passed through.
        ([2, 3, 1, -1, 1, 4, 4, 0, BRICKS, 0], 0, [3, 3, 1, 1, 2, 3, 4, 1, BRICKS - BRICK_2_3, 0], 1.0, False),
        ([2, 3, 1, -1, 1, 4, 4, 1, BRICKS, 0], 0, [3, 2, 1, -1, 2, 3, 4, 1, BRICKS, 0], 0.0, False),
        ([4, 5, 1, 1, 3, 4, 4, 1, 1, 0], NOTHING, [5, 6, 1, 1, 4, 5, 4, 0, 1, 0], 0.0, False),
        # The paddle below the ball sends it on, the paddle where it would land sends it back, else it is lost.
        ([4, 8, 1, 1, 3, 7, 3, 0, 1, 0], RIGHT, [5, 8, 1, -1, 4, 8, 4, 0, 1, RIGHT], 0.0, False),
        ([4, 8, 1, 1, 3, 7, 5, 0, 1, 0], NOTHING, [5, 8, -1, -1, 4, 8, 5, 0, 1, 0], 0.0, False),
        ([4, 8, 1, 1, 3, 7, 6, 0, 1, 0], NOTHING, [5, 9, 1, 1, 4, 8, 6, 0, 1, 0], 0.0, True),
        # Bricks come back when the ball is at the bottom and none is left.
        ([4, 8, 1, 1, 3, 7, 4, 0, 0, 0], NOTHING, [5, 8, 1, -1, 4, 8, 4, 0, BRICKS, 0], 0.0, False),
        ([4, 7, 1, 1, 3, 6, 4, 0, 0, 0], NOTHING, [5, 8, 1, 1, 4, 7, 4, 0, 0, 0], 0.0, False),
    ],
)
def test_single_steps(before: list[int], action: int, after: list[int], reward: float, terminated: bool) -> None:
    assert act(before, action) == (after, reward, terminated)


def test_an_action_sticks_with_a_tenth_of_the_draws() -> None:
    before = [4, 5, 1, 1, 3, 4, 4, 0, 1, LEFT]
    assert act(before, RIGHT, draw=0.0999)[0][6] == 3
    assert act(before, RIGHT, draw=0.1)[0][6] == 5
    rows, env = 40_000, env_of(40_000)
    env.state["physics"][:, 9] = LEFT
    env.step(torch.full((rows,), RIGHT))
    stuck = (env.state["physics"][:, 6] == 3).sum().item()
    assert stuck == pytest.approx(0.1 * rows, abs=5 * (0.09 * rows) ** 0.5)


def test_three_of_six_actions_do_nothing() -> None:
    env = env_of(6, version=0)
    assert (env.action_space.n, env_of().action_space.n) == (6, 3)
    env.transition(env.state["physics"], torch.arange(6), torch.ones(6, 1))
    assert env.transition(env.state["physics"], torch.arange(6), torch.ones(6, 1))[0][:, 6].tolist() == [
        4, 3, 4, 5, 4, 4,
    ]  # fmt: skip


def test_what_is_seen() -> None:
    obs = env_of().observe(torch.tensor([[5, 6, 1, 1, 4, 5, 7, 0, BRICKS - BRICK_2_3 - 1, 0]], dtype=torch.int32))[0]
    assert (obs.shape, obs.dtype) == ((10, 10, 4), torch.bool)
    assert [torch.nonzero(obs[:, :, layer]).tolist() for layer in range(3)] == [[[9, 7]], [[6, 5]], [[5, 4]]]
    bricks = obs[:, :, 3]
    assert bricks.sum(1).tolist() == [0, 9, 9, 10, 0, 0, 0, 0, 0, 0]
    assert not bricks[1, 0] and not bricks[2, 3]
    assert not is_image(env_of().observation_space)


def test_games_begin_on_either_side() -> None:
    left, right = [0, 3, 1, 1, 0, 3, 4, 0, BRICKS, 0], [9, 3, -1, 1, 9, 3, 4, 0, BRICKS, 0]
    states = env_of(4000).state["physics"].tolist()
    assert states.count(left) + states.count(right) == 4000
    assert states.count(left) == pytest.approx(2000, abs=5 * 1000**0.5)


def test_a_lost_ball_ends_the_game_and_a_new_one_begins() -> None:
    """Six steps from y = 3 to the bottom at y = 9, the ball at x = 6 or 3 then, the paddle at 0."""
    env = env_of(2)
    for t in range(1, 14):
        next_obs, rewards, terminated, truncated, obs = env.step(torch.tensor([LEFT, LEFT]))
        assert terminated.tolist() == [t in (6, 12)] * 2
        assert not truncated.any() and not rewards.any()
        assert env.episode_lengths.tolist() == [(t - 1) % 6 + 1] * 2
        if t in (6, 12):
            assert next_obs[:, 9, :, 1].any(1).all() and obs[:, 3, :, 1].any(1).all()
            assert env.state["physics"][:, 1].tolist() == [3, 3]


def test_one_graph_holds_for_all_states() -> None:
    """Traced at the start it is right everywhere; it vmaps; no value is read by the host (meta)."""
    env, generator = env_of(6), torch.Generator().manual_seed(0)
    graph = make_fx(lambda state, actions: env.dynamics(state, actions))(env.state, torch.zeros(6, dtype=torch.int64))
    split = lambda tree: tree_map(lambda x: x.unflatten(0, (2, 3)), tree)  # noqa: E731
    returns = 0.0
    for _ in range(200):
        x, paddle = env.state["physics"][:, 0], env.state["physics"][:, 6]
        actions = torch.where(x > paddle, RIGHT, torch.where(x < paddle, LEFT, NOTHING))
        actions[3:] = torch.randint(3, (3,), generator=generator)
        expected = env.dynamics(env.state, actions)
        torch.testing.assert_close(graph(env.state, actions), expected, rtol=0, atol=0)
        env.state, returns = expected[0], returns + expected[1].rewards
    assert (returns[:3] > 5).all()
    batched = torch.vmap(env.dynamics)(split(env.state), split(actions))
    torch.testing.assert_close(batched, split(env.dynamics(env.state, actions)), rtol=0, atol=0)
    _, step = env.dynamics(tree_map(lambda x: x.to("meta"), env.state), actions.to("meta"))
    assert {value.device.type for value in step} == {"meta"}


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones() -> None:
    env, generator = env_of(64), torch.Generator().manual_seed(0)
    compiled = Compiled(lambda *x: tree_leaves(env.dynamics(*x)), ("test_minatar", env.key))
    for _ in range(100):
        actions = torch.randint(3, (64,), generator=generator)
        expected = env.dynamics(env.state, actions)
        torch.testing.assert_close(compiled(env.state, actions), tree_leaves(expected), rtol=0, atol=0)
        env.state = expected[0]
