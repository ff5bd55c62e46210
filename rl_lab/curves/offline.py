"""Keeps compact results of offline runs and makes the tables and the plot that the README and docs show of them.

python -m rl_lab.curves.offline RUN...     keep the results of these runs, those of one process, then as below
python -m rl_lab.curves.offline            judge all results kept, make table and plot

runs/results/offline/{data set}/{algo}__{env}.csv.gz, .json    episodes of all evaluations and how they came about, in
                                                               the form of a reference set: `rl_lab.compare` reads them
runs/results/offline.png                                       scores by gradient step, d3rlpy's beside them
README.md                                                      the table, between <!-- results:offline --> and its end
docs/offline.md                                                scores by gradient step, between the same lines

A run's score is D4RL's normalized one of its last evaluation, 100 episodes of the last parameters. Every algorithm is
judged against behaviour cloning on the same data: the difference in IQM, its 90 % interval and the margins declared in
margins.toml, as everywhere in the harness.
"""

from __future__ import annotations

import csv
import math
import re
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rl_lab.curves import plot, store
from rl_lab.curves.compare import MARGINS, Equivalence, equivalence, flags_of, in_units
from rl_lab.curves.statistics import Floats
from rl_lab.curves.store import Run
from rl_lab.curves.summary import COLUMNS, RESULTS, insert, interval, keep, note_of

NAMES = {"bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL", "awac": "AWAC"}
FOLDER = RESULTS / "offline"
DASHES = (0, (4, 2))  # of d3rlpy's curves
EPISODES = 100  # of the last parameters, which make a run's score
READING = """

IQM of D4RL's normalized scores over seeds, with its 95 % interval: the last parameters, 100 episodes of likeliest
actions; seeds × gradient steps. The verdict and P, the chance that a run is above one of BC, are against BC on the same
data ([how](docs/offline.md)). In parentheses CORL's score after a million gradient steps on D4RL's set of this name
(-v2), then d3rlpy's after as many as ours (-v0). The lab's sets are other data, which makes them context only; a row of
D4RL's own file (…-v2), trained as long, says whether CORL's score is within our interval.
[runs/results/offline](runs/results/offline) has every episode; where files are removed there, `runs/offline.sh` makes
them again."""


@dataclass(frozen=True)
class Cell:
    """One algorithm on one data set: normalized scores (R,) of its seeds by gradient step, and the test against BC."""

    curve: dict[int, Floats]
    test: Equivalence | None = None

    @property
    def steps(self) -> int:
        """Gradient steps until the last evaluation, which judges."""
        return max(self.curve)

    @property
    def scores(self) -> Floats:
        """(R,) those of the last evaluation."""
        return self.curve[self.steps]


def score_curve(runs: list[Run], note: dict[str, Any]) -> dict[int, Floats]:
    """(R,) the normalized score of each run, by the gradient steps before its evaluations.

    Raises:
        ValueError: if one has not ended, or was judged by another number of episodes.
    """
    for run in runs:
        if (episodes := np.count_nonzero(run.steps == note["total_timesteps"])) != EPISODES:
            told = f"{episodes} episodes after step {note['total_timesteps']:,}, its last"
            raise ValueError(f"{run.path} (seed {run.seed}) has {told}; the table takes {EPISODES}")
    random, expert = map(float, note["data"]["scores"])
    shared = set.intersection(*(set(run.steps.astype(int).tolist()) for run in runs))
    means = {step: np.array([run.returns[run.steps == step].mean() for run in runs]) for step in sorted(shared)}
    return {step: 100 * (mean - random) / (expert - random) for step, mean in means.items()}


def margin(note: dict[str, Any], scores: Floats) -> float:
    """The margin that is declared for the score of a result's task, in points of the normalized score.

    Args:
        scores: (R,) of the reference, of which "20%" is a share.
    Raises:
        ValueError: if none is declared for any version of the task.
    """
    declared, env = tomllib.loads(MARGINS.read_text(encoding="utf-8")), note["env"]
    known = [env] if env in declared else store.other_versions(env, declared)
    if not known:
        raise ValueError(f"no margin is declared for {env}: add it to {MARGINS}")
    size, (random, expert) = declared[known[-1]]["score"], map(float, note["data"]["scores"])
    return in_units(size, scores) / (1 if str(size).endswith("%") else (expert - random) / 100)


