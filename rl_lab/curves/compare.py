"""Judging runs against a reference: an equivalence test with a margin declared beforehand.

The command is `python -m rl_lab.compare`; docs/curves.md states the method. `judge` is the whole of it for one
environment and algorithm; the rest finds its inputs and puts findings into words.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shlex
import tomllib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rl_lab.curves import statistics, store
from rl_lab.curves.statistics import Floats
from rl_lab.curves.store import Run

MARGINS = Path(__file__).parent / "margins.toml"
# Flags which say where, how fast and for how long something is learned, or are judged apart.
BOOKKEEPING = {
    f"--{name}"
    for name in ("env", "seed", "num-seeds", "total-timesteps", "stop-at", "until-return", "resume", "runs-dir",
                 "device", "torch-threads", "env-threads", "backend", "compile", "no-compile", "log-every",
                 "checkpoint-every", "eval-every", "eval-episodes", "replay-folder", "dataset", "scores", "semantics")
}  # fmt: skip
EXIT_CODES = {"better": 0, "match": 0, "worse": 1, "underpowered": 2, "informative": 2, "no reference": 3}


@dataclass(frozen=True)
class Equivalence:
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
        budget, whole: steps up to which the finding holds, and of the runs' whole budget.
        unit: of a step.
        tests: the final score and the normalised area; empty where there are no per-seed logs.
        scores, areas: statistic of each run, by side ("ours", "reference").
        curves: (R, G) learning curves on the common grid, by side.
        start: grid point at which the reference leaves its starting level, on data that of the first evaluation.
        notes: informative findings and what a reader has to know about the inputs.
    """

    env: str
    algo: str
    script: str
    verdict: str
    reference: str
    budget: int
    whole: int
    seeds: dict[str, list[int]]
    scores: dict[str, Floats]
    areas: dict[str, Floats]
    curves: dict[str, Floats]
    unit: str = "environment steps"
    start: int = 0
    margin_reason: str = ""
    tests: list[Equivalence] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """What a script needs: 0 match or better, 1 worse, 2 nothing decided, 3 no reference."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """Everything but the curves; JSON has no infinity, an unbounded interval ends in null."""
        record = dataclasses.asdict(dataclasses.replace(self, curves={})) | {"exit_code": self.exit_code}
        for name in ("scores", "areas"):
            record[name] = {side: [round(float(x), 4) for x in values] for side, values in record[name].items()}
        for test in record["tests"]:
            test.update({end: None for end in ("low", "high") if not math.isfinite(test[end])})
        del record["curves"]
        return json.dumps(record, indent=1, allow_nan=False) + "\n"


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
    if text.endswith("%"):
        size *= abs(float(statistics.iqm(reference))) / 100
        if not size:
            raise ValueError(f"--margin {text}: the reference's IQM is 0, give return units such as 25")
    return size


def common_budget(runs: Sequence[Run]) -> int:
    """The budget which all runs share, in env steps; where no file tells it, the last step at which an episode ended.

    Raises:
        ValueError: if budgets differ.
    """
    budgets = {run.total_timesteps: run.path for run in runs if run.total_timesteps}
    if len(budgets) > 1:
        told = ", ".join(f"{budget:,} steps of {path}" for budget, path in sorted(budgets.items()))
        raise ValueError(
            f"the budgets differ, {told}: compare runs with equal --total-timesteps; one that was stopped, as by "
            "--stop-at, is compared as far as it was run"
        )
    return next(iter(budgets), None) or int(max(run.steps[-1] for run in runs))


def require_finished(runs: Sequence[Run], budget: int) -> None:
    """Raises ValueError if a run was stopped before its budget, or went beyond it."""
    for run in runs:
        if run.steps[-1] > budget or not _finished(run, budget):
            raise ValueError(
                f"{run.path} seed {run.seed}: its last episode ends at step {run.steps[-1]:.0f} of {budget}: finish it "
                "with --resume, or compare runs of equal budget"
            )


def reached(runs: Sequence[Run], budget: int) -> int:
    """The env step up to which every run was run: the budget, if all are finished."""
    return budget if all(_finished(run, budget) for run in runs) else int(min(run.steps[-1] for run in runs))


def _finished(run: Run, budget: int) -> bool:
    return run.finished or bool(run.steps[-1] >= store.FINISHED * budget)


def cut(run: Run, end: int) -> Run:
    """The run's episodes up to step `end`."""
    kept = run.steps <= end
    return dataclasses.replace(run, steps=run.steps[kept], returns=run.returns[kept])


