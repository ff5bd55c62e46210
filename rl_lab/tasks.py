"""Tasks whose answers a program can check: prompts and a verifier, for `grpo` and for judging.

    larger-of-two    "... 31, 64 ->"                 the larger of two numbers of two digits
    addition         "... 47 + 8 ="                  the sum of a number of two digits and one of one
    countdown        "... 3 5 8 make 16:"            an expression of all three numbers, each used once
    gsm8k:FILE       a word problem, by the chat template; FILE is GSM8K's train.jsonl or test.jsonl, and answers follow
                     "####" [Cobbe et al. 2021, arXiv:2110.14168]

The first three give four worked examples and take the rest of the line for the answer: a small model without
instruction can do them at times, which a policy gradient needs.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from rl_lab.language import Prompt
from rl_lab.preference_data import read_lines

Reward = Callable[[list[Prompt], list[str]], list[float]]  # of completions, one number each

NAMES = "larger-of-two, addition, countdown, gsm8k:FILE"


class Task(NamedTuple):
    """Prompts, and what checks their completions.

    Attributes:
        prompts: all there are, in no special order.
        reward: 1.0 for a right completion, else 0.0.
        stop: a text that ends a completion; "" for none.
        max_new_tokens: enough for a right answer.
    """

    prompts: list[Prompt]
    reward: Reward
    stop: str
    max_new_tokens: int


def make(name: str) -> Task:
    """The task of a name. ValueError if there is none."""
    kind, _, path = name.partition(":")
    if kind == "gsm8k" and path:
        return _gsm8k(path)
    if name not in _LINES:
        raise ValueError(f"--task {name}: there are {NAMES}")
    problems, tokens = _LINES[name]
    answers = problems()
    worked, rest = list(answers)[:4], list(answers)[4:]
    begin = "".join(f"{problem} {answers[problem][0]}\n" for problem in worked)

    def reward(prompts: list[Prompt], completions: list[str]) -> list[float]:
        problems = [str(prompt).rpartition("\n")[2] for prompt in prompts]
        return [float(_right(x.strip(), *answers[p])) for p, x in zip(problems, completions, strict=True)]

    return Task([begin + problem for problem in rest], reward, "\n", tokens)


def reward_function(name: str) -> Reward:
    """The function that --reward names. ValueError if there is none."""
    module, _, function = name.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reward {name}: {error}; it names a function as module:function") from None
    return found


def score(rewards: Sequence[tuple[str, Reward, float]], prompts: list[Prompt], texts: list[str]) -> Tensor:
    """(B,) weighted sums of named functions; a ValueError with the name if one fails or does not give B numbers."""
    total = torch.zeros(len(texts))
    for name, function, weight in rewards:
        try:
            numbers = torch.tensor(function(prompts, texts), dtype=torch.float32)
        except Exception as error:  # it is the user's code
            raise ValueError(f"reward {name} failed with {type(error).__name__}: {error}") from error
        if numbers.shape != total.shape:
            raise ValueError(f"reward {name} gave {tuple(numbers.shape)} numbers for {len(texts)} completions")
        if not numbers.isfinite().all():
            index = int((~numbers.isfinite()).nonzero()[0])
            raise ValueError(f"reward {name} gave {float(numbers[index])} for the completion {texts[index]!r:.200}")
        total += weight * numbers
    return total


Answer = tuple[str, tuple[int, ...]]  # a right one, and the numbers to use if there are others


def _right(completion: str, wanted: str, numbers: tuple[int, ...]) -> bool:
    if not numbers:
        return completion == wanted
    return _value(completion, numbers) == _value(wanted, numbers)


def _value(expression: str, numbers: tuple[int, ...]) -> Fraction | None:
    """What an expression of these numbers, each used once, is worth; None if it is no such expression."""
    if len(expression) > 100:
        return None
    try:
        tree = ast.parse(expression, mode="eval")
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return _evaluate(tree.body) if Counter(used) == Counter(numbers) else None
    except (SyntaxError, TypeError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    raise ValueError("only numbers and + - * /")


def _shuffled(problems: dict[str, Answer]) -> dict[str, Answer]:
    order = list(problems)
    random.Random(0).shuffle(order)
    return {problem: problems[problem] for problem in order}


def _larger_of_two() -> dict[str, Answer]:
    pairs = itertools.permutations(range(10, 100), 2)
    return _shuffled({f"{a}, {b} ->": (str(max(a, b)), ()) for a, b in pairs})


def _addition() -> dict[str, Answer]:
    pairs = itertools.product(range(10, 100), range(1, 10))
    return _shuffled({f"{a} + {b} =": (str(a + b), ()) for a, b in pairs})


def _countdown() -> dict[str, Answer]:
    draw = random.Random(0)
    problems: dict[str, Answer] = {}
    while len(problems) < 5000:
        numbers = tuple(draw.randint(1, 12) for _ in range(3))
        signs = draw.choices("+-*", k=2)
        expression = f"{numbers[0]} {signs[0]} {numbers[1]} {signs[1]} {numbers[2]}"
        target = _value(expression, numbers)
        if target is not None and 0 < target <= 200:
            given = " ".join(map(str, sorted(numbers)))
            problems.setdefault(f"{given} make {target}:", (expression, numbers))
    return problems


_LINES: dict[str, tuple[Callable[[], dict[str, Answer]], int]] = {
    "larger-of-two": (_larger_of_two, 4),
    "addition": (_addition, 5),
    "countdown": (_countdown, 16),
}


def _gsm8k(path: str) -> Task:
    answers: dict[str, str] = {}
    for where, row in read_lines(path, "--task gsm8k:"):
        question, answer = (row.get(key) if isinstance(row, dict) else None for key in ("question", "answer"))
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise ValueError(f"{where}: a line of GSM8K has a question and an answer with ####")
        answers[question] = answer.rpartition("####")[2].strip().replace(",", "")
    if not answers:
        raise ValueError(f"--task gsm8k:{path}: it holds no problems")

    def reward(prompts: list[Prompt], completions: list[str]) -> list[float]:
        questions = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [float(_last_number(x) == answers[q]) for q, x in zip(questions, completions, strict=True)]

    prompts: list[Prompt] = [[{"role": "user", "content": question}] for question in answers]
    return Task(prompts, reward, "", 256)


def _last_number(text: str) -> str:
    """The last number in a text, written as GSM8K's answers are."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return found[-1].replace(",", "").removesuffix(".00").removesuffix(".0") if found else ""
