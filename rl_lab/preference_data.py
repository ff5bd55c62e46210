"""Text to learn preferences from: files and hub data sets to examples, examples to tokens.

Formats, told apart by their keys; a text is a string or a list of messages {"role": ..., "content": ...}:

    pairs                   chosen, rejected, prompt unless both begin with it, and margin if there are any
    completions             prompt, completion; or messages, the last of which is the completion; or text
    labelled completions    prompt, completion, label
    labelled steps          prompt, completions, labels
    prompts                 prompt

They are those of TRL (https://huggingface.co/docs/trl/dataset_formats), but that a pair of plain texts has its prompt
beside it: how much of what both begin with is prompt would be a guess. Strings that begin with "\\n\\nHuman:" are read
as the transcripts of hh-rlhf [Bai et al. 2022, arXiv:2204.05862].
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rl_lab import require
from rl_lab.checkpoint import replace_file
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
        margin: of a pair, by how much the chosen one is better; None where the line has none.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    labels: tuple[bool, ...]
    where: str
    margin: float | None = None


def read(data: str, kind: str, flag: str = "--data") -> tuple[list[Example], list[str]]:
    """The examples of a .jsonl or .jsonl.gz file, or of a data set of the Hugging Face hub, as "name" or "name:split".

    Args:
        kind: one of `KINDS`; prompts are taken from every kind, completions from pairs too, the chosen ones.
    Returns:
        the examples, and where pairs were left out as their answers do not follow one prompt.
    Raises:
        ValueError: if it cannot be read or is empty, or for a line that is no such example; the line is named.
    """
    examples, left_out = [], []
    for where, row in _rows(data, flag):
        example = _example(row, kind, where)
        if example is None:
            left_out.append(where)
        else:
            examples.append(example)
    if left_out and not examples:
        raise ValueError(f"{flag} {data}: of all {len(left_out)} pairs the answers do not follow one prompt")
    if not examples:
        raise ValueError(f"{flag} {data}: no examples; a line holds {KINDS[kind]}")
    return examples, left_out


def kind_of(data: str, flag: str = "--data") -> str:
    """Which of `KINDS` the keys of the first line say. ValueError if there is none, or if they say none."""
    where, row = next(_rows(data, flag), (f"{flag} {data}", {}))
    keys = {key for key, x in row.items() if x is not None} if isinstance(row, dict) else set()
    for kind, wanted in (
        ("pairs", {"chosen", "rejected"}),
        ("labelled steps", {"completions", "labels"}),
        ("labelled completions", {"completion", "label"}),
    ):
        if wanted <= keys:
            return kind
    if keys & {"completion", "messages", "text"}:
        return "completions"
    if "prompt" in keys:
        return "prompts"
    raise ValueError(f"{where}: has {', '.join(sorted(keys)) or 'nothing'}; needs {'; or '.join(KINDS.values())}")


def _rows(data: str, flag: str) -> Iterator[tuple[str, Any]]:
    """Where each row is, and what is there."""
    is_file = data.endswith((".jsonl", ".json", ".gz")) or data.startswith((".", "/")) or Path(data).exists()
    return read_lines(data, flag) if is_file else _hub_rows(data, flag)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write a .jsonl file, whole or not at all."""
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def read_lines(data: str, flag: str) -> Iterator[tuple[str, Any]]:
    """What each line of a .jsonl or .jsonl.gz file holds, behind its file and line. ValueError names either."""
    path = Path(data)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{flag} {path}: {reason}; a whole .jsonl or .jsonl.gz file works") from None


def _parse(line: bytes, where: str) -> Any:
    try:
        row = json.loads(line)  # a byte order mark may stand before it
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except ValueError as error:
        raise ValueError(f"{where}: no JSON in UTF-8: {error}") from None
    return row


def _hub_rows(data: str, flag: str) -> Iterator[tuple[str, Any]]:
    name, _, split = data.partition(":")
    try:
        rows = require("datasets", "preference").load_dataset(name, split=split or "train")
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
        answers = tuple(_answer(x, where, row["prompt"]) for x in steps)
        return Example(_prompt(row["prompt"], where), answers, tuple(_label(x, where) for x in labels), where)
    if kind == "labelled completions":
        _demand(row, ("prompt", "completion", "label"), where)
        answer = _answer(row["completion"], where, row["prompt"])
        return Example(_prompt(row["prompt"], where), (answer,), (_label(row["label"], where),), where)
    if kind == "prompts" and "prompt" in row:
        return Example(_prompt(row["prompt"], where), (), (), where)
    example = _completion(row, where)
    if kind == "prompts" and not example.prompt:
        raise ValueError(f"{where}: a plain text has no prompt")
    return example._replace(completions=()) if kind == "prompts" else example


def _pair(row: dict[str, Any], where: str) -> Example | None:
    _demand(row, ("chosen", "rejected"), where)
    margin = row.get("margin")
    if margin is not None and (not isinstance(margin, int | float) or not 0 <= margin < math.inf):
        raise ValueError(f"{where}: margin {margin!r} must be a finite number, 0 or more")
    if "prompt" in row:
        answers = tuple(_answer(row[name], where, row["prompt"]) for name in ("chosen", "rejected"))
        return Example(_prompt(row["prompt"], where), answers, (), where, margin)
    (prompt, chosen), (other, rejected) = (_split(_turns(row[name], where), where) for name in ("chosen", "rejected"))
    return Example(prompt, (chosen, rejected), (), where, margin) if prompt == other else None


