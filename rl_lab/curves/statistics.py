"""The statistics of curve matching: pure functions of NumPy arrays, random numbers from a generator handed in.

Shapes: R runs (seeds), G grid points, B bootstrap repetitions; `...` are independent rows, so that one call judges a
thousand synthetic pairs as well as one real pair.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

VERDICTS = ("better", "match", "underpowered", "worse")  # from best to worst, so the worse of two is the larger index
LEVEL = 0.90  # two-sided: a 5 % risk on either side, the level of an equivalence test by two one-sided tests
GRID = 100  # points; one per hundredth of the budget
REPETITIONS = 2_000  # of the bootstrap; the ends of a 90 % interval then move by about 2 % of its width
POWER = 0.80  # the chance of `match` for two equal algorithms that the seeds asked for shall give
_STANDARD_NORMAL = NormalDist()


class Interval(NamedTuple):
    """An estimate and its interval, floats or arrays of independent rows."""

    estimate: Floats
    low: Floats
    high: Floats


def final_score(returns: Floats, episodes: int = 100) -> float:
    """Mean return of the last 100 training episodes of a run, CleanRL's figure.

    Args:
        returns: (E,) episodic returns in the order in which the episodes ended.
    Raises:
        ValueError: if the run has fewer episodes.
    """
    if len(returns) < episodes:
        raise ValueError(f"a run has {len(returns)} episodes, its final score is the mean of the last {episodes}")
    return float(returns[-episodes:].mean())


def on_grid(steps: Floats, returns: Floats, budget: int, points: int = GRID) -> Floats:
    """One run's learning curve on the common step grid, unsmoothed.

    Point g is the mean return of the episodes that ended in the g-th of `points` equal parts of the budget; a part in
    which none ended is interpolated from its neighbours.

    Args:
        steps, returns: (E,) step at which an episode ended, counted from 0 to `budget`, and its return.
    Returns:
        (G,) returns.
    """
    part = np.minimum((steps * points / budget).astype(np.int64), points - 1)
    episodes = np.bincount(part, minlength=points)
    filled = np.flatnonzero(episodes)
    means = np.bincount(part, returns, points)[filled] / episodes[filled]
    return np.interp(np.arange(points), filled, means)


def departure(curve: Floats, margin: float) -> int:
    """First point of a (G,) curve that differs from its start by more than `margin`; G if it never leaves its start."""
    away = np.flatnonzero(np.abs(curve - curve[0]) > margin)
    return int(away[0]) if len(away) else len(curve)


def normalised_area(curves: Floats, start: int = 0) -> Floats:
    """Area under (..., G) curves from grid point `start` on, divided by the steps it spans: return units, (...)."""
    return np.asarray(curves[..., start:].mean(axis=-1))


def iqm(scores: Floats, axis: int = -1) -> Floats:
    """Interquartile mean: the mean without the lowest and highest quarter of the runs, floor(R / 4) on either side.

    [Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", section 4.3]
    """
    cut = scores.shape[axis] // 4
    ordered = np.moveaxis(np.sort(scores, axis=axis), axis, -1)
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


def resample(scores: Floats, generator: np.random.Generator, repetitions: int = REPETITIONS) -> Floats:
    """Stratified bootstrap samples: every row of (..., R) is a stratum, drawn with replacement on its own.

    Returns:
        (B, ..., R) scores.
    """
    index = generator.integers(0, scores.shape[-1], (repetitions, *scores.shape))
    return np.take_along_axis(scores[None], index, axis=-1)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile (0.5 to 1) of Student's t; with t = sqrt(f) tan(a) its density in the angle a is cos(a)^(f - 1)."""
    angle = np.linspace(0.0, math.pi / 2, 20_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(2 * probability - 1, mass / mass[-1], angle))


def widening(runs: int, level: float = LEVEL) -> float:
    """Factor by which bootstrap deviations are stretched for R runs: 1.45 for 5, 1.17 for 10, 1.05 for 30 at 90 %.

    The bootstrap treats the spread seen in R runs as the true one. As for a mean, sqrt(R / (R - 1)) corrects that
    spread and t / z the uncertainty about it [the "narrowness bias" of Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap"]. One run says nothing about spread: infinite.
    """
    if runs < 2:
        return math.inf
    tail = (1 + level) / 2
    return math.sqrt(runs / (runs - 1)) * t_quantile(tail, runs - 1) / _STANDARD_NORMAL.inv_cdf(tail)


def _deviations(scores: Floats, generator: np.random.Generator, level: float = LEVEL) -> Floats:
    """(B, ...) bootstrap deviations of the IQM of (..., R) scores, stretched for few runs; not a number for one run."""
    with np.errstate(invalid="ignore"):  # infinity times no spread
        return widening(scores.shape[-1], level) * (iqm(resample(scores, generator)) - iqm(scores))


def _interval(estimate: Floats, deviations: Floats, level: float = LEVEL) -> Interval:
    low, high = np.quantile(deviations, [(1 - level) / 2, (1 + level) / 2], axis=0)
    unbounded = np.isnan(low)
    return Interval(
        estimate, np.where(unbounded, -math.inf, estimate + low), np.where(unbounded, math.inf, estimate + high)
    )


def iqm_interval(scores: Floats, generator: np.random.Generator, level: float = LEVEL) -> Interval:
    """IQM of (..., R) scores with its interval; of (G, R) curves: the sample-efficiency curve, pointwise."""
    return _interval(iqm(scores), _deviations(scores, generator, level), level)


def difference_interval(ours: Floats, reference: Floats, generator: np.random.Generator) -> Interval:
    """IQM of ours (..., R) less IQM of the reference (..., R'), 90 % interval; the two sides are the strata."""
    deviations = _deviations(ours, generator) - _deviations(reference, generator)
    return _interval(iqm(ours) - iqm(reference), deviations)


def decide(low: Floats, high: Floats, margin: float | Floats) -> NDArray[np.int64]:
    """Index into VERDICTS of the equivalence test.

    `match` if -margin < low and high < margin; else `better` if low > 0; else `worse` if high < 0; else
    `underpowered`.
    """
    match = (low > -margin) & (high < margin)
    return np.select([match, low > 0, high < 0], [1, 0, 3], default=2)


def seeds_needed(ours: Floats, reference: Floats, margin: float, generator: np.random.Generator) -> int | None:
    """Seeds per side with which two equal algorithms of the observed spread are called `match` with 80 % chance.

    The smallest n with widening(n) z_0.95 e + z_0.90 e <= margin, where e^2 = (s^2 + s'^2) / n is the squared standard
    error of the difference in IQM: the interval's half width, and the room which the difference itself takes. The
    spread s of a side is that of its bootstrapped IQM times sqrt(R), and sqrt(R / (R - 1)) for the small sample.

    Args:
        ours, reference: (R,), (R',) scores.
    Returns:
        n, or None where a side has a single run or n would pass 10,000.
    """
    if min(len(ours), len(reference)) < 2:
        return None
    variance = sum(iqm(resample(x, generator)).var() * len(x) ** 2 / (len(x) - 1) for x in (ours, reference))
    half, room = _STANDARD_NORMAL.inv_cdf((1 + LEVEL) / 2), _STANDARD_NORMAL.inv_cdf((1 + POWER) / 2)
    n = max(2, math.ceil(variance * ((half + room) / margin) ** 2))
    while n <= 10_000 and (widening(n) * half + room) * math.sqrt(variance / n) > margin:
        n += 1
    return n if n <= 10_000 else None


def probability_of_improvement(ours: Floats, reference: Floats) -> float:
    """Chance that a run of ours scores above a run of the reference, ties half [Agarwal et al. 2021, section 4.3]."""
    difference = ours[:, None] - reference[None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def performance_profile(scores: Floats, thresholds: Floats) -> Floats:
    """(K,) share of the (R,) scores above each of (K,) thresholds [Agarwal et al. 2021, section 4.2]."""
    return np.asarray((scores[:, None] > thresholds).mean(axis=0))
