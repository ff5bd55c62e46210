"""The doctor finds each planted fault at its line, and nothing in a clean set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_lab.doctor import main
from rl_lab.language import load_tokenizer
from rl_lab.preference_checks import length_bias
from rl_lab.preference_data import Example, place, tokenize
from rl_lab.preference_metrics import wilson

Row = dict[str, Any]
Change = Callable[[Any], None]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def talk(question: str, chosen: str, rejected: str) -> Row:
    prompt = [said("user", question)]
    return {name: [*prompt, said("assistant", x)] for name, x in (("chosen", chosen), ("rejected", rejected))}


def talks() -> list[Row]:
    """Ten pairs of messages; every second time the longer answer is chosen."""
    answers = ("no", "yes, it is")
    return [talk(f"Is {i} a number?", answers[i % 2], answers[1 - i % 2]) for i in range(10)]


def texts() -> list[Row]:
    answers = (" one", " three")
    return [{"prompt": f"{i} is", "chosen": answers[i % 2], "rejected": answers[1 - i % 2]} for i in range(10)]


def labelled() -> list[Row]:
    return [{"prompt": f"{i} is", "completion": " odd", "label": i % 2 == 1} for i in range(10)]


def steps() -> list[Row]:
    return [{"prompt": f"{i} + 1", "completions": ["First.", "Then."], "labels": [True, i > 5]} for i in range(10)]


CLEAN = {
    "pairs of messages": talks(),
    "pairs of texts": texts(),
    "labelled completions": labelled(),
    "labelled steps": steps(),
    "completions": [{"prompt": x["prompt"], "completion": x["chosen"]} for x in texts()],
    "messages": [{"messages": x["chosen"]} for x in talks()],
    "plain texts": [{"text": f"{i} is one"} for i in range(10)],
    "prompts": [{"prompt": x["prompt"]} for x in texts()],
    "transcripts": [
        {x: f"\n\nHuman: {i}?\n\nAssistant:{text[x]}" for x in ("chosen", "rejected")} for i, text in enumerate(texts())
    ],
}


@pytest.fixture(scope="module")
def make_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Change], str]:
    """Makes models whose tokenizers differ from one without faults."""

    def make(change: Change) -> str:
        tokenizer = load_tokenizer(str(tiny_model))
        tokenizer.pad_token = "<|end|>"
        change(tokenizer)
        folder = tmp_path_factory.mktemp("model")
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text((tiny_model / "config.json").read_text())
        return str(folder)

    return make


@pytest.fixture(scope="module")
def model(make_model: Callable[[Change], str]) -> str:
    return make_model(lambda tokenizer: None)


def diagnose(folder: Path, rows: list[Row], model: str, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = main([str(data), "--model", model, "--json", str(folder / "report.json"), *flags])
    return code, json.loads((folder / "report.json").read_text())


def faults(report: dict[str, Any]) -> dict[str, tuple[str, int, str | None]]:
    """Level, count and first line of what is not ok; length bias, which a few examples cannot show, is ok."""
    found = [x for x in report["findings"] if x["level"] != "ok"]
    return {x["check"]: (x["level"], x["count"], x["first"] and x["first"].rpartition(":")[2]) for x in found}


@pytest.mark.parametrize("kind", CLEAN)
def test_nothing_is_found_in_a_clean_set(kind: str, model: str, tmp_path: Path) -> None:
    code, report = diagnose(tmp_path, CLEAN[kind], model)
    assert (code, faults(report), report["examples"]) == (0, {}, 10)
    assert all(finding["total"] != 0 for finding in report["findings"])


def crossing() -> list[str]:
    """A question of the lower half, and one of the upper half that differs from it by case and white space alone."""
    pairs = ([f"Is {i} a  Number?", f"is {i} a number?"] for i in range(100))
    return next(x for x in pairs if place([said("user", x[0])]) < 0.5 <= place([said("user", x[1])]))


def answered(*roles: str) -> Row:
    return {"prompt": [said(role, "So") for role in roles], "chosen": "no", "rejected": "yes"}


A, B = crossing()
OTHER = [said("user", "Is it?"), said("assistant", "no")]
HALVES = ["--train", "0", "0.5", "--holdout", "0.5", "1"]
PLANTED: list[tuple[str, str, list[Row], list[Row], list[str]]] = [  # check, level, clean rows, those after the third
    ("unshared prompts", "warning", talks(), [{"chosen": talks()[3]["chosen"], "rejected": OTHER}], []),
    ("empty completions", "warning", talks(), [talk("Well?", "no", "\n\n")], []),
    ("empty completions", "warning", labelled(), [{"prompt": "a", "completion": "", "label": True}], []),
    ("chosen = rejected", "warning", talks(), [talk("Well?", "no", "no\n")], []),
    ("duplicates", "warning", talks(), talks()[1:2], []),
    ("duplicates", "warning", CLEAN["prompts"], CLEAN["prompts"][1:2], []),
    ("conflicting labels", "warning", talks(), [talk("Is 1 a number?", "no", "yes, it is")], []),
    ("conflicting labels", "warning", labelled(), [labelled()[1] | {"label": False}], []),
    ("conflicting labels", "warning", steps(), [steps()[1] | {"labels": [False, True]}], []),
    ("spaces", "note", talks(), [talk("Well? ", "no", "yes")], []),
    ("spaces", "note", talks(), [talk("Well?", "no", " yes")], []),
    ("spaces", "note", texts(), [{"prompt": "So ", "chosen": "no", "rejected": "yes"}], []),
    ("spaces", "note", texts(), [{"prompt": "So\n", "chosen": " no", "rejected": "yes"}], []),
    ("turns", "note", texts(), [answered("user", "user")], []),
    ("turns", "note", texts(), [answered("user", "assistant")], []),
    ("similar prompts", "warning", talks(), [talk(A, "no", "yes"), talk(B, "yes", "no")], HALVES),
    ("EOS", "warning", talks(), [talk("Well?", "no", "yes<|im_end|>")], []),
    ("EOS", "warning", texts(), [{"prompt": "So", "chosen": " a<|im_end|>b", "rejected": " b"}], []),
    ("too long", "warning", talks(), [talk("Well?", "no", "y" * 100)], ["--max-tokens", "100"]),
    ("too long", "warning", steps(), [steps()[1] | {"completions": ["a" * 40, "b" * 40]}], ["--max-tokens", "64"]),
]


@pytest.mark.parametrize(("check", "level", "rows", "planted", "flags"), PLANTED)
def test_a_planted_fault_is_found_at_its_line(
    check: str,
    level: str,
    rows: list[Row],
    planted: list[Row],
    flags: list[str],
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report = diagnose(tmp_path, rows[:3] + planted + rows[3:], model, *flags)
    line = 3 + len(planted)
    assert (code, faults(report)) == (0, {check: (level, 1, str(line))})
    wanted = rf"^{level} +{re.escape(check)}: 1 of \d+ \(\d+\.\d%\), first .*/data\.jsonl:{line}: \S"
    assert len(re.findall(wanted, capsys.readouterr().out, re.MULTILINE)) == 1


def test_parts_that_overlap_are_an_error(model: str, tmp_path: Path) -> None:
    code, report = diagnose(tmp_path, texts(), model, "--train", "0", "1", "--holdout", "0.5", "1")
    held = [i for i, row in enumerate(texts(), 1) if place(row["prompt"]) >= 0.5]
    assert (code, faults(report)) == (1, {"shared prompts": ("error", len(held), str(held[0]))})
    assert report["holdout"] == {"from": 0.5, "to": 1.0, "examples": len(held)}


def test_nothing_left_to_train_on_is_an_error(model: str, tmp_path: Path) -> None:
    code, report = diagnose(tmp_path, texts(), model, "--max-tokens", "5")
    assert (code, faults(report)) == (1, {"too long": ("error", 10, "1")})


def test_one_label_only(model: str, tmp_path: Path) -> None:
    code, report = diagnose(tmp_path, [row | {"label": True} for row in labelled()], model)
    assert (code, faults(report)) == (0, {"one label only": ("warning", 10, "1")})


def bos_before_every_text(tokenizer: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    names = [("<|im_start|>", tokenizer.bos_token_id)]
    processor = tokenizers.processors.TemplateProcessing("<|im_start|> $A", None, names)
    tokenizer.backend_tokenizer.post_processor = processor


def with_template(template: str) -> Change:
    def change(tokenizer: Any) -> None:
        tokenizer.chat_template = template

    return change


def bos_missing(tokenizer: Any) -> None:
    bos_before_every_text(tokenizer)
    with_template(OPEN.format(start="", end="<|im_end|>"))(tokenizer)


OPEN = (
    "{start}{{% for m in messages %}}<|end|>{{{{ m['role'] }}}}:{{{{ m['content'] }}}}{end}{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|end|>assistant:{{% endif %}}"
)
TOKENIZERS: list[tuple[Change, str, tuple[str, int, str | None]]] = [
    (with_template(""), "no chat template", ("error", 10, "1")),
    (lambda tokenizer: setattr(tokenizer, "pad_token", "<|im_end|>"), "padding = EOS", ("note", 1, None)),
    (with_template(OPEN.format(start="", end="<|end|>")), "template's end", ("warning", 1, None)),
    (with_template(OPEN.format(start="", end="")), "template's end", ("warning", 1, None)),
    (with_template(OPEN.format(start="", end="<|im_end|>") + "!"), "template's end", ("warning", 1, None)),
    (bos_before_every_text, "template's BOS", ("note", 1, None)),
    (bos_missing, "BOS", ("warning", 10, "1")),
    (with_template(OPEN.format(start="<|im_start|>" * 2, end="<|im_end|>")), "BOS", ("warning", 10, "1")),
]


@pytest.mark.parametrize(("change", "check", "finding"), TOKENIZERS)
def test_a_tokenizers_fault_is_found(
    change: Change,
    check: str,
    finding: tuple[str, int, str | None],
    make_model: Callable[[Change], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report = diagnose(tmp_path, talks(), make_model(change))
    assert (code, faults(report)) == (int(finding[0] == "error"), {check: finding})
    assert len(re.findall(rf"^{finding[0]} +{check}: .*\w", capsys.readouterr().out, re.MULTILINE)) == 1


def test_double_bos_in_plain_text(make_model: Callable[[Change], str], tmp_path: Path) -> None:
    rows = [*texts()[:3], {"prompt": "<|im_start|>a", "chosen": "b", "rejected": "c"}, *texts()[3:]]
    _, report = diagnose(tmp_path, rows, make_model(bos_before_every_text))
    assert faults(report) == {"BOS": ("warning", 1, "4")}


def test_a_token_across_the_boundary_is_found(
    make_model: Callable[[Change], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a and b meet they are one token: between the planted prompt and its chosen answer alone."""
    tokenizers = pytest.importorskip("tokenizers")

    def merge(tokenizer: Any) -> None:
        vocabulary = tokenizer.get_vocab()
        model = tokenizers.models.BPE(vocabulary | {"ab": len(vocabulary)}, [("a", "b")])
        tokenizer.backend_tokenizer.model = model

    rows = [*texts()[:3], {"prompt": "Banana", "chosen": "bc", "rejected": "c"}, *texts()[3:]]
    code, report = diagnose(tmp_path, rows, make_model(merge))
    assert (code, faults(report)) == (0, {"prefix mismatch": ("warning", 1, "4")})
    assert "one text (apart 'a' 'b', as one 'ab' 'c'); training tokenizes apart" in capsys.readouterr().out


