"""Tasks whose answers a program checks, and rewards of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lab import tasks
from rl_lab.preference_data import place
from rl_lab.tasks import make, reward_function, rewarded, score, split


def right(name: str, problem: str, answer: str) -> float:
    """What a task gives for an answer to a problem of it."""
    task = make(name)
    (prompt,) = [prompt for prompt in task.prompts if str(prompt).endswith(f"\n{problem}")]
    (found,) = task.reward([prompt], [answer])
    return found


@pytest.mark.parametrize(
    ("name", "problem", "answer", "wanted"),
    [
        ("larger-of-two", "31, 64 ->", " 64", 1),
        ("larger-of-two", "64, 31 ->", "64 ", 1),
        ("larger-of-two", "31, 64 ->", " 31", 0),
        ("larger-of-two", "31, 64 ->", " 64, 31", 0),
        ("larger-of-two", "31, 64 ->", " 064", 0),
        ("larger-of-two", "31, 64 ->", "", 0),
        ("addition", "58 + 7 =", " 65", 1),
        ("addition", "58 + 7 =", " 66", 0),
        ("addition", "58 + 7 =", " 65.", 0),
        ("addition", "58 + 7 =", " 65 or so", 0),
    ],
)
def test_answers(name: str, problem: str, answer: str, wanted: float) -> None:
    assert right(name, problem, answer) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("3 * 5 + 1", 1),
        (" (5*3)+1 ", 1),
        ("1 + 5 * 3", 1),
        ("5 / (1 / 3) + 1", 0),  # a number twice
        ("15 + 1", 0),  # other numbers
        ("3 * 5", 0),  # not all of them
        ("3 * 5 + 1 + 0", 0),
        ("3 * 5 - 1", 0),  # 14
        ("3 * 5 + 1 = 16", 0),
        ("3 * 5 + 1 # sure", 0),
        ("is 3 * 5 + 1", 0),
        ("3.0 * 5 + 1", 0),
        ("3 * 5 + True", 0),
        ("3 * 5 + +1", 0),
        ("3 * 5 - -1", 0),
        ("3 * 5 + 1 if 1 else 0", 0),
        ("3 * 5 + 01", 0),
        ("16", 0),
        ("", 0),
        ("(", 0),
        ("3 5 1", 0),
        ("3 (5) 1", 0),
        ("5 // 1 * 3", 0),
        ("3 ** 5 ** 1", 0),
        ("3 * 5 + 1\n", 1),
        ("\uff13 * 5 + 1", 0),  # a digit, but none of ASCII
    ],
)
def test_expressions(answer: str, wanted: float) -> None:
    """Of 1, 3 and 5 for 16."""
    assert tasks._right(answer.strip(), "1 + 3 * 5", (1, 3, 5)) == bool(wanted)


def test_division_is_exact() -> None:
    """In floats 8 / (3 - 8 / 3) is less than 24, and 1 / 10 + 2 / 10 more than 3 / 10."""
    assert tasks._value("8 / (3 - 8 / 3)", (3, 3, 8, 8)) == 24
    assert tasks._value("1 / 10 + 2 / 10", (1, 2, 10, 10)) == tasks._value("3 / 10", (3, 10))
    assert tasks._value("1 / (2 - 2)", (1, 2, 2)) is None


@pytest.mark.parametrize(
    ("expression", "numbers"),
    [
        ("9 ** 9 ** 9", (9, 9, 9)),
        ("9" * 5000, (9,)),
        ("(" * 5000 + "1", (1,)),
        ("-" * 5000 + "1", (1,)),
        ("1" + "+1" * 5000, (1,) * 5001),
        ("(" * 49 + "1" + ")" * 50, (1,)),
        ("((((" * 12 + "1", (1,)),
        ("__import__('os').abort()", (1,)),
        ("print(1)", (1,)),
        ("[1][0]", (1,)),
        ("(1).real", (1,)),
        ("1\x00", (1,)),
    ],
)
def test_no_expression_hangs_or_runs_anything(
    expression: str, numbers: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tasks._value(expression, numbers) is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize(("name", "least"), [("larger-of-two", 8000), ("addition", 800), ("countdown", 3000)])
def test_prompts(name: str, least: int) -> None:
    """Enough of them, all different, each with four worked examples that are right and none of the prompts."""
    task = make(name)
    prompts = [str(prompt) for prompt in task.prompts]
    assert least <= len(prompts) == len(set(prompts))
    begin = {prompt.rpartition("\n")[0] for prompt in prompts}
    assert len(begin) == 1
    worked = begin.pop().splitlines()
    assert len(worked) == 4
    end = {"larger-of-two": "->", "addition": "=", "countdown": ":"}[name]
    problems = {prompt.rpartition("\n")[2] for prompt in prompts}
    for line in worked:
        problem, _, answer = line.partition(end)
        assert problem + end not in problems
        kind, _, rest = problem.partition(" make ")
        if name == "countdown":
            assert tasks._value(answer.strip(), tuple(map(int, kind.split()))) == int(rest)
        elif name == "addition":
            assert int(answer) == sum(map(int, problem.split("+")))
        else:
            assert int(answer) == max(map(int, problem.split(",")))
    assert prompts == [str(prompt) for prompt in make(name).prompts]  # whatever the process
    assert task.stop == "\n"
    places = torch.tensor([place(prompt) for prompt in prompts])
    assert (places >= 0.9).float().mean().item() == pytest.approx(0.1, abs=0.04)


def test_every_problem_has_a_right_answer() -> None:
    for name in ("larger-of-two", "addition", "countdown"):
        problems, _ = tasks._LINES[name]
        answers = problems()
        prompts = make(name).prompts
        texts = [f" {answers[str(prompt).rpartition(chr(10))[2]][0]}" for prompt in prompts]
        assert set(make(name).reward(prompts, texts)) == {1.0}
        if name == "countdown":
            for problem, (expression, numbers) in answers.items():
                given, _, target = problem.removesuffix(":").partition(" make ")
                assert sorted(numbers) == list(map(int, given.split()))
                assert eval(expression) == int(target) <= 200


GSM8K = [
    ("How many?", "He has 3 * 4 = <<3*4=12>>12.\n#### 12"),
    ("How much?", "A lot. #### no\n#### 1,234,500"),
    ("How cold?", "Below.\n#### -10"),
    ("How long?", "Half an hour.\n#### 0.50"),
]


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    rows = (json.dumps({"question": question, "answer": answer}) for question, answer in GSM8K)
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    return f"gsm8k:{tmp_path / 'test.jsonl'}"


@pytest.mark.parametrize(
    ("question", "answer", "wanted"),
    [
        (0, "3 * 4 is 12", 1),
        (0, "12.", 1),
        (0, "$12.00", 1),
        (0, "#### 12\n", 1),
        (0, "12 of 13", 0),  # the last number counts
        (0, "no idea", 0),
        (0, "", 0),
        (0, "20-12", 1),
        (0, "-12", 0),
        (0, "1.2", 0),
        (0, "120", 0),
        (1, "1234500", 1),
        (1, "it is 1,234,500 dollars", 1),
        (1, "1,234,500.0", 1),
        (2, "-10", 1),
        (2, "it was -10.0 degrees", 1),
        (2, "10", 0),
        (3, "0.5", 1),
        (3, "0.500", 1),
        (3, "it is .5", 1),
        (3, "-.5", 0),
        (0, "1,2", 0),  # two numbers, as a separator stands before three digits
        (0, "5, 12", 1),
        (3, "5", 0),
        (0, "9" * 10_000, 0),
    ],
)
def test_word_problems(gsm8k: str, question: int, answer: str, wanted: float) -> None:
    task = make(gsm8k)
    assert task.prompts == [[{"role": "user", "content": question}] for question, _ in GSM8K]
    assert (task.stop, task.max_new_tokens) == ("", 256)
    assert task.reward([task.prompts[question]], [answer]) == [wanted]
    assert task.reward([GSM8K[question][0]], [answer]) == [wanted]  # as plain text too


@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_the_problems_of_gsm8k(shared: Path, name: str, count: int) -> None:
    """Each file's own solutions, with their numbers in the text, are right; without the last line most are wrong."""
    path = shared / "data/gsm8k" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    task = make(f"gsm8k:{path}")
    assert len(task.prompts) == count
    assert task.reward(task.prompts, [row["answer"] for row in rows]) == [1.0] * count
    others = [row["answer"] for row in rows[1:] + rows[:1]]
    assert sum(task.reward(task.prompts, others)) < 0.1 * count


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--task gsm8k:.*test.jsonl: it holds no problems"),
        ("{}", "test.jsonl:1: a line of GSM8K has a question and an answer with ####"),
        ('{"question": "x", "answer": "3"}', "test.jsonl:1: a line of GSM8K"),
        ('{"question": "x", "answer": 3}', "test.jsonl:1: a line of GSM8K"),
        ('{"question": "x", "answer": "#### none"}', "test.jsonl:1: no number after ####"),
        ("[]", "test.jsonl:1: a line of GSM8K"),
        ("x", "test.jsonl:1: no JSON"),
    ],
)
def test_a_file_of_other_things(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "test.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        make(f"gsm8k:{tmp_path / 'test.jsonl'}")


@pytest.mark.parametrize("name", ["", "adition", "gsm8k", "gsm8k:", "addition:x"])
def test_an_unknown_task_names_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--task {name}: there are larger-of-two, addition, countdown, gsm8k:FILE$"):
        make(name)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match=r"^--task gsm8k: no.jsonl: .*No such file"):
        make("gsm8k:no.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":f", "--reward :f: ValueError: Empty module name; it names a function as module:function"),
        ("no_such_module:f", "--reward no_such_module:f: ModuleNotFoundError: No module named 'no_such_module'; it"),
        ("json:no_such", "--reward json:no_such: AttributeError: .*'no_such'; it names a function as module:function"),
        ("json:", "--reward json:: neither a folder with a model nor"),
        ("", "--reward : "),
        ("math:pi", "--reward math:pi: a float; it names a function as module:function"),
        ("broken:f", "--reward broken:f: ZeroDivisionError: division by zero; it names"),
        ("torn:f", "--reward torn:f: SyntaxError"),
    ],
)
def test_a_reward_that_is_none(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "torn.py").write_text("def f(:")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        reward_function(name)
    assert reward_function("math:sqrt")(4) == 2  # type: ignore[call-arg, arg-type]


