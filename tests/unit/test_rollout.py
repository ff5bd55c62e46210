"""Collection: what stands in each row of a rollout, by an environment that counts its steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor

from rl_lab import normalize as normalization
from rl_lab.rollout import Collector, Rollout
from rl_lab.vector import Step, TensorEnv, VectorEnv

SEEDS, NUM_ENVS, LIMIT = (3, 8), 2, 3
ROWS = len(SEEDS) * NUM_ENVS


class Counting(TensorEnv):
    """Observation (token, planned, t): a number drawn at reset, the step that terminates, 1 to 4, and the steps taken.

    The reward is 10 t + action. Planned 3 terminates and truncates at once, planned 4 is truncated at 3.
    """

    observation_space = gym.spaces.Box(0.0, 100.0, (3,))
    action_space = gym.spaces.Discrete(9)
    max_episode_steps, reset_draws = LIMIT, 2

    def initial(self, draws: Tensor) -> Tensor:
        token, planned = draws.unbind(-1)
        return torch.stack([token, 1 + (4 * planned).floor(), torch.zeros_like(token)], -1)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = physics + torch.tensor([0.0, 0.0, 1.0])
        return physics, 10 * physics[:, 2] + actions, physics[:, 2] == physics[:, 1]

    def observe(self, physics: Tensor) -> Tensor:
        return physics

    def mask(self, physics: Tensor) -> Tensor:
        return physics[:, 2:] != torch.arange(LIMIT)  # action t is not allowed at step t


class Plain(VectorEnv):
    """The same, without its pure functions: it can only be stepped."""

    def __init__(self, inner: TensorEnv) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def reset(self) -> Tensor:
        return self.inner.reset()

    def step(self, actions: Tensor) -> Step:
        return self.inner.step(actions)

    @property
    def action_mask(self) -> Tensor | None:
        return self.inner.action_mask

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def act(params: dict[str, Tensor], inputs: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
    """Stores noise + shift, while the environment sees its integer part."""
    assert inputs["obs"].shape == (NUM_ENVS, 3)
    assert inputs["mask"].shape == (NUM_ENVS, LIMIT)
    actions = noise.squeeze(1) + params["shift"]
    return actions, actions.floor()


def observe(normalizer: dict[str, Tensor], step: Step) -> tuple[dict[str, Tensor], Step]:
    """Adds 1000 per step taken to observations, and 7 to rewards."""
    count = normalizer["count"] + 1
    moved = step._replace(next_obs=step.next_obs + 1000 * count, obs=step.obs + 1000 * count, rewards=step.rewards + 7)
    return {"count": count}, moved


PARAMS = {"shift": torch.tensor([0.0, 4.0])}  # one agent after the other
MakeEnv = Callable[[], VectorEnv]


def counting() -> VectorEnv:
    return Counting(SEEDS, NUM_ENVS)


def plain() -> VectorEnv:
    return Plain(Counting(SEEDS, NUM_ENVS))


def collector(env: VectorEnv, normalized: bool = False) -> Collector:
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    made = Collector(env, act, None, generators, "test", compile=False)
    if normalized:  # by this file's own `observe`, which begins with the raw observation
        raw = made.obs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(env), "reset", lambda _: raw)
            made = Collector(env, act, observe, generators, "test", compile=False)
        made.normalizer, made.obs = {"count": torch.zeros(len(SEEDS))}, raw
    return made


def noise(num_steps: int) -> Tensor:
    return 4 * torch.rand(num_steps, ROWS, 1, generator=torch.Generator().manual_seed(0))


def assert_equal(left: Rollout, right: Rollout) -> None:
    assert left.keys() == right.keys()
    for name, column in left.items():
        assert torch.equal(column, right[name]), name


@pytest.mark.parametrize("make_env", [counting, plain])
def test_rows(make_env: MakeEnv) -> None:
    """Guards against rewards shifted by a step, a successor that is the next episode's first observation, an action
    stored as the environment saw it, another agent's parameters, and a mask of the wrong step."""
    steps = 60
    rollout = collector(make_env()).collect(PARAMS, noise(steps))
    obs, next_obs = rollout["obs"], rollout["next_obs"]
    shift = torch.tensor([0.0, 0.0, 4.0, 4.0])
    assert torch.equal(rollout["actions"], noise(steps).squeeze(2) + shift)
    assert torch.equal(rollout["rewards"], 10 * next_obs[..., 2] + rollout["actions"].floor())
    assert torch.equal(next_obs[..., :2], obs[..., :2])  # the token and plan of the same episode
    assert torch.equal(next_obs[..., 2], obs[..., 2] + 1)
    assert torch.equal(rollout["terminated"], next_obs[..., 2] == next_obs[..., 1])
    assert torch.equal(rollout["truncated"], next_obs[..., 2] == LIMIT)
    assert torch.equal(rollout["mask"], obs[..., 2:] != torch.tensor([0.0, 1.0, 2.0]))

    done = rollout["terminated"] | rollout["truncated"]
    assert (rollout["terminated"] & rollout["truncated"]).any()
    assert (rollout["terminated"] ^ rollout["truncated"]).any()
    following = obs[1:]
    assert torch.equal(following[~done[:-1]], next_obs[:-1][~done[:-1]])
    assert not following[done[:-1]][:, 2].any()  # a new episode, at its step 0
    assert (following[done[:-1]][:, 0] != next_obs[:-1][done[:-1]][:, 0]).all()

    assert torch.equal(rollout["episode_lengths"], next_obs[..., 2].long())
    for row in range(ROWS):  # the episode's total where it ended
        start = 0
        for t in done[:, row].nonzero().flatten().tolist():
            assert rollout["episode_returns"][t, row] == rollout["rewards"][start : t + 1, row].sum()
            start = t + 1


