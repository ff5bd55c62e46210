"""A small model learns a reward that a program computes; with the advantages' sign flipped it unlearns it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rl_lab.language import load_model
from rl_lab.preference import grpo

TOYS = """
def ascii(prompts, completions):
    return [sum(x < "\\x80" for x in text) / 8 for text in completions]
def constant(prompts, completions):
    return [0.7 for _ in completions]
"""


@pytest.fixture
def toys(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Flags: answers of eight tokens, which are bytes of all kinds."""
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{i} is"}) for i in range(40)))
    return {
        "model": str(tiny_model), "prompts": str(tmp_path / "prompts.jsonl"), "reward": ("toys:ascii",),
        "holdout": (0.5, 1.0), "steps": 30, "prompts_per_step": 4, "group_size": 8, "max_new_tokens": 8,
        "learning_rate": 1e-2, "decay": False, "device": "cpu", "bf16": False, "runs_dir": tmp_path / "runs",
    }  # fmt: skip


def rewards(run: Path) -> list[float]:
    """Mean of each round."""
    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    return [x.value for x in events.Scalars("charts/reward")]


@pytest.mark.parametrize("flipped", [False, True], ids=["sound", "flipped"])
@pytest.mark.parametrize(
    "flags",
    [
        {"loss": "grpo"},
        {"loss": "rloo"},
        pytest.param({"loss": "dapo", "epochs": 2, "minibatches": 2}, marks=pytest.mark.slow),
        pytest.param({"loss": "gspo", "epochs": 2}, marks=pytest.mark.slow),
        pytest.param({"loss": "dr_grpo", "beta": 0.01}, marks=pytest.mark.slow),
        pytest.param({"loss": "bnpo", "temperature": 0.8}, marks=pytest.mark.slow),
    ],
    ids=lambda flags: flags["loss"],
)
def test_learns(toys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], flipped: bool) -> None:
    """About half of a random model's bytes are ASCII; after 30 rounds nearly all are, on held-out prompts too."""
    sound = grpo.group_advantages

    def flip(values: Tensor, loss: str) -> Tensor:
        return -sound(values, loss)

    if flipped:
        monkeypatch.setattr(grpo, "group_advantages", flip)
    run = grpo.train(grpo.Args(**toys, **flags)).logs.folders[0]
    means, found = rewards(run), json.loads((run / "evaluation.json").read_text())
    assert 0.3 < means[0] < 0.7
    last = sum(means[-5:]) / 5
    assert last < 0.15 if flipped else last > 0.85, means
    assert found["after"] < 0.15 if flipped else found["after"] > 0.85, found


def test_a_constant_reward_teaches_nothing(toys: dict[str, Any]) -> None:
    run = grpo.train(grpo.Args(**{**toys, "reward": ("toys:constant",), "steps": 5})).logs.folders[0]
    assert rewards(run) == pytest.approx([0.7] * 5)
    before = dict(load_model(toys["model"]).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in load_model(str(run)).named_parameters())
