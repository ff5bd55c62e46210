"""Environments by Gymnasium id: `make`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence

import gymnasium as gym
import torch

from rl_lab.envs.adapter import GymnasiumEnv
from rl_lab.envs.classic import CLASSIC
from rl_lab.envs.gridworld import GRIDWORLDS
from rl_lab.envs.memory import Recall
from rl_lab.envs.minatar import MINATAR
from rl_lab.vector import TensorEnv, VectorEnv

NATIVE: dict[str, Callable[..., TensorEnv]] = {**CLASSIC, "Recall-v0": Recall, **GRIDWORLDS, **MINATAR}
BACKENDS = ("auto", "native", "gymnasium", "mujoco-warp")
ATARI, GPU = '-c constraints.txt -e ".[atari]"', '-c constraints.txt -e ".[gpu]"'
INSTALL = {  # by the package missing
    "ale_py": ATARI,
    "cv2": ATARI,
    "mujoco": '"gymnasium[mujoco]"',
    "mujoco_warp": GPU,
    "warp": GPU,
}


def make(
    env_id: str,
    seeds: Sequence[int],
    num_envs: int,
    device: torch.device | str = "cpu",
    backend: str = "auto",
    num_threads: int = 1,
    sticky_actions: float = 0.0,
) -> VectorEnv:
    """Make len(seeds) * num_envs environments in the form of `rl_lab.vector`.

    Args:
        env_id: a Gymnasium id, such as "CartPole-v1"; "module:Name-v0" imports the module that registers it. Or
            "module:Class", a `VectorEnv` that is called with (seeds, num_envs, device). Recall-v0 is this package's
            own.
        seeds: one non-negative integer per agent.
        num_envs: environments per seed.
        device: where the tensors live. MuJoCo, Atari and Gymnasium environments compute on the CPU and hand tensors
            over, unless the backend is "mujoco-warp".
        backend: "native" is this package's batched implementation, "gymnasium" the original, "auto" the native one
            where there is one; "mujoco-warp" simulates MuJoCo's environments on the device, in float32.
        num_threads: threads that share the rows of a native MuJoCo environment, processes that share a native Atari's.
        sticky_actions: probability that a native Atari game repeats the frame before's action.
    Raises:
        ValueError: if an argument is unusable, the id unknown or a package missing; it says what would work.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; there are {', '.join(BACKENDS)}")
    if num_envs < 1:
        raise ValueError(f"num_envs={num_envs} must be at least 1")
    if not seeds or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)} must be one or more integers from 0 up")
    try:
        atari = env_id.endswith("NoFrameskip-v4")
        if atari or env_id.startswith("ALE/"):
            importlib.import_module("ale_py")  # registers these ids
        known_ids = {**gym.registry, **NATIVE}
        if env_id not in known_ids and ":" not in env_id:
            nearest = difflib.get_close_matches(env_id, known_ids)
            hint = f"the nearest ids are {', '.join(nearest)}" if nearest else "no id is spelled nearly so"
            raise ValueError(f"env_id={env_id!r} is unknown: {hint}")
        if sticky_actions and (backend == "gymnasium" or not atari):
            raise ValueError(
                f"sticky_actions={sticky_actions}: only native Atari games, as BreakoutNoFrameskip-v4, have them; 0 is "
                "the rest's"
            )
        if (plugin := _plugin(env_id)) and backend == "auto" and num_threads == 1:
            return plugin(seeds, num_envs, device)
        if backend == "mujoco-warp" and num_threads == 1:
            from rl_lab.envs.mujoco_warp import MujocoWarpEnv  # here, so that the others do not need warp

            return MujocoWarpEnv(env_id, seeds, num_envs, device)
        if backend in ("auto", "native"):
            if atari:
                from rl_lab.envs.atari import AtariEnv  # here, so that the others need neither ale_py nor cv2

                return AtariEnv(env_id, seeds, num_envs, device, sticky_actions, num_threads)
            if env_id in NATIVE and num_threads == 1:
                return NATIVE[env_id](seeds, num_envs, device)
            from rl_lab.envs.mujoco import MujocoEnv  # here, so that the others do not need mujoco
            from rl_lab.envs.mujoco_tasks import TASKS

            if env_id in TASKS:
                return MujocoEnv(env_id, seeds, num_envs, device, num_threads)
            if backend == "native" and num_threads == 1:
                known = ", ".join([*NATIVE, *TASKS])
                raise ValueError(f"backend='native' has no {env_id}; it has {known} and Atari's, as PongNoFrameskip-v4")
        if num_threads != 1:
            raise ValueError(
                f"num_threads={num_threads} (--env-threads): only native MuJoCo and Atari environments share rows; 1 "
                "is the rest's"
            )
        return GymnasiumEnv(env_id, seeds, num_envs, device)
    except (gym.error.Error, ImportError) as error:
        package = getattr(error, "name", None)  # Gymnasium's own errors name no package, they say what to install
        reason = f"it needs {package}: pip install {INSTALL[package]}" if package in INSTALL else error
        raise ValueError(f"{env_id} cannot be made: {reason}") from error


def _plugin(env_id: str) -> Callable[..., VectorEnv] | None:
    """The class that "module:Class" names, None where it is something else."""
    module, _, name = env_id.partition(":")
    found = getattr(importlib.import_module(module), name, None) if name else None
    return found if isinstance(found, type) and issubclass(found, VectorEnv) else None
