"""Judging runs against a reference: an equivalence test with a margin declared beforehand.

The command is `python -m rl_lab.compare`; docs/curves.md states the method. `judge` is the whole of it for one
environment and algorithm; everything else finds its inputs or prints its result.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rl_lab.curves import statistics, store
from rl_lab.curves.statistics import Floats
from rl_lab.curves.store import Run

MARGINS = Path(__file__).parent / "margins.toml"
EXIT_CODES = {"better": 0, "match": 0, "worse": 1, "underpowered": 2, "informative": 2, "no reference": 3}
BAD_INPUT = 4
SEVERITY = (1, 3, 2, 0)  # of several comparisons the first of these exit codes that occurs is the command's


@dataclass(frozen=True)
class Test:
    """The equivalence test of one statistic; scores and margin in return units."""

    statistic: str
    ours: float
    reference: float
    difference: float
    low: float
    high: float
    margin: float
    improvement: float  # probability that a run of ours beats a run of the reference
    verdict: str
    seeds_needed: int | None


@dataclass(frozen=True)
class Result:
    """What one comparison found; `verdict.json` without the arrays.

    Attributes:
        verdict: a key of EXIT_CODES.
        tests: the final score and the normalised area; empty where there are no per-seed logs.
        scores, areas: statistic of each run, by side ("ours", "reference").
        curves: (R, G) learning curves on the common grid, by side.
        start: grid point at which the reference leaves its starting level.
        notes: informative findings and what a reader has to know about the inputs.
    """

    env: str
    algo: str
    script: str
    verdict: str
    reference: str
    budget: int
    margin_reason: str
    seeds: dict[str, list[int]]
    scores: dict[str, Floats]
    areas: dict[str, Floats]
    curves: dict[str, Floats]
    start: int = 0
    tests: list[Test] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(dataclasses.replace(self, curves={}))
        del record["curves"]
        for name in ("scores", "areas"):
            record[name] = {side: [round(float(x), 4) for x in values] for side, values in record[name].items()}
        return record | {"exit_code": self.exit_code}


@dataclass(frozen=True)
class Reference:
    """What to compare with: per-seed runs, or else the mean curve of another project, or else nothing."""

    name: str
    runs: list[Run] = field(default_factory=list)
    curve: Floats | None = None  # (K, 2) step, return
    provenance: dict[str, Any] = field(default_factory=dict)


def declared_margin(env: str, margin: str | None) -> tuple[str | float, str | float, str]:
    """Margins of score and area and their reason: those given, or the declared ones of margins.toml.

    Raises:
        ValueError: if none is given and none declared.
    """
    if margin is not None:
        return margin, margin, "given on the command line"
    margins = tomllib.loads(MARGINS.read_text())
    if env not in margins:
        raise ValueError(f"no margin is declared for {env}: give --margin 20% or --margin 25, or add it to {MARGINS}")
    return margins[env]["score"], margins[env]["area"], margins[env]["reason"]


def in_units(margin: str | float, reference: Floats) -> float:
    """A margin in return units; "20%" is a share of the absolute IQM of the reference's (R,) scores."""
    text = str(margin)
    try:
        size = float(text.removesuffix("%"))
    except ValueError:
        size = float("nan")
    if not 0 < size < float("inf"):
        raise ValueError(f"--margin {text}: give a share of the reference such as 20%, or return units such as 25")
    return size / 100 * abs(float(statistics.iqm(reference))) if text.endswith("%") else size


def common_budget(runs: Sequence[Run]) -> int:
    """The budget which all runs share.

    Raises:
        ValueError: if budgets differ, a run was stopped before its budget, or a seed occurs twice on a side.
    """
    budgets = {run.total_timesteps for run in runs if run.total_timesteps}
    if len(budgets) > 1:
        raise ValueError(f"the budgets differ, {sorted(budgets)} steps: compare runs with equal --total-timesteps")
    budget = budgets.pop() if budgets else int(max(run.steps[-1] for run in runs))
    for run in runs:
        if not store.FINISHED * budget <= run.steps[-1] <= budget:
            raise ValueError(
                f"{run.path} seed {run.seed}: its last episode ends at step {run.steps[-1]:.0f} of {budget}: finish it "
                "with --resume, or compare runs of equal budget"
            )
    return budget


def distinct_seeds(runs: Sequence[Run]) -> None:
    """Raises ValueError if two runs have the same seed: they are no independent samples."""
    for seed, count in Counter(run.seed for run in runs).items():
        if count > 1:
            paths = ", ".join(str(run.path) for run in runs if run.seed == seed)
            raise ValueError(f"seed {seed} occurs {count} times, which is no independent sample: {paths}")


