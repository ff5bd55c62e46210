"""The Gymnasium adapter: modes, refusals, seeds, masks, and the same numbers as the environment itself."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation

from rl_lab.envs.adapter import GymnasiumEnv

BOX = gym.spaces.Box(-1000.0, 1000.0, (1,), np.float32)
ACCEPTED = [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]


class Scripted(gym.Env[np.ndarray, Any]):
    """Observation 100 * episode + t; the episodes last 2, 1 and 3 steps and end as written in `SCRIPT`."""

    SCRIPT = ((2, True, False), (1, False, True), (3, True, True))
    observation_space: gym.Space[Any] = BOX
    action_space: gym.Space[Any] = gym.spaces.Discrete(2)
    episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.episode, self.t = self.episode + 1, 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return np.array([100.0 * self.episode + self.t], np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        length, terminated, truncated = self.SCRIPT[self.episode]
        end = self.t == length
        return self.observe(), float(self.t), end and terminated, end and truncated, {}


class Unusual(Scripted):
    def __init__(self, **spaces: gym.Space[Any]) -> None:
        self.__dict__.update(spaces)


@pytest.mark.parametrize("mode", ACCEPTED)
def test_script_comes_back_step_by_step(mode: AutoresetMode) -> None:
    env = GymnasiumEnv(SyncVectorEnv([Scripted], autoreset_mode=mode), [0], 1)
    assert env.reset().tolist() == [[0.0]]
    rows = []
    for _ in range(5):
        step = env.step(torch.tensor([1]))
        rows.append((*(x.flatten().tolist()[0] for x in step), env.episode_returns.item(), env.episode_lengths.item()))
    assert rows == [
        # next_obs, reward, terminated, truncated, obs, episode return, episode length
        (1.0, 1.0, False, False, 1.0, 1.0, 1),
        (2.0, 2.0, True, False, 100.0, 3.0, 2),
        (101.0, 1.0, False, True, 200.0, 1.0, 1),
        (201.0, 1.0, False, False, 201.0, 1.0, 1),
        (202.0, 2.0, False, False, 202.0, 3.0, 2),
    ]


def test_next_step_autoreset_is_refused() -> None:
    """The third step would return observation 100 with reward 0 as if it followed the action."""
    with pytest.raises(ValueError, match="NEXT_STEP each reset comes back as a transition with reward 0"):
        GymnasiumEnv(SyncVectorEnv([Scripted]), [0], 1)
    with pytest.raises(ValueError, match="NEXT_STEP"):
        GymnasiumEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="vector_entry_point"), [0], 2)
    silent = SyncVectorEnv([Scripted], autoreset_mode=AutoresetMode.SAME_STEP)
    del silent.metadata["autoreset_mode"]
    with pytest.raises(ValueError, match="mode None is refused"):
        GymnasiumEnv(silent, [0], 1)


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        ({"observation_space": gym.spaces.Discrete(3)}, "FlattenObservation"),
        ({"observation_space": gym.spaces.Dict(a=BOX)}, "must be a Box"),
        ({"observation_space": gym.spaces.Box(0, 9, (2,), np.uint16)}, "unsigned numbers must be uint8"),
        ({"action_space": gym.spaces.MultiBinary(3)}, "MultiBinary"),
        ({"action_space": gym.spaces.Discrete(3, start=1)}, "from 0"),
        ({"action_space": gym.spaces.MultiDiscrete([3, 3], start=[0, 1])}, "from 0"),
    ],
)
def test_unsupported_spaces_are_refused(spaces: dict[str, gym.Space[Any]], message: str) -> None:
    envs = SyncVectorEnv([lambda: Unusual(**spaces)], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=message):
        GymnasiumEnv(envs, [0], 1)


def test_number_of_rows_must_fit() -> None:
    envs = SyncVectorEnv([Scripted] * 3, autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match="3 rows; len\\(seeds\\) \\* num_envs is 4"):
        GymnasiumEnv(envs, [0, 1], 2)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Pendulum-v1", "CartPole-v1"])
def test_row_zero_is_the_environment_reset_with_the_seed(env_id: str) -> None:
    env, peer = GymnasiumEnv(env_id, [5], 2), gym.make(env_id)
    obs, (peer_obs, _) = env.reset(), peer.reset(seed=5)
    assert obs.numpy().dtype == peer_obs.dtype
    assert np.array_equal(obs[0].numpy(), peer_obs)
    peer.action_space.seed(0)
    for _ in range(250):
        action = peer.action_space.sample()
        step = env.step(torch.from_numpy(np.array([action, action])))
        peer_obs, reward, terminated, truncated, _ = peer.step(action)
        assert np.array_equal(step.next_obs[0].numpy(), peer_obs)
        assert step.rewards[0].item() == reward
        assert (step.terminated[0].item(), step.truncated[0].item()) == (terminated, truncated)
        if terminated or truncated:
            peer_obs, _ = peer.reset()
        assert np.array_equal(step.obs[0].numpy(), peer_obs)


def test_second_row_does_not_depend_on_the_number_of_rows() -> None:
    two, three = GymnasiumEnv("CartPole-v1", [5], 2).reset(), GymnasiumEnv("CartPole-v1", [5], 3).reset()
    assert torch.equal(two, three[:2])
    assert len({tuple(row) for row in three.tolist()}) == 3


@pytest.mark.parametrize("mode", ACCEPTED)
def test_action_mask_belongs_to_the_observation_to_act_on(mode: AutoresetMode) -> None:
    """Taxi's own mask, worked out from its state: episodes of 4 steps, so that resets occur."""

    def one() -> gym.Env:
        return FlattenObservation(gym.make("Taxi-v4", max_episode_steps=4, disable_env_checker=True))

    envs = SyncVectorEnv([one] * 4, autoreset_mode=mode)
    env = GymnasiumEnv(envs, [0, 1], 2)
    obs = env.reset()
    generator = torch.Generator().manual_seed(0)
    masks = set()
    for _ in range(20):
        mask = env.action_mask
        assert mask is not None
        for row, peer in enumerate(envs.envs):
            state = int(peer.unwrapped.s)
            assert obs[row].argmax().item() == state
            assert mask[row].tolist() == [bool(allowed) for allowed in peer.unwrapped.action_mask(state)]
            masks.add(tuple(mask[row].tolist()))
        obs = env.step(torch.randint(6, (4,), generator=generator)).obs
    assert len(masks) > 3
    assert GymnasiumEnv("CartPole-v1", [0], 1).action_mask is None


