"""Reward models learn a preference that can be seen in the text, and nothing where there is none to see."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rl_lab.preference.reward_model import Args, train

pytestmark = pytest.mark.slow


def learnt(rows: list[dict[str, Any]], model: Path, folder: Path, **flags: Any) -> dict[str, Any]:
    """The report of a short run."""
    (data := folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = train(
        Args(
            model=str(model), data=str(data), train=(0.0, 0.7), holdout=(0.7, 1.0), runs_dir=folder / "runs",
            device="cpu", bf16=False, steps=60, learning_rate=3e-3, warmup=5, **flags,
        )
    )  # fmt: skip
    report: dict[str, Any] = json.loads((run.logs.folders[0] / "evaluation.json").read_text())
    return report


@pytest.mark.parametrize("shuffled", [False, True], ids=["sound", "shuffled"])
def test_the_answer_with_more_a_wins(tmp_path: Path, tiny_model: Path, shuffled: bool) -> None:
    """Guards sign, place and order of everything between the data and the report; answers are equally long."""
    draws = random.Random(0)
    rows = []
    for i in range(700):
        size = draws.randint(4, 10)
        pair = sorted(("".join(draws.choices("abcd", k=size)) for _ in range(2)), key=lambda text: text.count("a"))
        if pair[0].count("a") < pair[1].count("a"):
            if shuffled:
                draws.shuffle(pair)
            rows.append({"prompt": f"{i}: ", "chosen": pair[1], "rejected": pair[0]})
    report = learnt(rows, tiny_model, tmp_path)
    assert report["length_baseline"]["mean"] == 0.5 and report["pairs"] > 120
    accuracy = report["accuracy"]["mean"]
    assert 0.35 < accuracy < 0.65 if shuffled else accuracy > 0.9


@pytest.mark.parametrize("shuffled", [False, True], ids=["sound", "shuffled"])
def test_steps_with_an_x_are_wrong(tmp_path: Path, tiny_model: Path, shuffled: bool) -> None:
    draws = random.Random(0)
    rows = []
    for i in range(400):
        steps = ["".join(draws.choices("abcd", k=4)) for _ in range(draws.randint(1, 4))]
        labels = [draws.random() < 0.5 for _ in steps]
        texts = [step if right else step[:2] + "x" + step[2:] for step, right in zip(steps, labels, strict=True)]
        if shuffled:
            labels = [draws.random() < 0.5 for _ in steps]
        rows.append({"prompt": f"{i}: ", "completions": texts, "labels": labels})
    report = learnt(rows, tiny_model, tmp_path, kind="process", aggregation="min")
    accuracy = report["accuracy"]["mean"]
    assert 0.4 < accuracy < 0.6 if shuffled else accuracy > 0.9 and report["solution_accuracy"]["mean"] > 0.85
