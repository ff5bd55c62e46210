"""Keeps compact results of training runs and makes the table and the plot that the README shows of them.

python -m rl_lab.curves.summary ppo runs/ppo/CartPole-v1__*      keep the results of these runs, then as below
python -m rl_lab.curves.summary ppo                              judge all results kept, make table and plot

runs/results/{algo}/{script}__{env}.csv.gz, .json    episodes of all seeds and how they came about, in the form of
                                                     a reference set: `rl_lab.compare` reads them too
runs/results/{algo}.png                              learning curves over the reference's
README.md                                            the table, between <!-- results:{algo} --> and its end
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_lab.curves import plot, statistics, store
from rl_lab.curves.compare import Equivalence, Result, common_budget, find_reference, judge
from rl_lab.curves.statistics import Floats, Interval
from rl_lab.curves.store import Run

LEVEL = 0.95  # of the intervals shown; the verdicts rest on the harness's own, of 90 %
RESULTS = Path("runs/results")
COLUMNS = 3  # of the plot


def keep(runs: Sequence[Run], target: Path) -> Path:
    """Write the episodes of all seeds of one training process, and what it takes to do it again.

    Args:
        runs: run folders of this project, every seed that was trained together.
        target: folder of the results of this algorithm.
    Returns:
        the CSV written; equal input gives equal bytes.
    Raises:
        ValueError: if a seed is missing or foreign.
    """
    first = min(runs, key=lambda run: run.seed)
    trained, given = first.config.get("group", []), [run.path.resolve().name for run in runs]
    if sorted(trained) != sorted(given):
        raise ValueError(
            f"{first.path} was trained with {len(trained)} seeds in all, of which "
            f"{len(set(trained) & set(given))} are among the {len(given)} runs given: give all of them and no others"
        )
    note = {"script": first.script, "env": first.env, "algo": first.algo, "seeds": first.config["seeds"]}
    note |= {"total_timesteps": common_budget(runs), "semantics": first.config["semantics"]}
    note["finished"] = all(run.finished for run in runs)
    # The folder as it is named here, not as it lay on the machine that trained.
    note["command"] = _in_folder(first.config["command"], str(first.path.parent))
    origin = ("versions", "git_commit", "hardware", "data")  # the last of runs that learned from a data set
    note |= {name: first.config[name] for name in origin if name in first.config}
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{first.script}__{re.sub('[/:]', '-', first.env)}.csv.gz"  # as run folders are named
    store.write_set(path, note, {run.seed: (run.steps, run.returns) for run in sorted(runs, key=lambda run: run.seed)})
    return path


def _in_folder(command: str, folder: str) -> str:
    """A training command with another --runs-dir, where it has one."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        if word.startswith("--runs-dir="):
            words[i] = f"--runs-dir={folder}"
        elif word == "--runs-dir":
            words[i + 1 : i + 2] = [folder]
    return shlex.join(words)


def note_of(path: Path) -> dict[str, Any]:
    """How the results kept in `path` came about. ValueError if its JSON file is gone."""
    if note := store.provenance(path):
        return note
    raise ValueError(f"{path} lies without the JSON file kept beside it: put that back, or keep the runs anew")


def judge_all(folder: Path) -> list[Result]:
    """Every result kept in a folder against CleanRL's."""
    results = []
    for path in sorted(folder.glob("*__*.csv.gz")):
        note = note_of(path)
        runs = [dataclasses.replace(run, config=note) for run in store.load(path)]
        results.append(judge(runs, find_reference("cleanrl", note["script"], note["env"])))
    return results


def interval(scores: Floats) -> Interval:
    """IQM of (..., R) scores with its interval at LEVEL, as the harness's are; one run is its own."""
    if scores.shape[-1] == 1:
        return Interval(scores[..., 0], scores[..., 0], scores[..., 0])
    return statistics.iqm_interval(scores, np.random.default_rng(0), LEVEL)


