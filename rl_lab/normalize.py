"""Running mean and variance, as pure functions of a dict of float64 tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_lab.vector import Step

Moments = dict[str, Tensor]


def init_moments(shape: tuple[int, ...], device: torch.device) -> Moments:
    """Mean 0, variance 1, and the weight 1e-4 that Gymnasium's normalisers start with."""
    return {
        "mean": torch.zeros(shape, dtype=torch.float64, device=device),
        "var": torch.ones(shape, dtype=torch.float64, device=device),
        "count": torch.full((), 1e-4, dtype=torch.float64, device=device),
    }


def update_moments(moments: Moments, batch: Tensor, mask: Tensor | None = None) -> Moments:
    """Merge a batch into the running moments (Chan et al. 1979, pairwise update).

    Args:
        batch: (N, *shape)
        mask: (N,) bool, rows that count; none counting leaves the moments as they are.
    """
    batch = batch.double()
    # torch.ones, for a tensor made of a Python number would be a constant, which the compiler refuses inside a loop.
    counts = torch.ones(len(batch), dtype=torch.float64, device=batch.device) if mask is None else mask.double()
    weights, n = counts.reshape(-1, *[1] * (batch.ndim - 1)), counts.sum()
    batch_mean = (batch * weights).sum(0) / n.clamp(min=1.0)
    batch_squares = ((batch - batch_mean).square() * weights).sum(0)
    delta = batch_mean - moments["mean"]
    count = moments["count"] + n
    squares = moments["var"] * moments["count"] + batch_squares + delta.square() * moments["count"] * n / count
    return {"mean": moments["mean"] + delta * n / count, "var": squares / count, "count": count}


def standardize(moments: Moments, x: Tensor, clip: float) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), clipped to +-clip, as float32."""
    return ((x.double() - moments["mean"]) / (moments["var"] + 1e-8).sqrt()).clamp(-clip, clip).float()


def begin(obs: Tensor, normalizer: dict[str, Any] | None = None) -> tuple[dict[str, Any], Tensor]:
    """A normaliser of one agent that has seen its episodes' first observations (N, *obs), and these normalised.

    Args:
        normalizer: the one to go on with, where all environments begin new episodes; None makes one.
    """
    past = normalizer or {"obs": init_moments(obs.shape[1:], obs.device), "returns": init_moments((), obs.device)}
    seen = update_moments(past["obs"], obs)
    discounted = torch.zeros(len(obs), dtype=torch.float64, device=obs.device)
    return {"obs": seen, "returns": past["returns"], "discounted": discounted}, standardize(seen, obs, clip=10.0)


def observe(normalizer: dict[str, Any], step: Step, gamma: float, cleanrl: bool) -> tuple[dict[str, Any], Step]:
    """Normalise the observations of a step and scale its rewards by running statistics, both clipped to +-10.

    Details 28 and 29 (observations), 30 and 31 (rewards) of PPO, after Huang et al. 2022.

    The true successor enters the statistics, then the first observation of a new episode where one begins. Rewards are
    divided by the standard deviation of the discounted return so far; no mean is subtracted.

    Args:
        step: of one agent's N environments.
        gamma: discount of that return.
        cleanrl: that return is kept where Gymnasium 0.29's NormalizeReward keeps it: a truncation does not end it, and
            a termination drops the past at the terminal step itself. Else it starts anew after either.
    """
    done = step.terminated | step.truncated
    seen = update_moments(normalizer["obs"], step.next_obs)
    next_obs = standardize(seen, step.next_obs, clip=10.0)
    seen = update_moments(seen, step.obs, mask=done)
    fresh = standardize(seen, step.obs, clip=10.0)
    obs = torch.where(done.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, next_obs)

    past = normalizer["discounted"] * gamma
    discounted = torch.where(step.terminated, 0.0, past) + step.rewards if cleanrl else past + step.rewards
    scale = update_moments(normalizer["returns"], discounted)
    rewards = (step.rewards / (scale["var"] + 1e-8).sqrt()).clamp(-10.0, 10.0).float()
    discounted = discounted if cleanrl else torch.where(done, 0.0, discounted)
    normalizer = {"obs": seen, "returns": scale, "discounted": discounted}
    return normalizer, Step(next_obs, rewards, step.terminated, step.truncated, obs)
