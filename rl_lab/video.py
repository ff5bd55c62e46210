"""Film an episode with Gymnasium's own renderer."""

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


def check_format(path: Path, num_runs: int) -> None:
    """Refuse what `film` could not write: ValueError."""
    if num_runs != 1:
        raise ValueError(f"--video films one run, not {num_runs}")
    if path.suffix not in (".gif", ".mp4"):
        raise ValueError(f"--video {path} must end in .gif or .mp4")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ValueError(f"--video {path} needs imageio-ffmpeg: pip install imageio-ffmpeg, or name a .gif")


def film(act: Callable[..., Any], env_id: str, seed: int, path: Path) -> str:
    """Play one episode of Gymnasium's `env_id` into a .mp4, or a .gif of half the size.

    Args:
        act: (obs, mask=...) to an action.
        seed: of the environment.
    Returns:
        a line about the episode.
    Raises:
        ValueError: if the environment cannot be drawn here; it says what is missing.
    """
    _choose_gl()
    try:
        env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
        start = env.reset(seed=seed)
        first: Any = env.render()
    except Exception as error:  # pygame, MuJoCo and OpenGL raise kinds of their own
        hint = "; without a display MuJoCo draws with MUJOCO_GL=egl (libegl1) or osmesa (libosmesa6)"
        hint = "" if isinstance(error, gym.error.Error) else hint
        raise ValueError(f"--video: {env_id} cannot be drawn here: {error}{hint}") from error
    rewards: list[float] = []

    def frames(stride: int) -> Iterator[NDArray[np.uint8]]:
        (obs, info), done = start, False
        yield first
        while not done:
            obs, reward, terminated, truncated, info = env.step(act(obs, mask=info.get("action_mask")))
            rewards.append(float(reward))
            done = terminated or truncated
            if len(rewards) % stride == 0:
                yield env.render()  # type: ignore[misc]

    fps = env.metadata.get("render_fps", 30)
    if path.suffix == ".gif":
        from PIL import Image

        stride = math.ceil(fps / 50)  # viewers play no more than 50 frames a second
        images = [Image.fromarray(frame).reduce(2).quantize() for frame in frames(stride)]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 * stride / fps, loop=0)
    else:
        import imageio

        writer: Any = imageio.get_writer(path, fps=fps, macro_block_size=2)
        with writer:
            for frame in frames(1):
                writer.append_data(frame)
    env.close()
    return f"{path}: one deterministic episode, return {sum(rewards):.1f} in {len(rewards)} steps"


def _choose_gl() -> None:
    """Let MuJoCo draw where there is no display: it would take GLFW, which needs one."""
    if os.environ.get("DISPLAY") or "MUJOCO_GL" in os.environ:
        return
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ["MUJOCO_GL"] = name
            return