def _completion(row: dict[str, Any], where: str) -> Example:
    if "completion" in row and "label" in row:
        raise ValueError(f"{where}: a labelled completion, which may be a bad one; without label it is one to imitate")
    if "prompt" in row and ("completion" in row or "chosen" in row):
        answer = _answer(row.get("completion", row.get("chosen")), where, row["prompt"])
        return Example(_prompt(row["prompt"], where), (answer,), (), where)
    for name in ("messages", "chosen", "text"):
        if name in row:
            whole = _turns(row[name], where)
            prompt, answer = ("", whole) if name == "text" and isinstance(whole, str) else _split(whole, where)
            return Example(prompt, (answer,), (), where)
    raise ValueError(f"{where}: has {', '.join(row) or 'nothing'}; needs {KINDS['completions']}")


def _demand(row: dict[str, Any], names: Iterable[str], where: str) -> None:
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{where}: has {', '.join(row) or 'nothing'}; lacks {' and '.join(missing)}")


def _prompt(value: Any, where: str) -> Prompt:
    """What is to be answered; a transcript's may end with "\\n\\nAssistant:", where the answer would begin."""
    prompt = _turns(value, where)
    opened = isinstance(value, str) and prompt[-1:] == [{"role": "assistant", "content": ""}]
    return prompt[:-1] if opened else prompt


def _turns(value: Any, where: str) -> Prompt:
    """A string as it is, a transcript and messages as messages."""
    if isinstance(value, str):
        return _transcript(value) if _is_transcript(value) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {value!r:.80} is neither a string nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: {message!r:.80} is no message: it needs a role and a content, both strings")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _transcript(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    parts = re.split(r"\n\n(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _split(whole: Prompt, where: str) -> tuple[Prompt, str]:
    """A conversation's last message, which must be the assistant's, and what comes before it."""
    if isinstance(whole, str):
        raise ValueError(f"{where}: a plain text without a prompt beside it; add one as prompt")
    if len(whole) < 2 or whole[-1]["role"] != "assistant":
        raise ValueError(f"{where}: a conversation must end with the assistant's answer to what comes before")
    return whole[:-1], whole[-1]["content"]


def _answer(value: Any, where: str, prompt: Any = None) -> str:
    """A completion: a string, without space around it if it goes on a transcript; or one message of the assistant."""
    if isinstance(value, str):
        return value.strip() if _is_transcript(prompt) else value
    messages = _turns(value, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":  # type: ignore[index]
        raise ValueError(
            f"{where}: beside a prompt, a completion must be a string or a single message of the assistant; "
            "a pair of whole conversations has no prompt beside it"
        )
    return messages[0]["content"]  # type: ignore[index]


def _label(value: Any, where: str) -> bool:
    if value not in (0, 1):  # as are False and True
        raise ValueError(f"{where}: label {value!r} must be true or false")
    return bool(value)


def plain(prompt: Prompt) -> str:
    """A prompt as one text, in which the messages of a longer conversation have their roles before them."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def normalised(prompt: Prompt) -> str:
    """A prompt's text without what does not make it another prompt: capitals and white space."""
    return " ".join(plain(prompt).casefold().split())


def place(prompt: Prompt) -> float:
    """A number in [0, 1) that depends on the prompt alone, by which prompts are split."""
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # exact; 7 bytes could be rounded up to 1


def select(examples: Iterable[Example], share: tuple[float, float]) -> list[Example]:
    """The examples whose prompt's place lies from share[0] up to, not including, share[1].

    A share that begins above its end goes on at 0: (0.9, 0.1) is a fifth. A text without a prompt has its own place.
    """
    (low, high), around = share, share[0] > share[1]
    places = ((example, place(split_by(example))) for example in examples)
    return [example for example, x in places if (low <= x or x < high if around else low <= x < high)]


def split_by(example: Example) -> Prompt:
    """What an example is split by: its prompt, or the text where there is none."""
    return example.prompt or "".join(example.completions[:1])


def longest(tree: Tree) -> int:
    """Tokens of the prompt with the longest branch."""
    return len(tree.prompt) + max(map(len, tree.branches), default=0)


def tokenize(examples: Sequence[Example], tokenizer: Any, most: int) -> tuple[list[Tree], list[int]]:
    """Examples as trees, and the indices of those that were kept: of at most `most` tokens with every branch.

    Nothing is truncated: what was cut off could be the answer, or what the answer answers.

    Raises:
        ValueError: if the tokenizer has no chat template for messages, or it refuses them; their line is named.
    """
    trees = [_tree(example, tokenizer) for example in examples]
    kept = [i for i, tree in enumerate(trees) if longest(tree) <= most]
    return [trees[i] for i in kept], kept


def _tree(example: Example, tokenizer: Any) -> Tree:
    try:
        prompt = encode_prompt(tokenizer, example.prompt)
    except ValueError as error:
        raise ValueError(f"{example.where}: {error}") from None
    return Tree(prompt, tuple(encode_completion(tokenizer, text) for text in example.completions))