def test_mask_survives_a_resume() -> None:
    gym.register("FlatTaxi-v0", lambda: FlattenObservation(gym.make("Taxi-v4")), max_episode_steps=9)
    try:
        env, other = GymnasiumEnv("FlatTaxi-v0", [3], 2), GymnasiumEnv("FlatTaxi-v0", [3], 2)
        env.reset()
        for action in (0, 3, 1):
            env.step(torch.tensor([action, action]))
        other.load_state_dict(env.state_dict())
        assert env.action_mask is not None and other.action_mask is not None
        assert torch.equal(env.action_mask, other.action_mask)
    finally:
        del gym.registry["FlatTaxi-v0"]


def test_recorded_actions_are_copies() -> None:
    """A caller may reuse its action buffer: Pendulum's second torque must not overwrite the first in the record."""
    env, other = GymnasiumEnv("Pendulum-v1", [0], 1), GymnasiumEnv("Pendulum-v1", [0], 1)
    env.reset()
    actions = torch.full((1, 1), 2.0)
    env.step(actions)
    env.step(actions.fill_(-2.0))
    other.load_state_dict(env.state_dict())
    assert torch.equal(env.step(actions).next_obs, other.step(actions).next_obs)


def test_what_cannot_be_resumed_says_so() -> None:
    handed_in = GymnasiumEnv(SyncVectorEnv([Scripted], autoreset_mode=AutoresetMode.SAME_STEP), [0], 1)
    handed_in.reset()
    with pytest.raises(ValueError, match="handed in cannot be saved"):
        handed_in.state_dict()

    gym.register("Scripted-v0", Scripted)  # its episode number is memory that no generator holds
    try:
        env, other = GymnasiumEnv("Scripted-v0", [0], 1), GymnasiumEnv("Scripted-v0", [0], 1)
        env.reset()
        for _ in range(3):
            env.step(torch.tensor([0]))
        with pytest.raises(ValueError, match="cannot be resumed"):
            other.load_state_dict(env.state_dict())
    finally:
        del gym.registry["Scripted-v0"]