def distinct_seeds(runs: Sequence[Run]) -> None:
    """Raises ValueError if two runs have the same seed: they are no independent samples."""
    for seed, count in Counter(run.seed for run in runs).items():
        if count > 1:
            paths = ", ".join(str(run.path) for run in runs if run.seed == seed)
            raise ValueError(f"seed {seed} occurs {count} times, which is no independent sample: {paths}")


def judge(ours: Sequence[Run], reference: Reference, margin: str | None = None, seed: int = 0) -> Result:
    """Compare runs of one environment and algorithm with a reference.

    Runs that were stopped early are compared as far as all of them were run, and the finding is `informative`.

    Args:
        ours: one run a seed.
        reference: from `find_reference`.
        margin: overrides the declared one, for both statistics.
        seed: of the bootstrap.
    Raises:
        ValueError: if the inputs cannot be compared.
    """
    first, whole = ours[0], common_budget([*ours, *reference.runs])
    budget = reached(ours, whole)
    require_finished([*ours, *reference.runs] if budget == whole else reference.runs, whole)
    # In the order of seeds, as the bootstrap draws by place.
    ours, theirs = (
        [cut(run, budget) for run in sorted(runs, key=lambda run: run.seed)] for runs in (ours, reference.runs)
    )
    sides = {"ours": ours, "reference": theirs}
    for runs in sides.values():
        distinct_seeds(runs)
    scores, curves = {}, {}
    for side, runs in sides.items():
        if runs:
            scores[side] = np.array([_score(run) for run in runs])
            curves[side] = np.stack([statistics.on_grid(run.steps, run.returns, budget) for run in runs])
    offline = "data" in {**first.config, **store.provenance(first.path)}
    start = 0
    if offline:  # the first evaluation is of what has learned already, not a starting level; before it nothing is known
        start = min(statistics.GRID - 1, int(max(run.steps[0] for run in ours + theirs) * statistics.GRID / budget))
    base = Result(
        env=first.env,
        algo=first.algo,
        script=first.script,
        verdict="no reference",
        reference=reference.name,
        budget=budget,
        whole=whole,
        unit="gradient steps" if offline else "environment steps",
        start=start,
        seeds={side: [run.seed for run in runs] for side, runs in sides.items()},
        scores=scores,
        areas={side: statistics.normalised_area(curve, start) for side, curve in curves.items()},
        curves=curves,
        notes=_notes(ours, reference) + _published(first.script, first.env, scores["ours"], budget),
        provenance=reference.provenance,
        versions={"ours": first.config.get("versions", {}), "reference": reference.provenance.get("versions", {})},
    )
    if budget < whole:
        base.notes.append(f"holds up to step {budget:,} of {whole:,}, as far as all of our runs were run")
        if theirs:
            mine, other = (float(statistics.iqm(scores[side])) for side in sides)
            base.notes.append(f"IQM of the mean of the last 100 episodes there: ours {mine:.1f}, reference {other:.1f}")
            return dataclasses.replace(base, verdict="informative")
    if not theirs:
        if reference.curve is not None:
            base.notes.extend(_curve_findings(curves["ours"], reference.curve, budget))
        known = reference.curve is not None or any(note.startswith("published") for note in base.notes)
        if offline and not known:
            base.notes.append("CleanRL learns from no data sets: --reference RUN_FOLDER, such as one of rl_lab.bc")
        return dataclasses.replace(base, verdict="informative" if known else "no reference")

    score_margin, area_margin, reason = declared_margin(first.env, margin)
    units = in_units(score_margin, scores["reference"])
    if not offline:
        start = statistics.departure(statistics.iqm(curves["reference"], axis=0), units)
    if start == statistics.GRID:
        base.notes.append("uninformative: the reference never leaves its starting level, so equal returns show nothing")
        return dataclasses.replace(base, verdict="informative", start=start, margin_reason=reason)
    if start > 1 and not offline:
        base.notes.append(
            f"uninformative up to step {start * budget // statistics.GRID:,}, where the reference has not left its "
            "starting level: the area counts from there"
        )
    areas = {side: statistics.normalised_area(curve, start) for side, curve in curves.items()}
    area_units = in_units(area_margin, areas["reference"])
    generator = np.random.default_rng(seed)
    tests = [
        equivalence("last-100 score", scores["ours"], scores["reference"], units, generator),
        equivalence("normalised area", areas["ours"], areas["reference"], area_units, generator),
    ]
    verdict = max((test.verdict for test in tests), key=statistics.VERDICTS.index)
    return dataclasses.replace(base, verdict=verdict, tests=tests, areas=areas, start=start, margin_reason=reason)


