"""KTO's training: the reference point of the whole batch, what is scored and logged, and what is learned."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rl_lab import checkpoint
from rl_lab.language import Tree, encode_completion, encode_prompt, load_model, load_tokenizer
from rl_lab.language_training import Examples, drawn
from rl_lab.preference import kto
from rl_lab.preference_data import Example, place
from rl_lab.preference_metrics import auc
from rl_lab.reference import branch_logprobs, cached_logprobs
from tests.language_runs import (
    assert_equal_gradients,
    command,
    evaluation,
    folder,
    gradients,
    labelled,
    left,
    logp_alone,
    pairs,
    scalars,
    trained,
    write,
)

WEIGHTS = {"desirable_weight": 1.25, "undesirable_weight": 0.75}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "labelled.jsonl", labelled(40))


@pytest.fixture(scope="module")
def other(tiny_model: Path) -> Any:
    """Another model: the tiny one with all weights off a little, which makes random letters less likely."""
    model = load_model(str(tiny_model)).requires_grad_(False)
    random = torch.Generator().manual_seed(7)
    for p in model.parameters():
        p += 0.1 * torch.randn(p.shape, generator=random)
    return model


@pytest.fixture
def other_reference(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    """Makes `other` the reference, so that log-ratios and z_0 are not zero at the start."""
    monkeypatch.setattr(kto, "cached_logprobs", lambda _, *rest: cached_logprobs(other, *rest))
    monkeypatch.setattr(kto, "copy", SimpleNamespace(deepcopy=lambda _: other))


def trees_of(tiny_model: Path, rows: list[dict[str, Any]]) -> list[Tree]:
    tokenizer = load_tokenizer(str(tiny_model))
    return [Tree(encode_prompt(tokenizer, x["prompt"]), (encode_completion(tokenizer, x["completion"]),)) for x in rows]


def batch_of(tiny_model: Path, rows: list[dict[str, Any]], size: int) -> tuple[list[Tree], list[bool]]:
    """The examples of the first batch, from the data's lines, and their labels."""
    mine = [row for row in rows if place(row["prompt"]) < 0.9]
    chosen = [mine[i] for i in drawn(len(mine), size, 1, 0)]
    return trees_of(tiny_model, chosen), [x["label"] for x in chosen]


@pytest.mark.usefixtures("other_reference")
@pytest.mark.parametrize("micro_tokens", [1, 50])
def test_the_first_loss_is_that_of_plain_sequences(micro_tokens: int, tiny_model: Path, other: Any, data: Path) -> None:
    """Guards z_0 of a micro-batch or of true pairs, mask and shift, the reference's rows, and labels turned round."""
    run = trained(kto, tiny_model, data, batch_size=5, micro_tokens=micro_tokens, **WEIGHTS)
    log, model = scalars(folder(run)), load_model(str(tiny_model))
    trees, labels = batch_of(tiny_model, labelled(40), 5)
    assert 0 < sum(labels) < 5

    def ratio(prompt: list[int], tokens: list[int]) -> float:
        return logp_alone(model, prompt, tokens) - logp_alone(other, prompt, tokens)

    z_0 = sum(ratio(trees[i].prompt, trees[(i + 1) % 5].branches[0]) for i in range(5)) / 5
    assert z_0 > 0.1
    losses, rewards = [], []
    for (prompt, (tokens,)), label in zip(trees, labels, strict=True):
        r = ratio(prompt, tokens)
        value = 1 / (1 + math.exp(-0.1 * (r - z_0 if label else z_0 - r)))
        losses.append((1.25 if label else 0.75) * (1 - value))
        rewards.append(0.1 * r)
    assert log["losses/kl"] == pytest.approx([z_0], rel=1e-4)
    assert log["losses/loss"] == pytest.approx([sum(losses) / 5], rel=2e-5)
    for name, kind in (("desirable", True), ("undesirable", False)):
        mine = [i for i in range(5) if labels[i] is kind]
        assert log[f"rewards/{name}"] == pytest.approx([sum(rewards[i] for i in mine) / len(mine)], rel=1e-4)
        logps = [logp_alone(model, trees[i].prompt, trees[i].branches[0]) for i in mine]
        assert log[f"logps/{name}"] == pytest.approx([sum(logps) / len(mine)], rel=1e-5)

    total = torch.zeros(())
    for (prompt, (tokens,)), label in zip(trees, labels, strict=True):
        scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        r = scores.gather(1, torch.tensor(tokens)[:, None]).sum() - logp_alone(other, prompt, tokens)
        total = total + (1.25 if label else 0.75) * (0.1 * (z_0 - r if label else r - z_0)).sigmoid() / 5
    total.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_equal_gradients(expected, gradients(run), 1e-5)


