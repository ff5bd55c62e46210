"""Running mean and variance, as pure functions of a dict of float64 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

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
    weights = torch.ones_like(batch[:1]) if mask is None else mask.double().reshape(-1, *[1] * (batch.ndim - 1))
    n = (
        torch.as_tensor(float(batch.shape[0]), dtype=torch.float64, device=batch.device)
        if mask is None
        else weights.sum()
    )
    batch_mean = (batch * weights).sum(0) / n.clamp(min=1.0)
    batch_squares = ((batch - batch_mean).square() * weights).sum(0)
    delta = batch_mean - moments["mean"]
    count = moments["count"] + n
    squares = moments["var"] * moments["count"] + batch_squares + delta.square() * moments["count"] * n / count
    return {"mean": moments["mean"] + delta * n / count, "var": squares / count, "count": count}


def standardize(moments: Moments, x: Tensor, clip: float) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), clipped to +-clip, as float32."""
    return ((x - moments["mean"]) / (moments["var"] + 1e-8).sqrt()).clamp(-clip, clip).float()
