"""The losses of DPO's family: values by hand, gradients against derivatives in numpy, and what must not happen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.preference.dpo import (
    LOSSES,
    NEED_KLS,
    NEED_LENGTHS,
    REFERENCE_FREE,
    SETTINGS,
    Pairs,
    implicit_rewards,
    log_odds,
)

Arrays = dict[str, np.ndarray]
FIELDS = [field.name for field in fields(Pairs)]
SETTING = {"beta": 0.5, "label_smoothing": 0.2, "gamma": 0.5, "alpha": 0.25, "orpo_lambda": 0.5}

# Two pairs with h_w, h_l = 2, -1 and -2, -1: margins 3 and -1; per token 1/2, -1/5 and -1/5, -1/4; log-probabilities
# per token -2.5, -1.8 and -2, -1.5; KL_l - KL_w = 1 and -1.
HAND: dict[str, list[float]] = {
    "policy_chosen_logps": [-10.0, -20.0],
    "policy_rejected_logps": [-9.0, -6.0],
    "reference_chosen_logps": [-12.0, -18.0],
    "reference_rejected_logps": [-8.0, -5.0],
    "chosen_lengths": [4, 10],
    "rejected_lengths": [5, 4],
    "chosen_kls": [0.5, 2.0],
    "rejected_kls": [1.5, 1.0],
}
VALUES = {  # under SETTING; l(x) = -log sigmoid(x) = log(1 + exp(-x)), so l(-x) = l(x) + x
    "sigmoid": [0.2014133, 0.9740770],  # l(1.5), l(-0.5)
    "ipo": [0.09, 0.9025],  # (0.7 - 1)^2, (0.05 - 1)^2
    "hinge": [0.0, 1.5],  # max(0, 1 - 1.5), 1 + 0.5
    "robust": [-0.2985867, 1.1407436],  # (0.8 l(x) - 0.2 (l(x) + x)) / 0.6 = l(x) - x / 3
    "conservative": [0.5014133, 0.8740770],  # 0.8 l(x) + 0.2 (l(x) + x) = l(x) + x / 5
    "apo_zero": [-0.3535179, 0.1085993],  # -sigmoid(1) + sigmoid(-0.5), -sigmoid(-1) + sigmoid(-0.5)
    "apo_down": [-0.0865159, -0.1085993],  # sigmoid(1) - sigmoid(1.5), sigmoid(-1) - sigmoid(-0.5)
    "simpo": [1.2058651, 1.1368710],  # l(0.5 * -0.7 - 0.5) = l(-0.85), l(0.5 * -0.5 - 0.5) = l(-0.75)
    "orpo": [
        3.0838385,
        2.5210290,
    ],  # 2.5 + log(1 + odds_l / odds_w) / 2, odds 0.0894, 0.1980; 2 + ... of 0.1565, 0.2872
    "tdpo1": [0.3132617, 0.6931472],  # l(0.5 * (3 - 1)), l(0.5 * (-1 + 1))
    "tdpo2": [0.2254133, 0.8981237],  # l(0.5 * (3 - 1/4)), l(0.5 * (-1 + 1/4))
}


def settings(name: str, **changes: float) -> dict[str, float]:
    return {key: {**SETTING, **changes}[key] for key in SETTINGS[name]}


def pairs(data: dict[str, list[float]] | Arrays, dtype: torch.dtype = torch.float32) -> Pairs:
    return Pairs(**{name: torch.tensor(x, dtype=dtype) for name, x in data.items()})


@pytest.mark.parametrize("name", LOSSES)
def test_by_hand(name: str) -> None:
    """Guards signs, beta's place, sums for averages, and a variant under another one's name."""
    losses = LOSSES[name](pairs(HAND), **settings(name))
    assert losses.tolist() == pytest.approx(VALUES[name], abs=2e-6)


def s(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def margin_only(slope: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], Arrays]:
    """Derivatives where the loss is a function of beta (h_w - h_l) with this slope."""

    def derivatives(x: Arrays) -> Arrays:
        d = SETTING["beta"] * slope(SETTING["beta"] * (x["h_w"] - x["h_l"]))
        return {"policy_chosen_logps": d, "policy_rejected_logps": -d}

    return derivatives


def d_ipo(x: Arrays) -> Arrays:
    d = 2 * (x["h_w"] / x["chosen_lengths"] - x["h_l"] / x["rejected_lengths"] - 1 / (2 * SETTING["beta"]))
    return {"policy_chosen_logps": d / x["chosen_lengths"], "policy_rejected_logps": -d / x["rejected_lengths"]}


def d_apo_zero(x: Arrays) -> Arrays:
    beta = SETTING["beta"]
    s_w, s_l = s(beta * x["h_w"]), s(beta * x["h_l"])
    return {"policy_chosen_logps": -beta * s_w * (1 - s_w), "policy_rejected_logps": beta * s_l * (1 - s_l)}


def d_apo_down(x: Arrays) -> Arrays:
    beta = SETTING["beta"]
    s_w, s_margin = s(beta * x["h_w"]), s(beta * (x["h_w"] - x["h_l"]))
    d = beta * s_margin * (1 - s_margin)
    return {"policy_chosen_logps": beta * s_w * (1 - s_w) - d, "policy_rejected_logps": d}


def d_simpo(x: Arrays) -> Arrays:
    beta, n_w, n_l = SETTING["beta"], x["chosen_lengths"], x["rejected_lengths"]
    d = -beta * s(SETTING["gamma"] - beta * (x["policy_chosen_logps"] / n_w - x["policy_rejected_logps"] / n_l))
    return {"policy_chosen_logps": d / n_w, "policy_rejected_logps": -d / n_l}


def d_orpo(x: Arrays) -> Arrays:
    """The derivative of log odds in the log-probability p is 1 / (1 - exp(p))."""
    n_w, n_l = x["chosen_lengths"], x["rejected_lengths"]
    p_w, p_l = np.exp(x["policy_chosen_logps"] / n_w), np.exp(x["policy_rejected_logps"] / n_l)
    d = SETTING["orpo_lambda"] * s(np.log(p_l / (1 - p_l)) - np.log(p_w / (1 - p_w)))
    return {"policy_chosen_logps": -(1 + d / (1 - p_w)) / n_w, "policy_rejected_logps": d / (1 - p_l) / n_l}


def d_tdpo1(x: Arrays) -> Arrays:
    d = SETTING["beta"] * s(SETTING["beta"] * (x["h_l"] - x["h_w"] + x["rejected_kls"] - x["chosen_kls"]))
    return {"policy_chosen_logps": -d, "policy_rejected_logps": d, "chosen_kls": -d, "rejected_kls": d}


def d_tdpo2(x: Arrays) -> Arrays:
    """Nothing for the chosen KL."""
    beta, alpha = SETTING["beta"], SETTING["alpha"]
    d = beta * s(beta * (x["h_l"] - x["h_w"] + alpha * (x["rejected_kls"] - x["chosen_kls"])))
    return {"policy_chosen_logps": -d, "policy_rejected_logps": d, "rejected_kls": alpha * d}


E = SETTING["label_smoothing"]
DERIVATIVES: dict[str, Callable[[Arrays], Arrays]] = {
    "sigmoid": margin_only(lambda z: -s(-z)),
    "ipo": d_ipo,
    "hinge": margin_only(lambda z: -(z < 1).astype(float)),
    "robust": margin_only(lambda z: (-(1 - E) * s(-z) - E * s(z)) / (1 - 2 * E)),
    "conservative": margin_only(lambda z: s(z) - (1 - E)),  # zero where the policy is as sure as 1 - e
    "apo_zero": d_apo_zero,
    "apo_down": d_apo_down,
    "simpo": d_simpo,
    "orpo": d_orpo,
    "tdpo1": d_tdpo1,
    "tdpo2": d_tdpo2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    """Guards lost or extra stop-gradients, and derivatives that a value by hand cannot see."""
    random = np.random.default_rng(0)
    data = {key: random.uniform(-30, -1, 16) if "logps" in key else random.uniform(0, 3, 16) for key in FIELDS}
    data["policy_chosen_logps"] = data["reference_chosen_logps"] + random.normal(0, 2, 16)
    data["policy_rejected_logps"] = data["reference_rejected_logps"] + random.normal(0, 2, 16)
    for key in ("policy_chosen_logps", "policy_rejected_logps"):
        data[key] = np.minimum(data[key], -0.5)  # log-probabilities, even so
    data |= {key: random.integers(1, 20, 16).astype(float) for key in ("chosen_lengths", "rejected_lengths")}
    batch = pairs(data, torch.float64)
    inputs: dict[str, Tensor] = {key: vars(batch)[key] for key in FIELDS if "policy" in key or "kls" in key}
    for x in inputs.values():
        x.requires_grad_()
    LOSSES[name](batch, **settings(name)).sum().backward()

    h_w = data["policy_chosen_logps"] - data["reference_chosen_logps"]
    h_l = data["policy_rejected_logps"] - data["reference_rejected_logps"]
    expected = DERIVATIVES[name]({**data, "h_w": h_w, "h_l": h_l})
    for key, x in inputs.items():
        found = np.zeros(16) if x.grad is None else x.grad.numpy()
        np.testing.assert_allclose(found, expected.get(key, np.zeros(16)), rtol=0, atol=1e-10, err_msg=key)


AT_THE_REFERENCE = {name: math.log(2) for name in ("sigmoid", "robust", "conservative", "tdpo1", "tdpo2")}
AT_THE_REFERENCE |= {"ipo": 25.0, "hinge": 1.0, "apo_zero": 0.0, "apo_down": 0.0}  # with beta 0.1: IPO's 1 / (4 beta^2)


@pytest.mark.parametrize("name", AT_THE_REFERENCE)
def test_at_the_reference(name: str) -> None:
    """Guards the first logged step: an untrained policy is its reference, the margin 0, in float32 to 1e-6."""
    logps = torch.tensor([-123.456, -0.01]), torch.tensor([-78.9, -543.21])
    lengths, kls = torch.tensor([50, 1]), torch.zeros(2)
    batch = Pairs(*logps, *logps, lengths, lengths + 3, kls, kls)
    losses = LOSSES[name](batch, **settings(name, beta=0.1))
    torch.testing.assert_close(losses, torch.full((2,), AT_THE_REFERENCE[name]), rtol=1e-6, atol=1e-6)
    chosen, rejected = implicit_rewards(batch, beta=0.1)
    assert torch.equal(chosen, torch.zeros(2)) and torch.equal(rejected, torch.zeros(2))


def test_robust_is_not_conservative() -> None:
    """Guards one kind of label smoothing under the other's name; both are DPO without it."""
    batch = pairs(HAND)
    robust, conservative = LOSSES["robust"], LOSSES["conservative"]
    plain = LOSSES["sigmoid"](batch, beta=0.5)
    assert torch.equal(robust(batch, beta=0.5, label_smoothing=0.0), plain)
    assert torch.equal(conservative(batch, beta=0.5, label_smoothing=0.0), plain)
    assert (robust(batch, beta=0.5, label_smoothing=0.1) - conservative(batch, beta=0.5, label_smoothing=0.1)).all()


