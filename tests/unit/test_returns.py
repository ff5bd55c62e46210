"""Advantages and discounted sums, against numbers worked out by hand and exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from rl_lab.returns import discounted_sum, gae

# gamma = gae_lambda = 1/2, so the sum is discounted by 1/4. Three steps with V(s_t) = 4, 2, 8 and V(s_{t+1}) = 2, 8, 4,
# so that next_values[t] = values[t + 1] where no episode ends. Rewards 1, 2, 3. Where step 1 ends an episode, its true
# successor has the value 6, and the 8 belongs to the next episode's first observation.
#
#   plain       delta = 1 + 2/2 - 4, 2 + 8/2 - 2, 3 + 4/2 - 8 = -2, 4, -3
#               A_2 = -3, A_1 = 4 - 3/4 = 3.25, A_0 = -2 + 3.25/4 = -1.1875
#   terminated  delta_1 = 2 - 2 = 0, A_1 = 0, A_0 = -2
#   truncated   delta_1 = 2 + 6/2 - 2 = 3, A_1 = 3, A_0 = -2 + 3/4 = -1.25
#   both        as terminated: a step that ends the task has no successor, whatever the clock says
CASES = {
    "plain": (8.0, False, False, [-1.1875, 3.25, -3.0]),
    "terminated": (6.0, True, False, [-2.0, 0.0, -3.0]),
    "truncated": (6.0, False, True, [-1.25, 3.0, -3.0]),
    "both": (6.0, True, True, [-2.0, 0.0, -3.0]),
}


def rollout(*names: str) -> tuple[list[Tensor], Tensor]:
    """The arguments of gae and what it must return, (3, N), one column for each case."""
    columns = [CASES[name] for name in names]
    n = len(columns)
    rewards = torch.tensor([[1.0], [2.0], [3.0]]).expand(3, n)
    values = torch.tensor([[4.0], [2.0], [8.0]]).expand(3, n)
    next_values = torch.tensor([[2.0, successor, 4.0] for successor, *_ in columns]).T
    terminated, truncated = (torch.tensor([[False, column[i], False] for column in columns]).T for i in (1, 2))
    return [rewards, values, next_values, terminated, truncated], torch.tensor([column[3] for column in columns]).T


@pytest.mark.parametrize("names", [(name,) for name in CASES] + [tuple(CASES)], ids="-".join)
def test_advantages_by_hand(names: tuple[str, ...]) -> None:
    """Guards against truncation taken for termination, the bootstrap from the next episode's first observation, a sum
    that runs on across an episode's end, and columns that mix."""
    arguments, expected = rollout(*names)
    torch.testing.assert_close(gae(*arguments, gamma=0.5, gae_lambda=0.5), expected, rtol=0, atol=0)


def test_limits_of_lambda() -> None:
    """Guards against gamma and lambda that are exchanged: with lambda 0 the advantage is the one-step error, with
    lambda 1 and gamma 1 the sum of rewards to the end, 6, 5, 3, and the last V(s') = 4, less the value."""
    arguments, _ = rollout("plain")
    assert gae(*arguments, gamma=0.5, gae_lambda=0.0).squeeze(1).tolist() == [-2.0, 4.0, -3.0]
    assert gae(*arguments, gamma=1.0, gae_lambda=1.0).squeeze(1).tolist() == [6.0, 7.0, -1.0]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13, 33])
def test_discounted_sum_is_exact(length: int) -> None:
    """Guards against a doubling that loses or repeats terms at lengths that are no power of two.

    Small dyadic numbers, so that float64 holds every intermediate result exactly."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randint(-8, 9, (length, 3), generator=generator).double()
    discounts = torch.randint(0, 3, (length, 3), generator=generator).double() / 2  # 0, 1/2 and 1
    expected = torch.zeros(length, 3, dtype=torch.float64)
    for column in range(3):
        total = Fraction(0)
        for t in reversed(range(length)):
            total = Fraction(x[t, column].item()) + Fraction(discounts[t, column].item()) * total
            expected[t, column] = float(total)
    assert torch.equal(discounted_sum(x, discounts), expected)


def test_long_float32_rollout() -> None:
    """Guards against rounding that grows with the length: ones discounted by 0.99 * 0.95 sum to (1 - d^n) / (1 - d)."""
    d, steps = 0.99 * 0.95, 2048
    sums = discounted_sum(torch.ones(steps), torch.full((steps,), d))
    exact = [(1 - d ** (steps - t)) / (1 - d) for t in range(steps)]
    torch.testing.assert_close(sums, torch.tensor(exact), rtol=2e-6, atol=0)


def test_shapes_that_differ_are_refused() -> None:
    """Guards against (T, N) broadcast with (T, N, 1) or (T, 1) to numbers that mean nothing."""
    arguments, _ = rollout("plain", "truncated")
    arguments[2] = arguments[2].unsqueeze(-1)
    with pytest.raises(ValueError, match=r"next_values.* differ in shape.*\(3, 2, 1\)"):
        gae(*arguments, gamma=0.5, gae_lambda=0.5)
    with pytest.raises(ValueError, match=r"x \(3,\), discounts \(3, 1\)"):
        discounted_sum(torch.ones(3), torch.ones(3, 1))
