"""The environment contract, checked on every implementation; the counting environment makes each ending known."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor

from rl_lab.envs import make
from rl_lab.envs.adapter import GymnasiumEnv
from rl_lab.vector import Step, TensorEnv, VectorEnv, uniform

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning")  # Gymnasium on -v4 ids

MakeEnv = Callable[[Sequence[int], int], VectorEnv]
LIMIT = 3  # time limit of the counting environment

# Its observation is (token, planned, t): a random number drawn at each reset, the step of termination planned for this
# episode, 1 to 4, and the steps taken. So an observation tells how its episode ends: planned 1 or 2 terminates, 3
# terminates and truncates in the same step, 4 is truncated at 3. The reward is 10 t + action.
COUNT_SPACE = gym.spaces.Box(0.0, 100.0, (3,), np.float64)


class Counting(gym.Env[np.ndarray, np.int64]):
    observation_space = COUNT_SPACE
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = np.array([self.np_random.random(), self.np_random.integers(1, 5), 0.0])
        return self.state.copy(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.state[2] += 1
        _, planned, t = self.state
        return self.state.copy(), 10 * t + action, bool(t == planned), False, {}


class Reusing(Counting):
    """Returns one array always, into which a reset writes."""

    def reset(self, **given: Any) -> tuple[np.ndarray, dict]:
        state = getattr(self, "state", None)
        new, info = super().reset(**given)
        if state is not None:
            state[:] = new
            self.state = state
        return self.state, info

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict]:
        return (self.state, *super().step(action)[1:])


class TensorCounting(TensorEnv):
    observation_space, action_space = COUNT_SPACE, Counting.action_space
    max_episode_steps, reset_draws = LIMIT, 2

    def initial(self, draws: Tensor) -> Tensor:
        token, planned = draws.unbind(-1)
        return torch.stack([token, 1 + (4 * planned).floor(), torch.zeros_like(token)], -1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = physics + torch.tensor([0.0, 0.0, 1.0])
        return physics, 10 * physics[:, 2] + actions, physics[:, 2] == physics[:, 1]

    def observe(self, physics: Tensor) -> Tensor:
        return physics


def counting_vector(mode: AutoresetMode, copy: bool) -> MakeEnv:
    def make_env(seeds: Sequence[int], num_envs: int) -> VectorEnv:
        one = lambda: gym.wrappers.TimeLimit(Counting(), LIMIT)  # noqa: E731
        envs = SyncVectorEnv([one] * (len(seeds) * num_envs), copy=copy, autoreset_mode=mode)
        return GymnasiumEnv(envs, seeds, num_envs)

    return make_env


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    gym.register("Counting-v0", Counting, max_episode_steps=LIMIT)
    gym.register("Reusing-v0", Reusing, max_episode_steps=LIMIT)
    yield
    del gym.registry["Counting-v0"], gym.registry["Reusing-v0"]


def by_id(env_id: str, backend: str = "auto") -> MakeEnv:
    return lambda seeds, num_envs: make(env_id, seeds, num_envs, backend=backend)


COUNTERS: dict[str, MakeEnv] = {
    "from an id": by_id("Counting-v0"),
    "from an id of one array": by_id("Reusing-v0"),
    "SAME_STEP": counting_vector(AutoresetMode.SAME_STEP, copy=True),
    "SAME_STEP without copies": counting_vector(AutoresetMode.SAME_STEP, copy=False),
    "DISABLED": counting_vector(AutoresetMode.DISABLED, copy=True),
    "DISABLED without copies": counting_vector(AutoresetMode.DISABLED, copy=False),
    "TensorEnv": lambda seeds, num_envs: TensorCounting(seeds, num_envs),
}
OTHERS: dict[str, MakeEnv] = {
    **{i: by_id(i) for i in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")},
    "CartPole-v1 of Gymnasium": by_id("CartPole-v1", "gymnasium"),
    "Pendulum-v1 of Gymnasium": by_id("Pendulum-v1", "gymnasium"),
    "HalfCheetah-v4": by_id("HalfCheetah-v4"),
    "HalfCheetah-v4 of Gymnasium": by_id("HalfCheetah-v4", "gymnasium"),
    "Hopper-v5": by_id("Hopper-v5"),
}


def sample(env: VectorEnv, generator: torch.Generator) -> Tensor:
    """Random actions of one seed's rows."""
    if isinstance(env.action_space, gym.spaces.Discrete):
        return torch.randint(int(env.action_space.n), (env.num_envs,), generator=generator)
    low, high = torch.as_tensor(env.action_space.low), torch.as_tensor(env.action_space.high)
    return low + (high - low) * torch.rand(env.num_envs, *low.shape, generator=generator)


