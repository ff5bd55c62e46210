"""`make` picks the implementation that was asked for, or says why not."""

from __future__ import annotations

import sys

import gymnasium as gym
import pytest
import torch

from rl_lab.envs import make
from rl_lab.envs.adapter import GymnasiumEnv
from rl_lab.envs.classic import CLASSIC
from rl_lab.envs.mujoco import MujocoEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*:DeprecationWarning")  # Gymnasium on -v4 ids


@pytest.mark.parametrize(
    ("env_id", "backend", "expected"),
    [
        ("CartPole-v1", "auto", CLASSIC["CartPole-v1"]),
        ("CartPole-v1", "native", CLASSIC["CartPole-v1"]),
        ("CartPole-v1", "gymnasium", GymnasiumEnv),
        ("CartPole-v0", "auto", GymnasiumEnv),
        ("HalfCheetah-v4", "auto", MujocoEnv),
        ("HalfCheetah-v4", "gymnasium", GymnasiumEnv),
        ("gymnasium:Pendulum-v1", "auto", GymnasiumEnv),
    ],
)
def test_backend(env_id: str, backend: str, expected: type) -> None:
    env = make(env_id, [1, 2], 3, backend=backend)
    assert type(env) is expected
    assert (env.seeds, env.num_envs, env.device) == ((1, 2), 3, torch.device("cpu"))
    peer = gym.make(env_id)
    assert env.observation_space == peer.observation_space
    assert env.action_space == peer.action_space
    assert env.reset().shape == (6, *peer.observation_space.shape)
    env.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPoole-v1", [0], 1), "env_id='CartPoole-v1' is unknown: the nearest ids are CartPole-v1"),
        (("HalfCheeta-v4", [0], 1), "HalfCheetah-v4"),
        (("?", [0], 1), "no id is spelled nearly so"),
        (("CartPole-v1", [0], 1, "cpu", "auto", 2), r"num_threads=2 \(--env-threads\): only native"),
        (("CartPole-v1", [0], 1, "cpu", "native", 2), r"num_threads=2 \(--env-threads\): only native"),
        (("HalfCheetah-v4", [0], 1, "cpu", "gymnasium", 2), r"num_threads=2 \(--env-threads\): only native"),
        (("nowhere_to_be_found:X-v0", [0], 1), "No module named 'nowhere_to_be_found'"),
        (("HalfCheetah-v3", [0], 1), "HalfCheetah-v3 cannot be made"),
        (("FrozenLake-v1", [0], 1), "observation space Discrete\\(16\\) is refused"),
        (("Pusher-v4", [0], 1, "cpu", "native"), "no Pusher-v4; it has Acrobot-v1, .*HalfCheetah-v4"),
        (("CartPole-v1", [0], 1, "cpu", "warp"), "backend='warp' is unknown; there are auto, native, gymnasium"),
        (("CartPole-v1", [0], 0), "num_envs=0 must be at least 1"),
        (("CartPole-v1", [], 1), "seeds=\\[\\] must be"),
        (("CartPole-v1", [1, -1], 1), "seeds=\\[1, -1\\] must be"),
    ],
)
def test_refusals_say_what_would_work(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "env_id", "install"),
    [
        ("ale_py", "ALE/Pong-v5", 'pip install -c constraints.txt -e ".[atari]"'),
        ("mujoco", "Ant-v5", 'pip install "gymnasium[mujoco]"'),
    ],
)
def test_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, module: str, env_id: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # importing it now fails as if it were not installed
    monkeypatch.delitem(sys.modules, "rl_lab.envs.mujoco")
    with pytest.raises(ValueError) as caught:
        make(env_id, [0], 1)
    assert f"it needs {module}: {install}" in str(caught.value)
    make("CartPole-v1", [0], 1).reset()  # the others do without
