"""Kahneman-Tversky optimization: the loss of completions that are labelled desirable or not, one by one.

Ethayarajh et al. 2024, KTO: model alignment as prospect theoretic optimization, arXiv:2402.01306; equations as numbered
in its version 4.

    r = log(policy(y | x) / reference(y | x))
    v = lambda_D sigmoid(beta (r - z_0)) where y is desirable, else lambda_U sigmoid(beta (z_0 - r))
    L = lambda_y - v                                                                                          Eq. 8
    z_0 = max(0, mean of log(policy(y' | x) / reference(y' | x))), y' another example's completion; no gradient

A batch split into micro-batches has one z_0, that of the whole batch: so the loss takes it as an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

BALANCE = (1.0, 1.5)  # weighted desirable over weighted undesirable examples, Eq. 9; once 4/3 (Eq. 8), as in TRL


def mismatched(n: int) -> Tensor:
    """(n,) for each example the index of another one, whose completion it takes: the next; for the last, the first.

    Rows must be in random order: two completions of one prompt, side by side, would not be mismatched.

    Raises:
        ValueError: if there is no other example.
    """
    if n < 2:
        raise ValueError(f"KTO's reference point needs another example's completion: 2 examples or more, got {n}")
    return torch.arange(n).roll(-1)


def reference_point(policy_kl_logps: Tensor, reference_kl_logps: Tensor) -> Tensor:
    """() z_0, from (B,) log-probabilities of mismatched completions; without gradient."""
    return (policy_kl_logps - reference_kl_logps).mean().clamp(min=0).detach()


def loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    z_0: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Losses of single completions.                                                     [Ethayarajh et al. 2024, Eq. 8]

    Args:
        policy_logps, reference_logps: (B,) float32 sums over a completion's tokens, in nats.
        labels: (B,) bool, true where the completion is desirable.
        z_0: () the reference point, in nats.
        beta: how fast value saturates away from z_0; desirable_weight, undesirable_weight: lambda_D, lambda_U.
    Returns:
        (B,) losses, between 0 and the weight.
    """
    assert policy_logps.shape == reference_logps.shape == labels.shape == policy_logps.shape[:1] and z_0.ndim == 0
    gains = policy_logps - reference_logps - z_0
    losses = (-beta * torch.where(labels, gains, -gains)).sigmoid()  # 1 - sigmoid(x) is sigmoid(-x)
    return torch.where(labels, desirable_weight * losses, undesirable_weight * losses)


def weights_notice(
    num_desirable: int, num_undesirable: int, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """What to say of weights that the paper would not choose for so many examples, if anything.

    lambda_D n_D / (lambda_U n_U) in [1, 3/2]                                            [Ethayarajh et al. 2024, Eq. 9]
    """
    if not (num_desirable and num_undesirable):
        return f"{num_desirable} desirable and {num_undesirable} undesirable examples: one label alone has no contrast"
    balanced = undesirable_weight * num_undesirable / num_desirable  # desirable_weight at which the ratio is 1
    low, high = BALANCE
    if low <= round(desirable_weight / balanced, 6) <= high:
        return None
    return (
        f"{num_desirable} desirable and {num_undesirable} undesirable examples, weighted {desirable_weight:g} and "
        f"{undesirable_weight:g}: Ethayarajh et al. 2024, Eq. 9, advise desirable_weight from {low * balanced:.3g} to "
        f"{high * balanced:.3g} at this undesirable_weight"
    )
