"""The batched MuJoCo environments against Gymnasium's classes, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

from rl_lab.envs.mujoco import MujocoEnv
from rl_lab.envs.mujoco_tasks import TASKS
from rl_lab.vector import Step

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Gymnasium's, on every -v4
NEVER_TERMINATE = ("HalfCheetah", "Swimmer", "Reacher")


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it runs


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Iterator[gym.Env[Any, Any]]:
    env = gym.make(request.param, disable_env_checker=True)
    yield env
    env.close()


all_ids = pytest.mark.parametrize("peer", list(TASKS), indirect=True)


def assert_same(step: Step, row: int, theirs: tuple[Any, ...]) -> None:
    obs, reward, terminated, truncated, _ = theirs
    assert step.next_obs[row].numpy().tobytes() == obs.tobytes()
    assert step.rewards[row].item() == reward
    assert (step.terminated[row].item(), step.truncated[row].item()) == (terminated, truncated)


def run_episodes(peer: gym.Env[Any, Any], steps: int, scale: float, seed: int) -> tuple[int, int]:
    """Step both from `reset(seed)` on, through later episodes; return how many episodes terminated and truncated."""
    rng = np.random.default_rng(seed)
    env = MujocoEnv(peer.spec.id, [seed], 1)
    obs = env.reset()
    assert obs[0].numpy().tobytes() == peer.reset(seed=seed)[0].tobytes()
    terminations = truncations = 0
    for _ in range(steps):
        action = scale * rng.uniform(peer.action_space.low, peer.action_space.high).astype(np.float32)
        step, theirs = env.step(torch.from_numpy(action)[None]), peer.step(action)
        assert_same(step, 0, theirs)
        terminations += theirs[2]
        truncations += theirs[3]
        obs = peer.reset()[0] if theirs[2] or theirs[3] else theirs[0]
        assert step.obs[0].numpy().tobytes() == obs.tobytes()
    return terminations, truncations


@all_ids
def test_spaces_and_time_limit(peer: gym.Env[Any, Any]) -> None:
    env = MujocoEnv(peer.spec.id, [0], 1)
    assert env.observation_space == peer.observation_space
    assert env.action_space == peer.action_space
    assert env.task.max_episode_steps == peer.spec.max_episode_steps


@all_ids
def test_episodes_of_random_actions(peer: gym.Env[Any, Any]) -> None:
    """Twice the allowed torques make legs fall, and 1,010 steps reach the time limit of what cannot."""
    never = peer.spec.id.startswith(NEVER_TERMINATE)
    terminations, truncations = run_episodes(peer, 1010 if never else 500, scale=2.0, seed=2)
    assert (truncations if never else terminations) > 0


@pytest.mark.parametrize("peer", ["Ant-v5"], indirect=True)
def test_time_limit_of_a_task_that_can_terminate(peer: gym.Env[Any, Any]) -> None:
    assert run_episodes(peer, 1010, scale=0.0, seed=1) == (0, 1)


@all_ids
def test_rows_side_by_side(peer: gym.Env[Any, Any]) -> None:
    """Each of five rows, copied into Gymnasium's environment, goes on as it does there."""
    env = MujocoEnv(peer.spec.id, [5, 8], 5)
    env.reset()
    peers = [gym.make(peer.spec.id, disable_env_checker=True) for _ in range(10)]
    for row, other in enumerate(peers):
        other.reset()
        other.unwrapped.set_state(env.data[row].qpos, env.data[row].qvel)
    rng = np.random.default_rng(0)
    compared = 0
    running = set(range(10))
    for _ in range(40):
        shape = (10, *env.action_space.shape)
        actions = rng.uniform(env.action_space.low, env.action_space.high, shape).astype(np.float32)
        step = env.step(torch.from_numpy(actions))
        for row in sorted(running):
            theirs = peers[row].step(actions[row])
            assert_same(step, row, theirs)
            compared += 1
            if theirs[2]:
                running.remove(row)
    assert compared > 50


@all_ids
def test_rows_of_a_seed_draw_in_order(peer: gym.Env[Any, Any]) -> None:
    obs = MujocoEnv(peer.spec.id, [4, 11], 2).reset().numpy()
    for seed, rows in (4, obs[:2]), (11, obs[2:]):
        assert (rows[0] == peer.reset(seed=seed)[0]).all()
        assert (rows[1] == peer.reset()[0]).all()


@pytest.mark.parametrize("peer", ["HalfCheetah-v4", "Ant-v5", "Humanoid-v4", "Reacher-v4"], indirect=True)
def test_unstable_simulation_is_reset_as_under_gymnasium(peer: gym.Env[Any, Any]) -> None:
    env = MujocoEnv(peer.spec.id, [0], 1)
    env.reset()
    peer.reset(seed=0)
    env.data[0].qvel[0] = peer.unwrapped.data.qvel[0] = 1e12  # beyond what MuJoCo accepts
    action = np.full(env.action_space.shape, 0.1, np.float32)
    for _ in range(3):
        assert_same(env.step(torch.from_numpy(action)[None]), 0, peer.step(action))
    assert env.data[0].warning[mujoco.mjtWarning.mjWARN_BADQVEL].number == 1


@pytest.mark.slow
@all_ids
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_whole_episodes(peer: gym.Env[Any, Any], scale: float) -> None:
    run_episodes(peer, 3000, scale, seed=17)
