"""Text to learn preferences from: files and hub data sets to examples, examples to tokens.

Formats, told apart by their keys; a text is a string or a list of messages {"role": ..., "content": ...}:

    pairs                   chosen, rejected, and prompt unless both begin with it
    completions             prompt, completion; or messages, the last of which is the completion; or text
    labelled completions    prompt, completion, label
    labelled steps          prompt, completions, labels
    prompts                 prompt

They are those of TRL (https://huggingface.co/docs/trl/dataset_formats); strings that begin with "\\n\\nHuman:" are read
as the transcripts of hh-rlhf [Bai et al. 2022, arXiv:2204.05862].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_lab import require
from rl_lab.language import Message, Prompt, Tree, encode_completion, encode_prompt

KINDS = {
    "pairs": "chosen and rejected",
    "labelled steps": "prompt, completions and labels",
    "labelled completions": "prompt, completion and label",
    "completions": "prompt and completion, or messages, or text",
    "prompts": "prompt",
}


class Example(NamedTuple):
    """A prompt with what belongs to it.

    Attributes:
        completions: (chosen, rejected) of a pair, the steps of labelled steps, one of completions, none of prompts.
        labels: of what is labelled, for each completion whether it is good; else none.
        where: file and line.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    where: str


def read(data: str, kind: str, flag: str = "--data") -> tuple[list[Example], list[str]]:
    """The examples of a .jsonl or .jsonl.gz file, or of a data set of the Hugging Face hub, as "name" or "name:split".

    Args:
        kind: one of `KINDS`; prompts are taken from every kind, completions from pairs too, the chosen ones.
    Returns:
        the examples, and where pairs were left out as their answers do not follow one prompt.
    Raises:
        ValueError: if it cannot be read or is empty, or for a line that is no such example; the line is named.
    """
    rows = read_lines(data, flag) if Path(data).exists() or _is_file_name(data) else _hub_rows(data, flag)
    examples, left_out = [], []
    for where, row in rows:
        example = _example(row, kind, where)
        if example is None:
            left_out.append(where)
        else:
            examples.append(example)
    if not examples:
        raise ValueError(f"{flag} {data}: no examples; a line holds {KINDS[kind]}")
    return examples, left_out


def _is_file_name(data: str) -> bool:
    return data.endswith((".jsonl", ".jsonl.gz", ".json")) or data.startswith((".", "/"))


def read_lines(data: str, flag: str) -> Iterator[tuple[str, Any]]:
    """What each line of a .jsonl or .jsonl.gz file holds, behind its file and line. ValueError names either."""
    path = Path(data)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    try:
                        yield where, json.loads(line)
                    except ValueError as error:
                        raise ValueError(f"{where}: no JSON: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {error}; a .jsonl or .jsonl.gz file works") from None


def _hub_rows(data: str, flag: str) -> Iterator[tuple[str, Any]]:
    name, _, split = data.partition(":")
    datasets = require("datasets", "preference")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # of many kinds
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{flag} {data}: no such file, and the Hugging Face hub gave none ({first}); a .jsonl file works"
        ) from None
    for number, row in enumerate(rows, 1):
        yield f"{data}:{number}", row


