"""The study of over-optimization: gold's classifier by hand, the fitted forms, and all of it on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from rl_lab import overoptimization
from rl_lab.curves.store import read_scalars
from rl_lab.language import load_model, load_tokenizer, save_model
from rl_lab.overoptimization import NaiveBayes, beginnings, features, fit, gold, held_out, main, sentences
from rl_lab.preference import grpo


def test_features_are_the_words_and_pairs_that_are_there() -> None:
    assert features("It's good , good GOOD -- 10 times .") == {
        "it's", "good", "times", "it's good", "good good", "good times",
    }  # fmt: skip
    assert features(" . ") == set()


def test_naive_bayes_by_hand() -> None:
    """What a text has several times counts once; six features, and 1 is added to the count of each."""
    classify = NaiveBayes(["a b", "a a"], ["b c"])
    p = {"a": 3, "b": 2, "c": 1, "a b": 2, "a a": 2, "b c": 1}
    q = {"a": 1, "b": 2, "c": 2, "a b": 1, "a a": 1, "b c": 2}
    weights = {x: math.log(p[x] / 11 / (q[x] / 9)) for x in p}
    assert classify.weights == pytest.approx(weights)
    assert classify("") == pytest.approx(math.log(2))
    assert classify("C a, unknown") == pytest.approx(math.log(2) + weights["c"] + weights["a"])


def test_the_forms_are_found_again() -> None:
    d = np.linspace(0, 4, 30)
    found = fit(d, d * (2.0 - 0.4 * d), "best-of-n")
    assert found == pytest.approx({"alpha": 2.0, "beta": 0.4, "rms": 0.0, "peak": 2.5}, abs=1e-9)
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.nan_to_num(d * (1.5 - 1.2 * np.log(d)))
    found = fit(d, gain, "GRPO")
    peak = found.pop("peak")
    assert found == pytest.approx({"alpha": 1.5, "beta": 1.2, "rms": 0.0}, abs=1e-9)
    values = [x * (1.5 - 1.2 * math.log(x)) for x in (peak - 0.01, peak, peak + 0.01)]  # type: ignore[operator]
    assert max(values) == values[1]
    assert fit(d, d * (1.0 + 0.1 * d), "best-of-n")["peak"] is None
    assert fit(d, d * (-0.1 - 0.2 * d), "best-of-n")["peak"] == 0  # it only falls
    noisy = fit(d, d + np.where(np.arange(30) % 2, 0.1, -0.1), "best-of-n")
    assert noisy["rms"] == pytest.approx(0.1, rel=0.1)


@pytest.fixture
def polarity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sentences: those with "good" are positive."""
    folder = tmp_path / "polarity"
    folder.mkdir()
    for name, word in (("pos", "good"), ("neg", "bad")):
        (folder / f"rt-polarity.{name}").write_text("".join(f"film number {i} is {word} .\n" for i in range(300)))
    monkeypatch.setenv("POLARITY", str(folder))
    monkeypatch.setattr("rl_lab.overoptimization.PROMPTS", 20)
    monkeypatch.setattr("rl_lab.overoptimization.SAMPLES", 4)
    overoptimization.classifier.cache_clear()
    yield folder
    overoptimization.classifier.cache_clear()


def test_gold_learns_from_nine_tenths_and_prompts_are_of_the_others(polarity: Path) -> None:
    every = [x for side in sentences() for x in side]
    assert 30 < sum(map(held_out, every)) < 90
    assert set(beginnings()) == {" ".join(x.split()[:4]) for x in every if held_out(x)}
    assert beginnings() == beginnings() and len(beginnings()) == len(set(beginnings()))
    (good, bad), seen = gold(["bad"] * 2, ["so good", "so bad"]), overoptimization.classifier().weights
    assert good > 0 > bad
    assert "film number" in seen