def test_robust_undoes_the_flips() -> None:
    """Guards robust's signs: the mean over labels flipped with probability e is DPO's loss without flips."""
    straight = pairs({key: x for key, x in HAND.items() if "logps" in key})
    chosen, rejected, reference_chosen, reference_rejected, *_ = vars(straight).values()
    flipped = Pairs(rejected, chosen, reference_rejected, reference_chosen)
    losses = [LOSSES["robust"](batch, beta=0.5, label_smoothing=0.2) for batch in (straight, flipped)]
    torch.testing.assert_close(0.8 * losses[0] + 0.2 * losses[1], LOSSES["sigmoid"](straight, beta=0.5))


@pytest.mark.parametrize("name", LOSSES)
def test_swapped_pairs_cost_more(name: str) -> None:
    """Guards chosen taken for rejected: where the policy prefers the chosen, the other order must cost more."""
    better, worse = torch.tensor([-4.0]), torch.tensor([-9.0])
    reference, lengths, kls = torch.tensor([-6.0]), torch.tensor([5]), torch.ones(1)
    rest = (reference, reference, lengths, lengths, kls, kls)
    losses = [LOSSES[name](Pairs(*logps, *rest), **settings(name)) for logps in ((better, worse), (worse, better))]
    assert losses[0].item() < losses[1].item()