@pytest.mark.parametrize("make_env", [counting, plain])
def test_rows_as_observed(make_env: MakeEnv) -> None:
    """Guards against a normaliser that lags a step behind, or is applied to one of the two observations only."""
    env = make_env()
    collected = collector(env, normalized=True)
    raw = collector(make_env()).collect(PARAMS, noise(20))
    rollout = collected.collect(PARAMS, noise(20))
    t = torch.arange(20.0).reshape(-1, 1, 1)
    assert torch.equal(rollout["obs"], raw["obs"] + 1000 * t)
    assert torch.equal(rollout["next_obs"], raw["next_obs"] + 1000 * (t + 1))
    assert torch.equal(rollout["rewards"], raw["rewards"] + 7)
    assert torch.equal(rollout["episode_returns"], raw["episode_returns"])  # the environment's own
    assert collected.normalizer["count"].tolist() == [20, 20]


@pytest.mark.parametrize("normalized", [False, True])
def test_fused_equals_stepping_by_hand(normalized: bool) -> None:
    """Guards against a fused loop that is another environment: same noise, stepped from outside."""
    env, other = Counting(SEEDS, NUM_ENVS), Counting(SEEDS, NUM_ENVS)
    fused = collector(env, normalized)
    obs, steps = other.reset(), 30
    rollout = fused.collect(PARAMS, noise(steps))
    for t in range(steps):
        actions = noise(steps)[t].squeeze(1) + torch.tensor([0.0, 0.0, 4.0, 4.0])
        offset = 1000.0 if normalized else 0.0
        assert torch.equal(rollout["obs"][t], obs + offset * t)
        assert torch.equal(rollout["actions"][t], actions)
        next_obs, rewards, terminated, truncated, obs = other.step(actions.floor())
        assert torch.equal(rollout["next_obs"][t], next_obs + offset * (t + 1))
        assert torch.equal(rollout["rewards"][t], rewards + 7 * normalized)
        assert torch.equal(rollout["terminated"][t], terminated)
        assert torch.equal(rollout["truncated"][t], truncated)
        assert torch.equal(rollout["episode_returns"][t], other.episode_returns)
        assert torch.equal(rollout["episode_lengths"][t], other.episode_lengths)
    assert torch.equal(fused.obs, obs + offset * steps)