def judge(ours: Sequence[Run], reference: Reference, margin: str | None = None, seed: int = 0) -> Result:
    """Compare runs of one environment and algorithm with a reference.

    Args:
        ours: one run a seed.
        reference: from `find_reference`.
        margin: overrides the declared one, for both statistics.
        seed: of the bootstrap.
    Raises:
        ValueError: if the inputs cannot be compared.
    """
    first, theirs = ours[0], reference.runs
    sides = {"ours": list(ours), "reference": theirs}
    for runs in sides.values():
        distinct_seeds(runs)
    budget = common_budget([*ours, *theirs])
    scores = {k: np.array([statistics.final_score(r.returns) for r in runs]) for k, runs in sides.items() if runs}
    curves = {
        k: np.stack([statistics.on_grid(r.steps, r.returns, budget) for r in runs]) for k, runs in sides.items() if runs
    }
    base = Result(
        first.env,
        first.algo,
        first.script,
        "no reference",
        reference.name,
        budget,
        "",
        {k: [run.seed for run in runs] for k, runs in sides.items()},
        scores,
        {k: statistics.normalised_area(curve) for k, curve in curves.items()},
        curves,
        notes=_notes(ours) + _published(first.script, first.env, scores["ours"], budget),
        provenance=reference.provenance,
        versions={"ours": first.config.get("versions", {}), "reference": reference.provenance.get("versions", {})},
    )
    if not theirs:
        if reference.curve is not None:
            base.notes.extend(_curve_findings(curves["ours"], reference.curve, budget))
        known = reference.curve is not None or any(note.startswith("published") for note in base.notes)
        return dataclasses.replace(base, verdict="informative" if known else "no reference")

    score_margin, area_margin, reason = declared_margin(first.env, margin)
    units = in_units(score_margin, scores["reference"])
    start = statistics.departure(statistics.iqm(curves["reference"], axis=0), units)
    if start == statistics.GRID:
        base.notes.append("uninformative: the reference never leaves its starting level, so equal returns show nothing")
        return dataclasses.replace(base, verdict="informative", start=start, margin_reason=reason)
    if start > 1:
        base.notes.append(
            f"uninformative up to step {start * budget // statistics.GRID:,}, where the reference has not left its "
            "starting level: the area counts from there"
        )
    areas = {k: statistics.normalised_area(curve, start) for k, curve in curves.items()}
    generator = np.random.default_rng(seed)
    tests = [
        equivalence("last-100 score", scores["ours"], scores["reference"], units, generator),
        equivalence(
            "normalised area", areas["ours"], areas["reference"], in_units(area_margin, areas["reference"]), generator
        ),
    ]
    verdict = max((test.verdict for test in tests), key=statistics.VERDICTS.index)
    return dataclasses.replace(base, verdict=verdict, tests=tests, areas=areas, start=start, margin_reason=reason)


def equivalence(name: str, ours: Floats, reference: Floats, margin: float, generator: np.random.Generator) -> Test:
    """The equivalence test of (R,) against (R',) scores with a margin in return units."""
    difference, low, high = statistics.difference_interval(ours, reference, generator)
    verdict = statistics.VERDICTS[int(statistics.decide(low, high, margin))]
    return Test(
        name,
        float(statistics.iqm(ours)),
        float(statistics.iqm(reference)),
        float(difference),
        float(low),
        float(high),
        margin,
        statistics.probability_of_improvement(ours, reference),
        verdict,
        statistics.seeds_needed(ours, reference, margin, generator) if verdict == "underpowered" else None,
    )


def find_reference(where: str, script: str, env: str) -> Reference:
    """The reference for CleanRL's `script` on `env`: a set of the package ("cleanrl"), or runs or a curve at a path.

    Raises:
        ValueError: if the reference is of another version of the environment, or ambiguous.
    """
    path = store.REFERENCE if where == "cleanrl" else Path(where)
    curve = None if path.is_dir() else _read_curve(path, script, env)
    if curve is not None:
        return Reference(f"the curve in {path}", curve=curve)
    if where == "cleanrl":
        names = [name.name.removesuffix(".csv.gz").split("__", 1) for name in path.glob("*__*.csv.gz")]
        envs = [other for name, other in names if name == script]
        _refuse_other_version(env, envs)
        if env not in envs:
            return Reference("cleanrl")
        runs = store.load(path / f"{script}__{env}.csv.gz")
    else:
        runs = store.load(path)
        _refuse_other_version(env, [run.env for run in runs])
        runs = [run for run in runs if run.env == env]
        scripts = {run.script for run in runs}
        if len(scripts) > 1 and script not in scripts:
            raise ValueError(f"{path} holds {sorted(scripts)} on {env} and none of {script}: name the one to compare with")
        runs = [run for run in runs if len(scripts) == 1 or run.script == script]
    origin = store.provenance(runs[0].path) or {"versions": runs[0].config.get("versions", {})} if runs else {}
    return Reference(f"{where}: {runs[0].script} on {env}" if runs else where, runs, provenance=origin)


