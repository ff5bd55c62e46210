"""Judge a model's answers against a baseline's, and the judge against people; docs/judging.md says how.

A win rate comes only with what it takes to believe it: the judge's name and its accuracy on human labels, what length
alone would say of both, mean lengths, agreement between the orders of the answers, intervals, and prompts that neither
of the models nor the judge was trained on.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from rl_lab import checkpoint, tasks
from rl_lab.endpoint import Endpoint
from rl_lab.generate import complete, open_language_model, require_sampling
from rl_lab.generation import Sampler
from rl_lab.language import Prompt, Tree, encode_prompt
from rl_lab.log import provenance, run_flags, run_folder
from rl_lab.optim import fast_bf16
from rl_lab.preference.judge import (
    EndpointJudge,
    Judge,
    LocalJudge,
    Rate,
    RewardJudge,
    Verifier,
    audit,
    judged,
    longer,
    rate,
)
from rl_lab.preference_data import Example, kind_of, normalised, place, plain, read, select, write_lines
from rl_lab.reward_models import require_room

URL = ("http://", "https://")


@dataclass(frozen=True)
class Args:
    """Judge a model's answers against a baseline's; prints a table, and writes --json with all answers beside it."""

    policy: str
    """run folder, folder of a model, smollm2-135m, or an id of the Hugging Face hub"""
    baseline: str
    """the same"""
    judge: str
    """run folder of a reward model; llm:MODEL for a local language model; task:TASK for a task's verifier; or the base
    address of an OpenAI-compatible endpoint, such as https://host/v1, whose key is in the environment as
    RL_LAB_JUDGE_KEY or OPENAI_API_KEY"""
    prompts: str
    """.jsonl file, or data set of the Hugging Face hub"""
    labels: str | None = None
    """human preference pairs to audit the judge with; else those of --prompts, which must then be pairs"""
    share: tuple[float, float] = (0.9, 1.0)
    """part of the prompts, by their places from 0 to 1, that is answered, and of the labels; 0.9 0.1 goes on at 0"""
    num_prompts: int = 200
    """to answer, at most; and pairs to audit the judge with"""
    max_new_tokens: int = 128
    """of an answer, at most"""
    temperature: float = 0.7
    """of the answers; 0 takes the likeliest tokens"""
    seed: int = 1
    """of the choice of prompts and of the sampling"""
    judge_model: str | None = None
    """the endpoint's name of its model"""
    price: tuple[float, float] | None = None
    """of a million prompt tokens and of a million completion tokens at the endpoint, to tell the cost"""
    json: Path | None = None
    """write the report there, and the answers with their verdicts beside it, as .jsonl"""


def require_valid(args: Args) -> None:
    """Raise a ValueError that says which flag cannot be so."""
    require_sampling(args.temperature, args.max_new_tokens)
    if args.num_prompts < 1:
        raise ValueError(f"--num-prompts {args.num_prompts} must be at least 1")
    if not 0 <= min(args.share) < max(args.share) <= 1:
        raise ValueError(f"--share {args.share[0]} {args.share[1]} must be two different numbers from 0 to 1")
    endpoint = args.judge.startswith(URL)
    if endpoint and args.judge_model is None:
        raise ValueError("--judge-model is needed: the name of a model of the endpoint that --judge gives")
    if not endpoint and (args.judge_model or args.price):
        raise ValueError(f"--judge-model and --price belong to an endpoint; --judge {args.judge} is none")
    if args.json and (args.json.suffix != ".json" or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json} must be a .json file in a folder that exists")
    if args.json:
        answers = args.json.with_suffix(".jsonl")
        for given in (args.prompts, args.labels):
            if given and answers.resolve() == Path(given).resolve():
                raise ValueError(f"--json {args.json}: the answers beside it would take the place of {given}")