def test_wilsons_interval() -> None:
    """For 15 of 20: centre (0.75 + 0.0960) / 1.1921 and half width 0.2111 / 1.1921, with z² / n = 0.1921."""
    z2 = 1.959964**2 / 20
    half = (0.75 * 0.25 * z2 + z2**2 / 4) ** 0.5
    assert wilson(15, 20) == pytest.approx([(0.75 + z2 / 2 - half) / (1 + z2), (0.75 + z2 / 2 + half) / (1 + z2)])
    assert wilson(15, 20) == pytest.approx((0.5313, 0.8881), abs=1e-4)  # published worked example of the formula
    assert wilson(0, 10)[0] == pytest.approx(0) and wilson(10, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("longer", "shorter", "same", "level"),
    [(6, 4, 10, "ok"), (80, 20, 0, "warning"), (80, 20, 700, "note"), (0, 0, 9, "ok")],
)
def test_length_bias(longer: int, shorter: int, same: int, level: str, model: str) -> None:
    """Answers of 3 bytes and of 1, with EOS 4 tokens and 2; a tie is half right."""
    answers = [("abc", "d")] * longer + [("d", "abc")] * shorter + [("d", "e")] * same
    examples = [Example(f"{i}", x, (), f"f:{i}") for i, x in enumerate(answers)]
    tokenizer = load_tokenizer(model)
    found = length_bias(examples, tokenize(examples, tokenizer, 100)[0])
    total = longer + shorter + same
    assert (found.level, found.count, found.total, found.first) == (level, longer, total, None)
    if found.numbers:
        assert found.numbers["share_of_unequal"] == longer / (longer + shorter)
        assert found.numbers["longer_wins"] == (longer + same / 2) / total
        assert found.numbers["mean_chosen"] == pytest.approx((4 * longer + 2 * shorter + 2 * same) / total)
        assert found.numbers["mean_rejected"] == pytest.approx((2 * longer + 4 * shorter + 2 * same) / total)
        assert f"{found.numbers['low']:.1%} to {found.numbers['high']:.1%}" in found.text


