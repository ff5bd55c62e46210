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
import operator
import random
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rl_lab.language import Prompt
from rl_lab.preference_data import place, read, read_lines
from rl_lab.reward_models import RewardModel

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


def make(name: str, flag: str = "--task") -> Task:
    """The task of a name. ValueError if there is none."""
    kind, _, path = name.partition(":")
    if kind == "gsm8k" and path:
        return _gsm8k(path, flag)
    if name not in _LINES:
        raise ValueError(f"{flag} {name}: there are {NAMES}")
    problems, tokens = _LINES[name]
    answers = problems()
    worked, rest = list(answers)[:4], list(answers)[4:]
    begin = "".join(f"{problem} {answers[problem][0]}\n" for problem in worked)

    def reward(prompts: list[Prompt], completions: list[str]) -> list[float]:
        problems = [str(prompt).rpartition("\n")[2] for prompt in prompts]
        return [float(_right(x.strip(), *answers[p])) for p, x in zip(problems, completions, strict=True)]

    return Task([begin + problem for problem in rest], reward, "\n", tokens)


def rewarded(
    task: str, prompts: str, names: Sequence[str], weights: Sequence[float], device: torch.device | str = "cpu"
) -> tuple[Task, list[tuple[str, Reward, float]]]:
    """A task by its name, or else of prompts to be read; and its rewards: names, functions and weights."""
    if task:
        made = make(task)
        return made, [(task, made.reward, 1.0)]
    short = [Path(name).name for name in names]
    if len(set(short)) < len(short):
        raise ValueError(f"--reward {' '.join(names)}: two have the same name; each is logged by its own")
    found = [x.prompt for x in read(prompts, "prompts", "--prompts")[0]]
    functions = [reward_function(name, device) for name in names]
    return Task(found, functions[0], "", 128), list(zip(short, functions, weights or (1.0,) * len(names), strict=True))


def split(prompts: Sequence[Prompt], share: tuple[float, float]) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts whose place lies in [share[0], share[1]), and the others; equal prompts stay together."""
    held = [share[0] <= place(prompt) < share[1] for prompt in prompts]
    return list(itertools.compress(prompts, held)), [x for x, out in zip(prompts, held, strict=True) if not out]


def reward_function(name: str, device: torch.device | str = "cpu") -> Reward:
    """The function, or the reward model as one, that --reward names. ValueError if there is none."""
    module, _, function = name.partition(":")
    if not function:
        return RewardModel(name, "--reward", device, "; a trained one works, or a function as module:function")
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's code
        raise ValueError(f"--reward {name}: {first_line(error)}; it names a function as module:function") from error
    if not callable(found):
        raise ValueError(f"--reward {name}: a {type(found).__name__}; it names a function as module:function")
    return found


def score(
    rewards: Sequence[tuple[str, Reward, float]], prompts: list[Prompt], texts: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) weighted sums of named rewards, and each by its name.

    Raises:
        ValueError: with the name if one fails or does not give B numbers.
    """
    each: dict[str, Tensor] = {}
    for name, function, _ in rewards:
        try:
            found = function(prompts, texts)
        except Exception as error:  # it is the user's code
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(f"reward {name} failed at {where.filename}:{where.lineno}: {first_line(error)}") from error
        try:
            numbers = torch.as_tensor(found, dtype=torch.float32, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"reward {name} gave no list of numbers: {first_line(error)}") from None
        if numbers.shape != (len(texts),):
            raise ValueError(f"reward {name} gave {tuple(numbers.shape)} numbers for {len(texts)} completions")
        if not numbers.isfinite().all():
            index = int((~numbers.isfinite()).nonzero()[0])
            raise ValueError(f"reward {name} gave {float(numbers[index])} for the completion {texts[index]!r:.200}")
        each[name] = numbers
    return torch.stack([weight * each[name] for name, _, weight in rewards]).sum(0), each


def first_line(error: Exception) -> str:
    """The kind of an error and what it says first."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


Answer = tuple[str, tuple[int, ...]]  # a right one, and the numbers to use if there are others


def _right(completion: str, wanted: str, numbers: tuple[int, ...]) -> bool:
    if not numbers:
        return completion == wanted
    return _value(completion, numbers) == _value(wanted, numbers)


def _value(expression: str, numbers: tuple[int, ...]) -> Fraction | None:
    """What an expression of these numbers, each used once, is worth; None if it is no such expression."""
    if not re.fullmatch("[0-9 +*/()-]{1,100}", expression):
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
    problems: dict[str, Answer] = {}
    signs: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    for given in itertools.combinations_with_replacement(range(1, 13), 3):
        for (a, b, c), first, second in itertools.product(itertools.permutations(given), signs, signs):
            target = signs[first](a, b * c) if second == "*" else signs[second](signs[first](a, b), c)
            if 0 < target <= 200:
                answer = f"{a} {first} {b} {second} {c}", given
                problems.setdefault(f"{' '.join(map(str, given))} make {target}:", answer)
    return _shuffled(problems)


_LINES: dict[str, tuple[Callable[[], dict[str, Answer]], int]] = {
    "larger-of-two": (_larger_of_two, 4),
    "addition": (_addition, 5),
    "countdown": (_countdown, 16),
}


def _gsm8k(path: str, flag: str) -> Task:
    answers: dict[str, str] = {}
    for where, row in read_lines(path, f"{flag} gsm8k:"):
        question, answer = (row.get(key) if isinstance(row, dict) else None for key in ("question", "answer"))
        if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
            raise ValueError(f"{where}: a line of GSM8K has a question and an answer with ####")
        answers[question] = _last_number(answer.rpartition("####")[2])
        if not answers[question]:
            raise ValueError(f"{where}: no number after ####")
    if not answers:
        raise ValueError(f"{flag} gsm8k:{path}: it holds no problems")

    def reward(prompts: list[Prompt], completions: list[str]) -> list[float]:
        questions = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        return [float(_last_number(x) == answers[q]) for q, x in zip(questions, completions, strict=True)]

    prompts: list[Prompt] = [[{"role": "user", "content": question}] for question in answers]
    return Task(prompts, reward, "", 256)


def _last_number(text: str) -> str:
    """The last number in a text, without separators of thousands and zeros that say nothing; "" if there is none."""
    whole = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?"  # 1,234 is one, 1,23 two
    found = re.findall(rf"(?:(?<![0-9])-)?(?:{whole}|\.[0-9]+)", text)  # in 7-5 the last one is 5
    number: str = found[-1].replace(",", "") if found else ""
    number = re.sub(r"^(-?)\.", r"\g<1>0.", number)
    return number.rstrip("0").removesuffix(".") if "." in number else number
