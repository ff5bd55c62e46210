"""Builds the reference sets that the package carries from measured CleanRL runs.

    python -m rl_lab.curves.build FOLDER... [--tables FILE] [--offline-curves FILE]

A FOLDER holds CleanRL's own run folders, or episode files `{script}__{env}__{seed}.csv.gz` with a `runs.csv` that tells
their budget (columns file, total_timesteps). All seeds found go in. Every (script, env) becomes
`reference/{script}__{env}.csv.gz` with a JSON of its provenance. FILE is a table of CleanRL's documented results, which
becomes `reference/published.csv`; that of --offline-curves, of d3rlpy's, `reference/curves_offline.csv`.
Equal input gives equal bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import tyro

from rl_lab.curves.compare import common_budget, distinct_seeds, require_finished
from rl_lab.curves.store import REFERENCE, Run, load, write_set

COMMIT = "fe8d8a03c41a7ef5b523e2e354bd01c363e786bb"
ORIGIN = {
    "repository": "https://github.com/vwxyzjn/cleanrl",
    "commit": COMMIT,
    "licence": "MIT",
    "measured": "the script unmodified, default flags, CPU, one thread a run",
    "versions": {"gymnasium": "0.29.1", "mujoco": "2.3.3", "numpy": "1.26.4", "torch": "2.13.0"},
}
OFFLINE_ORIGIN = (
    "# Normalized scores of d3rlpy on D4RL's first sets (-v0), of the ten evaluations until a gradient step; mean and "
    "std over seeds: github.com/takuseno/d3rlpy-benchmarks (MIT) at 1771c9b23322, d4rl/ALGORITHM.\n"
)
# Columns of published.csv and where they come from.
FIGURES = {
    "script": "variant",
    "env": "env_id",
    "mean": "mean",
    "std": "std",
    "seeds": "n_seeds",
    "total_timesteps": "total_timesteps",
    "metric": "metric",
    "source": "source_path",
    "commit": "source_commit",
}


def build(folders: Sequence[Path], target: Path = REFERENCE) -> list[Path]:
    """Write one reference set for every (script, env) found; returns the files written.

    Raises:
        ValueError: if seeds of a set have different budgets or an unknown one, a run was stopped early, or a seed
            occurs twice.
    """
    sets: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for folder in folders:
        budgets = {}
        if (folder / "runs.csv").is_file():
            with (folder / "runs.csv").open() as file:
                budgets = {row["file"]: int(row["total_timesteps"]) for row in csv.DictReader(file)}
        for run in load(folder):
            known = run.total_timesteps or budgets.get(run.path.name)
            if known is None:
                raise ValueError(f"{run.path}: its budget is unknown; list it in {folder / 'runs.csv'}")
            sets[run.algo, run.env].append(dataclasses.replace(run, total_timesteps=known))
    written = []
    for (script, env), runs in sorted(sets.items()):
        distinct_seeds(runs)
        require_finished(runs, budget := common_budget(runs))
        runs.sort(key=lambda run: run.seed)
        note = {
            "script": script,
            "env": env,
            "seeds": [run.seed for run in runs],
            "total_timesteps": budget,
            "command": f"python cleanrl/{script}.py --env-id {env} --seed SEED",
            **ORIGIN,
        }
        path = target / f"{script}__{env}.csv.gz"
        write_set(path, note, {run.seed: (run.steps, run.returns) for run in runs})
        written.append(path)
    return written


def build_published(tables: Path, target: Path = REFERENCE) -> Path:
    """Condense a table of CleanRL's documented results at COMMIT to one figure for a (script, env).

    The mean of the last 100 episodes is preferred to a final return of unstated definition.
    """
    figures: dict[tuple[str, str], list[str]] = {}
    with tables.open() as file:
        rows = [row for row in csv.DictReader(file) if row["source_commit"] == COMMIT and row["mean"]]
    for metric in ("return_mean_last100_train_episodes", "return_final_as_documented"):
        for row in rows:
            if row["metric"] == metric and row["algo"]:  # rows without are other projects' figures, quoted by CleanRL
                figures.setdefault((row["variant"], row["env_id"]), [row[column] for column in FIGURES.values()])
    path = target / "published.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([FIGURES, *(figures[key] for key in sorted(figures))])
    return path


def build_offline(table: Path, target: Path = REFERENCE) -> Path:
    """Condense d3rlpy's evaluations on D4RL's sets, means of ten, to normalized scores over seeds, at some steps."""
    with (REFERENCE.parents[1] / "d4rl_scores.csv").open() as file:
        next(file)  # the source
        scores = {row["task"]: (float(row["random"]), float(row["expert"])) for row in csv.DictReader(file)}
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with table.open() as file:
        for row in csv.DictReader(file):
            step, (task, _, rest) = int(row["gradient_step"]), row["env_id"].partition("-")
            if not rest.startswith("random") and (step <= 100_000 or step % 100_000 == 0):
                (random, expert), algo = scores[task], row["algo"].replace("td3_plus_bc", "td3_bc")
                found[algo, row["env_id"], step].append(
                    100 * (float(row["eval_return_raw"]) - random) / (expert - random)
                )
    path = target / "curves_offline.csv"
    with path.open("w", newline="") as file:
        file.write(OFFLINE_ORIGIN)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algo", "dataset", "gradient_step", "mean", "std", "seeds"])
        for key, x in sorted(found.items()):
            writer.writerow([*key, f"{statistics.mean(x):.2f}", f"{statistics.stdev(x):.2f}", len(x)])
    return path


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]] = (), tables: Path | None = None, offline_curves: Path | None = None
) -> None:
    """Build reference sets from measured CleanRL runs.

    Args:
        folders: run folders of CleanRL, or episode files with a runs.csv.
        tables: a table of CleanRL's documented results.
        offline_curves: a table of d3rlpy's evaluations: algo, env_id, seed, gradient_step, eval_return_raw.
    """
    try:
        written = build(folders) + ([build_published(tables)] if tables else [])
        for path in written + ([build_offline(offline_curves)] if offline_curves else []):
            print(f"{path.name}  {path.stat().st_size / 1024:.0f} KiB")
    except (ValueError, OSError) as error:
        sys.exit(f"build: {error}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m rl_lab.curves.build")