def compare(paths: Sequence[Path], reference: str = "cleanrl", margin: str | None = None) -> list[Result]:
    """Judge every (environment, algorithm) found at `paths` and write verdict.json into the run folders of ours."""
    groups: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for path in paths:
        for run in store.load(path):
            groups[run.env, run.algo, run.script].append(run)
    results = []
    for (env, _, script), runs in sorted(groups.items()):
        results.append(judge(runs, find_reference(reference, script, env), margin))
        for run in runs:
            if run.config:
                text = json.dumps(results[-1].to_json(), indent=1)
                (run.path / "verdict.json").write_text(text + "\n")
    return results


def print_result(result: Result, console: Console) -> None:
    """One comparison as a table with its notes."""
    console.print(f"\n[bold]{result.algo} on {result.env}[/] against {escape(result.reference)}, {result.budget:,} steps")
    counts = {side: len(seeds) for side, seeds in result.seeds.items()}
    if result.tests:
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("IQM of", f"ours ({counts['ours']} seeds)", f"reference ({counts['reference']} seeds)",
                      "difference", "90 % interval", "margin", "P(ours better)", "verdict"):  # fmt: skip
            table.add_column(title, justify="left" if title in ("IQM of", "verdict") else "right")
        for test in result.tests:
            numbers = (f"{test.ours:.1f}", f"{test.reference:.1f}", f"{test.difference:+.1f}",
                       f"{test.low:+.1f} to {test.high:+.1f}", f"±{test.margin:.1f}", f"{test.improvement:.2f}")  # fmt: skip
            table.add_row(test.statistic, *numbers, test.verdict)
        console.print(table)
        console.print(f"Margin: {escape(result.margin_reason)}")
    for line in power_lines(result) + result.notes + version_lines(result):
        console.print(f"- {line}", markup=False)
    colour = {0: "green", 1: "red"}.get(result.exit_code, "yellow")
    console.print(f"Verdict: [bold {colour}]{result.verdict}[/]")


def power_lines(result: Result) -> list[str]:
    """What would decide an underpowered test."""
    return [
        f"{test.statistic}: about {test.seeds_needed} seeds on either side would decide (80 % chance of `match` if "
        "both are equal and scatter as seen)"
        if test.seeds_needed
        else f"{test.statistic}: no number of seeds can be named, a side has one run or scatters beyond the margin"
        for test in result.tests
        if test.verdict == "underpowered"
    ]


def version_lines(result: Result) -> list[str]:
    """The packages whose version differs between the two sides."""
    ours, theirs = result.versions["ours"], result.versions["reference"]
    changed = [f"{name} {ours[name]} (reference {theirs[name]})" for name in theirs if ours.get(name, theirs[name]) != theirs[name]]
    return [f"versions differ: {', '.join(changed)}"] if changed else []


def list_references(console: Console) -> None:
    """A table of all there is to compare with."""
    table = Table("script", "environment", "seeds", "steps", "kind", "source", box=box.SIMPLE_HEAD)
    for path in sorted(store.REFERENCE.glob("*__*.csv.gz")):
        note = store.provenance(path)
        source = f"{note['repository'].removeprefix('https://github.com/')}@{note['commit'][:8]}"
        table.add_row(note["script"], note["env"], str(len(note["seeds"])), f"{note['total_timesteps']:,}", "logs: decide", source)
    with (store.REFERENCE / "published.csv").open() as file:
        for row in csv.DictReader(file):
            steps = f"{int(row['total_timesteps']):,}" if row["total_timesteps"] else "?"
            table.add_row(row["script"], row["env"], row["seeds"], steps, f"{row['mean']} ± {row['std']}: informs", row["source"])
    console.print(table)


def _refuse_other_version(env: str, known: list[str]) -> None:
    others = store.other_versions(env, iter(known))
    if others and env not in known:
        raise ValueError(f"the runs are on {env}, the reference is on {', '.join(others)}: different tasks, train with --env {others[0]}")