def walk(env: VectorEnv, generators: dict[int, torch.Generator], num_steps: int) -> Iterator[tuple[Tensor, Step]]:
    for _ in range(num_steps):
        actions = torch.cat([sample(env, generators[seed]) for seed in env.seeds])
        yield actions, env.step(actions)


def action_generators(env: VectorEnv) -> dict[int, torch.Generator]:
    return {seed: torch.Generator().manual_seed(100 + seed) for seed in env.seeds}


def check_contract(make_env: MakeEnv, num_steps: int = 120) -> int:
    """Check what the contract promises of every environment; returns the number of episodes that ended."""
    env = make_env([7, 8, 9], 2)
    obs = env.reset()
    space = env.observation_space
    assert obs.shape == (6, *space.shape)
    assert (env.episode_returns.tolist(), env.episode_lengths.tolist()) == ([0.0] * 6, [0] * 6)
    alone = make_env([8], 2)
    assert torch.equal(alone.reset(), obs[2:4])
    assert not torch.equal(obs[:2], obs[2:4])  # another seed starts elsewhere
    assert not torch.equal(obs[0], obs[1])  # and so does another row

    ended, returns, lengths = 0, [0.0] * 6, [0] * 6
    history = [(obs, obs.clone())]
    lone_steps = walk(alone, action_generators(alone), num_steps)
    for (_, step), (_, lone) in zip(walk(env, action_generators(env), num_steps), lone_steps, strict=True):
        assert step.next_obs.shape == step.obs.shape == (6, *space.shape)
        assert step.next_obs.dtype == step.obs.dtype == obs.dtype
        assert step.rewards.dtype in (torch.float32, torch.float64)
        assert step.terminated.dtype == step.truncated.dtype == torch.bool
        assert {x.shape[0] for x in step} == {6}
        history += [(x, x.clone()) for x in (*step, env.episode_returns, env.episode_lengths)]
        for name in Step._fields:
            assert torch.equal(getattr(lone, name), getattr(step, name)[2:4]), f"{name} depends on the other seeds"
        for row in range(6):
            returns[row] += step.rewards[row].item()
            lengths[row] += 1
            assert env.episode_returns[row].item() == pytest.approx(returns[row], rel=1e-12)
            assert env.episode_lengths[row].item() == lengths[row]
            done = bool(step.terminated[row] | step.truncated[row])
            assert torch.equal(step.obs[row], step.next_obs[row]) != done
            if done:
                ended, returns[row], lengths[row] = ended + 1, 0.0, 0
    assert all(torch.equal(x, copy) for x, copy in history)  # what was returned is never overwritten
    assert env.episode_returns.dtype == torch.float64
    assert env.episode_lengths.dtype == torch.int64
    for old in (env, alone):
        old.close()
    return ended


def totals(env: VectorEnv) -> tuple[Tensor, Tensor]:
    return env.episode_returns, env.episode_lengths


def leaves(state: dict[str, Any]) -> Iterator[Any]:
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def check_resume(make_env: MakeEnv, num_steps: int) -> None:
    """Saved after `num_steps`, a fresh environment continues bit for bit, twice from the same state."""
    env = make_env([7, 8], 2)
    env.reset()
    generators = action_generators(env)
    list(walk(env, generators, num_steps))
    state = env.state_dict()
    assert all(isinstance(leaf, Tensor) or json.loads(json.dumps(leaf)) == leaf for leaf in leaves(state))
    frozen = {seed: generator.get_state() for seed, generator in generators.items()}
    expected = [(*step, *totals(env)) for _, step in walk(env, generators, 60)]
    for _ in range(2):
        other = make_env([7, 8], 2)
        other.load_state_dict(state)
        for seed, generator in generators.items():
            generator.set_state(frozen[seed])
        for (_, step), want in zip(walk(other, generators, 60), expected, strict=True):
            for x, y in zip((*step, *totals(other)), want, strict=True):
                assert torch.equal(x, y)
        other.close()
    env.close()


@pytest.mark.parametrize("name", COUNTERS)
def test_counting_environment_tells_every_ending(name: str) -> None:
    """Each step is checked against the observation acted on, which says what must happen next."""
    env = COUNTERS[name]([3, 4], 4)
    obs = env.reset().clone()
    assert (obs[:, 2] == 0).all()
    endings: set[tuple[int, bool, bool]] = set()
    for actions, step in walk(env, action_generators(env), 60):
        for row in range(8):
            token, planned, t = obs[row].tolist()
            assert step.next_obs[row].tolist() == [token, planned, t + 1]
            assert step.rewards[row].item() == 10 * (t + 1) + actions[row].item()
            terminated, truncated = bool(step.terminated[row]), bool(step.truncated[row])
            assert (terminated, truncated) == (t + 1 == planned, t + 1 == 3)
            assert env.episode_lengths[row].item() == t + 1
            if terminated or truncated:
                endings.add((int(t + 1), terminated, truncated))
                assert step.obs[row, 0].item() != token
                assert step.obs[row, 2].item() == 0
            else:
                assert torch.equal(step.obs[row], step.next_obs[row])
        obs = step.obs.clone()
    assert endings == {(1, True, False), (2, True, False), (3, True, True), (3, False, True)}


