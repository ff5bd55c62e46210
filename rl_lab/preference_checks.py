"""What fails silently in preference data: each check is a function of examples, and of their tokens if it needs them.

A check of one kind of data finds nothing to look at in the others. Tokens are those of training: a tree an example.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rl_lab.language import Prompt, Tokens, Tree
from rl_lab.preference_data import Example, longest, normalised, select, split_by, tokenize
from rl_lab.preference_metrics import wilson

Level = Literal["ok", "note", "warning", "error"]

LENGTH_LIMIT = 0.55  # accuracy of guessing by length from which on it is a warning; ours


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        count, total: how many it concerns, and of how many; a tokenizer's fault is not of any number.
        first: file and line of the first one; none of a tokenizer's fault and of statistics.
        text: what it means.
        numbers: the statistics.
    """

    check: str
    level: Level
    count: int
    total: int | None
    first: str | None
    text: str
    numbers: dict[str, float] | None = None

    @property
    def share(self) -> float | None:
        return self.count / self.total if self.total else None


def check(
    examples: Sequence[Example],
    left_out: Sequence[str],
    tokenizer: Any,
    most: int,
    train: tuple[float, float],
    holdout: tuple[float, float],
) -> list[Finding]:
    """All that there is to say of examples of one kind, and of a model's tokenizer.

    Args:
        examples, left_out: as `preference_data.read` returns them.
        most: tokens of the longest example that training keeps.
        train, holdout: parts of the prompts, as `preference_data.select` takes them.
    Raises:
        ValueError: if the chat template refuses a prompt; its line is named.
    """
    found = [
        unshared_prompts(examples, left_out),
        empty_completions(examples),
        equal_answers(examples),
        duplicates(examples),
        conflicts(examples),
        one_label(examples),
        spaces(examples),
        turns(examples),
        *shared_prompts(examples, train, holdout),
        padding(tokenizer),
        no_template(examples, tokenizer),
    ]
    if found[-1].level == "ok":
        trees, _ = tokenize(examples, tokenizer, sys.maxsize)
        if found[-1].total:
            found += [template_end(tokenizer), template_bos(tokenizer)]
        found += [
            beginnings(examples, trees, tokenizer),
            endings(examples, trees, tokenizer),
            prefixes(examples, trees, tokenizer),
            too_long(examples, trees, most),
            length_bias(examples, trees),
        ]
    return [finding for finding in found if finding.total != 0]


def _found(check: str, level: Level, where: Sequence[str], total: int, text: str) -> Finding:
    return Finding(check, level if where else "ok", len(where), total, where[0] if where else None, text)


def unshared_prompts(examples: Sequence[Example], left_out: Sequence[str]) -> Finding:
    """Pairs whose answers do not follow one prompt, at the lines that `read` left out."""
    total = len(_pairs(examples)) + len(left_out)
    return _found("unshared prompts", "warning", left_out, total, "not of one prompt; training leaves them out")


def empty_completions(examples: Sequence[Example]) -> Finding:
    """Completions without a word: what is learned of them is to end at once."""
    where = [x.where for x in examples for text in x.completions if not text.strip()]
    return _found("empty completions", "warning", where, _completions(examples), "they teach to end at once")


def equal_answers(examples: Sequence[Example]) -> Finding:
    """Pairs whose answers are the same, but for space around them."""
    where = [x.where for x in _pairs(examples) if x.completions[0].strip() == x.completions[1].strip()]
    return _found("chosen = rejected", "warning", where, len(_pairs(examples)), "their gradient is zero")


def duplicates(examples: Sequence[Example]) -> Finding:
    """Examples that an earlier one equals."""
    seen: set[Any] = set()
    where = []
    for x in examples:
        if (key := (_key(x.prompt), x.completions, x.labels)) in seen:
            where.append(x.where)
        seen.add(key)
    return _found("duplicates", "warning", where, len(examples), "an earlier line says the same")


def conflicts(examples: Sequence[Example]) -> Finding:
    """Examples that an earlier one contradicts: the pair reversed, or the same completions with other labels."""
    seen: dict[Any, set[Any]] = {}
    where = []
    for x in examples:
        answers = x.completions if x.labels else tuple(sorted(x.completions))
        verdicts = seen.setdefault((_key(x.prompt), answers), set())
        verdict = x.labels or x.completions
        if verdicts - {verdict}:
            where.append(x.where)
        verdicts.add(verdict)
    return _found("conflicting labels", "warning", where, len(examples), "an earlier line says the opposite")


def one_label(examples: Sequence[Example]) -> Finding:
    """Labels that are all the same: there is nothing to tell apart."""
    labelled = [x for x in examples if x.labels]
    alike = len({label for x in labelled for label in x.labels}) == 1
    where = [x.where for x in labelled if alike]
    return _found("one label only", "warning", where, len(labelled), "nothing to tell apart")