@pytest.mark.usefixtures("other_reference")
def test_the_evaluation_is_of_all_held_out_completions(tiny_model: Path, other: Any, tmp_path: Path) -> None:
    """And of no other; by the model as it is at the end, around their own z_0."""
    rows = labelled(80)
    run = trained(kto, tiny_model, write(tmp_path / "many.jsonl", rows), eval_examples=99, eval_every=1)
    mine = [row for row in rows if place(row["prompt"]) >= 0.9]
    trees, labels = trees_of(tiny_model, mine), [row["label"] for row in mine]

    def ratio(prompt: list[int], tokens: list[int]) -> float:
        return logp_alone(run.model, prompt, tokens) - logp_alone(other, prompt, tokens)

    ratios = [ratio(prompt, tokens) for prompt, (tokens,) in trees]
    z_0 = sum(ratio(x.prompt, y.branches[0]) for x, y in zip(trees, [*trees[1:], trees[0]], strict=True)) / len(mine)
    report = evaluation(folder(run))
    assert report["examples"] == len(mine) and report["desirable"] == sum(labels)
    assert report["kl"] == pytest.approx(z_0, rel=1e-4)
    assert report["auc"] == pytest.approx(auc(ratios, labels)) and 0 < report["auc"]["mean"] < 1
    assert report["length_baseline"] == auc([len(tree.branches[0]) for tree in trees], labels)
    good = [0.1 * x for x, label in zip(ratios, labels, strict=True) if label]
    assert report["rewards_desirable"] == pytest.approx(sum(good) / len(good), rel=1e-4)
    log = scalars(folder(run))
    assert log["eval/loss"] == pytest.approx([report["losses_loss"]])
    assert log["eval/auc"] == pytest.approx([report["auc"]["mean"]])


@pytest.mark.usefixtures("other_reference")
def test_micro_batches_do_not_change_the_gradient(tiny_model: Path, data: Path) -> None:
    """Guards a reference point of a micro-batch, and means of means; of five, one is alone in its micro-batch."""
    found = [gradients(trained(kto, tiny_model, data, batch_size=5, micro_tokens=most)) for most in (1, 64, 100_000)]
    for other in found[1:]:
        assert_equal_gradients(found[0], other, 1e-6)