def test_text_and_json_say_the_same(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*talks(), talks()[0], talk("Well?", "", "no")]
    code, report = diagnose(tmp_path, rows, model, "--max-tokens", "60")
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == len(report["findings"]) + 2
    parts = ", ".join(
        f"{x} {a} to {b}: {report[x]['examples']}" for x, a, b in (("train", 0, 0.9), ("holdout", 0.9, 1))
    )
    assert lines[0] == f"{tmp_path}/data.jsonl for {model}: 12 pairs ({parts})"
    assert report["train"]["examples"] + report["holdout"]["examples"] == 12
    for line, finding in zip(lines[1:-1], report["findings"], strict=True):
        assert line.startswith(f"{finding['level']:8} {finding['check']}")
        if finding["level"] != "ok":
            assert line.endswith(finding["text"])
            assert f"{finding['count']} of {finding['total']} ({finding['share']:.1%})" in line
    assert lines[-1] == f"0 errors, {len(faults(report))} warnings, 0 notes"
    assert (report["kind"], report["model"], report["max_tokens"]) == ("pairs", model, 60)


@pytest.mark.parametrize(
    ("flags", "code", "wanted"),
    [
        (["--max-tokens", "0"], 2, "--max-tokens 0 must be at least 1"),
        (["--train", "0.5", "0.2"], 2, "--train 0.5 0.2 must be two numbers in [0, 1], the first one smaller"),
        (["--holdout", "0.5", "nan"], 2, "--holdout 0.5 nan must be"),
        (["--model", "no/such"], 1, "--model no/such: "),
        (["--json", "no/such/report.json"], 1, "No such file"),
    ],
)
def test_faults_are_one_line(
    flags: list[str],
    code: int,
    wanted: str,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a"}) + "\n")
    assert main([str(data), "--model", model, *flags]) == code
    assert re.fullmatch(rf"error: .*{re.escape(wanted)}.*\n", capsys.readouterr().err)


def test_data_that_cannot_be_read_is_one_line(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.jsonl"), "--model", model]) == 1
    assert re.fullmatch(r"error: DATA .*none\.jsonl: No such file .*\n", capsys.readouterr().err)
    (tmp_path / "data.jsonl").write_text('{"chosen": "a", "rejected": "b", "prompt": "c"}\n{"chosen": "a"}\n')
    assert main([str(tmp_path / "data.jsonl"), "--model", model]) == 1
    assert re.fullmatch(r"error: .*data\.jsonl:2: has chosen; lacks rejected\n", capsys.readouterr().err)


def test_bad_flags_exit_with_2() -> None:
    with pytest.raises(SystemExit) as exit:
        main(["data.jsonl", "--model", "x", "--no-such-flag"])
    assert exit.value.code == 2


def test_hh_rlhf(shared: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Counted by hand in the file: 4 empty answers, 5 pairs with two prompts, 4 conversations with a repeated role."""
    data = shared / "data/hh-rlhf/harmless-base-test.jsonl.gz"
    path = tmp_path / "report.json"
    assert main([str(data), "--model", str(tiny_model), "--json", str(path), "--max-tokens", "2048"]) == 0
    report = json.loads(path.read_text())
    found = faults(report)
    assert found["unshared prompts"] == ("warning", 5, "1255")
    assert found["empty completions"][:2] == ("warning", 4)
    assert found["turns"][:2] == ("note", 4)
    assert set(found) <= {"unshared prompts", "empty completions", "turns", "padding = EOS", "too long", "length bias"}
