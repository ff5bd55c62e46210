"""Win rates with planted answers, prompts that were trained on, and the command from end to end."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lab import tasks
from rl_lab.language import load_model, load_tokenizer, save_model
from rl_lab.preference.judge import Verdicts, Verifier
from rl_lab.preference_data import place
from rl_lab.preference_metrics import wilson
from rl_lab.winrate import Args, compare, lineage, main, notes, require_valid, training_prompts

KEY = "sk-secret-0123456789"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Twenty pairs; the longer answer is the chosen one in the first fifteen."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Question {i}?"}],
            "chosen": "long answer" if i < 15 else "no",
            "rejected": "short" if i < 15 else "longer",
        }
        for i in range(20)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_run(folder: Path, tiny_model: Path, labels: int = 0, **flags: Any) -> Path:
    """A run folder as training leaves it."""
    (folder / "model").mkdir(parents=True)
    model = load_model(str(tiny_model), num_labels=labels)
    if labels:
        torch.nn.init.normal_(model.score.weight)
    save_model(folder / "model", model, load_tokenizer(str(tiny_model)))
    (folder / "config.json").write_text(json.dumps({"algo": "dpo", "args": {"model": str(tiny_model)} | flags}))
    return folder


def words(flags: dict[str, Any]) -> list[str]:
    """A command line."""
    return [str(x) for flag, value in flags.items() for x in (flag, *(value if isinstance(value, tuple) else (value,)))]


def arguments(pairs: Path, policy: Path | str, baseline: Path | str, judge: str, **flags: Any) -> Args:
    return Args(str(policy), str(baseline), judge, str(pairs), **({"share": (0.0, 1.0)} | flags))


def test_planted_answers_give_their_rate_and_what_belongs_to_it(
    pairs: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    """The judge, which takes the answer that comes first in the alphabet, agrees with 15 of 20 labels, as length does.

    Of 20 answers of the policy "a", 12 meet "b", 2 meet "a" and 6 meet "", which the judge prefers.
    """
    theirs = ["b"] * 12 + ["a"] * 2 + [""] * 6
    planted = {"--policy": ["a"] * 20, "--baseline": theirs}
    monkeypatch.setattr("rl_lab.winrate.answers", lambda _, flag, *__: (planted[flag], [flag == "--policy"] * 20))
    judge = Verifier(lambda _, texts: [-float(ord(x[0])) if x else 0.0 for x in texts], "the alphabet")
    monkeypatch.setattr("rl_lab.winrate.open_judge", lambda *_: judge)
    report, rows = compare(arguments(pairs, tiny_model, "smollm2-135m", "llm:someone"))
    assert report["win_rate"] == (0.65, *wilson(13, 20), 20) and report["ties"] == 0.1
    # chosen "long answer" comes before "short", chosen "no" after "longer"
    assert report["judge"] == {
        "name": "the alphabet",
        "accuracy": (0.75, *wilson(15, 20), 20),
        "agreement": None,
        "agreement_on_labels": None,
    }
    assert report["longer_wins"]["win_rate"] == ((6 + 7) / 20, *wilson(13, 20), 20)
    assert report["longer_wins"]["accuracy"] == (0.75, *wilson(15, 20), 20)
    assert report["policy"] == {"name": str(tiny_model), "mean_length": 1.0, "cut": 1.0}
    assert report["baseline"] == {"name": "smollm2-135m", "mean_length": 0.7, "cut": 0.0}
    assert report["unknown_training_data"] == sorted([str(tiny_model), "smollm2-135m", "someone"])
    assert any("not shown to tell answers apart better than their lengths" in x for x in notes(report))
    assert [row["policy_wins"] for row in rows] == [1.0] * 12 + [0.5] * 2 + [0.0] * 6
    assert rows[0].keys() == {"prompt", "policy", "baseline", "policy_wins"}


def test_runs_that_a_model_comes_from_are_found(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    sft = make_run(tmp_path / "sft", tiny_model, data=str(pairs), train=[0.0, 0.5])
    reward = make_run(tmp_path / "reward", tiny_model, labels=1, data=str(pairs))
    policy = make_run(tmp_path / "policy", sft, reward=str(reward / "model"))  # no data of its own
    runs, unknown = lineage(str(policy / "model"))
    assert runs.keys() == {policy, sft, reward}
    assert unknown == {str(policy / "model"), str(tiny_model)}


@pytest.mark.parametrize("who", ["policy", "baseline", "judge", "ancestor", "inner folder"])
def test_training_prompts_are_refused_whosever_they_are(
    who: str, tmp_path: Path, tiny_model: Path, pairs: Path
) -> None:
    seen = make_run(tmp_path / "seen", tiny_model, labels=int(who == "judge"), data=str(pairs), train=[0.0, 0.6])
    names = {"policy": str(tiny_model), "baseline": str(tiny_model), "judge": f"llm:{tiny_model}"}
    if who == "ancestor":
        names["policy"] = str(make_run(tmp_path / "child", seen, data=str(pairs), train=[0.0, 0.0]))
    elif who == "inner folder":
        names["baseline"] = str(seen / "model")
    else:
        names[who] = str(seen)
    places = [place([{"role": "user", "content": f"Question {i}?"}]) for i in range(20)]
    asked, shared = sum(x >= 0.5 for x in places), sum(0.5 <= x < 0.6 for x in places)
    assert shared  # the shares overlap in some
    with pytest.raises(ValueError, match=rf"--prompts .*: {shared} of {asked} prompts are training prompts of .*/seen"):
        compare(arguments(pairs, **names, share=(0.5, 1.0)))


def test_training_prompts_are_those_outside_of_the_holdout_too(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    """GRPO learns from a task or from prompts, but for its held-out share."""
    policy = make_run(tmp_path / "policy", tiny_model, task="addition", data="", holdout=[0.5, 1.0])
    asked = tmp_path / "asked.jsonl"
    prompts = tasks.make("addition").prompts
    asked.write_text("".join(json.dumps({"prompt": x}) + "\n" for x in prompts))
    seen = sum(place(x) < 0.5 for x in prompts)
    flags: dict[str, Any] = {"labels": str(pairs), "num_prompts": 1000}
    with pytest.raises(ValueError, match=rf"{seen} of {len(prompts)} prompts are training prompts of .*policy"):
        compare(arguments(asked, policy, tiny_model, f"llm:{tiny_model}", **flags))
    with pytest.raises(ValueError, match=r"--judge .*: no reward model"):  # and here it went on to the judge
        compare(arguments(asked, policy, tiny_model, str(tiny_model), **flags | {"share": (0.5, 1.0)}))
    other = make_run(tmp_path / "other", tiny_model, prompts=str(asked), task="", holdout=[0.0, 0.5])
    with pytest.raises(ValueError, match=r"prompts are training prompts of .*other"):
        compare(arguments(asked, other, tiny_model, str(tiny_model), **flags | {"share": (0.5, 1.0)}))


def test_what_a_run_learned_from_may_have_no_prompts(tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text('{"text": "Once."}\n{"prompt": "p", "completion": "x"}\n')
    assert training_prompts(tmp_path, {"data": str(data)}) == ["p"]
    assert training_prompts(tmp_path, {"model": "m"}) == []
    data.write_text('{"prompt": "p", "completion": "x", "label": true}\n')
    assert training_prompts(tmp_path, {"data": str(data), "train": [0.0, 1.0]}) == ["p"]


def test_a_prompt_is_the_same_in_capitals_and_as_plain_text(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    (tmp_path / "sft.jsonl").write_text('{"prompt": " question\\n3?", "completion": "x"}\n')
    policy = make_run(tmp_path / "policy", tiny_model, data=str(tmp_path / "sft.jsonl"))
    with pytest.raises(ValueError, match=r": 1 of 20 prompts are training prompts"):
        compare(arguments(pairs, policy, tiny_model, f"llm:{tiny_model}"))


def test_labels_that_the_judge_learned_from_are_refused(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "p"}\n')
    judge = make_run(tmp_path / "judge", tiny_model, labels=1, data=str(pairs))
    with pytest.raises(ValueError, match=r"--labels .*pairs.jsonl: 20 of 20 prompts are training prompts of .*judge"):
        compare(arguments(other, tiny_model, tiny_model, str(judge), labels=str(pairs)))


def test_training_data_that_is_gone_stops_it(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    policy = make_run(tmp_path / "policy", tiny_model, data=str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match=r"policy: --data .*gone.jsonl: .*No such file"):
        compare(arguments(pairs, policy, tiny_model, f"llm:{tiny_model}"))


def test_a_win_rate_without_human_labels_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "p"}\n')
    with pytest.raises(ValueError, match=r"a win rate comes with its judge's accuracy on human labels: --labels"):
        compare(arguments(prompts, tiny_model, tiny_model, f"llm:{tiny_model}"))


def test_the_command_from_end_to_end(
    tmp_path: Path, tiny_model: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward model judges; the same flags give the same answers, and both models their own."""
    judge = make_run(tmp_path / "judge", tiny_model, labels=1, data=str(pairs), train=[0.0, 0.5])
    given = {"--policy": tiny_model, "--baseline": tiny_model, "--judge": judge, "--prompts": pairs}
    given |= {"--share": (0.5, 1), "--max-new-tokens": 5}
    texts = []
    for name in ("one.json", "two.json"):
        main(words(given | {"--json": tmp_path / name}))
        texts.append((tmp_path / name).with_suffix(".jsonl").read_text())
    assert texts[0] == texts[1]
    rows = [json.loads(line) for line in texts[0].splitlines()]
    report = json.loads((tmp_path / "one.json").read_text())
    assert report["prompts"] == len(rows) == report["judge"]["accuracy"]["number"] > 5
    assert report["win_rate"]["mean"] == pytest.approx(sum(row["policy_wins"] for row in rows) / len(rows))
    assert any(row["policy"] != row["baseline"] for row in rows)
    assert all((row["probability"] > 0.5) == (row["policy_wins"] == 1) for row in rows)
    assert report["args"]["share"] == [0.5, 1.0] and report["args"]["seed"] == 1 and "command" in report
    out = capsys.readouterr().out
    for wanted in ("win rate", "agrees with people", "the longer answer wins", "characters", "Wilson", "unknown"):
        assert wanted in out