@pytest.mark.parametrize("name", COUNTERS)
def test_a_return_stays_until_the_next_step(name: str) -> None:
    """Actions 0: rewards 10, 20, 30, so an episode of 1, 2 or 3 steps totals 10, 30 or 60."""
    env = COUNTERS[name]([0], 3)
    env.reset()
    ends = set()
    for _ in range(40):
        step = env.step(torch.zeros(3, dtype=torch.int64))
        for row in torch.nonzero(step.terminated | step.truncated).flatten().tolist():
            ends.add((env.episode_lengths[row].item(), env.episode_returns[row].item()))
    assert ends == {(1, 10.0), (2, 30.0), (3, 60.0)}


@pytest.mark.parametrize("name", [*COUNTERS, *OTHERS])
def test_contract(name: str) -> None:
    ended = check_contract({**COUNTERS, **OTHERS}[name], 220 if name.startswith("Pendulum") else 120)
    assert ended > 0 or name.startswith(("Acrobot", "MountainCar", "HalfCheetah"))


@pytest.mark.parametrize("name", ["from an id", "TensorEnv", *OTHERS])
def test_saved_environment_continues_bit_for_bit(name: str) -> None:
    check_resume({**COUNTERS, **OTHERS}[name], 150)


@pytest.mark.parametrize("name", COUNTERS)
def test_second_reset_goes_on_with_the_generators(name: str) -> None:
    env = COUNTERS[name]([3], 2)
    first, second = env.reset().clone(), env.reset().clone()
    assert (first[:, 0] != second[:, 0]).all()
    assert env.episode_lengths.tolist() == [0, 0]
    again = COUNTERS[name]([3], 2)
    assert torch.equal(again.reset(), first)
    assert torch.equal(again.reset(), second)


def test_uniform_is_splitmix64() -> None:
    """Vigna's splitmix64.c from seed 1234567 gives 6457827717110365317, 3203168211198807973, 9817491932198370423."""
    draws, after = uniform(torch.tensor([1234567, -1]), 3)
    expected = [x >> 40 for x in (6457827717110365317, 3203168211198807973, 9817491932198370423)]
    assert (draws[0].double() * 2**24).tolist() == expected
    assert uniform(torch.tensor([1234567, -1]), 0)[0].shape == (2, 0)
    once, stream = uniform(torch.tensor([1234567, -1]), 1)
    rest, end = uniform(stream, 2)
    assert torch.equal(torch.cat([once, rest], 1), draws)
    assert torch.equal(end, after)


def test_random_streams_are_uniform_and_apart() -> None:
    stream = TensorCounting([3], 1000).state["stream"]
    draws = uniform(stream, 100)[0]
    # Of n uniform numbers: mean 1/2 with error 0.29 / sqrt(n), variance 1/12; correlations of error 1 / sqrt(n).
    assert abs(draws.mean() - 0.5) < 5 * 0.29 / 1e5**0.5
    assert abs(draws.var() - 1 / 12) < 0.001
    assert draws.min() >= 0
    assert draws.max() < 1
    across, along = torch.corrcoef(draws.T) - torch.eye(100), torch.corrcoef(draws) - torch.eye(1000)
    assert across.abs().max() < 6 / 1000**0.5
    assert along.abs().max() < 6 / 100**0.5


def test_transitions_draw_where_a_task_says_so_and_episodes_start_the_same_whatever_was_done() -> None:
    class Coin(TensorCounting):
        step_draws = 1

        def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            physics, _, terminated = super().transition(physics, actions, draws)
            return physics, draws.squeeze(1), terminated

    env = Coin([1, 2], 3)
    env.reset()
    rewards = torch.stack([env.step(torch.zeros(6)).rewards for _ in range(50)])
    assert len(rewards.unique()) == rewards.numel()

    def starts(policy: Callable[[int], int]) -> list[Tensor]:
        env = make("CartPole-v1", [1], 1)
        env.reset()
        steps = (env.step(torch.tensor([policy(t)])) for t in range(200))
        return [step.obs[0] for step in steps if step.terminated]

    left, alternating = starts(lambda t: 0), starts(lambda t: t % 2)
    assert len(left) > len(alternating) > 2
    assert all(map(torch.equal, left, alternating))
