"""Measures of preferences against numbers by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rl_lab.preference_metrics import (
    calibration,
    headline,
    larger,
    pair_calibration,
    pair_report,
    pearson,
    reliability_diagram,
    share,
    step_report,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "count", "wanted"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (1, 2, (0.0945, 0.9055))],
)
def test_wilson_intervals(successes: int, count: int, wanted: tuple[float, float]) -> None:
    """At none of n the upper end is z^2 / (n + z^2)."""
    assert wilson(successes, count) == pytest.approx(wanted, abs=1e-4)


def test_a_wilson_interval_covers_the_truth_as_often_as_it_says() -> None:
    counts = np.random.default_rng(0).binomial(100, 0.6, 4000)
    covered = [low <= 0.6 <= high for low, high in (wilson(k, 100) for k in counts)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_a_tie_is_half_a_success() -> None:
    assert larger([3, 1, 2], [1, 3, 2]).tolist() == [1, 0, 0.5]
    assert share([1, 0, 0.5])["mean"] == 0.5


def test_calibration_by_hand() -> None:
    """Two bins of [0, 1]: 0.25 came true half of the time, 0.75 always; the error is (2 * 0.25 + 1 * 0.25) / 3."""
    found = calibration([0.25, 0.25, 0.75], [0, 1, 1], bins=2)
    assert found["expected_calibration_error"] == pytest.approx(0.25)
    assert [(row["count"], row["outcome"]) for row in found["bins"]] == [(2, 0.5), (1, 1)]


def test_a_calibrated_judge_of_pairs_looks_calibrated() -> None:
    """The chosen answer is first in the data: p = sigmoid(r_c - r_r) alone would always have the outcome 1."""
    random = np.random.default_rng(0)
    differences = random.normal(0, 1, 100_000)  # of the truly first answer's and the second's
    first_wins = random.random(len(differences)) < 1 / (1 + np.exp(-differences))
    chosen_minus_rejected = np.where(first_wins, differences, -differences)
    assert pair_calibration(chosen_minus_rejected)["expected_calibration_error"] < 0.01
    assert pair_calibration(3 * chosen_minus_rejected)["expected_calibration_error"] > 0.1  # overconfident
    naive = calibration(1 / (1 + np.exp(-chosen_minus_rejected)), np.ones(len(differences)))
    assert naive["expected_calibration_error"] > 0.3


def test_pearson() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(x, x + y) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    assert math.isnan(pearson(x, np.ones(50)))


def test_a_report_and_its_picture(tmp_path: Path) -> None:
    rewards, lengths = np.array([[2.0, 0], [1, 3], [1, 0]]), np.array([[9, 5], [4, 4], [7, 2]])
    report = pair_report(rewards, lengths)
    assert report["accuracy"]["mean"] == pytest.approx(2 / 3) and report["length_baseline"]["mean"] == pytest.approx(
        5 / 6
    )
    assert report["margin"] == pytest.approx(1 / 3)
    assert report["reward_length_correlation"] == pytest.approx(
        np.corrcoef([2, 0, 1, 3, 1, 0], [9, 5, 4, 4, 7, 2])[0, 1]
    )
    # Sure by sigma(2) of the first, rightly, and of the second, wrongly, in one bin; by sigma(1) of the third, rightly.
    error = (2 * abs(0.5 - 1 / (1 + math.exp(-2))) + 1 - 1 / (1 + math.exp(-1))) / 3
    assert report["expected_calibration_error"] == pytest.approx(error)
    assert json.loads(json.dumps(report)) == report
    reliability_diagram(report, tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert headline(report)["accuracy"] == report["accuracy"]["mean"] and "bins" not in headline(report)


def test_solutions_are_right_if_all_their_steps_are() -> None:
    probabilities = [np.array([0.9, 0.8]), np.array([0.7, 0.4, 0.6])]
    report = step_report(probabilities, [np.array([1.0, 1]), np.array([1.0, 0, 0])], [0.8, 0.4], [10, 20])
    assert (report["steps"], report["accuracy"]["mean"], report["majority_baseline"]["mean"]) == (5, 0.8, 0.6)
    assert (report["solutions"], report["solution_accuracy"]["mean"]) == (2, 1)
    assert report["solution_majority_baseline"]["mean"] == 0.5