def _example(row: Any, kind: str, where: str) -> Example | None:
    """None for a pair whose answers do not follow one prompt."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object with {KINDS[kind]}")
    row = {key: x for key, x in row.items() if x is not None}
    if kind == "pairs":
        return _pair(row, where)
    if kind == "labelled steps":
        _demand(row, ("prompt", "completions", "labels"), where)
        steps, labels = row["completions"], row["labels"]
        if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
            raise ValueError(f"{where}: completions and labels must be lists of one length, with a step or more")
        answers = tuple(_answer(x, where) for x in steps)
        return Example(_prompt(row["prompt"], where), answers, tuple(_label(x, where) for x in labels), where)
    if kind == "labelled completions":
        _demand(row, ("prompt", "completion", "label"), where)
        answer = _answer(row["completion"], where)
        return Example(_prompt(row["prompt"], where), (answer,), (_label(row["label"], where),), where)
    if kind == "prompts" and "prompt" in row:
        return Example(_prompt(row["prompt"], where), (), (), where)
    example = _completion(row, where)
    return example._replace(completions=()) if kind == "prompts" else example


def _pair(row: dict[str, Any], where: str) -> Example | None:
    _demand(row, ("chosen", "rejected"), where)
    if "prompt" in row:
        answers = _answer(row["chosen"], where), _answer(row["rejected"], where)
        return Example(_prompt(row["prompt"], where), answers, (), where)
    (prompt, chosen), (other, rejected) = (_split(_prompt(row[name], where), where) for name in ("chosen", "rejected"))
    return Example(prompt, (chosen, rejected), (), where) if prompt == other else None


def _completion(row: dict[str, Any], where: str) -> Example:
    if "prompt" in row and ("completion" in row or "chosen" in row):
        answer = _answer(row.get("completion", row.get("chosen")), where)
        return Example(_prompt(row["prompt"], where), (answer,), (), where)
    for name in ("messages", "chosen", "text"):
        if name in row:
            whole = _prompt(row[name], where)
            prompt, answer = ("", whole) if name == "text" and isinstance(whole, str) else _split(whole, where)
            return Example(prompt, (answer,), (), where)
    raise ValueError(f"{where}: has {', '.join(row) or 'nothing'}; needs {KINDS['completions']}")


def _demand(row: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{where}: has {', '.join(row) or 'nothing'}; lacks {' and '.join(missing)}")


def _prompt(value: Any, where: str) -> Prompt:
    """A string as it is, a transcript and messages as messages."""
    if isinstance(value, str):
        return _transcript(value) if value.startswith("\n\nHuman:") else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {value!r:.80} is neither a string nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: {message!r:.80} is no message: it needs a role and a content, both strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _transcript(text: str) -> list[Message]:
    """The turns of "\n\nHuman: ...\n\nAssistant: ..."."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _split(whole: Prompt, where: str) -> tuple[Prompt, str]:
    """A conversation's last message, which must be the assistant's, and what comes before it."""
    if isinstance(whole, str):
        raise ValueError(f"{where}: a plain text without a prompt beside it; add one as prompt")
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise ValueError(f"{where}: a conversation must end with an answer of the assistant")
    return whole[:-1], whole[-1]["content"]


def _answer(value: Any, where: str) -> str:
    """A completion: a string, or one message of the assistant."""
    if isinstance(value, str):
        return value
    messages = _prompt(value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":  # type: ignore[index]
        raise ValueError(f"{where}: a completion must be a string or a single message of the assistant")
    return messages[0]["content"]  # type: ignore[index]


def _label(value: Any, where: str) -> bool:
    if value not in (0, 1):  # as are False and True
        raise ValueError(f"{where}: label {value!r} must be true or false")
    return bool(value)


def place(prompt: Prompt) -> float:
    """A number in [0, 1) that depends on the prompt alone, by which prompts are split."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def select(examples: Iterable[Example], share: tuple[float, float]) -> list[Example]:
    """The examples whose prompt's place lies in [share[0], share[1])."""
    return [example for example in examples if share[0] <= place(example.prompt) < share[1]]


def tokenize(examples: Sequence[Example], tokenizer: Any, most: int) -> tuple[list[Tree], list[int]]:
    """Examples as trees, and the indices of those that were kept: of at most `most` tokens with every branch.

    Nothing is truncated: what was cut off could be the answer, or what the answer answers.
    """
    trees = [
        Tree(encode_prompt(tokenizer, x.prompt), tuple(encode_completion(tokenizer, text) for text in x.completions))
        for x in examples
    ]
    kept = [i for i, tree in enumerate(trees) if len(tree.prompt) + max(map(len, tree.branches), default=0) <= most]
    return [trees[i] for i in kept], kept
