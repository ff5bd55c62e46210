"""Preference data: all formats, what is refused and where, splits by prompt, tokens."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_lab.language import load_tokenizer
from rl_lab.preference_data import KINDS, Example, kind_of, place, read, select, split_by, tokenize

USER = {"role": "user", "content": "Höhe?\u2028\U0001f5fb"}
GOOD, BAD = ({"role": "assistant", "content": x} for x in ("8848 m", "tall"))
TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How high?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "How high?"},
]
PAIRS = "pairs"
STEPS = "labelled steps"
LABELLED = "labelled completions"

FORMATS: list[tuple[str, dict[str, Any], Any, tuple[str, ...], tuple[bool, ...]]] = [
    (PAIRS, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", ("2", "3"), ()),
    (PAIRS, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, [USER], ("8848 m", "tall"), ()),
    (PAIRS, {"prompt": [USER], "chosen": "8848 m", "rejected": "tall"}, [USER], ("8848 m", "tall"), ()),
    (PAIRS, {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ("8848 m", "tall"), ()),
    (PAIRS, {"chosen": TALK + " 8848 m", "rejected": TALK}, TURNS, ("8848 m", ""), ()),
    (PAIRS, {"prompt": TALK, "chosen": " 8848 m", "rejected": " tall"}, TURNS, ("8848 m", "tall"), ()),
    (PAIRS, {"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD]}, [USER], ("8848 m", "tall"), ()),
    ("completions", {"prompt": "1+1=", "completion": "2"}, "1+1=", ("2",), ()),
    ("completions", {"prompt": [USER], "completion": [GOOD]}, [USER], ("8848 m",), ()),
    ("completions", {"prompt": TALK, "completion": " 8848 m"}, TURNS, ("8848 m",), ()),
    ("completions", {"prompt": "Once", "completion": " upon"}, "Once", (" upon",), ()),  # which goes on a plain text
    ("completions", {"messages": [USER, GOOD]}, [USER], ("8848 m",), ()),
    ("completions", {"text": "Once upon"}, "", ("Once upon",), ()),
    ("completions", {"text": TALK + " 8848 m"}, TURNS, ("8848 m",), ()),
    ("completions", {"text": "Once upon", "label": 1}, "", ("Once upon",), ()),  # a class, no verdict
    (LABELLED, {"prompt": "1+1=", "completion": "3", "label": False}, "1+1=", ("3",), (False,)),
    (LABELLED, {"prompt": [USER], "completion": [GOOD], "label": 1}, [USER], ("8848 m",), (True,)),
    (STEPS, {"prompt": "2+2", "completions": ["4", "5"], "labels": [True, 0]}, "2+2", ("4", "5"), (True, False)),
    (STEPS, {"prompt": [USER], "completions": [[GOOD]], "labels": [True]}, [USER], ("8848 m",), (True,)),
    ("prompts", {"prompt": "1+1="}, "1+1=", (), ()),
    ("prompts", {"prompt": [USER]}, [USER], (), ()),
]


def write(path: Path, *rows: Any, end: str = "\n", start: bytes = b"") -> str:
    text = "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(start + text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize(("kind", "row", "prompt", "completions", "labels"), FORMATS)
def test_every_format(
    kind: str, row: Any, prompt: Any, completions: tuple[str, ...], labels: tuple[bool, ...], name: str, tmp_path: Path
) -> None:
    data = write(tmp_path / name, row)
    assert kind_of(data) == kind
    assert read(data, kind) == ([Example(prompt, completions, labels, f"{data}:1")], [])
    if prompt:
        assert read(data, "prompts")[0] == [Example(prompt, (), (), f"{data}:1")]
    if kind == PAIRS:
        assert read(data, "completions")[0] == [Example(prompt, completions[:1], (), f"{data}:1")]


@pytest.mark.parametrize("end", ["\r\n", "\n\n", "\n \t\n"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_other_line_ends_blank_lines_and_a_byte_order_mark(end: str, name: str, tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": x, "rejected": "\r\n\x85"} for x in ("a", "b")]
    data = write(tmp_path / name, *rows, end=end, start=b"\xef\xbb\xbf")
    examples, _ = read(data, PAIRS)
    assert kind_of(data) == PAIRS
    assert [x.prompt for x in examples] == [[USER]] * 2
    assert [x.completions for x in examples] == [("a", "\r\n\x85"), ("b", "\r\n\x85")]
    assert [x.where for x in examples] == [f"{data}:1", f"{data}:{2 if end == chr(13) + chr(10) else 3}"]


def test_pairs_whose_answers_do_not_follow_one_prompt_are_left_out_and_said(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "Depth?"}, BAD]
    data = write(
        tmp_path / "a.jsonl",
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": other},
    )
    examples, left_out = read(data, PAIRS)
    assert len(examples) == 1 and left_out == [f"{data}:2"]
    alone = write(tmp_path / "b.jsonl", {"chosen": [USER, GOOD], "rejected": other})
    with pytest.raises(ValueError, match=r"b\.jsonl: of all 1 pairs the answers do not follow one prompt"):
        read(alone, PAIRS)


@pytest.mark.parametrize(
    ("kind", "row", "wanted"),
    [
        (PAIRS, {"prompt": "a", "chosen": "b"}, "has prompt, chosen; lacks rejected"),
        (PAIRS, {"prompt": "a", "chosen": "b", "rejected": None}, "lacks rejected"),
        (PAIRS, {}, "has nothing; lacks chosen and rejected"),
        (PAIRS, ["a"], "a list, not an object with chosen and rejected"),
        (PAIRS, {"chosen": "a b", "rejected": "a c"}, "without a prompt beside it"),
        (PAIRS, {"chosen": [USER], "rejected": [USER]}, "must end with the assistant's answer"),
        (PAIRS, {"chosen": [GOOD], "rejected": [BAD]}, "must end with the assistant's answer"),
        (PAIRS, {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, "must end with the assistant's answer"),
        (PAIRS, {"prompt": "a", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "has no prompt beside it"),
        (PAIRS, {"prompt": "a", "chosen": [USER], "rejected": [BAD]}, "single message of the assistant"),
        (PAIRS, {"prompt": "a", "chosen": 1, "rejected": "b"}, "1 is neither a string nor a list of messages"),
        (PAIRS, {"prompt": [], "chosen": "a", "rejected": "b"}, "is neither a string nor a list of messages"),
        (PAIRS, {"prompt": ["a"], "chosen": "a", "rejected": "b"}, "'a' is no message: it needs a role and a content"),
        (PAIRS, {"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "is no message"),
        ("completions", {"question": "a"}, "has question; needs prompt and completion, or messages, or text"),
        ("completions", {"messages": [USER]}, "must end with the assistant's answer"),
        ("completions", {"prompt": "a", "completion": "b", "label": False}, "a labelled completion"),
        (LABELLED, {"prompt": "a", "completion": "b"}, "lacks label"),
        (LABELLED, {"prompt": "a", "completion": "b", "label": "good"}, "label 'good' must be true or false"),
        (LABELLED, {"prompt": "a", "completion": "b", "label": float("nan")}, "label nan must be true or false"),
        (STEPS, {"prompt": "a", "completions": ["b"]}, "lacks labels"),
        (STEPS, {"prompt": "a", "completions": ["b"], "labels": [1, 0]}, "lists of one length"),
        (STEPS, {"prompt": "a", "completions": [], "labels": []}, "with a step or more"),
        (STEPS, {"prompt": "a", "completions": "b", "labels": [1]}, "lists of one length"),
        ("prompts", {"question": "a"}, "has question; needs prompt"),
        ("prompts", {"text": "a"}, "a plain text has no prompt"),
    ],
)
def test_a_malformed_line_is_named_with_what_is_missing(kind: str, row: Any, wanted: str, tmp_path: Path) -> None:
    good = next(x for x in FORMATS if x[0] == kind)[1]
    data = write(tmp_path / "data.jsonl", good, good, row)
    with pytest.raises(ValueError, match=f"^{re.escape(data)}:3: .*{re.escape(wanted)}"):
        read(data, kind)


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a", ',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud83d"}',  # half an emoji, which no tokenizer takes
        b"\xff\xfe{\x00}\x00",  # UTF-16
    ],
)
def test_a_line_that_is_no_json_in_utf_8_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:2: no JSON in UTF-8: "):
        read(str(path), "prompts")


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    data = write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^--pairs {re.escape(data)}: no examples; a line holds {KINDS[kind]}"):
        read(data, kind, "--pairs")
    with pytest.raises(ValueError, match=rf"^DATA {re.escape(data)}: has nothing; needs "):
        kind_of(data, "DATA")


def test_keys_that_say_no_kind_are_named(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", {"question": "a", "answer": "b", "prompt": None})
    wanted = f"{data}:1: has answer, question; needs chosen and rejected; or "
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}"):
        kind_of(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = Path(write(tmp_path / "data.jsonl.gz", *[{"prompt": str(i)} for i in range(10_000)]))
    whole = data.read_bytes()
    broken = whole[:1000] + bytes(100) + whole[1100:]
    for name, content, wanted in (
        ("cut.gz", whole[: len(whole) // 2], "ended before"),
        ("broken.gz", broken, "Error -3|CRC"),
        ("plain.gz", b'{"prompt": "a"}\n', "Not a gzipped file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"^--data .*{name}: .*({wanted}).*; a whole \.jsonl or \.jsonl\.gz"):
            read(str(tmp_path / name), "prompts")
    for path, wanted in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"^--data {re.escape(str(path))}: {wanted}"):
            read(str(path), "prompts")


def test_a_hub_data_set_that_is_not_to_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, whether the package that downloads them is installed or not."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wanted = r"^--data no/such:test: no such file, and the Hugging Face hub gave none \(.+\); a \.jsonl file works$"
    with pytest.raises(ValueError, match=wanted):
        read("no/such:test", PAIRS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=wanted):
        read("no/such:test", PAIRS)


@pytest.mark.parametrize(("data", "split"), [("some/pairs", "train"), ("some/pairs:test", "test")])
def test_hub_rows(data: str, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": None, "chosen": [USER, {**GOOD, "tool": None}], "rejected": [USER, BAD], "score": 1.0}
    asked: list[Any] = []
    loaded = lambda name, split: asked.append((name, split)) or [row, row]  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=loaded))  # type: ignore[arg-type]
    examples, _ = read(data, PAIRS)
    assert examples == [Example([USER], ("8848 m", "tall"), (), f"{data}:{i}") for i in (1, 2)]
    assert asked == [("some/pairs", split)]


def prompts(number: int) -> list[Example]:
    return [Example(f"question {i}", ("yes", "no"), (), f"f:{i}") for i in range(number)]


def test_a_split_depends_on_prompts_alone() -> None:
    examples = prompts(2000)
    train, holdout = select(examples, (0.0, 0.9)), select(examples, (0.9, 1.0))
    assert sorted(train + holdout) == sorted(examples)
    assert not {x.prompt for x in train} & {x.prompt for x in holdout}
    assert len(holdout) == pytest.approx(200, abs=4 * (2000 * 0.9 * 0.1) ** 0.5)
    assert select(examples[::-1], (0.9, 1.0)) == holdout[::-1]
    assert select(examples, (0.9, 0.1)) == [x for x in examples if x in holdout or x in select(examples, (0.0, 0.1))]
    again = [x._replace(completions=("other",), where="g:1") for x in examples]
    assert [x.prompt for x in select(again, (0.9, 1.0))] == [x.prompt for x in holdout]
    assert 0 <= min(place(x.prompt) for x in examples) < max(place(x.prompt) for x in examples) < 1
    digest = hashlib.sha256(b'"question 1"').hexdigest()
    assert place("question 1") == int(digest[:12], 16) / 16**12  # a split of old is the split of today
    assert place([USER]) == place([dict(reversed(USER.items()))])


def test_texts_without_a_prompt_are_split_too() -> None:
    texts = [Example("", (f"text {i}",), (), f"f:{i}") for i in range(100)]
    assert 30 < len(select(texts, (0.0, 0.5))) < 70
    assert split_by(texts[0]) == "text 0" and split_by(prompts(1)[0]) == "question 0"


def test_tokens_are_the_prompts_then_the_completions(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    eos = tokenizer.eos_token_id
    examples = [
        Example("1+1=", ("2", "three"), (), "f:1"),
        Example([USER], ("8848 m", ""), (), "f:2"),
        Example("", ("Once upon",), (), "f:3"),
        Example("only", (), (), "f:4"),
    ]
    trees, kept = tokenize(examples, tokenizer, 100)
    assert kept == [0, 1, 2, 3]
    template = f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    for x, tree in zip(examples, trees, strict=True):
        start = x.prompt if isinstance(x.prompt, str) else template
        assert len(tree.branches) == len(x.completions)
        for text, tokens in zip(x.completions, tree.branches, strict=True):
            assert tokens[-1] == eos and eos not in tokens[:-1]
            whole = tokenizer(start + text, add_special_tokens=False)["input_ids"]
            assert tree.prompt[0 if start else 1 :] + tokens[:-1] == whole
    assert trees[2].prompt == [tokenizer.bos_token_id]  # something must come before the first token
    assert [tree.prompt[:2].count(tokenizer.bos_token_id) for tree in trees] == [0, 1, 1, 0]


def test_a_text_has_one_beginning_and_a_completion_one_end(tiny_model: Path) -> None:
    """Also where the tokenizer puts BOS before and EOS after every text, and the template writes a BOS itself."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(str(tiny_model))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    names = [("<|im_start|>", bos), ("<|im_end|>", eos)]
    single = "<|im_start|> $A <|im_end|>"
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single, None, names)
    assert tokenizer("a")["input_ids"][:: len(tokenizer("a")["input_ids"]) - 1] == [bos, eos]
    examples = [Example(prompt, ("b", "c"), (), "f:1") for prompt in ("a", "", [USER])]
    trees, _ = tokenize(examples, tokenizer, 100)
    for tree in trees[:2]:
        assert tree.prompt.count(bos) == 1 and eos not in tree.prompt
    assert trees[2].prompt[0] == bos and trees[2].prompt[1] != bos
    assert all(tokens.count(eos) == 1 and bos not in tokens for tree in trees for tokens in tree.branches)