def judge_all(folder: Path) -> dict[str, dict[str, Cell]]:
    """Every result kept, by data set and algorithm."""
    found: dict[str, dict[str, Cell]] = {}
    for data in sorted({path.parent for path in folder.glob("*/*__*.csv.gz")}):
        kept = {path: note_of(path) for path in sorted(data.glob("*__*.csv.gz"))}
        notes = {note["algo"]: note for note in kept.values()}
        cells = {note["algo"]: Cell(score_curve(store.load(path), note)) for path, note in kept.items()}
        if "bc" in cells:
            for algo in cells.keys() - {"bc"}:
                scores, theirs = cells[algo].scores, cells["bc"].scores
                size, rng = margin(notes[algo], theirs), np.random.default_rng(0)
                cells[algo] = replace(cells[algo], test=equivalence("normalized score", scores, theirs, size, rng))
        found[data.name] = {algo: cells[algo] for algo in NAMES if algo in cells}
    return found


def published() -> dict[tuple[str, str, int], float]:
    """CORL's and d3rlpy's scores by algorithm, D4RL's data set (of CORL -v2, of d3rlpy -v0) and gradient steps."""
    found = {}
    for name, million in (("published_offline.csv", 1_000_000), ("curves_offline.csv", 0)):
        with (store.REFERENCE / name).open(encoding="utf-8") as file:
            next(file)  # the source
            for row in csv.DictReader(file):
                found[row["algo"], row["dataset"], million or int(row["gradient_step"])] = float(row["mean"])
    return found


def d3rlpy(algo: str, data: str, theirs: dict[tuple[str, str, int], float]) -> dict[int, float]:
    """Out of what is published, d3rlpy's scores on D4RL's first set (-v0) of this name, by gradient step."""
    named = algo, f"{_namesake(data)}-v0"
    return {step: score for (*of, step), score in theirs.items() if tuple(of) == named}


