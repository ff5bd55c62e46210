"""Losses and gradients of pairs and of single completions against TRL's trainers, on the same log-probabilities.

dpo_numbers.json holds what its own methods computed, with the versions; make_dpo_numbers.py wrote it. TRL's conventions
that differ: it adds 1 to both APO losses, which the paper does not; it computes ORPO's odds in float32; its KTO loss is
the mean of the batch. It has no TDPO.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rl_lab.preference import kto
from rl_lab.preference.dpo import LOSSES, SETTINGS, Pairs

NUMBERS = json.loads((Path(__file__).parent / "dpo_numbers.json").read_text())
ADDED = {"apo_zero": 1.0, "apo_down": 1.0}  # by TRL


def test_all_but_tdpo() -> None:
    assert NUMBERS["losses"].keys() == NUMBERS["gradients"].keys() == LOSSES.keys() - {"tdpo1", "tdpo2"}


@pytest.mark.parametrize("name", NUMBERS["losses"])
def test_pairs(name: str) -> None:
    """Guards every loss and its gradient, lengths and smoothing included."""
    columns = {key: torch.tensor(x, dtype=torch.float64) for key, x in NUMBERS["inputs"].items()}
    policy = [columns[f"policy_{side}_logps"].requires_grad_() for side in ("chosen", "rejected")]
    losses = LOSSES[name](Pairs(**columns), **{key: NUMBERS["settings"][key] for key in SETTINGS[name]})
    losses.sum().backward()
    assert (losses + ADDED.get(name, 0.0)).tolist() == pytest.approx(NUMBERS["losses"][name], rel=1e-6, abs=1e-6)
    for x, expected in zip(policy, NUMBERS["gradients"][name], strict=True):
        assert x.grad is not None
        assert x.grad.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_kto() -> None:
    """Guards the weights, the labels' sides, the reference point and that it passes no gradient."""
    seen = NUMBERS["kto"]
    policy, reference, policy_kl, reference_kl = (
        torch.tensor(columns[f"{model}_chosen_logps"], dtype=torch.float64)
        for columns in (NUMBERS["inputs"], seen["mismatched"])
        for model in ("policy", "reference")
    )
    policy.requires_grad_()
    z_0 = kto.reference_point(policy_kl, reference_kl)
    loss = kto.loss(policy, reference, torch.tensor(seen["labels"]), z_0, **seen["settings"]).mean()
    loss.backward()
    assert z_0.item() == pytest.approx(seen["z_0"], rel=1e-6) and seen["z_0"] > 0.1
    assert loss.item() == pytest.approx(seen["loss"], rel=1e-6)
    assert policy.grad is not None
    assert policy.grad.tolist() == pytest.approx(seen["gradient"], rel=1e-6, abs=1e-9)