def open_judge(args: Args, task: tasks.Task | None) -> Judge:
    """The judge that --judge names, of the task if it names one."""
    if args.judge.startswith(URL):
        return EndpointJudge(Endpoint(args.judge, args.judge_model or "", "--judge"))
    if task:
        return Verifier(task.reward, args.judge)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.judge.startswith("llm:"):
        return LocalJudge(args.judge.removeprefix("llm:"), device)
    return RewardJudge(args.judge, device)


def lineage(name: str) -> tuple[dict[Path, dict[str, Any]], set[str]]:
    """The runs that a model comes from: itself, what it was trained from, and whatever else its flags name.

    Returns:
        each run's folder with its flags; and the models of which no training data are known.
    """
    runs: dict[Path, dict[str, Any]] = {}
    unknown: set[str] = set()
    todo = [name]
    while todo:
        name = todo.pop()
        folder = run_folder(name)
        flags = run_flags(folder)
        if folder in runs:
            continue
        if flags is None or not any(flags.get(key) for key in ("data", "prompts", "task")):
            unknown.add(name)
        if flags is not None:
            runs[folder] = flags
            named = [(key, x) for key, value in flags.items() for x in (value if isinstance(value, list) else [value])]
            names = [(key, x) for key, x in named if isinstance(x, str) and x]
            todo += [x for key, x in names if key == "model" or run_flags(run_folder(x)) is not None]
    return runs, unknown


def require_unseen(examples: Iterable[Example], runs: dict[Path, dict[str, Any]], what: str) -> None:
    """Raise a ValueError with their number if the runs were trained on prompts of the examples."""
    prompts = {normalised(x.prompt) for x in examples}
    for folder, flags in runs.items():
        seen = {normalised(prompt) for prompt in training_prompts(folder, flags)}
        if shared := len(prompts & seen):
            raise ValueError(
                f"{what}: {shared} of {len(prompts)} prompts are training prompts of {folder}; another --share, or "
                "data that it did not learn from, work"
            )


def training_prompts(folder: Path, flags: dict[str, Any]) -> list[Prompt]:
    """The prompts that a run was trained on, by its flags: those in --train, or those not in --holdout."""
    if data := flags.get("data"):
        low, high = flags.get("train") or (0.0, 1.0)
        flag = f"{folder}: --data"
        kind = "completions" if kind_of(data, flag) == "completions" else "prompts"  # plain texts have no prompt
        return [x.prompt for x in select(read(data, kind, flag)[0], (low, high)) if x.prompt]
    if not flags.get("prompts") and not flags.get("task"):
        return []
    if data := flags.get("prompts"):
        prompts = [x.prompt for x in read(data, "prompts", f"{folder}: --prompts")[0]]
    else:
        prompts = tasks.make(flags["task"]).prompts
    low, high = flags.get("holdout") or (0.0, 0.0)
    return [x for x in prompts if not low <= place(x) < high]


def sample(examples: Iterable[Example], number: int, seed: int) -> list[Example]:
    """At most so many examples with different prompts, drawn by the seed."""
    distinct = list({normalised(x.prompt): x for x in examples}.values())
    return random.Random(seed).sample(distinct, min(number, len(distinct)))


def answers(
    name: str, flag: str, prompts: Sequence[Prompt], args: Args, stream: int, stop: str
) -> tuple[list[str], list[bool]]:
    """A model's answers, which `stop` ends too, and which were cut; by `stream` two models' samples are independent."""
    model, tokenizer = open_language_model(name, flag)
    if not tokenizer.chat_template and not all(isinstance(x, str) for x in prompts):
        raise ValueError(f"{flag} {name}: its tokenizer has no chat template, which messages need; plain prompts work")
    trees = [Tree(encode_prompt(tokenizer, x), ()) for x in prompts]
    require_room(model, trees, f"{flag} {name}", args.max_new_tokens, packed=False)
    seed = int(np.random.SeedSequence((args.seed, stream)).generate_state(1, np.uint64)[0])
    generator = torch.Generator(model.device).manual_seed(seed)
    sampler = Sampler(model, tokenizer, stop, args.max_new_tokens, generator, fast_bf16())
    return complete(sampler, prompts, args.temperature, f"answers of {name}")


