"""Advantages and returns over a rollout: pure functions of (T, N) tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_sum(x: Tensor, discounts: Tensor) -> Tensor:
    """y_t = x_t + discounts_t * y_{t+1}, with y_T = 0, along the first axis.

    By recursive doubling: log2(T) passes of whole-tensor arithmetic instead of T small steps, which is what both a
    compiler and a GPU want. (Hillis and Steele 1986, Data parallel algorithms.)

    Args:
        x, discounts: (T, ...) of equal shape.
    Returns:
        (T, ...)
    """
    if x.shape != discounts.shape:
        raise ValueError(f"shapes differ: x {tuple(x.shape)}, discounts {tuple(discounts.shape)}")
    shift = 1
    while shift < x.shape[0]:
        pad = torch.zeros_like(x[:shift])
        x = x + discounts * torch.cat([x[shift:], pad])
        discounts = discounts * torch.cat([discounts[shift:], pad])
        shift *= 2
    return x


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalized advantage estimation over a rollout.

    A_t = sum_l (gamma * gae_lambda)^l * delta_{t+l}               [Schulman et al. 2016, Eq. 16]
    delta_t = r_t + gamma * V(s_{t+1}) * (1 - terminated_t) - V(s_t)
    A truncated step bootstraps from its true successor; the sum stops at either.

    Args:
        rewards: (T, N) reward of each step, env units.
        values: (T, N) value of the observation acted on.
        next_values: (T, N) value of next_obs, the true successor.
        terminated, truncated: (T, N) bool.
        gamma: discount per env step, in [0, 1].
        gae_lambda: in [0, 1].
    Returns:
        (T, N) advantages; add the values for the return targets.
    Raises:
        ValueError: if shapes differ.
    """
    shapes = {tuple(x.shape) for x in (rewards, values, next_values, terminated, truncated)}
    if len(shapes) > 1:
        raise ValueError(f"rewards, values, next_values, terminated, truncated differ in shape: {sorted(shapes)}")
    deltas = rewards + gamma * next_values * ~terminated - values
    return discounted_sum(deltas, gamma * gae_lambda * ~(terminated | truncated))


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the last axis; not finite where the returns do not vary."""
    return 1 - (returns - values).var(-1, correction=0) / returns.var(-1, correction=0)
