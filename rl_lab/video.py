"""Film an episode.

`Shots` are its moments, the first one before any step: of each what draws it, (H, W, 3) uint8, to be called before the
next moment if at all, and the return so far.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]
Shots = Iterator[tuple[Callable[[], Any], float]]


def check_format(path: Path, num_runs: int) -> None:
    """Refuse what `film` could not write: ValueError."""
    if num_runs != 1:
        raise ValueError(f"--video films one run, not {num_runs}")
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"--video {path} must end in .gif or .mp4")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"--video {path} needs imageio-ffmpeg: pip install imageio-ffmpeg, or name a .gif")


def film(shots: Shots, fps: float, path: Path) -> str:
    """Write an episode into a .mp4, or a .gif with large pictures at half their size.

    Args:
        shots: see above.
        fps: of them, a second.
    Returns:
        a line about the episode.
    """
    stride = math.ceil(fps / 50) if path.suffix == ".gif" else 1  # viewers play no more than 50 frames a second
    returns: list[float] = []

    def frames() -> Iterator[Frame]:
        for step, (draw, total) in enumerate(shots):
            returns.append(total)
            if step % stride == 0:
                yield draw()

    if path.suffix == ".gif":
        from PIL import Image

        pictures = (Image.fromarray(frame) for frame in frames())
        images = [picture.reduce(2 if picture.width > 320 else 1).quantize() for picture in pictures]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 * stride / fps, loop=0)
    else:
        import imageio

        writer: Any = imageio.get_writer(path, fps=fps, macro_block_size=2)
        with writer:
            for frame in frames():
                writer.append_data(frame)
    return f"{path}: one deterministic episode, return {returns[-1]:.1f} in {len(returns) - 1} steps"


def episode(act: Callable[..., Any], env_id: str, seed: int) -> tuple[Shots, float]:
    """An episode of Gymnasium's `env_id`, which draws it, and its frames a second: what `film` takes.

    Args:
        act: (obs, mask=...) to an action.
        seed: of the environment.
    Raises:
        ValueError: if the environment cannot be drawn here; it says what is missing.
    """
    _choose_gl()
    try:
        env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        start = env.reset(seed=seed)
        env.render()
    except Exception as error:  # pygame, MuJoCo and OpenGL raise kinds of their own
        hint = "; without a display MuJoCo draws with MUJOCO_GL=egl (libegl1) or osmesa (libosmesa6)"
        hint = "" if isinstance(error, gym.error.Error) else hint
        raise ValueError(f"--video: {env_id} cannot be drawn here: {error}{hint}") from error
    if not isinstance(env.observation_space, gym.spaces.Box):
        raise ValueError(f"--video: Gymnasium's {env_id} cannot be played by it: it observes {env.observation_space}")

    def shots() -> Shots:
        (obs, info), total, done = start, 0.0, False
        yield env.render, total
        while not done:
            obs, reward, terminated, truncated, info = env.step(act(obs, mask=info.get("action_mask")))
            total, done = total + float(reward), terminated or truncated
            yield env.render, total
        env.close()

    return shots(), env.metadata.get("render_fps", 30)


def _choose_gl() -> None:
    """Let MuJoCo draw where there is no display: it would take GLFW, which needs one."""
    if os.environ.get("DISPLAY") or "MUJOCO_GL" in os.environ:
        return
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ["MUJOCO_GL"] = name
            return