@pytest.fixture
def proxy(tiny_model: Path, tmp_path: Path) -> Path:
    """A reward model's run folder."""
    folder = tmp_path / "proxy"
    model = load_model(str(tiny_model), num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    (folder / "model").mkdir(parents=True)
    save_model(folder / "model", model, load_tokenizer(str(tiny_model)))
    (folder / "config.json").write_text('{"command": "python", "git_commit": null}')
    (folder / "evaluation.json").write_text('{"accuracy": {"mean": 0.5}}')
    return folder


def study(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr("sys.argv", ["overoptimization", *map(str, words)])
    main()


def test_the_study_from_end_to_end(
    polarity: Path, proxy: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A tiny model says no word at all: its letters are rewarded.
    monkeypatch.setattr("rl_lab.overoptimization.gold", lambda _, texts: [float(sum(map(ord, x))) for x in texts])
    folder = tmp_path / "study"
    study(monkeypatch, "pairs", folder, "--model", tiny_model, "--number", 25)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 20 and 10 < len(rows) <= 25
    assert not set(prompts) & {row["prompt"] for row in rows}
    assert all(sum(map(ord, row["chosen"])) > sum(map(ord, row["rejected"])) for row in rows)
    assert json.loads((folder / "gold.json").read_text())["accuracy"]["mean"] > 0.95

    study(monkeypatch, "best-of-n", folder, "--model", tiny_model, "--proxy", proxy)
    table = json.loads((folder / "best_of_n.json").read_text())
    assert np.array(table["proxy"]).shape == np.array(table["gold"]).shape == (20, 4)

    policy = grpo.train(
        grpo.Args(
            model=str(tiny_model),
            prompts=str(folder / "prompts.jsonl"),
            steps=3,
            prompts_per_step=2,
            group_size=4,
            reward=(str(proxy), "rl_lab.overoptimization:gold"),
            reward_weights=(1.0, 0.0),
            beta=1e-3,
            eval_prompts=2,
            max_new_tokens=6,
            learning_rate=1e-3,
            device="cpu",
            holdout=(0.8, 1.0),
            runs_dir=tmp_path / "runs",
        )
    ).logs.folders[0]
    study(monkeypatch, "report", folder, "--proxy", proxy, "--policy", policy)
    report = json.loads((folder / "report.json").read_text())
    assert report["policy"]["evaluation"]["held_out"] == 2 and report["gold"]["sentences"] > 30
    best = report["curves"]["best-of-n"]
    assert best["d"][:2] == [0.0, pytest.approx(math.sqrt(math.log(2) - 0.5))] and len(best["d"]) == 3
    assert [best["proxy"][0], best["gold"][0]] == pytest.approx([0, 0], abs=1e-9)
    assert best["proxy"][2] > best["proxy"][1] > 0
    start = np.array(table["proxy"])
    assert best["proxy"][2] == pytest.approx((start.max(1).mean() - start.mean()) / start.std())
    ours, logged = report["curves"]["GRPO"], read_scalars(policy, ("charts/reward/proxy", "charts/length", "losses/kl"))
    assert ours["proxy"] == pytest.approx([(x - start.mean()) / start.std() for x in logged["charts/reward/proxy"]])
    kl = np.array(logged["losses/kl"]) * logged["charts/length"]
    assert np.array(ours["d"]) ** 2 == pytest.approx(kl.clip(min=0), abs=1e-9) and kl[-1] > 0
    assert report["fits"]["GRPO"]["gold"].keys() == {"alpha", "beta", "rms", "peak"}
    assert (folder / "overoptimization.png").read_bytes().startswith(b"\x89PNG")


def test_faults_end_in_one_line(tmp_path: Path, proxy: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLARITY", raising=False)
    overoptimization.classifier.cache_clear()
    with pytest.raises(SystemExit, match=r"POLARITY: it is not set; it names the folder of rt-polarity.pos and"):
        study(monkeypatch, "pairs", tmp_path / "x", "--model", tiny_model)
    monkeypatch.setenv("POLARITY", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"POLARITY: .*No such file"):
        study(monkeypatch, "pairs", tmp_path / "x", "--model", tiny_model)
    with pytest.raises(SystemExit, match=r"FOLDER .*prompts.jsonl: No such file"):
        study(monkeypatch, "best-of-n", tmp_path, "--model", tiny_model, "--proxy", proxy)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(SystemExit, match=r"--proxy .*tiny: no reward model"):
        study(monkeypatch, "best-of-n", tmp_path, "--model", tiny_model, "--proxy", tiny_model)
    (tmp_path / "best_of_n.json").write_text('{"proxy": [[0, 1]], "gold": [[1, 0]]}')
    with pytest.raises(
        SystemExit, match=r"its events have no charts/reward/proxy, charts/reward/rl_lab.over.*, losses"
    ):
        study(monkeypatch, "report", tmp_path, "--proxy", proxy, "--policy", tmp_path)


def test_of_a_step_that_was_done_again_the_last_value_counts(tmp_path: Path) -> None:
    for name, points in (("a", [(1, 0.5), (2, 0.25)]), ("b", [(2, 4.0), (3, 8.0)])):
        writer = SummaryWriter(str(tmp_path), filename_suffix=name)
        for step, x in points:
            writer.add_scalar("x", x, step)
        writer.close()
    assert read_scalars(tmp_path, ["x"]) == {"x": [0.5, 4.0, 8.0]}
