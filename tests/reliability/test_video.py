"""Filming an episode, where this machine can draw, and what is said where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl_lab.algorithms import ppo
from rl_lab.video import check_format, film

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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Gymnasium's viewer, half made
def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(*_: object, **__: object) -> int:
        raise AssertionError("nothing is played where nothing can be drawn")

    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    with pytest.raises(
        ValueError, match=r'CartPole-v1 cannot be drawn here: .*pip install "gymnasium\[classic-control\]"'
    ):
        film(act, "CartPole-v1", 0, tmp_path / "episode.gif")
    monkeypatch.setenv("MUJOCO_GL", "crayon")
    with pytest.raises(ValueError, match=r"Hopper-v4 cannot be drawn here: .*'crayon'.*MUJOCO_GL=egl \(libegl1\)"):
        film(act, "Hopper-v4", 0, tmp_path / "episode.gif")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ValueError, match=r"needs imageio-ffmpeg: pip install imageio-ffmpeg, or name a \.gif"):
        check_format(tmp_path / "episode.mp4", 1)
    assert not list(tmp_path.iterdir())