def test_what_is_too_long_is_left_out_whole(tiny_model: Path) -> None:
    """A token a byte: prompt, the longest completion and EOS are 3 + 4 + 1 = 8."""
    tokenizer = load_tokenizer(str(tiny_model))
    examples = [
        Example("abc", ("d", "defg"), (), "f:1"),
        Example("abcd", ("defg",), (), "f:2"),
        Example("abcdefgh", (), (), "f:3"),
        Example("abcdefghi", (), (), "f:4"),
    ]
    trees, kept = tokenize(examples, tokenizer, 8)
    assert kept == [0, 2]
    assert [len(tree.prompt) for tree in trees] == [3, 8]
    assert [len(x) for x in trees[0].branches] == [2, 5]
    assert tokenize(examples, tokenizer, 7)[1] == []


def test_messages_that_a_template_refuses_are_named(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^f:7: the model's chat template refuses the prompt .*: roles must"):
        tokenize([Example([USER], ("a",), (), "f:7")], tokenizer, 10)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        tokenize([Example([USER], ("a",), (), "f:7")], tokenizer, 10)


def test_hh_rlhf(shared: Path) -> None:
    data = str(shared / "data/hh-rlhf/harmless-base-test.jsonl.gz")
    assert kind_of(data) == PAIRS
    examples, left_out = read(data, PAIRS)
    assert (len(examples), len(left_out)) == (2307, 5)
    assert left_out[0] == f"{data}:1255"
    assert sum(len(x.prompt) == 1 for x in read(data, "prompts")[0]) == 662  # single-turn
    with gzip.open(data) as file:
        first = json.loads(next(file))
    turns = [*examples[0].prompt, {"role": "assistant", "content": examples[0].completions[1]}]
    names = {"user": "Human", "assistant": "Assistant"}
    again = "".join(f"\n\n{names[x['role']]}: {x['content']}" for x in turns if isinstance(x, dict))
    assert again == first["rejected"]
    assert {x.prompt[-1]["role"] for x in examples if not isinstance(x.prompt, str)} == {"user"}
