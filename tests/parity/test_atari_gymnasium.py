"""Atari games against CleanRL's own environments, and against Gymnasium's wrappers, frame for frame.

atari_numbers.json holds what CleanRL's environments show, with their versions; make_atari_numbers.py wrote it.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

pytest.importorskip("ale_py", reason="Atari needs ale_py")
cv2 = pytest.importorskip("cv2", reason="Atari needs cv2")

from rl_lab.envs import make  # noqa: E402
from rl_lab.envs.atari import AtariEnv, Game  # noqa: E402

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "atari_numbers.json").read_text())
spec = importlib.util.spec_from_file_location("make_atari_numbers", HERE / "make_atari_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its actions and records; it runs no peer unless called


def scripted_noops(monkeypatch: pytest.MonkeyPatch, noops: int) -> None:
    class Always:
        def integers(self, low: int, high: int) -> int:
            assert (low, high) == (1, 31)
            return noops

    init = Game.__init__

    def scripted_init(self: Game, *args: Any) -> None:
        init(self, *args)
        self.rng = Always()  # type: ignore[assignment]

    monkeypatch.setattr(Game, "__init__", scripted_init)


@pytest.mark.parametrize("game", list(peers.STEPS))
def test_cleanrls_environment(monkeypatch: pytest.MonkeyPatch, game: str) -> None:
    """Guards details 14-20, their order and their oddities, through the ends of lives and of games."""
    scripted_noops(monkeypatch, peers.NOOPS)
    env = AtariEnv(f"{game.title()}NoFrameskip-v4", [0], 1)
    record = peers.Record(env.reset()[0].numpy())
    for action in peers.actions(game, int(env.action_space.n)):
        step = env.step(torch.tensor([action]))
        score = env.episode_returns.item() if env.game_over else None
        done = bool(step.terminated | step.truncated)
        record.step(step.next_obs[0].numpy(), step.rewards.item(), done, step.obs[0].numpy(), score)
    assert len(NUMBERS[game]["games"]) > 0 and len({reward for _, reward in NUMBERS[game]["rewards"]}) > 0
    assert record.numbers == NUMBERS[game]


# --- the same wrappers by Gymnasium, for whole games with drawn no-ops and the time limit ---------------------------


class Noops(gym.Wrapper[Any, Any, Any, Any]):
    """Up to 30 frames without action begin a game; `random` draws their number."""

    random: np.random.Generator

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        for _ in range(self.random.integers(1, 31)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


class Lives(gym.Wrapper[Any, Any, Any, Any]):
    """The loss of a life terminates; the game is reset only where it is over, else a step without action goes by."""

    lives, over = 0, True

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.over, before, self.lives = terminated or truncated, self.lives, info["lives"]
        return obs, reward, terminated or 0 < self.lives < before, truncated, info

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        ended = self.over
        if not ended:
            obs, _, terminated, truncated, info = self.env.step(0)
            ended = terminated or truncated
        if ended:
            obs, info = self.env.reset(**kwargs)
        self.lives = info["lives"]
        return obs, info


class Fire(gym.Wrapper[Any, Any, Any, Any]):
    """Actions 1 and 2 begin a life."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        self.env.reset(**kwargs)
        for action in (1, 2):
            obs, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                self.env.reset()
        return obs, info


def peer(env_id: str, random: np.random.Generator) -> gym.Env[Any, Any]:
    env: Any = gym.make(env_id, disable_env_checker=True)
    fire = "FIRE" in env.unwrapped.get_action_meanings()
    env = Noops(gym.wrappers.RecordEpisodeStatistics(env))
    env.random = random
    env = Lives(gym.wrappers.MaxAndSkipObservation(env, 4))
    env = gym.wrappers.TransformReward(Fire(env) if fire else env, np.sign)
    env = gym.wrappers.ResizeObservation(env, (84, 84))
    space = gym.spaces.Box(0, 255, (84, 84), np.uint8)
    env = gym.wrappers.TransformObservation(env, lambda x: cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), space)  # as Gymnasium 0
    return gym.wrappers.FrameStackObservation(env, 4)


def compare(env_id: str, steps: int) -> dict[str, int]:
    """Play both with equal actions, two rows of a seed; count what happened."""
    env, counts = make(env_id, [3], 2), {"lost": 0, "games": 0, "truncated": 0, "rewards": 0}
    randoms = [np.random.default_rng((3, row)) for row in range(2)]
    for random in randoms:
        random.integers(2**31)  # the emulator's seed
    rows = [peer(env_id, random) for random in randoms]
    first = env.reset()
    assert env.observation_space == rows[0].observation_space and env.action_space == rows[0].action_space
    for row, other in enumerate(rows):
        assert np.array_equal(first[row], other.reset()[0])
    for actions in np.random.default_rng(7).integers(env.action_space.n, size=(steps, 2)):
        step = env.step(torch.from_numpy(actions))
        for row, other in enumerate(rows):
            obs, reward, terminated, truncated, info = other.step(actions[row])
            assert np.array_equal(step.next_obs[row], obs)
            found = (step.rewards[row].item(), step.terminated[row].item(), step.truncated[row].item())
            assert found == (reward, terminated, truncated)
            assert env.game_over[row].item() == ("episode" in info)
            if terminated or truncated:
                obs, _ = other.reset()
            assert np.array_equal(step.obs[row], obs)
            if "episode" in info:
                assert env.episode_returns[row].item() == info["episode"]["r"]
            counts["games"] += "episode" in info
            counts["lost"] += terminated and "episode" not in info
            counts["truncated"] += truncated
            counts["rewards"] += reward != 0
    return counts


def test_breakout_through_whole_games() -> None:
    counts = compare("BreakoutNoFrameskip-v4", 450)
    assert counts["games"] >= 4 and counts["lost"] >= 12 and counts["rewards"] > 0


def test_pong_through_whole_games() -> None:
    counts = compare("PongNoFrameskip-v4", 1000)
    assert counts["games"] >= 1 and counts["rewards"] > 20


def test_game_without_fire_on_reset() -> None:
    counts = compare("FreewayNoFrameskip-v4", 60)
    assert counts["games"] == 0


def test_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 401 frames, in the middle of a step; the limit of both is set, as 108,000 frames would take a minute."""
    monkeypatch.setattr("rl_lab.envs.atari.MAX_FRAMES", 401)
    monkeypatch.setitem(gym.spec("PongNoFrameskip-v4").kwargs, "max_num_frames_per_episode", 401)
    counts = compare("PongNoFrameskip-v4", 300)
    assert counts["truncated"] >= 4 and counts["games"] == counts["truncated"]