def test_rewards_are_summed_by_weight() -> None:
    rewards: Any = [("a", lambda p, x: [1, 2, 3], 2.0), ("b", lambda p, x: torch.tensor([0.5, 0.0, -1.0]), -1.0)]
    total, each = score(rewards, ["p"] * 3, ["x"] * 3)
    assert total.tolist() == [1.5, 4.0, 7.0]
    assert {name: x.tolist() for name, x in each.items()} == {"a": [1, 2, 3], "b": [0.5, 0.0, -1.0]}


def fails(*_: Any) -> Any:
    raise RuntimeError("no\nmore")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, r"reward mine failed at .*test_tasks\.py:\d+: RuntimeError: no$"),
        (lambda p, x: [1.0], r"reward mine gave \(1,\) numbers for 2 completions"),
        (lambda p, x: [[1.0], [2.0]], r"reward mine gave \(2, 1\) numbers for 2 completions"),
        (lambda p, x: 1.0, r"reward mine gave \(\) numbers for 2 completions"),
        (lambda p, x: None, "reward mine gave no list of numbers: "),
        (lambda p, x: ["good", "bad"], "reward mine gave no list of numbers: "),
        (lambda p, x: [1.0, None], "reward mine gave no list of numbers: "),
        (lambda p, x: [1.0, float("nan")], "reward mine gave nan for the completion 'second'"),
        (lambda p, x: [float("-inf"), 0.0], "reward mine gave -inf for the completion 'first'"),
        (lambda p, x: [1e300, 0.0], "reward mine gave inf for the completion 'first'"),
    ],
)
def test_a_reward_that_fails_is_named(function: Callable[..., Any], message: str) -> None:
    fine: Any = ("fine", lambda p, x: [0.0, 0.0], 1.0)
    with pytest.raises(ValueError, match=message):
        score([fine, ("mine", function, 1.0)], ["p", "q"], ["first", "second"])