def test_a_model_against_itself_ties_by_a_local_judge(tiny_model: Path, pairs: Path) -> None:
    judge = f"llm:{tiny_model}"
    report, rows = compare(arguments(pairs, tiny_model, tiny_model, judge, temperature=0.0, max_new_tokens=4))
    assert report["win_rate"].mean == 0.5 and report["ties"] == 1.0 and report["judge"]["agreement"] is None
    assert report["longer_wins"]["win_rate"].mean == 0.5
    assert all(row["policy"] == row["baseline"] for row in rows)


def test_a_verifier_judges_answers_that_its_task_ends(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    """It is right on the labels by definition, asks for no data of its own, and answers are ended as in its task."""
    task = tasks.make("addition")
    asked = [{"prompt": x, "chosen": str(eval(x.splitlines()[-1].rstrip("="))), "rejected": "?"} for x in task.prompts]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in asked[:20]))
    given = arguments(pairs, tiny_model, tiny_model, "task:addition", max_new_tokens=40, temperature=1.0)
    report, rows = compare(given)
    assert report["judge"]["accuracy"].mean == 1.0 and report["judge"]["name"] == "task:addition"
    assert report["unknown_training_data"] == [str(tiny_model)]
    assert report["win_rate"].mean == 0.5 and report["ties"] == 1.0
    assert report["trained_with_judge"] is False
    policy = make_run(pairs.parent / "policy", tiny_model, task="addition", data="", holdout=[0.0, 1.0])
    assert compare(dataclasses.replace(given, policy=str(policy)))[0]["trained_with_judge"] is True
    assert not any("\n" in row[side] for row in rows for side in ("policy", "baseline"))
    assert any(len(row["policy"]) < 40 for row in rows)
    pairs.write_text(pairs.read_text() + '{"prompt": "2 + 2 =", "chosen": "4", "rejected": "5"}\n')
    with pytest.raises(ValueError, match=r"^--judge task:addition: 2 of 42 prompts are not of that task, the first"):
        compare(given)
    pairs.write_text(json.dumps(asked[0] | {"prompt": asked[0]["prompt"] + " "}) + "\n")  # the verifier knows it not
    with pytest.raises(ValueError, match=r"^--judge task:addition: 2 of 2 prompts are not of that task"):
        compare(given)
    with pytest.raises(ValueError, match=r"^--judge task: adition: there are larger-of-two, "):
        compare(arguments(pairs, tiny_model, tiny_model, "task:adition"))


