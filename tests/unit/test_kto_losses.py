"""KTO's loss by hand and against its derivative, its reference point, and the weights it advises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rl_lab.preference import kto

WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def test_by_hand() -> None:
    """r = 3 and 2, z_0 = 1: 1.5 (1 - sigmoid(0.5 * 2)) where desirable, 0.5 (1 - sigmoid(0.5 * -1)) where not.

    Guards the sides, the weights' sides, and z_0 outside beta's bracket.
    """
    z_0 = kto.reference_point(torch.tensor([-4.0, -6.0]), torch.tensor([-6.0, -6.0]))
    assert z_0.item() == 1.0
    logps, labels = torch.tensor([-4.0, -6.0]), torch.tensor([True, False])
    losses = kto.loss(logps, torch.tensor([-7.0, -8.0]), labels, z_0, beta=0.5, **WEIGHTS)
    assert losses.tolist() == pytest.approx([1.5 * 0.2689414, 0.5 * 0.6224593], rel=1e-6)


def test_gradients() -> None:
    """-lambda beta sigmoid' (beta (r - z_0)), its sign turned where undesirable; none into z_0, which has some to lose.

    Guards a missing detach: the KL term would be trained on other examples' completions.
    """
    random = np.random.default_rng(0)
    columns = random.uniform(-30, -1, (4, 16))
    columns[2] = columns[3] + random.uniform(0, 3, 16)  # a KL above 0
    labels = np.arange(16) % 3 == 0
    policy, reference, policy_kl, reference_kl = torch.tensor(columns).unbind()
    policy.requires_grad_()
    policy_kl.requires_grad_()
    z_0 = kto.reference_point(policy_kl, reference_kl)
    kto.loss(policy, reference, torch.tensor(labels), z_0, beta=0.1, **WEIGHTS).sum().backward()

    value = 1 / (1 + np.exp(-0.1 * (columns[0] - columns[1] - (columns[2] - columns[3]).mean())))
    expected = np.where(labels, -1.5, 0.5) * 0.1 * value * (1 - value)
    assert policy.grad is not None
    np.testing.assert_allclose(policy.grad.numpy(), expected, rtol=0, atol=1e-10)
    assert policy_kl.grad is None and not z_0.requires_grad


def test_reference_point_is_not_negative() -> None:
    """Guards the estimate of a KL, which is never below 0; the mean is bounded, not its terms."""
    assert kto.reference_point(torch.tensor([-5.0, -5.0]), torch.tensor([-3.0, -4.0])).item() == 0.0
    assert kto.reference_point(torch.tensor([-5.0, -5.0]), torch.tensor([-4.0, -9.0])).item() == 1.5


def test_at_the_reference() -> None:
    """An untrained policy is its reference: z_0 = 0 and every loss is half its weight."""
    logps = torch.tensor([-123.456, -0.01])
    z_0 = kto.reference_point(logps, logps)
    losses = kto.loss(logps, logps, torch.tensor([True, False]), z_0, beta=0.1, **WEIGHTS)
    assert losses.tolist() == [0.75, 0.25]


def test_labels_turn_the_gradient() -> None:
    """Guards desirable taken for undesirable: a likelier completion costs less with one label, more with the other."""
    for label, direction in ((True, -1), (False, 1)):
        logps = torch.tensor([-5.0], requires_grad=True)
        kto.loss(logps, logps.detach(), torch.tensor([label]), torch.tensor(0.3), beta=0.1, **WEIGHTS).sum().backward()
        assert logps.grad is not None and logps.grad.sign().item() == direction


def test_extremes_stay_finite() -> None:
    """Guards overflow at log-probabilities of -10,000: the value saturates between 0 and the weight."""
    logps = torch.tensor([-1e4, -1e4, 0.0, 0.0], requires_grad=True)
    labels = torch.tensor([True, False, True, False])
    losses = kto.loss(logps, torch.tensor([0.0, 0.0, -1e4, -1e4]), labels, torch.tensor(0.0), beta=0.5, **WEIGHTS)
    losses.sum().backward()
    assert losses.tolist() == [1.5, 0.0, 0.0, 0.5]
    assert logps.grad is not None and logps.grad.isfinite().all()


def test_shapes() -> None:
    """Guards broadcasting, and a reference point per example."""
    ones, labels, z_0 = torch.ones(2), torch.tensor([True, False]), torch.tensor(0.0)
    for arguments in ((ones, ones[:1], labels, z_0), (ones, ones, labels[:, None], z_0), (ones, ones, labels, ones)):
        with pytest.raises(AssertionError):
            kto.loss(*arguments, beta=0.1, **WEIGHTS)


@pytest.mark.parametrize("n", [2, 3, 8, 9])
def test_mismatched(n: int) -> None:
    """Guards true pairs in the estimate of the KL, at odd sizes too; every completion serves once if prompts differ."""
    batch = list(range(3, 3 + n))
    found = kto.mismatched(batch, range(20))
    assert all(i != j for i, j in zip(batch, found, strict=True))
    assert sorted(found) == batch


def test_mismatched_is_the_papers_shift() -> None:
    """(x_1, y_2), (x_2, y_3), (x_3, y_1)."""
    assert kto.mismatched([7, 4, 9], range(10)) == [4, 9, 7]


def test_mismatched_passes_by_its_own_prompt() -> None:
    """Guards two completions of one prompt, side by side or at the ends, and one example drawn twice."""
    assert kto.mismatched([0, 1, 2, 3], "aabb") == [2, 2, 0, 0]
    assert kto.mismatched([0, 1, 2], "aba") == [1, 2, 1]
    assert kto.mismatched([0, 0, 1], "ab") == [1, 1, 0]


def test_a_batch_of_one_prompt_looks_further() -> None:
    assert kto.mismatched([2, 3], "abcc") == [0, 0] and kto.mismatched([0, 1], "aab") == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "fine"),
    [
        ((100, 100, 1.0, 1.0), True),
        ((100, 100, 1.5, 1.0), True),
        ((100, 100, 1.51, 1.0), False),
        ((100, 100, 1.0, 1.01), False),
        ((1000, 10000, 1.0, 1.0), False),
        ((1000, 10000, 10.0, 1.0), True),  # the paper's example: 1 to 10, lambda_D in [10, 15]
        ((1000, 10000, 15.0, 1.0), True),
        ((1000, 10000, 9.9, 1.0), False),
        ((1000, 10000, 1.0, 10.0), False),  # the weights' sides exchanged
        ((900, 100, 1.0, 6.0), True),
        ((1, 3, 0.3, 0.1), True),  # a ratio of 1 but for rounding
        ((10, 0, 1.0, 1.0), False),
        ((0, 10, 1.0, 1.0), False),
    ],
)
def test_weights_notice(arguments: tuple[Any, ...], fine: bool) -> None:
    """Guards Eq. 9 turned upside down, and its older bound."""
    assert (kto.weights_notice(*arguments) is None) == fine


def test_weights_notice_says_what_to_do() -> None:
    notice = kto.weights_notice(1000, 10000, 1.0, 1.0)
    assert notice is not None and "desirable_weight from 10 to 15" in notice
