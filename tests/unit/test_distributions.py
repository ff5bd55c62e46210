"""Distributions of returns on fixed atoms, and which actions there are; distributions of these are tested with PPO."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

from rl_lab.distributions import Actions, of_action, project

SPREAD = [0.1, 0.2, 0.4, 0.2, 0.1]


@pytest.mark.parametrize(
    ("probabilities", "reward", "discount", "expected"),
    [
        ([0, 0, 1, 0, 0], 0.25, 1, [0, 0, 0.75, 0.25, 0]),  # a quarter of the way to the next
        ([0, 0, 1, 0, 0], -0.25, 1, [0, 0.25, 0.75, 0, 0]),
        (SPREAD, 0, 1, SPREAD),  # every place is integral
        (SPREAD, 1, 1, [0, 0.1, 0.2, 0.4, 0.3]),  # what would leave the last atom stays there
        (SPREAD, -2, 1, [0.7, 0.2, 0.1, 0, 0]),
        ([1, 0, 0, 0, 0], 0, 0.25, [0, 0.5, 0.5, 0, 0]),  # -2 becomes -0.5
        ([0, 0, 0, 0.5, 0.5], 0, 0.5, [0, 0, 0.25, 0.75, 0]),  # 1 becomes 0.5, 2 becomes 1
        (SPREAD, 1, 0, [0, 0, 0, 1, 0]),  # nothing follows the end: all mass at the reward,
        (SPREAD, 1.5, 0, [0, 0, 0, 0.5, 0.5]),
        (SPREAD, 2, 0, [0, 0, 0, 0, 1]),  # also on the last atom,
        (SPREAD, -2, 0, [1, 0, 0, 0, 0]),  # the first,
        (SPREAD, 50, 0, [0, 0, 0, 0, 1]),  # and beyond them
        (SPREAD, -50, 0, [1, 0, 0, 0, 0]),
    ],
)
def test_projection_by_hand(probabilities: list[float], reward: float, discount: float, expected: list[float]) -> None:
    """Guards against mass lost at integral places or beyond the ends, and against neighbours exchanged."""
    atoms = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    rows = (torch.tensor([x], dtype=torch.float32) for x in (probabilities, reward, discount))
    found = project(next(rows), atoms, *rows)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_projection_keeps_mass_and_mean() -> None:
    """Guards against rounding at atoms that binary fractions miss (0.4 apart): rows sum to 1, nothing is negative, and
    the mean is r + discount * E[Z] where nothing is clipped."""
    random, atoms = torch.Generator().manual_seed(0), torch.linspace(-10, 10, 51)
    probabilities = torch.rand(1000, 51, generator=random).softmax(1)
    rewards = 0.4 * torch.randint(-40, 41, (1000,), generator=random)  # mostly on an atom, some beyond the ends
    discounts = torch.where(torch.rand(1000, generator=random) < 0.5, 0.9, 0.0)
    found = project(probabilities, atoms, rewards, discounts)
    torch.testing.assert_close(found.sum(1), torch.ones(1000), rtol=0, atol=1e-5)
    assert found.min() >= 0
    inside = rewards.abs() + 10 * discounts <= 10
    assert 100 < inside.sum() < 900
    mean = rewards + discounts * (probabilities @ atoms)
    torch.testing.assert_close((found @ atoms)[inside], mean[inside], rtol=0, atol=1e-4)


def test_boxes_of_actions() -> None:
    """Whole numbers would be cut from what a policy draws, and a scalar has no axis to put components on."""
    for space in (Box(0, 10, (2,), np.int64), Box(-1, 1, ())):
        with pytest.raises(ValueError, match="a Box of floating numbers with one axis or more, not Box"):
            Actions.of(space)
    assert Actions.of(Box(-1, 1, (2, 3))).bounded
    for low, high in ((-np.inf, 1), (-np.inf, np.inf), (0, 0)):  # of no width there is no logarithm
        assert not Actions.of(Box(np.array([-1, low], np.float32), np.array([1, high], np.float32))).bounded
    assert not Actions((4,), ()).bounded


def test_of_action() -> None:
    """Guards against a row's distribution under another row's action."""
    distributions = torch.arange(12.0).view(2, 3, 2)  # two rows, three actions, two atoms
    assert of_action(distributions, torch.tensor([2, 0])).tolist() == [[4, 5], [6, 7]]