def _notes(ours: Sequence[Run]) -> list[str]:
    """What a reader has to know about runs of ours: other semantics than the reference's, settings that differ."""
    notes = []
    if any(run.config.get("semantics") == "correct" for run in ours):
        notes.append("ours ran with --semantics correct, the reference treats truncation as CleanRL does")
    settings: dict[str, set[str]] = defaultdict(set)
    for run in ours:
        for name, value in run.config.get("args", {}).items():
            settings[name].add(repr(value))
    differing = sorted(name for name, values in settings.items() if len(values) > 1 and name != "seed")
    return [*notes, f"our runs differ among themselves in {', '.join(differing)}"] if differing else notes


def _published(script: str, env: str, scores: Floats, budget: int) -> list[str]:
    """Our final score beside CleanRL's documented one, in its convention: mean and ddof-0 deviation over seeds."""
    return [
        f"published, informs only: {script} {float(row['mean']):.1f} ± {float(row['std'] or 'nan'):.1f} ({row['seeds']} "
        f"seeds, {row['total_timesteps'] or '?'} steps, {row['metric']}); ours {scores.mean():.1f} ± {scores.std():.1f} "
        f"({len(scores)} seeds, {budget} steps), difference {scores.mean() - float(row['mean']):+.1f} "
        f"[{row['source']}@{row['commit'][:8]}]"
        for row in store.published(script, env)
    ]


def _read_curve(path: Path, script: str, env: str) -> Floats | None:
    """(K, 2) mean curve from a CSV with columns algo, env_id, global_step, episodic_return; None for other files."""
    if not path.is_file() or path.suffix != ".csv":
        return None
    with path.open() as file:
        reader = csv.DictReader(file)
        if not {"algo", "env_id", "global_step", "episodic_return"} <= set(reader.fieldnames or ()):
            return None
        rows = [row for row in reader if row["algo"] == script]
    _refuse_other_version(env, [row["env_id"] for row in rows])
    points = [(float(row["global_step"]), float(row["episodic_return"])) for row in rows if row["env_id"] == env]
    return np.array(sorted(points)) if points else None


def _curve_findings(ours: Floats, curve: Floats, budget: int) -> list[str]:
    """End point, and the steps at which a quarter, half and three quarters of the reference's climb are reached."""
    ours, last = statistics.iqm(ours, axis=0), curve[-1]
    at = statistics.on_grid(np.arange(budget), np.arange(budget, dtype=np.float64), budget, len(ours))
    found = [f"curve's end: {last[1]:.1f} at step {last[0]:,.0f}; ours there {np.interp(last[0], at, ours):.1f} (IQM)"]
    start = curve[0, 1]
    for share in (0.25, 0.5, 0.75):
        level = start + share * (last[1] - start)
        steps = [_crossing(x, y, start, level) for x, y in ((curve[:, 0], curve[:, 1]), (at, ours))]
        told = ["never" if step is None else f"at step {step:,.0f}" for step in steps]
        found.append(f"{share:.0%} of the curve's climb, return {level:.1f}: reference {told[0]}, ours {told[1]}")
    return found


def _crossing(steps: Floats, returns: Floats, start: float, level: float) -> float | None:
    beyond = np.flatnonzero((returns - level) * np.sign(level - start) >= 0)
    return float(steps[beyond[0]]) if len(beyond) else None


@dataclass(frozen=True)
class Args:
    """Judge training runs against a reference; exit code 0 match or better, 1 worse, 2 underpowered or informative,
    3 no reference, 4 input refused."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders of one or several environments, CleanRL's run folders, CSV files, or folders of these."""
    reference: str = "cleanrl"
    """The sets of the package ("cleanrl"), or a path to runs or to a CSV with a mean curve."""
    margin: str | None = None
    """Instead of the declared margin: a share of the reference such as 20%, or return units such as 25."""
    report: Path | None = None
    """Write a self-contained HTML report there, with a PNG of the curves beside it."""
    list: bool = False
    """Show what there is to compare with."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    try:
        args = tyro.cli(Args, prog="python -m rl_lab.compare", args=argv)
        if args.list:
            list_references(console)
            return 0
        if not args.runs:
            raise ValueError("no run given: python -m rl_lab.compare RUN... or --list")
        results = compare(args.runs, args.reference, args.margin)
        for result in results:
            print_result(result, console)
        if args.report:
            from rl_lab.curves.report import write_report  # imports matplotlib, which takes a second

            console.print(f"\nReport: {write_report(results, args.report)}")
    except ValueError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"compare: {error}", markup=False)
        return BAD_INPUT
    except SystemExit as stop:  # 2, argparse's code for a bad command line, means `underpowered` here
        return BAD_INPUT if stop.code else 0
    codes = {result.exit_code for result in results}
    return next(code for code in SEVERITY if code in codes)
