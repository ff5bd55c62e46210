"""Evaluation episodes: a policy that no longer learns, in environments that training never touches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rl_lab.vector import VectorEnv

Inputs = dict[str, Tensor]


def evaluate(
    act: Callable[[Inputs], Any], env: VectorEnv, episodes: int, memory: Inputs | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Run the same number of episodes in every environment.

    The first to finish among environments side by side are the short episodes, and to stop once enough have ended would
    favour them. So each environment counts its own, and what it does after its last one is ignored.

    Args:
        act: {"obs": (B, *obs)} and, where the environment has one, {"mask": (B, A)}, to actions for `env.step`.
        env: B environments, reset here; every episode must end sometime.
        episodes: of each environment, at least 1; whole games where the environment's episodes are lives.
        memory: a recurrent policy's at the start, {name: (B, H)}: `act` gets it with its inputs and returns actions and
            the new one, which is set to zero where an episode ended.
    Returns:
        (B, episodes) returns, and lengths in env steps.
    """
    rows = len(env.seeds) * env.num_envs
    returns, lengths = np.zeros((rows, episodes)), np.zeros((rows, episodes))
    ended = np.zeros(rows, np.int64)
    obs = env.reset()
    while (ended < episodes).any():
        mask = env.action_mask
        inputs = {"obs": obs} if mask is None else {"obs": obs, "mask": mask}
        actions, memory = act(inputs | memory) if memory else (act(inputs), None)
        step = env.step(actions)
        obs = step.obs
        if memory:
            done_rows = (step.terminated | step.truncated).unsqueeze(1)
            memory = {name: x.masked_fill(done_rows, 0.0) for name, x in memory.items()}
        over = env.game_over
        over = step.terminated | step.truncated if over is None else over
        (done,) = (over.cpu().numpy() & (ended < episodes)).nonzero()
        if len(done):
            returns[done, ended[done]] = env.episode_returns.cpu().numpy()[done]
            lengths[done, ended[done]] = env.episode_lengths.cpu().numpy()[done]
            ended[done] += 1
    return returns, lengths


def evaluation_seeds(seeds: Sequence[int], key: tuple[int, ...] = (0,)) -> tuple[int, ...]:
    """Seeds for evaluation environments, other ones for each `key`.

    Training environments are seeded with the agents' seeds themselves, or with numpy's hash of (seed, row). These are
    the hash under a spawn key, which no row number can stand for: numpy puts it after zeros that fill the pool.
    """
    children = [np.random.SeedSequence(seed, spawn_key=key) for seed in seeds]
    return tuple(int(child.generate_state(1, np.uint64)[0]) for child in children)