def test_answers_are_kept_when_the_judge_fails(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call, which audits it, goes well."""
    calls: list[int] = []

    def judge(prompts: Any, first: Any, second: Any) -> Verdicts:
        calls.append(len(prompts))
        if len(calls) > 1:
            raise OSError("gone")
        return Verdicts([1.0] * len(prompts))

    judge.name = "a judge"  # type: ignore[attr-defined]
    monkeypatch.setattr("rl_lab.winrate.open_judge", lambda *_: judge)
    monkeypatch.setattr("rl_lab.winrate.answers", lambda _, flag, *__: ([flag] * 20, [False] * 20))
    given = {
        "--policy": tiny_model,
        "--baseline": tiny_model,
        "--judge": "llm:x",
        "--prompts": pairs,
        "--share": (0, 1),
    }
    with pytest.raises(SystemExit, match="error: gone"):
        main(words(given | {"--json": tmp_path / "report.json"}))
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[0].keys() == {"prompt", "policy", "baseline"}
    assert not (tmp_path / "report.json").exists()


def test_an_endpoint_judges_meters_and_keeps_the_key(
    endpoint: Any,
    tmp_path: Path,
    tiny_model: Path,
    pairs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RL_LAB_JUDGE_KEY", KEY)

    def answer(question: str, _: Any) -> str:  # the longer one
        found = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\n\[End\]", question, re.DOTALL)
        assert found
        a, b = map(len, found.groups())
        return "A" if a > b else "B" if b > a else "tie"

    endpoint.answer = answer
    given = {"--policy": tiny_model, "--baseline": tiny_model, "--judge": endpoint.url, "--prompts": pairs}
    given |= {"--judge-model": "gpt", "--share": (0, 1), "--max-new-tokens": 4, "--price": (3, 15)}
    flags = words(given | {"--json": tmp_path / "report.json"})
    main(flags)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["judge"]["name"] == f"gpt at {endpoint.url}"
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    count = 40 + 2 * sum(row["policy"] != row["baseline"] for row in rows)  # labels and answers, in both orders
    assert 40 < count < 80  # equal answers are not asked about
    assert report["judge"]["usage"] == {
        "requests": count, "prompt_tokens": 100 * count, "completion_tokens": 2 * count,
    }  # fmt: skip
    assert report["judge"]["cost"] == pytest.approx((100 * count * 3 + 2 * count * 15) / 1e6)
    assert all(row["orders_agree"] is None and row["policy_wins"] == 0.5
               for row in rows if row["policy"] == row["baseline"])  # fmt: skip
    assert report["judge"]["agreement"] == report["judge"]["agreement_on_labels"] == 1.0
    for name in ("win_rate", "accuracy"):
        ours = report["win_rate"] if name == "win_rate" else report["judge"]["accuracy"]
        assert ours == report["longer_wins"][name]
    shown = capsys.readouterr()
    assert f"cost {report['judge']['cost']:.4f}" in shown.out
    assert "same verdict in 100% of pairs of different answers, 100% of the human ones" in shown.out
    monkeypatch.setattr("rl_lab.winrate.answers", lambda *_: (["same"] * 20, [False] * 20))
    main(flags)  # nothing is asked of the answers, but the audit is metered
    assert json.loads((tmp_path / "report.json").read_text())["judge"]["usage"]["requests"] == 40
    endpoint.answer = lambda *_: (401, {}, f"no such key {KEY}".encode())
    with pytest.raises(SystemExit, match=r"error: --judge gpt at .*401: no such key \*\*\*"):
        main(flags)
    told = shown.out + shown.err + "".join(path.read_text() for path in tmp_path.glob("report.*"))
    assert KEY not in told and KEY not in "".join(capsys.readouterr())


def test_a_policy_trained_with_the_judge_is_pointed_out(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = make_run(tmp_path / "start", tiny_model)
    common = {"model": str(start / "model")}  # which alone makes nothing trained with a judge
    judge = make_run(tmp_path / "judge", tiny_model, labels=1, aggregation=None, **common)
    other = make_run(tmp_path / "other", tiny_model, **common)
    policy = make_run(tmp_path / "policy", tiny_model, reward=["math:cos", str(judge)])  # as grpo writes it
    later = make_run(tmp_path / "later", tiny_model, labels=1, aggregation=None, model=str(judge / "model"))
    monkeypatch.setattr("rl_lab.winrate.answers", lambda _, flag, *__: ([flag] * 20, [False] * 20))
    for judging, model, trained in (
        (judge / "model", policy, True),
        (later, policy, True),
        (judge, tiny_model, False),
        (later, other, False),
    ):
        report, _ = compare(arguments(pairs, model, tiny_model, str(judging)))
        assert report["trained_with_judge"] == trained
        assert any("policy was trained with" in line for line in notes(report)) == trained


def test_prompts_are_distinct_and_drawn_by_the_seed(
    tmp_path: Path, tiny_model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs.write_text(pairs.read_text() * 2)
    drawn = []

    def judge(prompts: Any, first: Any, second: Any) -> Verdicts:
        return Verdicts([1.0] * len(prompts))

    judge.name = "yes"  # type: ignore[attr-defined]
    monkeypatch.setattr("rl_lab.winrate.open_judge", lambda *_: judge)
    monkeypatch.setattr("rl_lab.winrate.answers", lambda *a: (["x"] * len(a[2]), [False] * len(a[2])))
    for flags in ({"num_prompts": 5}, {"num_prompts": 5}, {"num_prompts": 5, "seed": 2}, {}):
        _, rows = compare(arguments(pairs, tiny_model, tiny_model, f"llm:{tiny_model}", **flags))
        drawn.append([row["prompt"][0]["content"] for row in rows])
    assert drawn[0] == drawn[1] != drawn[2] and [len(set(x)) for x in drawn] == [5, 5, 5, 20]


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"temperature": -1.0}, "--temperature -1.0 must be"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be"),
        ({"num_prompts": 0}, "--num-prompts 0 must be"),
        ({"share": (0.5, 0.5)}, "--share 0.5 0.5 must be"),
        ({"share": (0.9, -0.1)}, "--share 0.9 -0.1 must be"),
        ({"judge": "http://host/v1"}, "--judge-model is needed"),
        ({"judge_model": "gpt"}, "--judge-model and --price belong to an endpoint; --judge run is none"),
        ({"price": (1.0, 2.0)}, "--judge-model and --price belong to an endpoint"),
        ({"json": Path("report.txt")}, "--json report.txt must be"),
        ({"json": Path("no/such/report.json")}, "--json no/such/report.json must be"),
        (
            {"json": Path("a.json"), "prompts": "./a.jsonl"},
            "--json a.json: the answers beside it would take the place of",
        ),
        ({"json": Path("a.json"), "labels": "a.jsonl"}, "--json a.json: the answers beside it would take the place of"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags: dict[str, Any], wanted: str) -> None:
    given = {"policy": "a", "baseline": "b", "judge": "run", "prompts": "data"} | flags
    with pytest.raises(ValueError, match=re.escape(wanted)):
        require_valid(Args(**given))


def test_faults_end_in_one_line(tmp_path: Path, tiny_model: Path, pairs: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_model, plain)
    tokenizer = load_tokenizer(str(plain))
    tokenizer.chat_template = None
    shutil.rmtree(plain)
    save_model(plain, load_model(str(tiny_model)), tokenizer)
    given = {"--policy": tiny_model, "--baseline": plain, "--judge": f"llm:{tiny_model}", "--prompts": pairs}
    for change, wanted in (
        ({}, "--baseline .*plain: its tokenizer has no chat template"),
        ({"--max-new-tokens": 4000}, r"--policy .*: 20 of 20 texts are longer than its 2048 tokens"),
        ({"--share": (0.0, 1e-9)}, "--prompts .*: no prompts in --share"),
        ({"--judge": tiny_model}, "--judge .*tiny: no reward model"),
        ({"--prompts": tmp_path / "none.jsonl"}, "--prompts .*none.jsonl: .*No such file"),
    ):
        flags = {"--share": (0.0, 1.0), "--max-new-tokens": 2} | given | change
        with pytest.raises(SystemExit, match=f"error: {wanted}"):
            main(words(flags))
