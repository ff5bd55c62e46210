"""Best-of-n against the enumeration of all draws, and its bound against divergences that are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rl_lab.best_of_n import expected_best, kl_bound


def enumerated(proxy: np.ndarray, gold: np.ndarray, n: int) -> float:
    """Mean over all draws of n samples of the gold score of those with the highest proxy score."""
    draws = [list(draw) for draw in itertools.combinations(range(len(proxy)), n)]
    return float(np.mean([gold[draw][proxy[draw] == proxy[draw].max()].mean() for draw in draws]))


@pytest.mark.parametrize("total", [1, 2, 5, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_the_expectation_is_that_over_all_draws(total: int, ties: bool) -> None:
    random = np.random.default_rng(total)
    proxy = random.integers(0, 3, (3, total)).astype(float) if ties else random.normal(size=(3, total))
    gold = random.normal(size=(3, total))
    found, own = expected_best(proxy, gold), expected_best(proxy)
    assert list(found) == {1: [1], 2: [1, 2], 5: [1, 2, 4, 5], 8: [1, 2, 4, 8]}[total]
    for n, x in found.items():
        assert x == pytest.approx(np.mean([enumerated(p, g, n) for p, g in zip(proxy, gold, strict=True)]), abs=1e-12)
        assert own[n] == pytest.approx(np.mean([enumerated(p, p, n) for p in proxy]), abs=1e-12)


def test_many_samples_do_not_overflow() -> None:
    x = np.arange(2000.0)[None]
    assert expected_best(x)[1024] == pytest.approx(
        1024 / 1025 * 2001 - 1
    )  # E[max of n from 1..N] = n / (n + 1) (N + 1)


@pytest.mark.parametrize(
    ("proxy", "gold", "wanted"),
    [
        (np.zeros(3), np.zeros(3), "must both be"),
        (np.zeros((1, 3)), np.zeros((1, 2)), "must both be"),
        (np.array([[0.0, np.nan]]), np.zeros((1, 2)), "not finite"),
    ],
)
def test_scores_that_are_none_are_refused(proxy: np.ndarray, gold: np.ndarray, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        expected_best(proxy, gold)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_bound_holds_and_is_reached_by_many_answers_of_equal_probability(n: int) -> None:
    def divergence(answers: int) -> float:
        steps = np.arange(answers + 1) / answers
        best = np.diff(steps**n)  # probabilities that the k-th best answer wins
        return float((best[best > 0] * np.log(best[best > 0] * answers)).sum())

    assert divergence(3) <= kl_bound(n) + 1e-12
    assert divergence(200_000) == pytest.approx(kl_bound(n), abs=1e-3)
    assert kl_bound(1) == 0.0 and kl_bound(2) == pytest.approx(math.log(2) - 0.5)