@pytest.mark.parametrize("name", LOSSES)
def test_extremes_stay_finite(name: str) -> None:
    """Guards log(sigmoid), exp(-x) and log(1 - exp(p)): values and gradients, at log-probabilities -10,000 and 0."""
    grid = torch.tensor(list(product((-1e4, -1e-9, 0.0), repeat=4)), requires_grad=True)
    ones = torch.ones(len(grid))
    losses = LOSSES[name](Pairs(*grid.unbind(1), ones, ones, ones, ones), **settings(name))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert grid.grad is not None and grid.grad.isfinite().all()


@pytest.mark.parametrize("logp", [-1000.0, -20.0, -1.0, -0.1, -1e-3, -1.3e-6])
def test_log_odds(logp: float) -> None:
    """Guards the cancellation in 1 - exp(log P) where P is near 1, in float32."""
    found = log_odds(torch.tensor([logp])).item()
    assert found == pytest.approx(logp - math.log(-math.expm1(logp)), rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_needs(name: str) -> None:
    """Guards the tables: with what they name a loss runs, and without any of it it does not; nothing is optional."""
    needs = {"policy_chosen_logps", "policy_rejected_logps"}
    needs |= {key for key in FIELDS if "reference" in key and name not in REFERENCE_FREE}
    needs |= {key for key in FIELDS if "lengths" in key and name in NEED_LENGTHS}
    needs |= {key for key in FIELDS if "kls" in key and name in NEED_KLS}
    batch = pairs({key: x for key, x in HAND.items() if key in needs})
    assert LOSSES[name](batch, **settings(name)).shape == (2,)
    for key in needs - {"policy_chosen_logps", "policy_rejected_logps"}:
        with pytest.raises(AssertionError):
            LOSSES[name](replace(batch, **{key: None}), **settings(name))
    for key in SETTINGS[name]:
        with pytest.raises(TypeError, match=key):
            LOSSES[name](batch, **{other: x for other, x in settings(name).items() if other != key})


def test_shapes() -> None:
    """Guards broadcasting: (B, 1) beside (B,), or a cached reference of another batch."""
    four = [torch.zeros(2)] * 4
    for other in (torch.zeros(2, 1), torch.zeros(1), torch.zeros(())):
        with pytest.raises(AssertionError, match="not one"):
            Pairs(*four[:3], other)
        with pytest.raises(AssertionError, match="not one"):
            Pairs(other, *four[1:])
    with pytest.raises(AssertionError, match="not one"):
        Pairs(*[torch.zeros(2, 1)] * 4)


def test_implicit_rewards() -> None:
    """Guards the logged margin and accuracy: beta h, or beta p without a reference; never a path for gradients."""
    batch = pairs(HAND)
    batch.policy_chosen_logps.requires_grad_()
    chosen, rejected = implicit_rewards(batch, beta=0.5)
    assert chosen.tolist() == [1.0, -1.0] and rejected.tolist() == [-0.5, -0.5]
    free = replace(batch, reference_chosen_logps=None, reference_rejected_logps=None)
    chosen, rejected = implicit_rewards(free, beta=2.0)
    assert chosen.tolist() == [-5.0, -4.0] and rejected.tolist() == pytest.approx([-3.6, -3.0])
    assert not chosen.requires_grad
