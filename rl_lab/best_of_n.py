"""Best-of-n: the expected score of the best of n samples, and how far from the model choosing it leads."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def expected_best(proxy: Floats, gold: Floats | None = None) -> dict[int, float]:
    """Score of the best of n samples, in expectation over which n of the N samples are drawn, without bias.

    E[x of the best of n] = sum_k C(k - 1, n - 1) / C(N, n) * x_(k),     x_(k) of the k-th lowest proxy score

    [the estimator of Nakano et al. 2021, arXiv:2112.09332]. Of equal proxy scores each is taken with the
    same probability.

    Args:
        proxy: (P, N) scores of N samples for each of P prompts; the best is the one with the highest.
        gold: (P, N) scores of the same samples by another judge, whose expectation is wanted; else proxy's is.
    Returns:
        mean over prompts for n = 1, 2, 4, ... and N.
    Raises:
        ValueError: if the shapes differ or are not (P, N), or a score is not finite.
    """
    gold = proxy if gold is None else gold
    if proxy.ndim != 2 or proxy.shape != gold.shape or not proxy.size:
        raise ValueError(f"scores of shapes {proxy.shape} and {gold.shape} must both be (prompts, samples)")
    if not np.isfinite(proxy).all() or not np.isfinite(gold).all():
        raise ValueError("a score is not finite")
    total = proxy.shape[1]
    ordered = np.stack([_by_rank(*row) for row in zip(proxy, gold, strict=True)])  # (P, N)
    sizes = sorted({2**i for i in range(total.bit_length())} | {total})
    return {n: float((ordered @ _weights(n, total)).mean()) for n in sizes}


def _by_rank(proxy: Floats, gold: Floats) -> Floats:
    """(N,) gold scores in the order of the proxy's, each the mean over those of equal proxy scores."""
    _, group, count = np.unique(proxy, return_inverse=True, return_counts=True)
    means = np.bincount(group, gold) / count
    return np.repeat(means, count)


def _weights(n: int, total: int) -> Floats:
    """(N,) probabilities that the k-th lowest of N samples is the best of n drawn from them."""
    return np.array([math.comb(k - 1, n - 1) / math.comb(total, n) for k in range(1, total + 1)])


def kl_bound(n: int) -> float:
    """Upper bound on the KL divergence of best-of-n from the model, in nats: log n - (n - 1) / n.

    [Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; that it is a bound, and not always reached:
    Beirami et al. 2024, arXiv:2401.01879, Theorem 3.1]
    """
    return math.log(n) - (n - 1) / n
