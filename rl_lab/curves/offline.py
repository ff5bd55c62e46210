"""Keeps compact results of offline runs and makes the table and the plot that the README shows of them.

python -m rl_lab.curves.offline RUN...     keep the results of these runs, those of one process, then as below
python -m rl_lab.curves.offline            judge all results kept, make table and plot

runs/results/offline/{data set}/{algo}__{env}.csv.gz, .json    episodes of all evaluations and how they came about, in
                                                               the form of a reference set: `rl_lab.compare` reads them
runs/results/offline.png                                       scores with intervals
README.md                                                      the table, between <!-- results:offline --> and its end

A run's score is D4RL's normalized one of its last evaluation, 100 episodes of the last parameters. Every algorithm is
judged against behaviour cloning on the same data: the difference in IQM, its 90 % interval and the margins declared in
margins.toml, as everywhere in the harness.
"""

from __future__ import annotations

import csv
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from rl_lab.curves import plot, store
from rl_lab.curves.compare import MARGINS, Equivalence, equivalence, flags_of, in_units
from rl_lab.curves.statistics import Floats
from rl_lab.curves.store import Run
from rl_lab.curves.summary import RESULTS, insert, interval, keep, note_of

NAMES = {"bc": "BC", "td3_bc": "TD3+BC", "iql": "IQL", "cql": "CQL", "awac": "AWAC"}
FOLDER = RESULTS / "offline"
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
    """One algorithm on one data set: normalized scores (R,) of its seeds, gradient steps, and the test against BC."""

    scores: Floats
    steps: int
    test: Equivalence | None


def last_scores(runs: list[Run], note: dict[str, Any]) -> Floats:
    """(R,) the normalized score of each run's evaluation after its last gradient step.

    Raises:
        ValueError: if one has not ended, or was judged by another number of episodes.
    """
    last = [run.returns[run.steps == note["total_timesteps"]] for run in runs]
    for run, returns in zip(runs, last, strict=True):
        if len(returns) != EPISODES:
            told = f"{len(returns)} episodes after step {note['total_timesteps']:,}, its last"
            raise ValueError(f"{run.path} (seed {run.seed}) has {told}; the table takes {EPISODES}")
    random, expert = map(float, note["data"]["scores"])
    return 100 * (np.array([returns.mean() for returns in last]) - random) / (expert - random)


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
        scores = {note["algo"]: last_scores(store.load(path), note) for path, note in kept.items()}
        found[data.name] = {}
        for algo in (algo for algo in NAMES if algo in scores):
            test = None
            if algo != "bc" and "bc" in scores:
                size = margin(notes[algo], scores["bc"])
                test = equivalence("normalized score", scores[algo], scores["bc"], size, np.random.default_rng(0))
            found[data.name][algo] = Cell(scores[algo], notes[algo]["total_timesteps"], test)
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


def table(results: dict[str, dict[str, Cell]]) -> str:
    """Markdown: a row for each data set, a column for each algorithm with results, and how to read them."""
    shown, theirs = algorithms(results), published()
    rows = [["data set", *(NAMES[algo] for algo in shown)], ["---", *["---:"] * len(shown)]]
    for data, row in results.items():
        cells = [_cell(row[algo]) + _context(row[algo], algo, data, theirs) if algo in row else "–" for algo in shown]
        rows.append([data, *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + READING


def _context(cell: Cell, algo: str, data: str, theirs: dict[tuple[str, str, int], float]) -> str:
    """CORL's score, and whether it is within ours, and d3rlpy's, in parentheses; nothing where neither is known."""
    named = data.replace("_", "-")  # D4RL's files are hopper_medium_replay-v2.hdf5
    namesake = re.sub(r"^.*?((?:halfcheetah|hopper|walker2d)-.+)-v\d+$", r"\1", named)
    told = []
    if (known := theirs.get((algo, f"{namesake}-v2", 1_000_000))) is not None:
        told.append(f"{known:.1f}")
        if named == f"{namesake}-v2" and comparable(cell):
            _, low, high = map(float, interval(cell.scores))
            told[0] += ", within" if low <= known <= high else ", outside"
    if (as_long := theirs.get((algo, f"{namesake}-v0", cell.steps))) is not None:
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


def draw(results: dict[str, dict[str, Cell]]) -> Figure:
    """Scores of single seeds and their IQM with its interval, a row for each data set."""
    colours = dict(zip(NAMES, ("#6b7280", "#e08214", "#2f7de1", "#1b9e77", "#984ea3"), strict=True))
    with matplotlib.rc_context(plot.STYLE):
        figure = Figure(figsize=(8.0, 1.2 + 0.55 * len(results)), layout="constrained")
        axes = figure.subplots()
        for y, row in enumerate(results.values()):
            for k, (algo, cell) in enumerate(row.items()):
                place = y + 0.17 * (k - (len(row) - 1) / 2)
                iqm, low, high = map(float, interval(cell.scores))
                axes.plot(cell.scores, np.full(len(cell.scores), place), "|", color=colours[algo], alpha=0.6)
                axes.errorbar(iqm, place, xerr=[[iqm - low], [high - iqm]], fmt="o", markersize=4, color=colours[algo])
        for algo in algorithms(results):
            axes.plot([], [], "o", color=colours[algo], label=NAMES[algo])
        axes.set_yticks(range(len(results)), list(results))
        axes.invert_yaxis()
        axes.set_xlabel("normalized score")
        axes.grid(axis="x", color=plot.INK, alpha=0.12, linewidth=0.6)
        axes.tick_params(length=0)
        figure.legend(loc="outside upper center", ncols=len(NAMES), frameon=False)
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
    margin(config, last_scores(runs, config))
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
    """Keep the results of runs; make the table in README.md and the plot of all that are kept.

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
        if Path("README.md").is_file():
            insert(Path("README.md"), "offline", table(results))
    except ValueError as error:
        sys.exit(f"offline: {error}")


if __name__ == "__main__":
    tyro.cli(main)
