"""Recurrent PPO recalls what it saw; a policy without memory cannot, and neither can a memory cleared at each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lab.algorithms import ppo, ppo_lstm

pytestmark = pytest.mark.slow

CELLS = ("hidden", "cell")


def score(run: Any) -> float:
    """Mean return of the last 100 training episodes."""
    (recent,) = run.recent
    assert len(recent) == 100
    return sum(recent) / 100


def test_memory_recalls(tmp_path: Path) -> None:
    """With the command's own defaults. 1 is the most; 1/4 is exactly what any memoryless policy gets."""
    assert score(ppo_lstm.train(ppo_lstm.Args(compile=False, runs_dir=tmp_path))) >= 0.9


def test_without_memory_it_is_chance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward PPO, and the LSTM with its state cleared before each step: within 4 standard deviations of 1/4."""
    flags: dict[str, Any] = {"env": "Recall-v0", "num_envs": 32, "num_steps": 20, "learning_rate": 2e-3}
    flags |= {"total_timesteps": 15_000, "compile": False}
    assert abs(score(ppo.train(ppo.Args(**flags, runs_dir=tmp_path / "ppo"))) - 0.25) <= 4 * 0.0433
    remember, replay = ppo_lstm.remember, ppo_lstm.replay

    def cleared(memory: Any) -> Any:
        return {name: torch.zeros_like(x) for name, x in memory.items()}

    monkeypatch.setattr(ppo_lstm, "remember", lambda p, obs, m: remember(p, obs, cleared({k: m[k] for k in CELLS})))
    monkeypatch.setattr(ppo_lstm, "replay", lambda p, r, m: replay(p, {**r, "keep": 0 * r["keep"]}, m))
    run = ppo_lstm.train(ppo_lstm.Args(**flags, runs_dir=tmp_path / "cleared"))
    assert abs(score(run) - 0.25) <= 4 * 0.0433