def table(results: dict[str, dict[str, Cell]]) -> str:
    """Markdown: a row for each data set, a column for each algorithm with results, and how to read them."""
    shown, theirs = algorithms(results), published()
    rows = [["data set", *(NAMES[algo] for algo in shown)], ["---", *["---:"] * len(shown)]]
    for data, row in results.items():
        cells = [_cell(row[algo]) + _context(row[algo], algo, data, theirs) if algo in row else "–" for algo in shown]
        rows.append([data, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + READING


def _namesake(data: str) -> str:
    """The name of D4RL's set, without version; D4RL's files are hopper_medium_replay-v2.hdf5."""
    return re.sub(r"^.*?((?:halfcheetah|hopper|walker2d)-.+)-v\d+$", r"\1", data.replace("_", "-"))


def _context(cell: Cell, algo: str, data: str, theirs: dict[tuple[str, str, int], float]) -> str:
    """CORL's score, and whether it is within ours, and d3rlpy's, in parentheses; nothing where neither is known."""
    namesake, told = _namesake(data), []
    if (known := theirs.get((algo, f"{namesake}-v2", 1_000_000))) is not None:
        told.append(f"{known:.1f}")
        if data.replace("_", "-") == f"{namesake}-v2" and comparable(cell):
            _, low, high = map(float, interval(cell.scores))
            told[0] += ", within" if low <= known <= high else ", outside"
    if (as_long := d3rlpy(algo, data, theirs).get(cell.steps)) is not None:
        told.append(f"{as_long:.1f}")
    return f" ({'; '.join(told)})" if told else ""


def comparable(cell: Cell) -> bool:
    """Whether a result is of CORL's budget, and of enough seeds for an interval."""
    return cell.steps == 1_000_000 and len(cell.scores) > 1


def algorithms(results: dict[str, dict[str, Cell]]) -> list[str]:
    """Those with results on some data set."""
    return [algo for algo in NAMES if any(algo in row for row in results.values())]


def _cell(cell: Cell) -> str:
    iqm, low, high = map(float, interval(cell.scores))
    text = f"{iqm:.1f} [{low:.1f}, {high:.1f}]" if len(cell.scores) > 1 else f"{iqm:.1f}"
    text += f", {len(cell.scores)} × {cell.steps // 1000:,}k"
    return text if cell.test is None else f"{text}: {cell.test.verdict}, P {cell.test.improvement:.2f}"


def curves_table(results: dict[str, dict[str, Cell]]) -> str:
    """Markdown: IQM of the scores after so many gradient steps, d3rlpy's mean in parentheses."""
    theirs = published()
    shown = sorted({step for row in results.values() for cell in row.values() for step in cell.curve})
    shown = [step for step in shown if any(step == known for *_, known in theirs)]
    rows = [["data set", "", *(f"{step:,}" for step in shown)], ["---", "---", *["---:"] * len(shown)]]
    for data, row in results.items():
        for algo, cell in row.items():
            beside = {step: f" ({score:.1f})" for step, score in d3rlpy(algo, data, theirs).items()}
            curve = {
                step: f"{float(interval(scores)[0]):.1f}{beside.get(step, '')}" for step, scores in cell.curve.items()
            }
            rows.append([data, NAMES[algo], *(curve.get(step, "–") for step in shown)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def draw(results: dict[str, dict[str, Cell]]) -> Figure:
    """A panel for each data set: IQM and single seeds by gradient step, its 95 % interval at the end, d3rlpy's mean."""
    colours = dict(zip(NAMES, ("#6b7280", "#e08214", "#2f7de1", "#1b9e77", "#984ea3"), strict=True))
    rows, columns, theirs = math.ceil(len(results) / COLUMNS), min(COLUMNS, len(results)), published()
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(max(3.5 * columns, 7.0), 0.7 + 2.55 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (data, row) in zip(panels, results.items(), strict=False):
            for k, (algo, cell) in enumerate(row.items()):
                colour, steps = colours[algo], list(cell.curve)
                scores = np.array(list(cell.curve.values()))
                iqm, low, high = (float(x) for x in interval(cell.scores))
                axes.plot(steps, scores, color=colour, alpha=0.22, linewidth=0.6)
                axes.plot(steps, [interval(of)[0] for of in scores], color=colour, linewidth=1.8)
                beyond = cell.steps * (1.02 + 0.02 * k)
                axes.errorbar(beyond, iqm, [[iqm - low], [high - iqm]], fmt="o", markersize=4, color=colour)
                beside = {step: score for step, score in d3rlpy(algo, data, theirs).items() if step <= cell.steps}
                axes.plot(list(beside), list(beside.values()), color=colour, linewidth=1.2, linestyle=DASHES)
            axes.set_title(data, loc="left", fontsize=9.5, fontweight="bold")
            axes.xaxis.set_major_formatter(plot.short)
            axes.grid(axis="y", color=plot.INK, alpha=0.12, linewidth=0.6)
            axes.tick_params(length=0)
        for axes in panels[len(results) :]:
            axes.remove()
        lines = [Line2D([], [], color=colours[algo], linewidth=1.8, label=NAMES[algo]) for algo in algorithms(results)]
        lines.append(Line2D([], [], color=plot.INK, linestyle=DASHES, linewidth=1.2, label="d3rlpy on D4RL's -v0"))
        figure.supxlabel("gradient steps", fontsize=9)
        figure.supylabel("normalized score", fontsize=9)
        figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False, fontsize=10)
        return figure


def place(runs: list[Run]) -> Path:
    """Where results of runs go. ValueError unless these can stand in the table, beside what is kept of their data."""
    first, config, data = runs[0].path, runs[0].config, runs[0].config.get("data")
    if data is None:
        raise ValueError(f"{first} has not learned from a data set; rl_lab.curves.summary keeps others")
    if runs[0].algo not in NAMES:
        raise ValueError(f"{first} is of {runs[0].algo}; the table has {', '.join(NAMES)}")
    if flags := flags_of(config.get("command", "")):
        raise ValueError(f"{first} was trained with {flags}; the table is of the defaults, rl_lab.compare judges it")
    margin(config, Cell(score_curve(runs, config)).scores)
    folder = FOLDER / store.set_name(str(data["name"]))
    for kept in folder.glob("*__*.csv.gz"):
        note = note_of(kept)
        budget, new = ((len(of["seeds"]), of["total_timesteps"]) for of in (note, config))
        if note["algo"] == runs[0].algo and budget != new:
            told = "{} seeds × {:,} gradient steps, {} is of {} × {:,}".format(*budget, first, *new)
            raise ValueError(f"{kept} is of {told}: remove it to keep the other")
        if note["data"]["checksum"] != data["checksum"]:
            raise ValueError(f"{kept} is of other data of this name than {first}: remove it, or train on its data")
        if (note["env"], note["data"]["scores"]) != (config["env"], data["scores"]):
            told = f"judged in {note['env']} by the scores {note['data']['scores']}"
            raise ValueError(f"{kept} was {told}, {first} in {config['env']} by {data['scores']}: remove one of them")
    return folder


def main(runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """Keep the results of runs; make the plot of all that are kept, the tables in README.md and docs/offline.md.

    Args:
        runs: run folders to keep: every seed that was trained together.
    """
    try:
        if runs:
            loaded = [run for path in runs for run in store.load(path)]
            print(keep(loaded, place(loaded)))
        results = judge_all(FOLDER)
        if not results:
            raise ValueError(f"{FOLDER} keeps no results: name run folders")
        (RESULTS / "offline.png").write_bytes(plot.png(draw(results)))
        print(table(results))
        for page, text in ((Path("README.md"), table), (Path("docs/offline.md"), curves_table)):
            if page.is_file():
                insert(page, "offline", text(results))
    except ValueError as error:
        sys.exit(f"offline: {error}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m rl_lab.curves.offline")
