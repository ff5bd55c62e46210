"""Answers to a task's prompts: how many are right, and pairs of right and wrong ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rl_lab import verify
from rl_lab.language import Prompt, Tree
from rl_lab.preference_data import place, read
from rl_lab.tasks import make


class Oracle:
    """In the place of the sampler: right answers to larger-of-two for even first numbers, all others the first one."""

    asked: ClassVar[list[Any]] = []  # what ends an answer, its longest, the generator's seed; then how it was sampled

    def __init__(
        self, model: Any, tokenizer: Any, stop: str, longest: int, random: torch.Generator, bf16: bool
    ) -> None:
        self.asked[:] = [stop, longest, random.initial_seed()]

    def __call__(
        self, prompts: list[Prompt], group_size: int, temperature: float
    ) -> tuple[list[Tree], list[str], torch.Tensor]:
        texts = []
        self.asked[3:] = [group_size, temperature]
        for prompt in prompts:
            a, b = map(int, str(prompt).rpartition("\n")[2].removesuffix(" ->").split(", "))
            texts += [f" {max(a, b)}"] + [f" {max(a, b) if a % 2 == 0 else a}"] * (group_size - 1)
        return [], texts, torch.zeros(len(texts), dtype=torch.bool)


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(verify, "Sampler", Oracle)
    monkeypatch.setattr(sys, "argv", ["verify", *flags])
    verify.main()


def test_accuracy_is_of_the_share_asked_for(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    run(monkeypatch, str(tiny_model), "--task", "larger-of-two", "--num-prompts", "50", "--json", str(path))
    assert "on 50 prompts of larger-of-two, greedy: 1.000 right [0.929, 1.000]" in capsys.readouterr().out
    assert json.loads(path.read_text())["accuracy"]["mean"] == 1.0
    task = make("larger-of-two")
    assert Oracle.asked == [task.stop, task.max_new_tokens, 1, 1, 0.0]  # one answer, of the likeliest tokens


def test_pairs_are_right_against_wrong_of_prompts_of_the_share(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts whose answers are all right, or all wrong, give none."""
    path, flags = tmp_path / "pairs.jsonl", ("--share", "0", "0.5", "--num-prompts", "100", "--group-size", "3")
    run(monkeypatch, str(tiny_model), "--task", "larger-of-two", "--pairs", str(path), *flags)
    pairs, _ = read(str(path), "pairs")
    task = make("larger-of-two")
    assert Oracle.asked == [task.stop, task.max_new_tokens, 1, 3, 1.0]
    assert 10 < len(pairs) < 40  # a quarter
    for pair in pairs:
        assert place(pair.prompt) < 0.5
        assert task.reward([pair.prompt] * 2, list(pair.completions)) == [1.0, 0.0]


def test_no_pair_has_an_answer_that_was_cut(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's wrong answers are all cut here, so that every prompt has right ones only, or none."""

    class Cutting(Oracle):
        def __call__(self, prompts: list[Prompt], *rest: Any) -> tuple[list[Tree], list[str], torch.Tensor]:
            trees, texts, cut = super().__call__(prompts, *rest)
            asked = [prompt for prompt in prompts for _ in range(len(texts) // len(prompts))]
            return trees, texts, cut | ~torch.tensor(make("larger-of-two").reward(asked, texts)).bool()

    monkeypatch.setattr(verify, "Sampler", Cutting)
    flags = ["--task", "larger-of-two", "--num-prompts", "50", "--pairs", str(tmp_path / "pairs.jsonl")]
    monkeypatch.setattr(sys, "argv", ["verify", str(tiny_model), *flags])
    verify.main()
    assert (tmp_path / "pairs.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--task", "chess"], "--task chess: there are larger-of-two"),
        (["--task", "addition", "--share", "0.5", "0.5"], "no prompts of addition"),
        (["--task", "gsm8k:nothing.jsonl"], "No such file"),
        (["--task", "addition", "--pairs", "no/such.jsonl"], "--pairs no/such.jsonl must be a file in a folder that"),
        (
            ["--task", "addition", "--json", "no/such.json"],
            "--json no/such.json must be a file in a folder that exists",
        ),
        (["--task", "addition", "--pairs", "x.jsonl", "--group-size", "1"], "--group-size 1 must be at least 2"),
    ],
)
def test_bad_flags_end_in_one_line(
    flags: list[str], wanted: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=wanted):
        run(monkeypatch, str(tiny_model), *flags)
