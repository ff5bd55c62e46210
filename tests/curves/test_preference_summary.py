"""The table of preference results, from run folders to the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl_lab.curves import preference

SHARE = {"mean": 0.61, "low": 0.55, "high": 0.67}


def run_folder(folder: Path, seed: int, **files: Any) -> Path:
    """A finished run's JSON files."""
    folder = folder / f"m__x__{seed}__0"
    folder.mkdir(parents=True)
    about = {
        "algo": "x",
        "seed": seed,
        "command": "python -m x --runs-dir /a/b --y",
        "git_commit": None,
        "versions": {},
        "hardware": {},
    }
    (folder / "config.json").write_text(
        json.dumps(about | {"args": {"runs_dir": "/a/b", "y": 1}, "group": ["left out"]})
    )
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_rows_of_a_task_of_pairs_and_of_both(tmp_path: Path) -> None:
    """Seeds are summed up as everywhere in the harness; a single seed has the interval of its examples."""
    for seed, after in enumerate((0.95, 0.96, 0.97, 0.96), 1):
        evaluation = {"held_out": 500, "before": 0.7, "after": after, "seconds": 600.0}
        run_folder(tmp_path / "grpo", seed, evaluation=evaluation)
    evaluation = {"pairs": 90, "accuracy": SHARE, "length_baseline": SHARE | {"mean": 0.5}, "seconds": 90.0}
    task = {name: {"prompts": 500, "accuracy": SHARE | {"mean": x}} for name, x in (("before", 0.7), ("after", 0.9))}
    run_folder(tmp_path / "dpo", 1, evaluation=evaluation, **task)
    kept = tmp_path / "results"
    for name in ("grpo", "dpo"):
        preference.keep(name, sorted((tmp_path / name).iterdir(), reverse=True), kept)
    rows = [line.split(" | ") for line in preference.table(kept).splitlines()[2:5]]
    assert rows[0] == [
        "| dpo", "1", "accuracy, 500 prompts", "0.700", "0.900 [0.550, 0.670]", "2 |",
    ]  # fmt: skip
    assert rows[1][2:5] == ["accuracy, 90 pairs", "the longer one: 0.500", "0.610 [0.550, 0.670]"]
    assert rows[2][:4] == ["| grpo", "4", "accuracy, 500 prompts", "0.700"]
    assert rows[2][4].startswith("0.960 [0.9") and rows[2][5] == "10 |"
    notes = json.loads((kept / "grpo.json").read_text())
    assert [note["seed"] for note in notes] == [1, 2, 3, 4] and "group" not in notes[0]
    assert (notes[0]["command"], notes[0]["args"]) == ("python -m x --y", {"y": 1})


def test_seeds_that_agree_are_no_surer_than_their_examples(tmp_path: Path) -> None:
    """All right on the same 55 pairs in every seed: the interval is that of 55 pairs."""
    right = {"mean": 1.0, "low": 0.935, "high": 1.0}
    evaluation = {"pairs": 55, "accuracy": right, "length_baseline": right, "seconds": 60.0}
    runs = [run_folder(tmp_path / "dpo", seed, evaluation=evaluation) for seed in range(5)]
    preference.keep("dpo", runs, tmp_path / "results")
    assert "| 1.000 [0.935, 1.000] |" in preference.table(tmp_path / "results")


def test_a_win_rate_stands_beside_its_judge_s_accuracy_and_length(tmp_path: Path) -> None:
    evaluation = {"pairs": 90, "accuracy": SHARE, "length_baseline": SHARE | {"mean": 0.5}, "seconds": 90.0}
    report = {
        "prompts": 300,
        "win_rate": SHARE | {"mean": 0.58, "number": 300},
        "judge": {"name": "a judge", "accuracy": SHARE | {"mean": 0.63}},
        "longer_wins": {"win_rate": SHARE | {"mean": 0.47}, "accuracy": SHARE},
        "baseline": {"name": "smollm2-135m"},
    }
    report["args"] = {"prompts": "/a/b/pairs.jsonl", "share": [0.8, 1.0], "policy": "runs/x"}
    report["notes"] = ["unknown: those of /a/b/m, https://host/v1 and a/b", "a / b"]
    path = preference.keep(
        "dpo", [run_folder(tmp_path, 1, evaluation=evaluation, winrate=report)], tmp_path / "results"
    )
    kept = json.loads(path.read_text())[0]["winrate"]
    assert kept["args"] == {"prompts": "pairs.jsonl", "share": [0.8, 1.0], "policy": "runs/x"}
    assert kept["notes"] == ["unknown: those of m, https://host/v1 and a/b", "a / b"]
    row = preference.table(tmp_path / "results").splitlines()[3].split(" | ")
    assert row[2] == "win rate over smollm2-135m, 300 prompts; the judge is right in 0.630"
    assert row[3:5] == ["the longer one: 0.470", "0.580 [0.550, 0.670]"]


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no evaluation\.json.*--resume"):
        preference.keep("x", [run_folder(tmp_path, 1)], tmp_path)
    with pytest.raises(ValueError, match="must be a finished run folder"):
        preference.keep("x", [tmp_path / "nothing"], tmp_path)
