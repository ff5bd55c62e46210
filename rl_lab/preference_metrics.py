"""Measures of preferences: shares with their intervals, calibration, correlation. Pure functions of arrays."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from rl_lab.checkpoint import replace_file


def wilson(successes: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share; z of 1.96 for 95 %                                     [Wilson 1927, JASA 22(158)]

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n); ties may count as half a success.
    """
    share, weight = successes / count, z * z / count
    half = z * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max((share + weight / 2 - half) / (1 + weight), 0.0), min((share + weight / 2 + half) / (1 + weight), 1.0)


def share(successes: ArrayLike) -> dict[str, float]:
    """The mean of (N,) successes, each 0, 0.5 or 1, with its 95 % Wilson interval."""
    x = np.asarray(successes, np.float64)
    low, high = wilson(x.sum(), len(x))
    return {"mean": float(x.mean()), "low": low, "high": high}


def larger(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """(N,) 1 where the first number is the larger one, 0 where the second is, 0.5 for a tie."""
    return (np.sign(np.subtract(first, second, dtype=np.float64)) + 1) / 2


def auc(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The probability that a good one has the larger score than a bad one, ties half, with its 95 % interval.

    The interval has every A whose distance to the probability found is within 1.96 of the deviation that A itself would
    give it, as Wilson's of a share has                                    [Newcombe 2006, Stat. Med. 25:559, method 5]

        V(A) = A (1 - A) (1 + (N - 1) ((1 - A) / (2 - A) + A / (1 + A))) / (m n),   N = (m + n) / 2

    of m good and n bad ones: exact for exponential scores and m = n.

    Args:
        scores: (N,) numbers.
        labels: (N,) true for the good ones; both kinds are there.
    """
    x, good = np.asarray(scores, np.float64), np.asarray(labels, bool)
    mean, m, n = float(larger(x[good][:, None], x[~good]).mean()), good.sum(), (~good).sum()
    a = np.linspace(0, 1, 100_001)
    variance = a * (1 - a) * (1 + ((m + n) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (m * n)
    inside = a[(a - mean) ** 2 <= 1.959964**2 * variance]
    low, high = (float(inside.min()), float(inside.max())) if len(inside) else (mean, mean)
    return {"mean": mean, "low": min(low, mean), "high": max(high, mean)}


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, low: float = 0.0, bins: int = 10) -> dict[str, Any]:
    """The expected calibration error, and its table.

    ECE = sum_b n_b / N |mean outcome_b - mean probability_b|            [Naeini et al. 2015; Guo et al. 2017, Eq. 3]
    over bins of equal width. Few samples make it too large, also for who is perfectly calibrated.

    Args:
        probabilities: (N,) in [low, 1].
        outcomes: (N,) what came true of them, in [0, 1].
        low: where the first bin begins.
    """
    p, y = np.asarray(probabilities, np.float64), np.asarray(outcomes, np.float64)
    edges = np.linspace(low, 1, bins + 1)
    where = np.digitize(p, edges[1:-1])
    rows = []
    for index in np.unique(where):
        mine = where == index
        names = {
            "low": edges[index],
            "high": edges[index + 1],
            "probability": p[mine].mean(),
            "outcome": y[mine].mean(),
        }
        rows.append({"count": int(mine.sum())} | {name: float(x) for name, x in names.items()})
    error = sum(row["count"] * abs(row["outcome"] - row["probability"]) for row in rows) / len(p)
    return {"expected_calibration_error": error, "bins": rows}


def pair_calibration(differences: ArrayLike, bins: int = 10) -> dict[str, Any]:
    """Calibration of p = sigmoid(r_c - r_r), from (N,) differences of the rewards of chosen and rejected.

    Which answer comes first is arbitrary: with the chosen one first the outcome is always 1, and p alone would look
    badly calibrated however good it is. So the confidence max(p, 1 - p) in the answer that the model prefers is held
    against whether that is the chosen one.
    """
    x = np.asarray(differences, np.float64)
    return calibration(1 / (1 + np.exp(-np.abs(x))), larger(x, 0.0), 0.5, bins)


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Their correlation; NaN if either is constant."""
    a, b = (z - z.mean() for z in (np.asarray(x, np.float64), np.asarray(y, np.float64)))
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm else math.nan


def pair_report(rewards: NDArray[Any], lengths: NDArray[Any]) -> dict[str, Any]:
    """How well rewards tell the chosen answers, beside how well lengths do.

    Args:
        rewards: (N, 2) of the chosen and the rejected answer.
        lengths: (N, 2) in tokens.
    """
    return {
        "pairs": len(rewards),
        "accuracy": share(larger(*rewards.T)),
        "length_baseline": share(larger(*lengths.T)),
        "margin": float((rewards[:, 0] - rewards[:, 1]).mean()),
        "mean_reward": float(rewards.mean()),
        "reward_length_correlation": pearson(rewards.ravel(), lengths.ravel()),
        **pair_calibration(rewards[:, 0] - rewards[:, 1]),
    }


def step_report(
    probabilities: Sequence[NDArray[Any]], labels: Sequence[NDArray[Any]], scores: ArrayLike, lengths: ArrayLike
) -> dict[str, Any]:
    """How well steps are told right from wrong, beside who always says what is commoner.

    Args:
        probabilities: of each of N solutions, (T,) that its steps are right.
        labels: likewise, 1 for a right step.
        scores: (N,) aggregated probabilities of the solutions, which are right if all their steps are.
        lengths: (N,) in tokens.
    """
    p, y = np.concatenate(probabilities), np.concatenate(labels)
    whole = np.array([x.min() for x in labels])
    return {
        "steps": len(p),
        "accuracy": share((p > 0.5) == (y > 0.5)),
        "majority_baseline": share(y == (y.mean() > 0.5)),
        "solutions": len(whole),
        "solution_accuracy": share((np.asarray(scores) > 0.5) == (whole > 0.5)),
        "solution_majority_baseline": share(whole == (whole.mean() > 0.5)),
        "reward_length_correlation": pearson(scores, lengths),
        **calibration(p, y),
    }


def headline(report: dict[str, Any]) -> dict[str, float]:
    """A report's numbers without intervals and bins."""
    means = {name: x["mean"] if isinstance(x, dict) else x for name, x in report.items() if name != "bins"}
    return {name: float(x) for name, x in means.items()}


def reliability_diagram(report: dict[str, Any], path: Path) -> None:
    """Draw a report's calibration as PNG: outcomes over probabilities, their 95 % intervals and counts."""
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for row in report["bins"]:
        low, high = wilson(row["outcome"] * row["count"], row["count"])
        axes.plot([row["probability"]] * 2, [low, high], color="tab:blue", linewidth=1)
        axes.plot(row["probability"], row["outcome"], "o", color="tab:blue", markersize=4)
        axes.annotate(str(row["count"]), (row["probability"], high), ha="center", va="bottom", fontsize=7)
    axes.set(xlim=(0, 1), ylim=(0, 1.05), xlabel="probability", ylabel="share that came true")
    axes.set_title(f"expected calibration error {report['expected_calibration_error']:.3f}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    replace_file(path, buffer.getvalue())