def spaces(examples: Sequence[Example]) -> Finding:
    """Prompts that end with a space, and completions that begin with one, unless it parts them from a plain prompt."""
    where = []
    for x in examples:
        end = x.prompt if isinstance(x.prompt, str) else x.prompt[-1]["content"]
        parted = isinstance(x.prompt, str) and x.prompt and not x.prompt[-1].isspace()
        if end.endswith(" ") or (not parted and any(text.startswith(" ") for text in x.completions)):
            where.append(x.where)
    return _found("spaces", "note", where, len(examples), "the prompt ends with one, or a completion begins with one")


def turns(examples: Sequence[Example]) -> Finding:
    """Conversations in which one role speaks twice in a row, the answer included; some chat templates refuse them."""
    talks = [x for x in examples if not isinstance(x.prompt, str)]
    where = []
    for x in talks:
        roles = [message["role"] for message in x.prompt if isinstance(message, dict)] + ["assistant"]
        if any(a == b for a, b in itertools.pairwise(roles)):
            where.append(x.where)
    return _found("turns", "note", where, len(talks), "one role twice in a row, which some chat templates refuse")


def shared_prompts(
    examples: Sequence[Example], train: tuple[float, float], holdout: tuple[float, float]
) -> tuple[Finding, Finding]:
    """Holdout examples whose prompt is trained on: itself, as the parts overlap, or but for case and white space."""
    training = [split_by(x) for x in select(examples, train)]
    same, similar = {_key(x) for x in training}, {normalised(x) for x in training}
    held = select(examples, holdout)
    shared = [x.where for x in held if _key(split_by(x)) in same]
    near = [x.where for x in held if _key(split_by(x)) not in same and normalised(split_by(x)) in similar]
    text = "of the holdout, which training has"
    return (
        _found("shared prompts", "error", shared, len(held), f"{text} too"),
        _found("similar prompts", "warning", near, len(held), f"{text} but for case and white space"),
    )


def no_template(examples: Sequence[Example], tokenizer: Any) -> Finding:
    """Conversations for a model whose tokenizer has no chat template: it cannot be trained on them."""
    talks = [x.where for x in examples if not isinstance(x.prompt, str)]
    where = [] if tokenizer.chat_template else talks
    return _found("no chat template", "error", where, len(talks), "messages need one, in the model's tokenizer")


def padding(tokenizer: Any) -> Finding:
    """Whether the padding token is the one that ends a completion."""
    same = tokenizer.pad_token_id == tokenizer.eos_token_id
    text = f"both are {tokenizer.eos_token!r}; harmless here, as completions are told by position, not by token"
    return _tokenizers("padding = EOS", "note", same, text)


def template_end(tokenizer: Any) -> Finding:
    """Whether the chat template ends an answer as training does: with EOS, right after what `encode_prompt` opens."""
    start, whole = _probe(tokenizer)
    if not whole.startswith(start):
        return _tokenizers("template's end", "warning", True, "it writes an answered conversation unlike an open one")
    rest = tokenizer(whole.removeprefix(start), add_special_tokens=False)["input_ids"]
    end = repr(tokenizer.decode(rest[:1])) if rest else "nothing"
    text = f"it ends an answer with {end}, training with EOS, {tokenizer.eos_token!r}"
    return _tokenizers("template's end", "warning", rest[:1] != [tokenizer.eos_token_id], text)


