"""Fifty gradient steps of DPO against TRL's DPOTrainer: one model, the same pairs in the same order, float32.

dpo_run_numbers.json holds what it logged, with the versions; make_dpo_run_numbers.py wrote it, and makes model and
pairs here too. Both take AdamW with the same settings and let the learning rate fall as a line. TRL computes a prompt
with each of its answers, padded; here a prompt is computed once, and nothing is padded.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_lab.preference import dpo
from rl_lab.preference_data import place
from tests.language_runs import folder, scalars, trained, write
from tests.parity.make_dpo_run_numbers import BATCH, SETTINGS, STEPS, pairs, write_model

NUMBERS = json.loads((Path(__file__).parent / "dpo_run_numbers.json").read_text())
SHARE = 0.998  # of the prompts, all that TRL learned from


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("models") / "parity"
    write_model(made)
    return made


def logged(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int], **flags: float
) -> dict[str, list[float]]:
    """What our run logs of each step, from these pairs in this order and one that is held out."""
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(dpo, "drawn", lambda count, size, seed, step: order[step * size : (step + 1) * size])
    assert all(place(row["prompt"]) < SHARE for row in pairs())
    held_out = next(str(i) for i in range(100_000) if place(str(i)) >= SHARE)
    rows = [*pairs(), {"prompt": held_out, "chosen": "a", "rejected": "b"}]
    shares = {"train": (0.0, SHARE), "holdout": (SHARE, 1.0)}
    rest = {"steps": STEPS, "batch_size": BATCH, **shares}
    return scalars(folder(trained(dpo, model, write(tmp_path / "pairs.jsonl", rows), **rest | SETTINGS | flags)))


def test_fifty_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards everything between a pair and the next loss: tokens, loss, clipping, optimizer, schedule."""
    assert NUMBERS["settings"] == SETTINGS and len(NUMBERS["losses"]) == STEPS
    log = logged(model, tmp_path, monkeypatch, list(range(STEPS * BATCH)))
    assert log["losses/loss"] == pytest.approx(NUMBERS["losses"], rel=1e-3)
    assert log["rewards/margin"] == pytest.approx(NUMBERS["rewards/margins"], abs=1e-3)
    for side in ("chosen", "rejected"):
        assert log[f"logps/{side}"] == pytest.approx(NUMBERS[f"logps/{side}"], rel=1e-3)
    assert log["losses/grad_norm"] == pytest.approx(NUMBERS["grad_norm"], rel=1e-3)
    assert log["charts/learning_rate"] == pytest.approx(NUMBERS["learning_rate"], rel=1e-5)
    assert max(NUMBERS["losses"]) - min(NUMBERS["losses"]) > 0.1


@pytest.mark.parametrize("change", ["beta", "decay", "weight_decay", "order"])
def test_another_run_is_another(change: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a run that differs in one thing does not agree."""
    order = list(range(STEPS * BATCH))
    if change == "order":
        order = np.random.default_rng(0).permutation(STEPS * BATCH).tolist()
    flags = {"beta": {"beta": 0.11}, "decay": {"decay": False}, "weight_decay": {"weight_decay": 1.0}}.get(change, {})
    log = logged(model, tmp_path, monkeypatch, order, **flags)
    assert log["losses/loss"] != pytest.approx(NUMBERS["losses"], rel=1e-3)