def _score(run: Run) -> float:
    try:
        return statistics.final_score(run.returns)
    except ValueError as error:
        raise ValueError(f"{run.path} seed {run.seed}: {error}") from None


def equivalence(
    name: str, ours: Floats, reference: Floats, margin: float, generator: np.random.Generator
) -> Equivalence:
    """The equivalence test of (R,) against (R',) scores with a margin in return units."""
    difference, low, high = statistics.difference_interval(ours, reference, generator)
    verdict = statistics.VERDICTS[int(statistics.decide(low, high, margin))]
    return Equivalence(
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
            raise ValueError(f"{path} holds {sorted(scripts)} on {env}, none of them {script}: name one run or file")
        runs = [run for run in runs if len(scripts) == 1 or run.script == script]
    origin = store.provenance(runs[0].path) or {"versions": runs[0].config.get("versions", {})} if runs else {}
    return Reference(f"{where}: {runs[0].script} on {env}" if runs else where, runs, provenance=origin)


def grouped(paths: Sequence[Path]) -> list[list[Run]]:
    """All runs found at `paths`, those of an environment and algorithm together."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for path in paths:
        for run in store.load(path):
            groups[run.env, run.algo].append(run)
    return [runs for _, runs in sorted(groups.items())]


def compare(runs: Sequence[Run], reference: str = "cleanrl", margin: str | None = None) -> Result:
    """Judge runs of one environment and algorithm, as `judge`, against what `find_reference` finds."""
    return judge(runs, find_reference(reference, runs[0].script, runs[0].env), margin)


def write_verdict(runs: Sequence[Run], result: Result) -> None:
    """Write verdict.json into the run folders of ours."""
    for run in runs:
        if run.config:
            (run.path / "verdict.json").write_text(result.to_json())


def seeds_of(number: int | str) -> str:
    """How many, as in 1 seed and 2 seeds."""
    return f"{number} seed" + "s" * (str(number) != "1")


def seeds_lines(result: Result) -> list[str]:
    """What would decide an underpowered test."""
    lines = []
    for test in result.tests:
        if test.seeds_needed:
            line = "seeds on either side would decide (an 80 % chance of match, if both are equal and scatter as seen)"
            lines.append(f"{test.statistic}: about {test.seeds_needed} {line}")
        elif test.verdict == "underpowered":
            lines.append(
                f"{test.statistic}: no number of seeds can be named, one run or a scatter far beyond the margin"
            )
    return lines


def version_lines(result: Result) -> list[str]:
    """The packages whose version differs between the two sides."""
    ours, theirs = result.versions["ours"], result.versions["reference"]
    pairs = [(name, ours[name], theirs[name]) for name in theirs if name in ours and ours[name] != theirs[name]]
    changed = ", ".join(f"{name} {mine} (reference {other})" for name, mine, other in pairs)
    return [f"versions differ: {changed}"] if changed else []


def _refuse_other_version(env: str, known: list[str]) -> None:
    others = store.other_versions(env, known)
    if others and env not in known:
        names = ", ".join(others)
        raise ValueError(
            f"the runs are on {env}, the reference is on {names}, a different task: train with --env {names}"
        )


def _notes(ours: Sequence[Run], reference: Reference) -> list[str]:
    """What a reader has to know about the inputs."""
    notes = []
    same = [run.seed for run in ours if any(_equal(run, other) for other in reference.runs)]
    if same:
        notes.append(f"no independent evidence: our seeds {same} are the reference's own runs, episode by episode")
    theirs = {run.config.get("semantics") for run in reference.runs} | {reference.provenance.get("semantics")}
    if "correct" not in theirs and any(run.config.get("semantics") == "correct" for run in ours):
        notes.append("ours ran with --semantics correct, while CleanRL takes truncation for termination")
    settings: dict[str, set[str]] = defaultdict(set)
    for run in ours:
        for name, value in run.config.get("args", {}).items():
            settings[name].add(repr(value))
    differing = sorted(name for name, values in settings.items() if len(values) > 1 and name != "seed")
    if differing:
        notes.append(f"our runs differ among themselves in {', '.join(differing)}")
    own = all(run.config for run in reference.runs) and reference.runs
    if (flags := flags_of(ours[0].config.get("command", ""))) and not own:
        notes.append(f"ours were trained with {flags}, which the reference may not have had")
    return notes


def flags_of(command: str) -> str:
    """The flags of a training command which say what is learned, as they were given."""
    found, keep = [], False
    for word in shlex.split(command):
        if word.startswith("--"):
            keep = word.partition("=")[0] not in BOOKKEEPING
        if keep:
            found.append(word)
    return shlex.join(found)


def _equal(run: Run, other: Run) -> bool:
    return np.array_equal(run.steps, other.steps) and np.array_equal(run.returns, other.returns)


def _published(script: str, env: str, scores: Floats, budget: int) -> list[str]:
    """Our final score beside CleanRL's documented one, in its convention: mean and ddof-0 deviation over seeds."""
    notes = []
    for row in store.published(script, env):
        mean, deviation = float(row["mean"]), float(row["std"] or "nan")
        kind = "last 100 episodes" if "last100" in row["metric"] else "final return as documented"
        steps, source = row["total_timesteps"] or "unknown", f"{row['source']} at {row['commit'][:8]}"
        notes.append(
            f"published, informs only: {mean:.1f} ± {deviation:.1f} ({kind}, {seeds_of(row['seeds'])}, {steps} steps, "
            f"{source}); ours {scores.mean():.1f} ± {scores.std():.1f} ({seeds_of(len(scores))}, {budget} steps)"
            + (f", difference {scores.mean() - mean:+.1f}" if steps in (str(budget), "unknown") else "")
        )
    return notes


def _read_curve(path: Path, script: str, env: str) -> Floats | None:
    """(K, 2) mean curve from a CSV with columns algo, env_id, global_step, and episodic_return or return_mean.

    None for other files. `algo` is CleanRL's script, or without what its name says of the environment.

    Raises:
        ValueError: if it has no curve of this algorithm on this environment.
    """
    if not path.is_file() or path.suffix != ".csv":
        return None
    with path.open() as file:
        reader = csv.DictReader(file)
        names = {name.strip() for name in reader.fieldnames or ()}
        column = next((name for name in ("episodic_return", "return_mean") if name in names), "")
        if not column or not {"algo", "env_id", "global_step"} <= names:
            return None
        table = list(reader)
    known = script, script.replace("_atari", "").removesuffix("_continuous_action")
    rows = next((found for name in known if (found := [row for row in table if row["algo"].lower() == name])), [])
    _refuse_other_version(env, [row["env_id"] for row in rows])
    try:
        points = [(float(row["global_step"]), float(row[column])) for row in rows if row["env_id"] == env]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error} in global_step or {column}") from None
    if not points:
        there = ", ".join(sorted({f"{row['algo']} on {row['env_id']}" for row in rows or table}))
        raise ValueError(f"{path} has no curve of {script} on {env}; it has {there}")
    return np.array(sorted(points))


def _curve_findings(ours: Floats, curve: Floats, budget: int) -> list[str]:
    """End point, and the steps at which a quarter, half and three quarters of the reference's climb are reached.

    Of a curve that goes on beyond `budget`, the part until there.
    """
    curve = curve[: max(1, int((curve[:, 0] <= budget).sum()))]
    ours, last = statistics.iqm(ours, axis=0), curve[-1]
    at = (np.arange(len(ours)) + 0.5) * budget / len(ours)
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
