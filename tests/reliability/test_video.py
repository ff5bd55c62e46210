"""Filming an episode, where this machine can draw, and what is said where it cannot."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rl_lab.algorithms import ppo, ppo_lstm
from rl_lab.evaluate import Policy, main
from rl_lab.video import check_format, episode

ROOT = Path(__file__).resolve().parents[2]
DRAW = "import mujoco; mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16).render()"


def test_an_episode_becomes_a_gif(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="GIFs are written by Pillow")
    args = replace(ppo.BOX, env="InvertedPendulum-v4", total_timesteps=64, num_steps=64, num_minibatches=2)
    run = ppo.train(replace(args, compile=False, runs_dir=tmp_path)).logs.folders[0]
    environ = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "MUJOCO_GL")}
    probe = subprocess.run([sys.executable, "-c", DRAW], env={**environ, "MUJOCO_GL": "egl"}, capture_output=True)
    if probe.returncode:
        pytest.skip("MuJoCo cannot draw through EGL on this machine")
    path = tmp_path / "episode.gif"
    command = [sys.executable, "-m", "rl_lab.evaluate", str(run), "--episodes", "1", "--video", str(path)]
    result = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = re.search(r"episode\.gif: one deterministic episode, return (\S+) in (\d+) steps", result.stdout)
    assert found is not None and float(found[1]) == int(found[2]) > 0  # an upright pole earns 1 a step

    gif = image.open(path)
    assert gif.size == (240, 240)  # half of Gymnasium's 480
    total = 0
    for frame in range(gif.n_frames):
        gif.seek(frame)
        total += gif.info["duration"]
        assert len(gif.convert("L").getcolors()) > 10  # more than a plain background
    assert total == 40 * (int(found[2]) + 1)  # ms: 25 frames a second, the first before any step


@pytest.mark.parametrize("algorithm", [ppo, ppo_lstm], ids=["ppo", "ppo_lstm"])
def test_a_game_of_atari_becomes_a_gif(
    algorithm: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The game that was evaluated, whole, as played in training: a recurrent policy forgets where a life ends."""
    image = pytest.importorskip("PIL.Image", reason="GIFs are written by Pillow")
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    short = {"total_timesteps": 16, "num_envs": 2, "num_steps": 8, "num_minibatches": 2, "learning_rate": 0.01}
    args = replace(algorithm.defaults("BreakoutNoFrameskip-v4"), **short, sticky_actions=0.25, compile=False)
    run = algorithm.train(replace(args, runs_dir=tmp_path)).logs.folders[0]
    path = tmp_path / "episode.gif"
    call, fresh = Policy.__call__, []

    def watched(policy: Policy, *arguments: Any, **named: Any) -> Any:
        fresh.append(bool(policy.memory) and not policy.memory["hidden"].any())
        return call(policy, *arguments, **named)

    monkeypatch.setattr(Policy, "__call__", watched)
    main([str(run), "--episodes", "1", "--deterministic", "--video", str(path)])
    played = json.loads((run / "evaluation.json").read_text())["deterministic"]
    found = re.search(r"episode\.gif: one deterministic episode, return (\S+) in (\d+) steps", capsys.readouterr().out)
    assert found is not None and (float(found[1]), int(found[2])) == (played["mean"], played["mean_length"])
    assert len(fresh) == 2 * int(found[2]) > 100
    assert sum(fresh) == (10 if algorithm is ppo_lstm else 0)  # at each of five lives, evaluated and filmed

    gif = image.open(path)
    assert gif.size == (160, 210)  # the whole screen
    pixels = np.asarray(gif.convert("RGB")).astype(int)
    assert (pixels.max(2) - pixels.min(2)).max() > 100  # the wall's bricks are red, orange, ..., blue
    assert gif.n_frames > 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gymnasium's viewer, half made
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(*_: object, **__: object) -> int:
        raise AssertionError("nothing is played where nothing can be drawn")

    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=r'CartPole-v1 cannot be drawn here: .*pip install "gymnasium\[classic-control\]"'
    ):
        episode(act, "CartPole-v1", 0)
    monkeypatch.setenv("MUJOCO_GL", "crayon")
    with pytest.raises(ValueError, match=r"Hopper-v4 cannot be drawn here: .*'crayon'.*MUJOCO_GL=egl \(libegl1\)"):
        episode(act, "Hopper-v4", 0)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"needs imageio-ffmpeg: pip install imageio-ffmpeg, or name a \.gif"):
        check_format(tmp_path / "episode.mp4", 1)
    assert not list(tmp_path.iterdir())
