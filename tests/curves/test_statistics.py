"""The statistics against numbers worked out by hand and by peers (peer_numbers.json, from make_peer_numbers.py)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_lab.curves import statistics
from rl_lab.curves.statistics import Floats

PEERS: dict[str, Any] = json.loads(Path(__file__).with_name("peer_numbers.json").read_text())


def row(*values: float) -> Floats:
    return np.array(values, dtype=np.float64)


def test_final_score_takes_the_last_hundred_episodes() -> None:
    assert statistics.final_score(np.arange(150.0)) == 99.5  # 50 to 149
    with pytest.raises(ValueError, match="99 episodes"):
        statistics.final_score(np.zeros(99))


def test_grid_takes_bin_means_and_interpolates_empty_parts() -> None:
    # Four parts of 25 steps: [1, 3] -> 2, none, 8, the last step belongs to the last part.
    curve = statistics.on_grid(row(0, 24, 50, 100), row(1, 3, 8, 20), 100, points=4)
    np.testing.assert_array_equal(curve, [2, 5, 8, 20])
    # Before the first and after the last episode the nearest part stands in.
    np.testing.assert_array_equal(statistics.on_grid(row(30), row(7), 100, points=4), [7, 7, 7, 7])


def test_area_is_the_mean_over_the_informative_stretch() -> None:
    curve = row(0, 1, 5, 9)
    assert statistics.departure(curve, 2) == 2
    assert statistics.departure(curve, 9) == 4  # a difference equal to the margin is no departure
    assert statistics.normalised_area(curve) == 3.75
    assert statistics.normalised_area(curve, 2) == 7


def test_iqm_by_hand() -> None:
    assert statistics.iqm(row(100, 1, 3, 2, -50)) == 2  # one run cut on either side of five
    assert statistics.iqm(row(9, 1, 2)) == 4  # of three none
    np.testing.assert_array_equal(statistics.iqm(np.array([[0.0, 9, 1, 5], [2, 2, 4, 8]])), [3, 3])


@pytest.mark.parametrize("side", ["ours", "reference"])
def test_iqm_and_stratified_interval_agree_with_rliable_and_scipy(side: str) -> None:
    scores = np.array(PEERS[side])  # (R, tasks)
    np.testing.assert_allclose(statistics.iqm(scores.ravel()), PEERS[side + "_iqm"], rtol=1e-12)
    np.testing.assert_allclose(statistics.iqm(scores, axis=0), PEERS[side + "_iqm_by_task"], rtol=1e-12)
    samples = statistics.resample(scores.T, np.random.default_rng(1), 50_000)
    interval = np.quantile(statistics.iqm(samples.reshape(len(samples), -1)), [0.05, 0.95])
    # Both have 50,000 repetitions: the ends then agree to about a hundredth of the width.
    assert interval == pytest.approx(PEERS[side + "_interval"], abs=0.02 * np.diff(PEERS[side + "_interval"]).item())


def test_improvement_and_profile_agree_with_rliable() -> None:
    ours, reference = np.array(PEERS["ours"]), np.array(PEERS["reference"])
    for task, expected in enumerate(PEERS["improvement_by_task"]):
        assert statistics.probability_of_improvement(ours[:, task], reference[:, task]) == pytest.approx(expected)
    first, second, expected = PEERS["improvement_ties"]
    assert statistics.probability_of_improvement(np.array(first), np.array(second)) == pytest.approx(expected)
    profile = statistics.performance_profile(ours.ravel(), np.array(PEERS["thresholds"]))
    np.testing.assert_allclose(profile, PEERS["profile"])


def test_t_quantile_agrees_with_scipy() -> None:
    for freedom, expected in PEERS["t_0.95"].items():
        assert statistics.t_quantile(0.95, int(freedom)) == pytest.approx(expected, rel=1e-5)
    assert statistics.widening(5) == pytest.approx(math.sqrt(5 / 4) * 2.13185 / 1.64485, rel=1e-4)
    assert 1 < statistics.widening(1_000) < 1.002


def test_single_runs_have_no_interval_and_need_a_spread() -> None:
    generator = np.random.default_rng(0)
    for ours, reference in ((row(1), row(1, 2, 3)), (row(1, 2, 3), row(1)), (row(1), row(2))):
        interval = statistics.difference_interval(ours, reference, generator)
        assert (interval.low, interval.high) == (-math.inf, math.inf)
        assert statistics.VERDICTS[int(statistics.decide(interval.low, interval.high, 5))] == "underpowered"
        assert statistics.seeds_needed(ours, reference, 5, generator) is None


def test_decision_at_its_borders() -> None:
    cases = [
        (-4, 4, "match"),
        (1, 4, "match"),  # a difference that is certain and small is still a match
        (-5, 4, "underpowered"),  # the margin itself is outside
        (-1, 9, "underpowered"),
        (1, 9, "better"),
        (-9, -1, "worse"),
        (-9, 9, "underpowered"),
        (-9, 0, "underpowered"),
    ]
    low, high, verdicts = zip(*cases, strict=True)
    found = statistics.decide(row(*low), row(*high), 5)
    assert [statistics.VERDICTS[i] for i in found] == list(verdicts)


def test_equal_generators_give_equal_intervals() -> None:
    scores = np.random.default_rng(3).normal(size=(4, 6))
    first, second = (statistics.iqm_interval(scores, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first.low < first.estimate).all() and (first.estimate < first.high).all()