def template_bos(tokenizer: Any) -> Finding:
    """Whether the chat template writes BOS and the tokenizer adds one to every text."""
    written = tokenizer(_probe(tokenizer)[0], add_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id
    text = "template and tokenizer both write it; here it comes once, elsewhere perhaps twice"
    return _tokenizers("template's BOS", "note", written and _adds_bos(tokenizer), text)


def beginnings(examples: Sequence[Example], trees: Sequence[Tree], tokenizer: Any) -> Finding:
    """Prompts that begin with two BOS, or without the one that the tokenizer puts before a text."""
    bos, added = tokenizer.bos_token_id, _adds_bos(tokenizer)
    wrong = [tree.prompt[:2] == [bos, bos] or (added and tree.prompt[0] != bos) for tree in trees]
    where = [x.where for x, bad in zip(examples, wrong, strict=True) if bad]
    return _found("BOS", "warning", where, len(examples), "the prompt begins with two, or lacks that of other texts")


def endings(examples: Sequence[Example], trees: Sequence[Tree], tokenizer: Any) -> Finding:
    """Completions whose text has EOS in it, before the one that ends them: it ends there, or twice."""
    eos = tokenizer.eos_token_id
    branches = [(x.where, tokens) for x, tree in zip(examples, trees, strict=True) for tokens in tree.branches]
    where = [place for place, tokens in branches if eos in tokens[:-1]]
    return _found("EOS", "warning", where, len(branches), f"{tokenizer.eos_token!r} is in the completion, then ends it")


def prefixes(examples: Sequence[Example], trees: Sequence[Tree], tokenizer: Any) -> Finding:
    """Completions, of steps the first, whose tokens differ when they are tokenized with the prompt as one text.

    Training here tokenizes apart, as sampling does, so that the prompt's tokens are those of every completion.
    """
    where: list[str] = []
    total, shown = 0, ""
    for x, tree in zip(examples, trees, strict=True):
        if not x.prompt:
            continue
        plain = isinstance(x.prompt, str)
        start = _start(tokenizer, x.prompt)
        for text, tokens in list(zip(x.completions, tree.branches, strict=True))[: 1 if x.labels else 2]:
            total += 1
            apart = tree.prompt + tokens[:-1]
            whole: Tokens = tokenizer(start + text, add_special_tokens=plain)["input_ids"]
            if whole[: len(apart)] != apart:
                where.append(x.where)
                shown = shown or _difference(tokenizer, apart, whole)
    text = f"other tokens after the prompt, as one text{shown}; training tokenizes apart, as sampling does"
    return _found("prefix mismatch", "warning", where, total, text)


def too_long(examples: Sequence[Example], trees: Sequence[Tree], most: int) -> Finding:
    """Examples of more than `most` tokens, which training leaves out."""
    lengths = [  # labelled steps follow each other, completions do not
        len(tree.prompt) + sum(map(len, tree.branches)) if len(x.labels) > 1 else longest(tree)
        for x, tree in zip(examples, trees, strict=True)
    ]
    where = [x.where for x, length in zip(examples, lengths, strict=True) if length > most]
    level: Level = "error" if len(where) == len(examples) else "warning"
    text = f"more than {most} tokens; training leaves them out (the longest has {max(lengths)})"
    return _found("too long", level, where, len(examples), text)


def length_bias(examples: Sequence[Example], trees: Sequence[Tree]) -> Finding:
    """How often the longer answer is the chosen one, and how well length alone predicts the preference.

    The share is of the pairs of different lengths, with Wilson's 95 % interval; the accuracies are of all pairs, a
    guess where the lengths are the same. Lengths are in tokens, with EOS.
    """
    lengths = [(len(t.branches[0]), len(t.branches[1])) for x, t in zip(examples, trees, strict=True) if _is_pair(x)]
    longer, shorter = sum(a > b for a, b in lengths), sum(a < b for a, b in lengths)
    if not longer + shorter:
        return Finding("length bias", "ok", longer, len(lengths), None, "no lengths differ")
    low, high = wilson(longer, longer + shorter)
    accuracy = (longer + (len(lengths) - longer - shorter) / 2) / len(lengths)
    chosen, rejected = (sum(x) / len(lengths) for x in zip(*lengths, strict=True))
    level: Level = "ok" if low <= 0.5 <= high else "note"
    if level == "note" and max(accuracy, 1 - accuracy) >= LENGTH_LIMIT:
        level = "warning"
    text = (
        f"chosen are longer; of different lengths {longer / (longer + shorter):.1%} "
        f"(95 % interval {low:.1%} to {high:.1%}); mean lengths {chosen:.1f} and {rejected:.1f} tokens; "
        f'"the longer wins" is right in {accuracy:.1%}, "the shorter wins" in {1 - accuracy:.1%}'
    )
    numbers = {"share_of_unequal": longer / (longer + shorter), "low": low, "high": high, "longer_wins": accuracy}
    numbers |= {"mean_chosen": chosen, "mean_rejected": rejected}
    return Finding("length bias", level, longer, len(lengths), None, text, numbers)


def _completions(examples: Sequence[Example]) -> int:
    return sum(len(x.completions) for x in examples)


def _is_pair(example: Example) -> bool:
    return len(example.completions) == 2 and not example.labels


def _pairs(examples: Sequence[Example]) -> list[Example]:
    return [x for x in examples if _is_pair(x)]


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt)


def _tokenizers(check: str, level: Level, faulty: bool, text: str) -> Finding:
    return Finding(check, level if faulty else "ok", int(faulty), None, None, text)


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS before a text."""
    return bool(tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)


def _start(tokenizer: Any, prompt: Prompt) -> str:
    """What the completion follows, as text."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)  # type: ignore[no-any-return]


def _probe(tokenizer: Any) -> tuple[str, str]:
    """A question and its answer as training begins them, and as the template writes them."""
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    return _start(tokenizer, messages[:1]) + "y", tokenizer.apply_chat_template(messages, tokenize=False)


def _difference(tokenizer: Any, apart: Tokens, whole: Tokens) -> str:
    """The first tokens that differ, for example " (apart 'a' 'b', as one 'ab')"."""
    first = next((i for i, (a, b) in enumerate(zip(apart, whole, strict=False)) if a != b), min(len(apart), len(whole)))
    apart_, whole_ = (" ".join(repr(tokenizer.decode([i])) for i in x[first : first + 2]) for x in (apart, whole))
    return f" (apart {apart_}, as one {whole_})"
