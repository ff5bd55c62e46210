"""Builds the reference sets that the package carries from a folder of measured CleanRL logs.

    python -m rl_lab.curves.build FOLDER

FOLDER holds `runs.csv` (columns file, script, env_id, seed, total_timesteps) and the episode files that it names; all
seeds it lists go in. Every (script, env) becomes `reference/{script}__{env}.csv.gz` with a JSON of its provenance. With
`--tables FILE` CleanRL's documented results are condensed into `reference/published.csv` as well. Equal input gives
equal bytes.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import tyro

from rl_lab.curves.store import REFERENCE, read_episodes

COMMIT = "fe8d8a03c41a7ef5b523e2e354bd01c363e786bb"
ORIGIN = {
    "repository": "https://github.com/vwxyzjn/cleanrl",
    "commit": COMMIT,
    "licence": "MIT",
    "measured": "the script unmodified, default flags, CPU, one thread a run",
    "versions": {"gymnasium": "0.29.1", "mujoco": "2.3.3", "numpy": "1.26.4", "torch": "2.13.0"},
}
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


def build(folder: Path, target: Path = REFERENCE) -> list[Path]:
    """Write one reference set for every (script, env) that `folder`/runs.csv lists; returns the files written."""
    sets: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (folder / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            sets[row["script"].removesuffix(".py"), row["env_id"]].append(row)
    written = []
    for (script, env), rows in sorted(sets.items()):
        rows.sort(key=lambda row: int(row["seed"]))
        budgets = {int(row["total_timesteps"]) for row in rows}
        if len(budgets) > 1:
            raise ValueError(f"{script} {env}: the seeds have different budgets {sorted(budgets)}; keep one")
        lines = ["seed,global_step,episodic_return,episodic_length"]
        for row in rows:
            table = read_episodes(folder / row["file"])
            columns = (table[name] for name in ("global_step", "episodic_return", "episodic_length"))
            lines += [f"{row['seed']},{int(t)},{r:.10g},{int(n)}" for t, r, n in zip(*columns, strict=True)]
        path = target / f"{script}__{env}.csv.gz"
        path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode(), mtime=0))
        command = f"python cleanrl/{script}.py --env-id {env} --seed SEED"
        note = {
            "script": script,
            "env": env,
            "seeds": [int(row["seed"]) for row in rows],
            "total_timesteps": budgets.pop(),
            "command": command,
            **ORIGIN,
        }
        (target / f"{script}__{env}.json").write_text(json.dumps(note, indent=1) + "\n")
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


def main(folder: Annotated[Path, tyro.conf.Positional], tables: Path | None = None) -> None:
    for path in build(folder) + ([build_published(tables)] if tables else []):
        print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    tyro.cli(main)
