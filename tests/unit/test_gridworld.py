"""MiniGrid's rules, worked out by hand; tests/parity compares with MiniGrid itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from rl_lab.compiler import Compiled
from rl_lab.envs import make
from rl_lab.envs.gridworld import CLOSED, DONE, DROP, FORWARD, LEFT, LOCKED, OPEN, PICK_UP, RIGHT, TOGGLE
from rl_lab.networks import is_image
from rl_lab.vector import TensorEnv, uniform

EMPTY, RANDOM, DOOR_KEY, FOUR_ROOMS = TASKS = [
    f"MiniGrid-{name}-v0" for name in ("Empty-5x5", "Empty-Random-5x5", "DoorKey-5x5", "FourRooms")
]
LETTERS = dict(enumerate("?.W DK  G"))  # of the kinds of things, unseen and empty first


def env_of(env_id: str, num_envs: int = 1) -> TensorEnv:
    env = make(env_id, [0], num_envs)
    assert isinstance(env, TensorEnv)
    env.reset()
    return env


def act(env: TensorEnv, physics: list[int], action: int) -> tuple[list[int], float, bool]:
    physics, rewards, terminated = env.transition(
        torch.tensor([physics], dtype=torch.int32), torch.tensor([action]), torch.zeros(1, 0)
    )
    assert (physics.dtype, rewards.dtype) == (torch.int32, torch.float32)
    return physics[0].tolist(), rewards.item(), terminated.item()


def picture(env: TensorEnv, physics: list[int]) -> list[str]:
    """What the agent sees, from far to near, and from its left to its right."""
    image = env.observe(torch.tensor([physics], dtype=torch.int32))[0]
    assert (image.shape, image.dtype) == ((7, 7, 3), torch.uint8)
    return ["".join(LETTERS[kind] for kind in row) for row in image[:, :, 0].T.tolist()]


def test_door_key_from_start_to_goal() -> None:
    r"""x 0 1 2 3 4
    y 1   W A W . W     A: the agent, looking down; K: key; D: locked door; G: goal
    y 2   W . D . W
    y 3   W K W G W
    """
    env = env_of(DOOR_KEY)
    physics = [1, 1, 1, 0, 1, 3, 2, 2, LOCKED]
    assert picture(env, physics) == ["???????", "???????", "???????", "??WWW??", "??WKW??", "??D.W??", "??W.W??"]
    for action, after in [
        (FORWARD, [1, 2, 1, 1, 1, 3, 2, 2, LOCKED]),
        (FORWARD, [1, 2, 1, 2, 1, 3, 2, 2, LOCKED]),  # the key is in the way
        (PICK_UP, [1, 2, 1, 3, 1, 2, 2, 2, LOCKED]),  # and is now where the agent is
        (LEFT, [1, 2, 0, 4, 1, 2, 2, 2, LOCKED]),
        (FORWARD, [1, 2, 0, 5, 1, 2, 2, 2, LOCKED]),
        (TOGGLE, [1, 2, 0, 6, 1, 2, 2, 2, OPEN]),
        (FORWARD, [2, 2, 0, 7, 2, 2, 2, 2, OPEN]),
        (FORWARD, [3, 2, 0, 8, 3, 2, 2, 2, OPEN]),
        (RIGHT, [3, 2, 1, 9, 3, 2, 2, 2, OPEN]),
    ]:
        physics, reward, terminated = act(env, physics, action)
        assert (physics, reward, terminated) == (after, 0.0, False)
        if action == TOGGLE:
            assert picture(env, physics)[3:] == ["?WWWWW?", "?W..GW?", "?WWDWW?", "?W.K.W?"]
    physics, reward, terminated = act(env, physics, FORWARD)
    assert (physics, terminated) == ([3, 3, 1, 10, 3, 3, 2, 2, OPEN], True)
    assert reward == pytest.approx(0.964, abs=1e-7)  # 1 - 0.9 * 10 / 250


@pytest.mark.parametrize(
    ("before", "action", "after"),
    [
        ([1, 2, 0, 0, 1, 3, 2, 2, LOCKED], TOGGLE, [1, 2, 0, 1, 1, 3, 2, 2, LOCKED]),  # without the key
        ([1, 2, 0, 0, 1, 3, 2, 2, CLOSED], TOGGLE, [1, 2, 0, 1, 1, 3, 2, 2, OPEN]),  # needs none
        ([1, 2, 0, 0, 1, 2, 2, 2, OPEN], TOGGLE, [1, 2, 0, 1, 1, 2, 2, 2, CLOSED]),  # never locked again
        ([1, 2, 2, 0, 1, 2, 2, 2, LOCKED], TOGGLE, [1, 2, 2, 1, 1, 2, 2, 2, LOCKED]),  # the door is behind
        ([1, 2, 0, 0, 1, 3, 2, 2, CLOSED], FORWARD, [1, 2, 0, 1, 1, 3, 2, 2, CLOSED]),
        ([1, 2, 0, 0, 1, 2, 2, 2, OPEN], DROP, [1, 2, 0, 1, 1, 2, 2, 2, OPEN]),  # an open door is no place for it
        ([1, 2, 2, 0, 1, 2, 2, 2, OPEN], DROP, [1, 2, 2, 1, 1, 2, 2, 2, OPEN]),  # nor is a wall
        ([1, 2, 3, 0, 1, 2, 2, 2, OPEN], DROP, [1, 2, 3, 1, 1, 1, 2, 2, OPEN]),
        ([1, 2, 3, 0, 1, 3, 2, 2, OPEN], DROP, [1, 2, 3, 1, 1, 3, 2, 2, OPEN]),  # nothing to drop
        ([1, 2, 3, 0, 1, 3, 2, 2, OPEN], PICK_UP, [1, 2, 3, 1, 1, 3, 2, 2, OPEN]),  # the key is behind
        ([1, 1, 3, 0, 1, 3, 2, 2, OPEN], RIGHT, [1, 1, 0, 1, 1, 3, 2, 2, OPEN]),
        ([1, 1, 0, 0, 1, 3, 2, 2, OPEN], LEFT, [1, 1, 3, 1, 1, 3, 2, 2, OPEN]),
        ([1, 1, 3, 0, 1, 3, 2, 2, OPEN], FORWARD, [1, 1, 3, 1, 1, 3, 2, 2, OPEN]),  # a wall
        ([1, 1, 1, 0, 1, 1, 2, 2, OPEN], DONE, [1, 1, 1, 1, 1, 1, 2, 2, OPEN]),
    ],
)
def test_single_steps(before: list[int], action: int, after: list[int]) -> None:
    assert act(env_of(DOOR_KEY), before, action) == (after, 0.0, False)


def test_walls_hide_nothing_in_an_empty_room_and_stand_between_four() -> None:
    W = "WWWWWWW"
    assert picture(env_of(EMPTY), [3, 1, 3, 0]) == [W, W, W, W, W, W, "W...WWW"]
    assert picture(env_of(EMPTY), [1, 1, 0, 0]) == [W, W, W, W, "WWW..GW", "WWW...W", "WWW...W"]
    # Four rooms, from the upper left through its lower gap at x = 4: behind it light spreads sideways again.
    dark = picture(env_of(FOUR_ROOMS), [4, 7, 1, 0, 5, 12, 2, 4, 15, 15])
    assert dark == [".......", "..G....", ".......", ".......", "WWW.WWW", ".......", "......."]
    # And beside the wall at x = 9, looking along it, its gap three cells ahead or behind.
    ahead, behind = (picture(env_of(FOUR_ROOMS), [8, 5, 3, 0, 15, 15, gap, 4, 15, 15]) for gap in (2, 8))
    assert ahead == ["???????", "WWWWWWW", "....W..", ".......", "....W??", "....W??", "....W??"]
    assert behind == ["???????", "WWWWW??", "....W??", "....W??", "....W??", "....W??", "....W??"]


def test_an_episode_ends_at_the_time_limit_and_a_new_one_begins() -> None:
    env = make(EMPTY, [0], 2)
    start = env.reset()
    for t in range(1, 102):
        turn = torch.tensor([LEFT, DONE])
        next_obs, rewards, terminated, truncated, obs = env.step(turn)
        assert truncated.tolist() == [t == 100] * 2  # 4 * 5 * 5
        assert not terminated.any() and not rewards.any()
        assert env.episode_lengths.tolist() == [(t - 1) % 100 + 1] * 2
        assert torch.equal(obs[1], start[1])
        # 100 turns are 25 times round: the first row sees the start every fourth step, and where it starts anew.
        assert torch.equal(next_obs[0], start[0]) == (t % 4 == 0)
        assert torch.equal(obs[0], start[0]) == (t % 4 == 0)


def chi_square_holds(counts: Tensor, shares: list[float] | Tensor) -> bool:
    """Within 5 standard deviations of the statistic's mean, its degrees of freedom."""
    expected = torch.as_tensor(shares, dtype=torch.float64) * counts.sum()
    freedom = len(counts) - 1
    return bool(((counts - expected).square() / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5)


def first_states(env_id: str, number: int) -> Tensor:
    env = make(env_id, [0], 1)
    assert isinstance(env, TensorEnv)
    return env.initial(uniform(torch.arange(number), env.reset_draws)[0])


def test_first_states() -> None:
    """Chances by the generators: wall, agent, door and key one after the other, each among what is free."""
    assert first_states(EMPTY, 3).tolist() == [[1, 1, 0, 0]] * 3
    n = 40_000
    states, counts = first_states(RANDOM, n).unique(dim=0, return_counts=True)
    assert len(states) == 8 * 4 and chi_square_holds(counts, [1 / 32] * 32)

    states, counts = first_states(DOOR_KEY, n).unique(dim=0, return_counts=True)
    assert len(states) == 3 * 4 * 2 * 2 and chi_square_holds(counts, [1 / 48] * 48)
    assert states[:, 6].unique().tolist() == [2] and states[:, 8].unique().tolist() == [LOCKED]

    states, counts = first_states("MiniGrid-DoorKey-6x6-v0", n).unique(dim=0, return_counts=True)
    narrow = states[:, 6] == 2  # wall at 2 or 3, 4 or 8 cells before it; 4 directions, 3 doors
    assert (narrow.sum(), (~narrow).sum()) == (4 * 3 * 12, 8 * 7 * 12)
    assert chi_square_holds(counts, torch.where(narrow, 1 / 2 / (4 * 3 * 12), 1 / 2 / (8 * 7 * 12)))
    assert (states[:, 4] < states[:, 6]).all() and (states[:, :2] != states[:, 4:6]).any(1).all()

    rooms = first_states(FOUR_ROOMS, n)
    agent, goal = rooms[:, :2], rooms[:, 4:6]
    assert (agent != goal).any(1).all()
    for place in (agent, goal):
        assert torch.equal(env_of(FOUR_ROOMS).cell(rooms, *place.T) == 2 | 5 << 4, torch.zeros(n, dtype=torch.bool))
        in_gap = (place == 9).any(1).sum().item()
        assert in_gap == pytest.approx(n * 4 / 260, abs=5 * (n * 4 / 260) ** 0.5)
        inside = place[(place != 9).all(1)].unique(dim=0, return_counts=True)[1]
        assert len(inside) == 256 and chi_square_holds(inside, [1 / 256] * 256)
    for gap, low in zip(range(6, 10), (1, 1, 10, 10), strict=True):
        values, counts = rooms[:, gap].unique(return_counts=True)
        assert values.tolist() == list(range(low, low + 8)) and chi_square_holds(counts, [1 / 8] * 8)


@pytest.mark.parametrize("env_id", TASKS)
def test_one_graph_holds_for_all_states(env_id: str) -> None:
    """Traced at the start, it is right everywhere later; it also vmaps, and no value is read by the host (meta)."""
    env, generator = env_of(env_id, 6), torch.Generator().manual_seed(0)
    graph = make_fx(lambda state, actions: env.dynamics(state, actions))(env.state, torch.zeros(6, dtype=torch.int64))
    split = lambda tree: tree_map(lambda x: x.unflatten(0, (2, 3)), tree)  # noqa: E731
    for _ in range(60):
        actions = torch.randint(7, (6,), generator=generator)
        expected = env.dynamics(env.state, actions)
        torch.testing.assert_close(graph(env.state, actions), expected, rtol=0, atol=0)
        env.state = expected[0]
    batched = torch.vmap(env.dynamics)(split(env.state), split(actions))
    torch.testing.assert_close(batched, split(env.dynamics(env.state, actions)), rtol=0, atol=0)
    _, step = env.dynamics(tree_map(lambda x: x.to("meta"), env.state), actions.to("meta"))
    assert {value.device.type for value in step} == {"meta"}


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones() -> None:
    env, generator = env_of(DOOR_KEY, 64), torch.Generator().manual_seed(0)
    compiled = Compiled(lambda *x: tree_leaves(env.dynamics(*x)), ("test_gridworld", env.key))
    for _ in range(300):  # more than an episode
        actions = torch.randint(7, (64,), generator=generator)
        expected = env.dynamics(env.state, actions)
        torch.testing.assert_close(compiled(env.state, actions), tree_leaves(expected), rtol=0, atol=1e-6)
        env.state = expected[0]


def test_ids_and_networks() -> None:
    assert not is_image(env_of(EMPTY).observation_space)  # 7x7 is for networks of vectors
    with pytest.raises(ValueError, match=r"env_id='MiniGrid-DoorKey-7x7-v0' is unknown: .*MiniGrid-DoorKey-.x.-v0"):
        make("MiniGrid-DoorKey-7x7-v0", [0], 1)
    assert env_of(DOOR_KEY).key != env_of("MiniGrid-DoorKey-6x6-v0").key  # each has compiled code of its own