@pytest.mark.parametrize("normalized", [False, True])
def test_stepped_equals_fused(normalized: bool) -> None:
    """Guards against two ways of collecting that drift apart, also over the seam between two rollouts."""
    fused, stepped = collector(counting(), normalized), collector(plain(), normalized)
    for part in noise(24).split(8):
        assert_equal(fused.collect(PARAMS, part), stepped.collect(PARAMS, part))


@pytest.mark.parametrize("make_env", [counting, plain])
def test_rollouts_run_across_the_ends_of_episodes(make_env: MakeEnv) -> None:
    """Guards detail 1: a second rollout goes on where the first stopped, in the middle of an episode."""
    collected = collector(make_env(), normalized=True)
    first, second = (collected.collect(PARAMS, part) for part in noise(14).split(7))
    goes_on = ~(first["terminated"] | first["truncated"])[-1]
    assert goes_on.any()
    assert torch.equal(second["obs"][0][goes_on], first["next_obs"][-1][goes_on])
    assert (second["obs"][0][~goes_on][:, 2] == 7000).all()


@pytest.mark.parametrize("make_env", [counting, plain])
def test_state_continues_a_rollout(make_env: MakeEnv) -> None:
    """Guards against a checkpoint that forgets the observation to act on, the normaliser or the environment."""
    collected, fresh = collector(make_env(), normalized=True), collector(make_env(), normalized=True)
    collected.collect(PARAMS, noise(7))
    fresh.load_state_dict(collected.state_dict())
    assert_equal(collected.collect(PARAMS, noise(9)), fresh.collect(PARAMS, noise(9)))


class Forgetful(Plain):
    """The same, which cannot be continued."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Tensor:
        return self.reset()


def recall(params: dict[str, Tensor], inputs: dict[str, Tensor], noise: Tensor) -> tuple[Any, ...]:
    """Acts, and counts in its memory."""
    return *act(params, inputs, noise), {"count": inputs["count"] + 1}


@pytest.mark.parametrize("normalized", [False, True])
def test_an_environment_that_cannot_go_on_begins_anew(normalized: bool) -> None:
    """Guards against an action by what was seen before the checkpoint in an episode that has just begun."""

    def made() -> Collector:
        normalize = partial(normalization.observe, gamma=0.5, cleanrl=False) if normalized else None
        memory, generators = {"count": torch.zeros(ROWS, 1)}, [torch.Generator() for _ in SEEDS]
        return Collector(Forgetful(Counting(SEEDS, NUM_ENVS)), recall, normalize, generators, "", False, memory)

    collected, resumed = made(), made()
    last = collected.collect(PARAMS, noise(7))["next_obs"][-1]
    ended = collected.memory["count"].squeeze(1) == 0
    resumed.load_state_dict(collected.state_dict())
    assert resumed.cut is not None and torch.equal(resumed.cut[~ended], last[~ended]) and not ended.all()
    assert resumed.memory["count"].eq(0).all()
    assert isinstance(resumed.env, Plain) and resumed.env.inner.state["episode_lengths"].eq(0).all()
    raw = resumed.env.inner.observe(resumed.env.inner.state["physics"])
    if normalized:
        counts = [x.normalizer["obs"]["count"] for x in (collected, resumed)]
        torch.testing.assert_close(counts[1] - counts[0], torch.full((2,), float(NUM_ENVS)).double())
        means = resumed.normalizer["obs"]["mean"].repeat_interleave(NUM_ENVS, 0)
        scales = (resumed.normalizer["obs"]["var"] + 1e-8).sqrt().repeat_interleave(NUM_ENVS, 0)
        raw = ((raw - means) / scales).clamp(-10, 10).float()
    torch.testing.assert_close(resumed.collect(PARAMS, noise(1))["obs"][0], raw)