def test_the_first_step_is_at_the_reference(tiny_model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """z_0 and rewards are 0, every loss is half its weight; of these weights nothing is to be said, of others it is."""
    log = scalars(folder(trained(kto, tiny_model, data, batch_size=5, desirable_weight=0.6, lora_rank=2)))
    labels = batch_of(tiny_model, labelled(40), 5)[1]
    assert log["losses/loss"] == pytest.approx([sum(0.6 if x else 1.0 for x in labels) / 10], rel=1e-6)
    for name in ("losses/kl", "rewards/desirable", "rewards/undesirable"):
        assert log[name] == pytest.approx([0.0], abs=1e-6)
    assert "advise" not in capsys.readouterr().out
    trained(kto, tiny_model, data)
    rows = [row for row in labelled(40) if place(row["prompt"]) < 0.9]
    good = sum(row["label"] for row in rows)
    said = capsys.readouterr().out
    assert f"{good} desirable and {len(rows) - good} undesirable examples, weighted 1 and 1: " in said
    assert f"advise desirable_weight from {(len(rows) - good) / good:.3g}" in said


def test_mismatched_trees_have_other_prompts(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pairs, whose two completions may be drawn side by side: none is scored behind its own prompt (trl#1911)."""
    data = write(tmp_path / "pairs.jsonl", pairs(8))
    seen: list[list[Tree]] = []

    def watched(model: Any, trees: list[Tree], *rest: Any) -> Any:
        seen.append(list(trees))
        return branch_logprobs(model, trees, *rest)

    monkeypatch.setattr(kto, "branch_logprobs", watched)
    trained(kto, tiny_model, data, steps=8, batch_size=4, train=(0.0, 0.8), holdout=(0.8, 1.0))
    tokenizer = load_tokenizer(str(tiny_model))
    true = {
        (*encode_prompt(tokenizer, row["prompt"]), *encode_completion(tokenizer, row[side]))
        for row in pairs(8)
        for side in ("chosen", "rejected")
    }
    assert len(seen) == 2 * 8 + 2 and all(seen[i] == seen[i + 1] for i in range(0, len(seen), 2))
    assert not true & {(*tree.prompt, *tree.branches[0]) for trees in seen for tree in trees}


def test_mismatched_trees_keep_to_max_tokens(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt and another one's long answer, each of which fits with its own: the answer is cut."""
    rows = [
        {"prompt": letter * length, "completion": letter * (30 - length), "label": length > 9}
        for letter, length in zip("abcdefghijklmnop", (2, 26) * 8, strict=True)
    ]
    seen: list[Tree] = []

    def watched(model: Any, trees: list[Tree], *rest: Any) -> Any:
        seen.extend(trees)
        return branch_logprobs(model, trees, *rest)

    monkeypatch.setattr(kto, "branch_logprobs", watched)
    trained(kto, tiny_model, write(tmp_path / "long.jsonl", rows), steps=4, batch_size=4, max_tokens=32,
            train=(0.0, 0.5), holdout=(0.5, 1.0))  # fmt: skip
    assert max(map(len, seen)) == 32


def test_singles() -> None:
    """A pair is a desirable and an undesirable completion; the rest has labels."""
    pair, single = Example("a", ("b", "c"), (), ""), Example("d", ("e",), (False,), "")
    data = Examples([pair, single], [Tree([1], ([2], [3])), Tree([4], ([5],))])
    assert kto.singles(data) == ([Tree([1], ([2],)), Tree([1], ([3],)), Tree([4], ([5],))], [True, False, False])


def test_pairs_are_the_same_as_labelled_completions(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs()
        for side in ("chosen", "rejected")
    ]
    files = write(tmp_path / "pairs.jsonl", pairs()), write(tmp_path / "singles.jsonl", rows)
    runs = [trained(kto, tiny_model, path, steps=3, learning_rate=1e-3, eval_examples=99) for path in files]
    first, second = (left(folder(run)) for run in runs)
    assert first == second and first["report"]["desirable"] * 2 == first["report"]["examples"]


def test_means_by_label() -> None:
    labels = torch.tensor([True, False, True, True])
    logps, args = torch.tensor([-1.0, -2.0, -3.0, -5.0]), SimpleNamespace(beta=0.5, **WEIGHTS)
    found = kto.measures(logps, torch.zeros(4), labels, torch.tensor(0.0), args)  # type: ignore[arg-type]
    means = kto.by_label({name: float(x.mean()) for name, x in found.items()}, labels.tolist())
    assert means["logps/desirable"] == -3.0 and means["logps/undesirable"] == -2.0
    assert means["rewards/desirable"] == -1.5 and means["rewards/undesirable"] == -1.0
    assert means["losses/loss"] == pytest.approx(float(found["losses/loss"].mean()))
    assert kto.by_label({"rewards/desirable": 0.5, "rewards/undesirable": 0.0, "losses/loss": 0.2}, [True] * 2) == {
        "rewards/desirable": 0.5,
        "losses/loss": 0.2,
    }


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (labelled(40), {"batch_size": 1}, "--batch-size 1 must be 2 or more"),
        (labelled(40), {"beta": 0.0}, "--beta 0.0 must be finite and above 0"),
        (labelled(40), {"undesirable_weight": 0.0}, "--undesirable-weight 0.0 must be finite and above 0"),
        ([x | {"label": True} for x in labelled(40)], {}, "--holdout .* a share with both labels"),
        (
            [x | {"prompt": "a" if place(x["prompt"]) < 0.9 else x["prompt"]} for x in labelled(40)],
            {"train": (0.0, 0.9)},
            "--data .* of two prompts or more",
        ),
    ],
    ids=["batch", "beta", "weight", "one label", "one prompt"],
)
def test_what_is_refused(
    rows: list[dict[str, Any]], flags: dict[str, Any], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(kto, tiny_model, write(tmp_path / "rows.jsonl", rows), **flags)


def test_a_stopped_run_goes_on_bit_for_bit(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", tiny_model, "--data", data, "--learning-rate", 1e-3, "--steps", 4, "--batch-size", 3]
    flags += ["--warmup", 2, "--no-bf16", "--eval-every", 2, "--device", "cpu"]
    assert command(kto, monkeypatch, *flags, "--runs-dir", tmp_path / "whole") == 0
    assert command(kto, monkeypatch, *flags, "--runs-dir", tmp_path / "parts", "--stop-at", 2) == 0
    (whole,), (parts,) = ((tmp_path / name).iterdir() for name in ("whole", "parts"))
    assert checkpoint.load(parts)["run"]["iteration"] == 2
    assert command(kto, monkeypatch, "--resume", parts) == 0
    assert left(parts) == left(whole) and len(left(whole)["logs"]["eval/auc"]) == 2
    assert left(whole)["logs"]["losses/kl"][-1] > 0  # of the model at the start, also after the resumption


def test_it_learns_what_is_desirable(tiny_model: Path, tmp_path: Path) -> None:
    """On held-out prompts, with a negative control: with the labels turned round it learns the opposite."""
    flags = {"steps": 12, "learning_rate": 2e-3, "batch_size": 8, "max_grad_norm": 1.0, "eval_examples": 99}
    found = []
    for good in (True, False):
        rows = [
            {"prompt": row["prompt"], "completion": "aaa" if i % 2 else "bbb", "label": bool(i % 2) == good}
            for i, row in enumerate(pairs(60))
        ]
        run = trained(kto, tiny_model, write(tmp_path / f"{good}.jsonl", rows), **flags)
        report, tokenizer = evaluation(folder(run)), load_tokenizer(str(tiny_model))
        assert report["auc"]["mean"] == 1.0 and report["length_baseline"]["mean"] == 0.5
        assert report["rewards_desirable"] > report["rewards_undesirable"] and report["kl"] >= 0
        tree = Tree(encode_prompt(tokenizer, "new"), tuple(encode_completion(tokenizer, x) for x in ("aaa", "bbb")))
        after, before = (branch_logprobs(m, [tree], 1, False) for m in (run.model, load_model(str(tiny_model))))
        found.append(float((after - before) @ torch.tensor([1.0, -1.0])))
    assert found[0] > 1 and found[1] < -1


def test_auc_by_hand() -> None:
    """Good 3, 1, 2 and bad 1, 0: of six comparisons five and a half are won.

    At an end A of the interval the distance is 1.96 deviations: at 1/2, V = 1/4 (1 + 3/2 (1/3 + 1/3)) / 6 = 1/12.
    """
    found = auc([3, 1, 1, 2, 0], [True, True, False, True, False])
    assert found["mean"] == pytest.approx(5.5 / 6)
    for end in (found["low"], found["high"]):
        variance = end * (1 - end) * (1 + 1.5 * ((1 - end) / (2 - end) + end / (1 + end))) / 6
        assert abs(end - 5.5 / 6) == pytest.approx(1.959964 * math.sqrt(variance), abs=1e-4)
    assert found["low"] < 0.5 < found["mean"] < found["high"] < 1  # 5.5 / 6 - 0.5 is less than 1.96 / sqrt 12


@pytest.mark.parametrize(("good", "bad"), [(30, 60), (3, 3), (2, 50), (5, 45)])
def test_aucs_interval_holds_the_truth_as_often_as_it_says(good: int, bad: int) -> None:
    """Of few examples too, whose scores are often all apart."""
    random, truth = np.random.default_rng(0), 0.7602499389  # P(x > y) = Phi(1 / sqrt 2) for N(1, 1) and N(0, 1)
    labels, inside = np.arange(good + bad) < good, 0
    for _ in range(400):
        found = auc(random.standard_normal(good + bad) + labels, labels)
        inside += found["low"] <= truth <= found["high"]
    assert 0.92 < inside / 400 < 0.985
    assert auc([1, 2, 3], [False, True, True])["low"] < 0.6  # apart, and three examples show little
