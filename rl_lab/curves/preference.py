"""Keeps compact results of language models' runs and makes the table that the README shows of them.

python -m rl_lab.curves.preference NAME RUN...     keep the results of these runs, seeds of one thing, then as below
python -m rl_lab.curves.preference                 make the table of all results kept

runs/results/preference/NAME.json    of every seed: flags, command, commit, versions, hardware, and what was measured,
                                     which are the JSON files in its run folder
README.md                            the table, between <!-- results:preference --> and its end
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from rl_lab.curves.summary import RESULTS, insert, interval

FOLDER = RESULTS / "preference"
KEPT = ("evaluation", "before", "after", "winrate")  # .json files of a run folder
ABOUT = ("algo", "seed", "command", "git_commit", "versions", "hardware", "args")
READING = """

Seeds' IQM with its 95 % interval, widened where it is narrower than one seed's over its held-out examples (Wilson),
which are the same for all; GRPO's is of the seeds alone, a single seed has Wilson's. Accuracy is of greedy answers to
prompts of the task that were not trained on, or of the implicit reward on pairs whose prompts were not. Minutes are the
wall clock's, on one thread beside other work. `PAIRS=FILE runs/preference.sh` makes the rows again, FILE being
hh-rlhf's harmless-base/test.jsonl.gz; every seed is in
[runs/results/preference](runs/results/preference), with command, commit (of a changed tree where it says so),
versions and hardware; what stands beside a win rate: [docs/judging.md](docs/judging.md)."""

Run = dict[str, Any]


def keep(name: str, runs: Sequence[Path], folder: Path) -> Path:
    """Write what was measured of these runs. ValueError if one of them is unfinished."""
    kept: list[Run] = []
    for run in runs:
        try:
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))
            found = {x: json.loads(path.read_text()) for x in KEPT if (path := run / f"{x}.json").is_file()}
            found = {x: {key: y for key, y in report.items() if key != "model"} for x, report in found.items()}
        except (OSError, ValueError) as error:
            raise ValueError(f"{run}: {error}; it must be a finished run folder") from None
        if "evaluation" not in found:
            raise ValueError(f"{run} has no evaluation.json: it is not finished; continue with --resume")
        about = {key: config[key] for key in ABOUT}
        about["command"] = re.sub(r" --runs-dir[= ]\S+", "", about["command"])  # where it lay says nothing
        about["args"] = {flag: x for flag, x in about["args"].items() if flag != "runs_dir"}
        kept.append(portable(about | found))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(sorted(kept, key=lambda run: run["seed"]), indent=1) + "\n", encoding="utf-8")
    return path


def portable(report: Any) -> Any:
    """A report without folders of this machine: absolute paths end in the same name elsewhere."""
    if isinstance(report, dict):
        return {name: portable(x) for name, x in report.items()}
    if isinstance(report, list):
        return [portable(x) for x in report]
    return re.sub(r"(?<![^\s=])/\S*/(?=\S)", "", report) if isinstance(report, str) else report


def spread(values: Sequence[float], below: float = 0.0, above: float = 0.0) -> str:
    """IQM and interval over seeds, of shares; at least so far below and above."""
    middle, low, high = map(float, interval(np.array(values)))
    return f"{middle:.3f} [{max(min(low, middle - below), 0):.3f}, {min(max(high, middle + above), 1):.3f}]"


def shown(runs: Sequence[Run], share: Callable[[Run], dict[str, float]]) -> str:
    """A share over seeds, or of one seed over its examples, which all seeds have in common."""
    shares = [share(run) for run in runs]
    if len(shares) > 1:
        below, above = (float(np.mean([abs(x["mean"] - x[end]) for x in shares])) for end in ("low", "high"))
        return spread([x["mean"] for x in shares], below, above)
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**shares[0])


def rows_of(name: str, runs: list[Run]) -> list[list[str]]:
    """What the table says of one name: a row for each thing that was measured."""
    first = runs[0]["evaluation"]
    seeds, minutes = str(len(runs)), np.mean([run["evaluation"].get("seconds", np.nan) for run in runs]) / 60
    time = "–" if np.isnan(minutes) else f"{minutes:.0f}"
    if "after" in first:  # GRPO measures the task itself
        afters = [run["evaluation"]["after"] for run in runs]
        after = spread(afters) if len(afters) > 1 else f"{afters[0]:.3f}"
        return [[name, seeds, f"accuracy, {first['held_out']} prompts", f"{first['before']:.3f}", after, time]]
    rows = []
    if "after" in runs[0] and "before" in runs[0]:
        measure = f"accuracy, {runs[0]['after']['prompts']} prompts"
        before = "{mean:.3f}".format(**runs[0]["before"]["accuracy"])
        rows.append([name, seeds, measure, before, shown(runs, lambda run: run["after"]["accuracy"]), time])
    if "accuracy" in first:
        length = "the longer one: {mean:.3f}".format(**first["length_baseline"]) if "length_baseline" in first else "–"
        measure = f"accuracy, {first['pairs']} pairs"
        rows.append([name, seeds, measure, length, shown(runs, lambda run: run["evaluation"]["accuracy"]), time])
    if report := runs[0].get("winrate"):
        measure = "win rate over {baseline[name]}, {prompts} prompts; the judge is right in {judge[accuracy][mean]:.3f}"
        length = "the longer one: {win_rate[mean]:.3f}".format(**report["longer_wins"])
        win = shown(runs, lambda run: run["winrate"]["win_rate"])
        rows.append([name, seeds, measure.format(**report), length, win, time])
    return rows


def table(folder: Path) -> str:
    """Markdown of all results kept, and how to read it."""
    rows = [["", "seeds", "measured", "before, or baseline", "after", "training, minutes"]]
    rows.append(["---", "---", "---", "---:", "---:", "---:"])
    for path in sorted(folder.glob("*.json")):
        rows += rows_of(path.stem, json.loads(path.read_text(encoding="utf-8")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + READING


def main(name: tyro.conf.Positional[str] = "", runs: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """Keep results; make the table in README.md.

    Args:
        name: of what these runs are seeds of, such as grpo-larger-of-two.
        runs: their folders.
    """
    try:
        if runs:
            print(keep(name, runs, FOLDER))
        text = table(FOLDER)
        print(text)
        if Path("README.md").is_file():
            insert(Path("README.md"), "preference", text)
    except ValueError as error:
        sys.exit(f"preference: {error}")


if __name__ == "__main__":
    tyro.cli(main, prog="python -m rl_lab.curves.preference")