def table(results: Sequence[Result]) -> str:
    """Markdown: a row for each result. How to read them stands in the README."""
    header = ["environment", "seeds", "ours, IQM [95 %]", "ours, mean ± std", "CleanRL measured, IQM [95 %]",
              "CleanRL published, mean ± std", "score", "area"]  # fmt: skip
    rows = [header, ["---"] * 2 + ["---:"] * 4 + ["---"] * 2]
    for result in results:
        ours, seeds = result.scores["ours"], f"{len(result.seeds['ours'])}"
        measured, published, score, area = "–", "–", result.verdict, "–"
        if result.tests:
            seeds += f" : {len(result.seeds['reference'])}"
            source = f"rl_lab/curves/reference/{result.script}__{result.env}.json"
            measured = f"[{_interval(result.scores['reference'])}]({source})"
            score, area = map(_verdict, result.tests)
        whole = result.whole
        for row in store.published(result.script, result.env):
            whole = max(whole, int(row["total_timesteps"] or 0))
            document, _, line = row["source"].partition(":")
            source = f"https://github.com/vwxyzjn/cleanrl/blob/{row['commit']}/{document}?plain=1#L{line}"
            published = f"[{_number(float(row['mean']))} ± {_number(float(row['std']))}]({source})"
        mean = f"{_number(ours.mean())} ± {_number(ours.std())}" if len(ours) > 1 else _number(ours.mean())
        stopped = f" at {result.budget:,} of {whole:,} steps" if result.budget < whole else ""
        rows.append([result.env + stopped, seeds, _interval(ours), mean, measured, published, score, area])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def insert(readme: Path, algo: str, text: str) -> None:
    """Put `text` between the markers of `algo` in a Markdown file; where it has none, say so.

    Raises:
        ValueError: if they are not there once each and in order.
    """
    begin, end = f"<!-- results:{algo} -->\n", f"<!-- /results:{algo} -->\n"
    head, *rest = readme.read_text(encoding="utf-8").split(begin)
    if not rest and end not in head:
        print(f"{readme} has no place for this table: the lines {begin.strip()} and {end.strip()}", file=sys.stderr)
        return
    if len(rest) != 1 or rest[0].count(end) != 1:
        raise ValueError(f"{readme} needs the lines {begin.strip()} and {end.strip()} once each, the table between")
    store.replace(readme, (head + begin + text + "\n" + end + rest[0].split(end)[1]).encode())


def draw(results: Sequence[Result]) -> Figure:
    """Small multiples: ours over the reference's band, or over the published figure where no runs were measured."""
    columns = min(COLUMNS, len(results))
    rows = math.ceil(len(results) / columns)
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(max(3.5 * columns, 7.0), 0.5 + 2.55 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        handles: dict[str, Artist] = {}
        for axes, result in zip(panels, results, strict=False):
            _panel(axes, result)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        for axes in panels[len(results) :]:
            axes.remove()
        figure.supxlabel("environment steps", fontsize=9)
        figure.supylabel("return", fontsize=9)
        lines, labels = list(handles.values()), list(handles)
        figure.legend(lines, labels, loc="outside upper center", ncols=max(columns, 2), frameon=False, fontsize=10)
    return figure


def _panel(axes: Axes, result: Result) -> None:
    for side, label in (("reference", "CleanRL, measured: IQM, 95 % interval, single seeds"), ("ours", "rl_lab")):
        if side not in result.curves:
            continue
        curves, colour = result.curves[side], plot.COLOURS[side]
        steps = (np.arange(curves.shape[1]) + 0.5) * result.budget / curves.shape[1]
        iqm, *band = interval(curves.T)
        low, high = np.clip(band, curves.min(), curves.max())  # no return beyond those seen
        axes.plot(steps, curves.T, color=colour, alpha=0.25, linewidth=0.5)
        axes.fill_between(steps, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(steps, iqm, color=colour, linewidth=1.8, label=label)
    if not result.tests:
        for row in store.published(result.script, result.env):
            if int(row["total_timesteps"] or result.whole) != result.budget:
                continue
            mean, std, label = float(row["mean"]), float(row["std"]), "CleanRL, published: mean ± std"
            axes.errorbar(result.budget, mean, std, fmt="D", color=plot.COLOURS["reference"], markersize=5, capsize=3,
                          label=label, clip_on=False, zorder=5)  # fmt: skip
    axes.set_title(result.env, loc="left", fontsize=10.5 if len(result.env) < 20 else 8.5, fontweight="bold")
    axes.set_title(result.verdict, loc="right", fontsize=9.5)
    axes.set_xlim(0, result.budget)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(plot.short)
    axes.grid(axis="y", color=plot.INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _number(x: float) -> str:
    return f"{x:,.1f}" if abs(x) < 1000 else f"{x:,.0f}"


def _interval(scores: Floats) -> str:
    iqm, low, high = map(float, interval(scores))
    return f"{_number(iqm)} [{_number(low)}, {_number(high)}]" if len(scores) > 1 else _number(iqm)


def _verdict(test: Equivalence) -> str:
    needed = f", about {test.seeds_needed} a side would decide" if test.seeds_needed else ""
    return f"{test.verdict} (±{_number(test.margin)}{needed})"


def main(algo: tyro.conf.Positional[str], runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """Keep the results of runs; make the table in README.md and the plot of all that are kept.

    Args:
        algo: whose results.
        runs: run folders to keep, those of one environment: every seed that was trained together.
    """
    try:
        if runs:
            print(keep([run for path in runs for run in store.load(path)], RESULTS / algo))
        results = judge_all(RESULTS / algo)
        if not results:
            raise ValueError(f"{RESULTS / algo} keeps no results: name run folders")
        (RESULTS / f"{algo}.png").write_bytes(plot.png(draw(results)))
        print(table(results))
        if Path("README.md").is_file():
            insert(Path("README.md"), algo, table(results))
    except ValueError as error:
        sys.exit(f"summary: {error}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m rl_lab.curves.summary")