def draw(data: str, kind: str, flag: str, args: Args) -> list[Example]:
    """The examples to use of a data set. ValueError if its share is empty."""
    found = sample(select(read(data, kind, flag)[0], args.share), args.num_prompts, args.seed)
    if not found:
        raise ValueError(f"{flag} {data}: no prompts in --share {args.share[0]} {args.share[1]}; a wider one has some")
    return found


def compare(args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report, and a row for each prompt with its answers and verdict."""
    asked = draw(args.prompts, "prompts", "--prompts", args)
    try:
        pairs = draw(args.labels or args.prompts, "pairs", "--labels" if args.labels else "--prompts", args)
    except ValueError as error:
        need = "" if args.labels else "; a win rate comes with its judge's accuracy on human labels: --labels PAIRS"
        raise ValueError(f"{error}{need}") from None
    judging = args.judge_model or args.judge.removeprefix("llm:")
    task = tasks.make(args.judge.removeprefix("task:"), "--judge task:") if args.judge.startswith("task:") else None
    if task:
        known = {plain(prompt) for prompt in task.prompts}  # letter by letter, as the verifier looks them up
        foreign = [x.where for x in [*asked, *pairs] if plain(x.prompt) not in known]
        if foreign:
            told = f"{len(foreign)} of {len(asked) + len(pairs)} prompts are not of that task"
            raise ValueError(f"--judge {args.judge}: {told}, the first at {foreign[0]}")
    models = {name: lineage(name) for name in (args.policy, args.baseline)}
    models[judging] = ({}, set()) if task else lineage(judging)  # a verifier learned from nothing
    for runs, _ in models.values():
        require_unseen(asked, runs, f"--prompts {args.prompts}")
    require_unseen(pairs, models[judging][0], f"--labels {args.labels or args.prompts}")

    judge, length = open_judge(args, task), longer()
    accuracy, of_labels = audit(judge, pairs)  # first, as it tells whether the judge works at all
    prompts, stop = [x.prompt for x in asked], task.stop if task else ""
    ours, ours_cut = answers(args.policy, "--policy", prompts, args, 0, stop)
    theirs, theirs_cut = answers(args.baseline, "--baseline", prompts, args, 1, stop)
    columns: dict[str, Sequence[Any]] = {"prompt": prompts, "policy": ours, "baseline": theirs}
    if args.json:  # answers take long, and a judge may still fail
        write_lines(args.json.with_suffix(".jsonl"), rows_of(columns))
    verdicts = judged(judge, prompts, ours, theirs)
    by_length, of_length = length(prompts, ours, theirs), audit(length, pairs)[0]
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "win_rate": rate(verdicts.wins),
        "ties": verdicts.wins.count(0.5) / len(prompts),
        "judge": {"name": judge.name, "accuracy": accuracy, "agreement": verdicts.agreement,
                  "agreement_on_labels": of_labels.agreement},
        "longer_wins": {"win_rate": rate(by_length.wins), "accuracy": of_length},
        "policy": _summary(args.policy, ours, ours_cut),
        "baseline": _summary(args.baseline, theirs, theirs_cut),
        "unknown_training_data": sorted(set().union(*(unknown for _, unknown in models.values()))),
        "trained_with_judge": any(
            folder == run_folder(judging)
            or (folder in models[judging][0] and "aggregation" in flags)  # a reward model that the judge comes from
            or (task and flags.get("task") == judging.removeprefix("task:"))
            for folder, flags in models[args.policy][0].items()
        ),
    }  # fmt: skip
    if used := [x.usage for x in (verdicts, of_labels) if x.usage is not None]:  # none where all answers are equal
        report["judge"]["usage"] = usage = dict(sum(used, Counter()))
        if args.price:
            spent = (usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0))
            report["judge"]["cost"] = sum(tokens * price for tokens, price in zip(spent, args.price, strict=True)) / 1e6
    columns["policy_wins"] = verdicts.wins
    columns |= {"probability": verdicts.probabilities, "orders_agree": verdicts.agreed}
    return report, rows_of({name: column for name, column in columns.items() if len(column)})


def rows_of(columns: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns of N values each as N rows."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _summary(name: str, texts: Sequence[str], cut: Sequence[bool]) -> dict[str, Any]:
    return {"name": name, "mean_length": sum(map(len, texts)) / len(texts), "cut": sum(cut) / len(cut)}


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader must know to believe the win rate, or not."""
    judge, length = report["judge"], report["longer_wins"]["accuracy"].mean
    found = ["intervals: Wilson's, 95 %, over prompts, ties as half; a rate is at most as good as its judge's accuracy"]
    if judge["accuracy"].low <= max(length, 1 - length):
        found.append("this judge is not shown to tell answers apart better than their lengths do")
    shares = {"pairs of different answers": judge["agreement"], "the human ones": judge["agreement_on_labels"]}
    if told := ", ".join(f"{share:.0%} of {name}" for name, share in shares.items() if share is not None):
        found.append(f"both orders of the answers have the same verdict in {told}; the others are ties")
    if report["trained_with_judge"]:
        found.append(
            "the policy was trained with this judge, or with what it comes from: it may have learned its faults"
        )
    if usage := judge.get("usage"):
        tokens = f"{usage.get('prompt_tokens', 0):,} prompt and {usage.get('completion_tokens', 0):,} completion tokens"
        found.append(
            f"{usage['requests']:,} requests, {tokens}" + (f", cost {judge['cost']:.4f}" if "cost" in judge else "")
        )
        for name, text in (("unmetered", "say nothing of tokens"), ("unparsable", "are neither A, B nor tie")):
            if name in usage:
                found.append(f"{usage[name]:,} replies {text}")
    if report["unknown_training_data"]:
        found.append(f"training prompts unknown, so not checked: those of {', '.join(report['unknown_training_data'])}")
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """The report as two tables and its notes."""
    title = f"{report['policy']['name']} against {report['baseline']['name']} on {report['prompts']} prompts"
    pairs = report["judge"]["accuracy"].number
    table = Table("judge", "win rate", f"agrees with people, {pairs} pairs", box=box.SIMPLE_HEAD, title=title)
    for name, win, accuracy in (
        (report["judge"]["name"], report["win_rate"], report["judge"]["accuracy"]),
        ("the longer answer wins", *report["longer_wins"].values()),
    ):
        table.add_row(name, _interval(win), _interval(accuracy))
    console.print(table)
    console.print(f"ties: {report['ties']:.0%}")
    for side in ("policy", "baseline"):
        about = report[side]
        console.print(f"{side}: answers of {about['mean_length']:.0f} characters, {about['cut']:.0%} of them cut")
    for line in notes(report):
        console.print(f"- {line}")


def _interval(x: Rate) -> str:
    return f"{x.mean:.3f} ({x.low:.3f} to {x.high:.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    """The command; every expected fault ends in one line and exit status 1 (2 for flags)."""
    args = tyro.cli(Args, prog="python -m rl_lab.winrate", args=argv)
    try:
        require_valid(args)
        report, rows = compare(args)
        console = Console(width=None if Console().is_terminal else 160, highlight=False, markup=False)
        show(report, console)
        if args.json:
            flags = {name: str(x) if isinstance(x, Path) else x for name, x in dataclasses.asdict(args).items()}
            whole = {"args": flags, **_named(report), "notes": notes(report), **provenance()}
            checkpoint.replace_file(args.json, json.dumps(whole, indent=2).encode())
            write_lines(args.json.with_suffix(".jsonl"), rows)
            print(f"{args.json}; the answers are in {args.json.with_suffix('.jsonl')}")
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("interrupted") from None


def _named(report: Any) -> Any:
    """The report with rates as objects, for JSON."""
    if isinstance(report, Rate):
        return report._asdict()
    return {name: _named(x) for name, x in report.items()} if isinstance(report, dict) else report


if __name__ == "__main__":
    main()