def test_prompts_with_rewards(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": [{"role": "user", "content": "b"}]}\n')
    task, rewards = rewarded("", str(tmp_path / "p.jsonl"), ("math:sqrt", "math:cos"), ())
    assert task.prompts == ["a", [{"role": "user", "content": "b"}]] and task.stop == ""
    assert [(name, weight) for name, _, weight in rewards] == [("math:sqrt", 1.0), ("math:cos", 1.0)]
    assert [x for _, _, x in rewarded("", str(tmp_path / "p.jsonl"), ("math:sqrt",), (3.0,))[1]] == [3.0]
    task, rewards = rewarded("addition", "", (), ())
    assert rewards == [("addition", task.reward, 1.0)]


def test_a_split_has_every_prompt_once_and_equal_ones_together() -> None:
    prompts: list[Any] = [*map(str, range(500)), *([{"role": "user", "content": str(i)}] for i in range(500)), "7", "8"]
    inside, outside = split(prompts, (0.25, 0.75))
    assert len(inside) + len(outside) == len(prompts)
    assert 400 < len(inside) < 600
    assert not {str(x) for x in inside} & {str(x) for x in outside}
    assert inside == [x for x in prompts if x in inside]  # in their order
    assert split(prompts, (0.0, 1.0)) == (prompts, [])
