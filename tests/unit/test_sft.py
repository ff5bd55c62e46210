"""Supervised fine-tuning: the mean over the tokens of completions, whatever micro-batches they come in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from rl_lab import checkpoint
from rl_lab.language import Tree, encode_completion, encode_prompt, load_model, load_tokenizer
from rl_lab.language_training import drawn
from rl_lab.preference import sft
from rl_lab.preference_data import place
from tests.language_runs import (
    assert_equal_gradients,
    command,
    evaluation,
    folder,
    gradients,
    left,
    logp_alone,
    pairs,
    scalars,
    trained,
    write,
)


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(count)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "completions.jsonl", rows())


def trees(tiny_model: Path, low: float, high: float) -> list[Tree]:
    """The examples of a share of the prompts."""
    tokenizer = load_tokenizer(str(tiny_model))
    mine = [row for row in rows() if low <= place(row["prompt"]) < high]
    return [Tree(encode_prompt(tokenizer, x["prompt"]), (encode_completion(tokenizer, x["completion"]),)) for x in mine]


def perplexity(model: Any, examples: list[Tree]) -> float:
    logps = [logp_alone(model, prompt, tokens) for prompt, (tokens,) in examples]
    return math.exp(-sum(logps) / sum(len(tokens) for _, (tokens,) in examples))


@pytest.mark.parametrize("micro_tokens", [1, 100_000])
def test_the_loss_is_the_mean_over_the_batchs_tokens(micro_tokens: int, tiny_model: Path, data: Path) -> None:
    """Guards prompts that are scored, a shift by one, a missing EOS, and means over examples or micro-batches."""
    run = trained(sft, tiny_model, data, batch_size=5, micro_tokens=micro_tokens)
    known, model = trees(tiny_model, 0.0, 0.9), load_model(str(tiny_model))
    batch = [known[i] for i in drawn(len(known), 5, 1, 0)]
    lengths = [len(tokens) for _, (tokens,) in batch]
    assert len(set(lengths)) > 1 and all(tokens[-1] == 2 for _, (tokens,) in batch)
    loss = torch.zeros(())
    for prompt, (tokens,) in batch:
        scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        loss = loss - scores.gather(1, torch.tensor(tokens)[:, None]).sum() / sum(lengths)
    loss.backward()
    assert scalars(folder(run))["losses/loss"] == pytest.approx([loss.item()], rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_equal_gradients(expected, gradients(run), 1e-5)


def test_perplexity_before_and_after(tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the held-out prompts alone, by the model as it was and as it is saved; once a gradient step."""
    counted = Mock(side_effect=sft.branch_logprobs)
    monkeypatch.setattr(sft, "branch_logprobs", counted)
    run = trained(sft, tiny_model, data, steps=3, learning_rate=1e-3, eval_every=1, eval_examples=99)
    assert counted.call_count == 1 + 3
    report, held_out = evaluation(folder(run)), trees(tiny_model, 0.9, 1.0)
    assert report["examples"] == len(held_out)
    assert report["tokens"] == sum(len(tokens) for _, (tokens,) in held_out)
    assert report["before"] == pytest.approx(perplexity(load_model(str(tiny_model)), held_out), rel=1e-5)
    assert report["perplexity"] == pytest.approx(perplexity(load_model(str(folder(run))), held_out), rel=1e-5)
    assert report["perplexity"] != pytest.approx(report["before"], rel=1e-3)
    logged = scalars(folder(run))["eval/perplexity"]
    assert len({*logged}) == 3 and logged[-1] == pytest.approx(report["perplexity"], rel=1e-6)


def test_of_pairs_the_chosen_are_imitated(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    peers = write(tmp_path / "pairs.jsonl", pairs())
    found = [gradients(trained(sft, tiny_model, path)) for path in (data, peers)]
    assert_equal_gradients(*found, 0.0)


def test_labelled_completions_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Guards imitation of what is labelled bad."""
    labelled = write(tmp_path / "labelled.jsonl", [row | {"label": True} for row in rows()])
    with pytest.raises(ValueError, match="labelled completion"):
        trained(sft, tiny_model, labelled)


def test_a_stopped_run_goes_on_bit_for_bit(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", tiny_model, "--data", data, "--learning-rate", 1e-3, "--steps", 4, "--batch-size", 3]
    flags += ["--warmup", 2, "--no-bf16", "--eval-every", 2, "--device", "cpu", "--lora-rank", 2]
    assert command(sft, monkeypatch, *flags, "--runs-dir", tmp_path / "whole") == 0
    assert command(sft, monkeypatch, *flags, "--runs-dir", tmp_path / "parts", "--stop-at", 2) == 0
    (whole,), (parts,) = ((tmp_path / name).iterdir() for name in ("whole", "parts"))
    assert checkpoint.load(parts)["run"]["iteration"] == 2
    assert command(sft, monkeypatch, "--resume", parts) == 0
    assert left(parts) == left(whole) and left(whole)["report"]["before"] > 1


def test_it_learns_to_imitate(tiny_model: Path, tmp_path: Path) -> None:
    """With a negative control: who learns another answer does not learn this one, EOS aside."""
    flags = {"steps": 12, "learning_rate": 3e-3, "batch_size": 8, "max_grad_norm": 1.0, "eval_examples": 99}
    found, tokenizer = [], load_tokenizer(str(tiny_model))
    answer = encode_prompt(tokenizer, "new"), encode_completion(tokenizer, "aaa")[:-1]
    for said in ("aaa", "hgf"):
        lines = [{"prompt": row["prompt"], "completion": said} for row in rows(40)]
        run = trained(sft, tiny_model, write(tmp_path / f"{said}.jsonl", lines), **flags)
        assert evaluation(folder(run))["perplexity"] < 0.5 * evaluation(folder(run))["before"]
        found.append(logp_alone(run.model, *answer) - logp_alone(load_model(str(tiny_model)), *answer))
    assert found[0] > 3 and found[1] < 0.5
