"""Running moments against numpy on all the data at once, and what enters them.

Whole streams are compared with Gymnasium's wrappers in tests/parity/test_ppo_parity.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rl_lab.normalize import begin, init_moments, observe, standardize, update_moments
from rl_lab.vector import Step

CPU = torch.device("cpu")


def expected(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of `data` and the start: mean 0 and variance 1 at weight 1e-4, as two points at +-1."""
    points = np.concatenate([[np.ones(data.shape[1:]), -np.ones(data.shape[1:])], data])
    weights = np.concatenate([[5e-5, 5e-5], np.ones(len(data))])
    mean = np.average(points, axis=0, weights=weights)
    return mean, np.average((points - mean) ** 2, axis=0, weights=weights)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_batches_equal_all_data_at_once(shape: tuple[int, ...]) -> None:
    """Guards against a merge that forgets the shift of the mean, or weighs batches of unequal size alike."""
    generator = np.random.default_rng(0)
    batches = [generator.normal(size=(n, *shape)) * 3 + 50 * i for i, n in enumerate((1, 4, 1, 17, 3))]
    moments = init_moments(shape, CPU)
    for batch in batches:
        moments = update_moments(moments, torch.from_numpy(batch))
    mean, var = expected(np.concatenate(batches))
    np.testing.assert_allclose(moments["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(moments["var"], var, rtol=1e-12)
    assert moments["count"].item() == pytest.approx(26.0001, abs=1e-12)


def test_masked_rows_do_not_count() -> None:
    """Guards against first observations that enter the statistics where no episode began."""
    generator = np.random.default_rng(1)
    data = generator.normal(size=(6, 4, 3))
    mask = generator.random((6, 4)) < 0.4
    assert {0, 1} <= set(mask.sum(1))  # none counting, and one alone
    moments = init_moments((3,), CPU)
    for batch, rows in zip(data, mask, strict=True):
        batch = np.where(rows[:, None], batch, 1e9)
        moments = update_moments(moments, torch.from_numpy(batch), torch.from_numpy(rows))
    mean, var = expected(data[mask])
    np.testing.assert_allclose(moments["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(moments["var"], var, rtol=1e-12)


def test_no_row_counting_changes_nothing() -> None:
    """Guards against NaN, and drift, from an empty batch."""
    moments = update_moments(init_moments((2,), CPU), torch.tensor([[1.0, 5.0], [3.0, 4.0]]))
    after = update_moments(moments, torch.full((2, 2), 7.0), torch.zeros(2, dtype=torch.bool))
    for name, x in moments.items():
        torch.testing.assert_close(after[name], x, rtol=1e-14, atol=0)


def test_small_variance_beside_a_large_mean() -> None:
    """Guards against float32 sums: of 1,000 observations around 100,000 the variance 1 must survive."""
    data = np.random.default_rng(2).normal(size=(1000, 1)) + 1e5
    moments = {name: x.clone() for name, x in init_moments((1,), CPU).items()}
    moments["count"].zero_()  # the start at zero, with its weight, would add 1e3 to the variance
    for batch in data.reshape(-1, 8, 1):
        moments = update_moments(moments, torch.from_numpy(batch))
    np.testing.assert_allclose(moments["var"], data.var(0), rtol=1e-8)


def test_standardize_by_hand() -> None:
    """Guards against a division by the variance, a clip before the division, and float64 that reaches the network."""
    moments = {"mean": torch.tensor([1.0, 0.0]), "var": torch.tensor([4.0, 0.25]), "count": torch.tensor(1.0)}
    moments = {name: x.double() for name, x in moments.items()}
    scaled = standardize(moments, torch.tensor([[5.0, 1.0], [-39.0, 6.0]]), clip=10.0)
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([[2.0, 2.0], [-10.0, 10.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("cleanrl", "ended", "entered"),
    [
        (False, "truncated", [1.0, 1.5, 1.0]),
        (False, "terminated", [1.0, 1.5, 1.0]),
        (True, "truncated", [1.0, 1.5, 1.75]),
        (True, "terminated", [1.0, 1.0, 1.5]),
    ],
)
def test_discounted_return_at_an_episodes_end(cleanrl: bool, ended: str, entered: list[float]) -> None:
    """Guards against a return that scales rewards and runs on into the next episode.

    Three rewards of 1, gamma 1/2, the second step ends the episode: the return is 1, 1 + 1/2, then 1 anew. Gymnasium's
    wrapper lets it run on after a truncation, 1 + 1.5/2, and at a termination drops it one step too early.
    """
    no, yes, zero = torch.tensor([False]), torch.tensor([True]), torch.zeros(1, 1)
    normalizer, _ = begin(zero)
    seen, total = [], 0.0
    for t in range(3):
        ends = {name: yes if t == 1 and name == ended else no for name in ("terminated", "truncated")}
        normalizer, _ = observe(normalizer, Step(zero, torch.ones(1), **ends, obs=zero), 0.5, cleanrl)
        moments = normalizer["returns"]
        seen.append((moments["mean"] * moments["count"]).item() - total)
        total += seen[-1]
    assert seen == pytest.approx(entered, rel=1e-9)


def test_observations_enter_once_each() -> None:
    """Guards against a true successor, or an episode's first observation, that is missed, counted twice or normalised
    by what is not yet seen. Two environments; the second's episode ends, 40 is the next one's first observation."""
    normalizer, obs = begin(torch.tensor([[1.0], [3.0]]))
    mean, var = expected(np.array([[1.0], [3.0]]))
    np.testing.assert_allclose(obs, ([[1.0], [3.0]] - mean) / np.sqrt(var + 1e-8), rtol=1e-6)
    ended = torch.tensor([False, True])
    step = Step(torch.tensor([[5.0], [9.0]]), torch.zeros(2), ended, ~ended & False, torch.tensor([[5.0], [40.0]]))
    normalizer, step = observe(normalizer, step, 0.99, cleanrl=False)
    mean, var = expected(np.array([[1.0], [3.0], [5.0], [9.0]]))
    np.testing.assert_allclose(step.next_obs, ([[5.0], [9.0]] - mean) / np.sqrt(var + 1e-8), rtol=1e-6)
    assert torch.equal(step.obs[0], step.next_obs[0])  # what is acted on next is the successor as it was seen
    mean, var = expected(np.array([[1.0], [3.0], [5.0], [9.0], [40.0]]))
    np.testing.assert_allclose(step.obs[1], (40.0 - mean) / np.sqrt(var + 1e-8), rtol=1e-6)
    np.testing.assert_allclose(normalizer["obs"]["mean"], mean, rtol=1e-12)


def test_new_episodes_go_on_with_the_statistics() -> None:
    """Guards against first observations that are missed where all episodes begin anew, or a return that runs on."""
    normalizer, _ = begin(torch.tensor([[1.0], [3.0]]))
    normalizer["discounted"] += 5.0
    later, obs = begin(torch.tensor([[9.0], [40.0]]), normalizer)
    mean, var = expected(np.array([[1.0], [3.0], [9.0], [40.0]]))
    np.testing.assert_allclose(obs, ([[9.0], [40.0]] - mean) / np.sqrt(var + 1e-8), rtol=1e-6)
    assert later["discounted"].tolist() == [0.0, 0.0] and later["returns"] is normalizer["returns"]


def test_observations_are_clipped_where_they_are_used() -> None:
    """Guards detail 29: of a thousand zeros and one far off, that one is some thirty deviations away."""
    outlier = torch.zeros(1001, 1)
    outlier[0] = 1e3
    normalizer, first = begin(outlier)
    assert first.max().item() == 10.0
    ends = torch.zeros(1001, dtype=torch.bool)
    ends[0] = True
    step = Step(outlier, torch.zeros(1001), ends, torch.zeros_like(ends), -outlier)
    _, seen = observe(normalizer, step, gamma=0.99, cleanrl=False)
    assert seen.next_obs.max().item() == 10.0 and seen.obs.min().item() == -10.0
