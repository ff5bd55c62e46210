"""The tensor versions of classic control against Gymnasium's originals."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import continuous_mountain_car
from torch import Tensor

from rl_lab.envs.classic import CLASSIC, wrap
from rl_lab.vector import State, TensorEnv, uniform

ROWS = 6
IDS = sorted(CLASSIC)

# Policies that reach the ends random actions miss: the goal, or the time limit by balancing.
SKILLED: dict[str, Callable[[Tensor], Tensor]] = {
    "Acrobot-v1": lambda physics: 2 * (physics[:, 3] > 0).long(),
    "CartPole-v1": lambda physics: (physics @ physics.new_tensor([0.1, 0.3, 1.0, 0.5]) > 0).long(),
    "MountainCar-v0": lambda physics: 2 * (physics[:, 1] > 0).long(),
    "MountainCarContinuous-v0": lambda physics: torch.sign(physics[:, 1:] + 1e-9),
    "Pendulum-v1": lambda physics: 2 * torch.sign(physics[:, 1:]),
}


@pytest.fixture
def double_mountain_car(monkeypatch: pytest.MonkeyPatch) -> None:
    """The continuous mountain car rounds its state to float32 at each step; here it keeps float64."""
    monkeypatch.setattr(continuous_mountain_car, "np", SimpleNamespace(array=np.array, float32=np.float64))


def start(env: TensorEnv, dtype: torch.dtype) -> tuple[State, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    physics = env.initial(torch.rand(ROWS, env.reset_draws, generator=generator, dtype=dtype))
    zeros = torch.zeros(ROWS, dtype=torch.float64)
    totals = {"episode_returns": zeros, "episode_lengths": zeros.long()}
    return {"stream": torch.arange(ROWS), "physics": physics, "done": zeros.bool(), **totals}, generator


def act(env_id: str, physics: Tensor, generator: torch.Generator) -> Tensor:
    """Three skilled rows, three random ones; Box actions reach beyond the bounds, where the originals clip."""
    space = CLASSIC[env_id].action_space
    if isinstance(space, gym.spaces.Discrete):
        random = torch.randint(int(space.n), (ROWS,), generator=generator)
    else:
        random = 3 * torch.rand(ROWS, 1, generator=generator, dtype=physics.dtype) - 1.5
    return torch.cat([SKILLED[env_id](physics)[:3], random[3:]])


def originals(env_id: str) -> list[gym.Env]:
    envs = [gym.make(env_id, disable_env_checker=True) for _ in range(ROWS)]
    for env in envs:
        env.reset(seed=0)
    return envs


def place(env: gym.Env, physics: Tensor) -> None:
    env.unwrapped.state = physics.double().numpy().copy()


def step_all(peers: list[gym.Env], actions: Tensor) -> list[np.ndarray]:
    """Observations, rewards, terminated, truncated of the originals, one row each."""
    results = [peer.step(action) for peer, action in zip(peers, actions.numpy(), strict=True)]
    return [np.array(column) for column in list(zip(*results, strict=True))[:4]]


@pytest.mark.usefixtures("double_mountain_car")
@pytest.mark.parametrize(
    ("env_id", "hand_over"),
    [
        # Rounding errors grow by e in about a dozen steps of the two unstable systems: they meet again every 25 steps.
        ("Acrobot-v1", 25),
        ("CartPole-v1", 25),
        ("MountainCar-v0", 10**6),
        ("MountainCarContinuous-v0", 10**6),
        ("Pendulum-v1", 10**6),
    ],
)
def test_whole_episodes_equal_gymnasium_in_float64(env_id: str, hand_over: int) -> None:
    """1,100 steps hold every kind of ending; states are handed over where an episode starts, or as said above."""
    env, peers = CLASSIC[env_id]([0], ROWS), originals(env_id)
    state, generator = start(env, torch.float64)
    fresh = set(range(ROWS))
    ends: set[tuple[bool, bool]] = set()
    returns, lengths = np.zeros(ROWS), np.zeros(ROWS, int)
    for t in range(1100):
        for row in range(ROWS) if t % hand_over == 0 else fresh:
            place(peers[row], state["physics"][row])
        actions = act(env_id, state["physics"], generator)
        draws = uniform(state["stream"], env.reset_draws)[0]
        successor = env.transition(state["physics"], actions, draws[:, :0])[0]
        state, step = env.dynamics(state, actions)

        obs, rewards, terminated, truncated = step_all(peers, actions)
        states = np.array([peer.unwrapped.state for peer in peers])
        np.testing.assert_allclose(successor, states, rtol=0, atol=1e-9)
        np.testing.assert_allclose(step.next_obs, obs, rtol=0, atol=2e-6)  # theirs is rounded to float32
        np.testing.assert_allclose(step.rewards, rewards, rtol=0, atol=1e-9)
        assert step.terminated.tolist() == terminated.tolist()
        assert step.truncated.tolist() == truncated.tolist()
        returns, lengths = returns + rewards, lengths + 1
        np.testing.assert_allclose(state["episode_returns"], returns, rtol=0, atol=1e-6)
        assert state["episode_lengths"].tolist() == lengths.tolist()

        done = terminated | truncated
        fresh = set(np.flatnonzero(done))
        for row in fresh:
            ends.add((bool(terminated[row]), bool(truncated[row])))
            peers[row].reset()
        returns[done], lengths[done] = 0.0, 0
        assert torch.equal(step.obs[~done], step.next_obs[~done])
        assert torch.equal(step.obs[done], env.observe(env.initial(draws).double())[done])
        assert (step.obs[done] != step.next_obs[done]).any(1).all()
    assert (False, True) in ends
    assert ((True, False) in ends) == (env_id != "Pendulum-v1")


@pytest.mark.parametrize("env_id", IDS)
def test_each_float32_step_equals_gymnasium(env_id: str) -> None:
    env, peers = CLASSIC[env_id]([0], ROWS), originals(env_id)
    state, generator = start(env, torch.float32)
    for _ in range(200):
        actions = act(env_id, state["physics"], generator)
        for peer, physics in zip(peers, state["physics"], strict=True):
            place(peer, physics)
        state, step = env.dynamics(state, actions)
        obs, rewards, terminated, _ = step_all(peers, actions)
        assert step.next_obs.dtype == step.rewards.dtype == torch.float32
        np.testing.assert_allclose(step.next_obs, obs, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(step.rewards, rewards, rtol=1e-5, atol=1e-5)
        assert step.terminated.tolist() == terminated.tolist()
        for row in torch.nonzero(state["done"]).flatten().tolist():
            peers[row].reset()


@pytest.mark.parametrize(
    ("env_id", "low", "high"),
    [
        ("Acrobot-v1", [-0.1] * 4, [0.1] * 4),
        ("CartPole-v1", [-0.05] * 4, [0.05] * 4),
        ("MountainCar-v0", [-0.6, 0.0], [-0.4, 0.0]),
        ("MountainCarContinuous-v0", [-0.6, 0.0], [-0.4, 0.0]),
        ("Pendulum-v1", [-math.pi, -1.0], [math.pi, 1.0]),
    ],
)
def test_first_states_are_uniform_as_in_gymnasium(env_id: str, low: list[float], high: list[float]) -> None:
    env = CLASSIC[env_id]([3], 4000)
    env.reset()
    ours = env.state["physics"].numpy()
    peer = gym.make(env_id, disable_env_checker=True)
    peer.reset(seed=0)
    theirs = np.array([(peer.reset(), np.array(peer.unwrapped.state))[1] for _ in range(1000)])
    width = np.array(high) - low
    for sample in (ours, theirs):
        assert (sample >= np.array(low) - 1e-6).all() and (sample <= np.array(high) + 1e-6).all()
        # Of n uniform numbers on [0, 1): mean 1/2 with error 0.29 / sqrt(n), variance 1/12; 5 standard errors here.
        np.testing.assert_allclose(sample.mean(0), np.add(low, high) / 2, atol=width.max() * 0.046)
        np.testing.assert_allclose(sample.var(0), width**2 / 12, atol=width.max() ** 2 * 0.012)
    random = ours[:, width > 0]
    correlation = np.atleast_2d(np.corrcoef(random.T)) - np.eye(random.shape[1])
    assert np.abs(correlation).max() < 0.08  # each column has a draw of its own


@pytest.mark.parametrize("env_id", IDS)
def test_spaces_and_time_limit_are_the_registered_ones(env_id: str) -> None:
    env, peer = CLASSIC[env_id]([0], 1), gym.make(env_id)
    assert env.observation_space == peer.observation_space
    assert env.action_space == peer.action_space
    assert env.max_episode_steps == gym.spec(env_id).max_episode_steps


@pytest.mark.parametrize("env_id", IDS)
def test_dynamics_has_one_graph_and_vmaps_over_seeds(env_id: str) -> None:
    """No graph break means no value read by the host; `aot_eager` traces as every backend does, compiling nothing."""
    env = CLASSIC[env_id]([0], ROWS)
    state, generator = start(env, torch.float32)
    actions = act(env_id, state["physics"], generator)
    expected = env.dynamics(state, actions)

    torch.compiler.reset()
    compiled = torch.compile(env.dynamics, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(state, actions), expected, rtol=0, atol=0)

    split = torch.utils._pytree.tree_map(lambda x: x.unflatten(0, (2, 3)), (state, actions))
    joined = torch.utils._pytree.tree_map(lambda x: x.flatten(0, 1), torch.vmap(env.dynamics)(*split))
    torch.testing.assert_close(joined, expected, rtol=0, atol=0)


@pytest.mark.parametrize("env_id", IDS)
def test_dynamics_stays_on_the_device_of_its_input(env_id: str) -> None:
    """On the meta device there are no values: reading one, or mixing in a CPU tensor, raises."""
    env = CLASSIC[env_id]([0], ROWS)
    state, generator = start(env, torch.float32)
    actions = act(env_id, state["physics"], generator).to("meta")
    state = {name: value.to("meta") for name, value in state.items()}
    _, step = env.dynamics(state, actions)
    assert {value.device.type for value in step} == {"meta"}


def test_wrap_leaves_angles_in_range_alone() -> None:
    angles = torch.tensor([0.0, 3.0, -3.0, 1e-7, 3.5, -3.5, 7.0, 100.0])
    expected = torch.tensor([0.0, 3.0, -3.0, 1e-7, -2.7831853, 2.7831853, 0.7168147, -0.5309649])
    torch.testing.assert_close(wrap(angles), expected, rtol=0, atol=1e-5)
    assert torch.equal(wrap(angles[:4]), angles[:4])


def test_a_million_environments_step_together() -> None:
    env = CLASSIC["CartPole-v1"]([0], 10**6)
    env.reset()
    ended = torch.zeros(10**6, dtype=torch.int64)
    for _ in range(12):  # pushed to the right alone, every pole falls within eight to eleven steps
        ended += env.step(torch.ones(10**6, dtype=torch.int64)).terminated
    assert ended.unique().tolist() == [1]
    assert len(env.state["physics"].unique(dim=0)) > 990_000  # no two the same, but for rounding
