"""Judge training runs against reference learning curves; docs/curves.md states the method."""

from __future__ import annotations

import csv
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from rl_lab.curves import store
from rl_lab.curves.compare import (
    Result,
    compare,
    grouped,
    in_units,
    seeds_lines,
    seeds_of,
    version_lines,
    write_verdict,
)
from rl_lab.curves.report import write_report

BAD_INPUT = 4
SEVERITY = (1, 3, 2, 0)  # of several comparisons the first of these exit codes that occurs is the command's


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


def print_result(result: Result, console: Console) -> None:
    """One comparison as a table with its notes."""
    console.print(f"\n[bold]{result.algo} on {result.env}[/]", end=" ")
    console.print(f"against {result.reference}, {result.budget:,} steps", markup=False)
    counts = {side: seeds_of(len(seeds)) for side, seeds in result.seeds.items()}
    if result.tests:
        table = Table(box=box.SIMPLE_HEAD)
        titles = ("IQM of", f"ours ({counts['ours']})", f"reference ({counts['reference']})", "difference",
                  "90 % interval", "margin", "P(ours better)", "verdict")  # fmt: skip
        for title in titles:
            table.add_column(title, justify="left" if title in ("IQM of", "verdict") else "right")
        for test in result.tests:
            table.add_row(test.statistic, f"{test.ours:.1f}", f"{test.reference:.1f}", f"{test.difference:+.1f}",
                          f"{test.low:+.1f} to {test.high:+.1f}", f"±{test.margin:.1f}", f"{test.improvement:.2f}",
                          test.verdict)  # fmt: skip
        console.print(table)
        console.print(f"Margin: {result.margin_reason}", markup=False)
    for line in seeds_lines(result) + result.notes + version_lines(result):
        console.print(f"- {line}", markup=False)
    colour = {0: "green", 1: "red"}.get(result.exit_code, "yellow")
    console.print(f"Verdict: [bold {colour}]{result.verdict}[/]")


def list_references(console: Console) -> None:
    """A table of all there is to compare with."""
    table = Table("script", "environment", "seeds", "steps", "kind", "source", box=box.SIMPLE_HEAD)
    for path in sorted(store.REFERENCE.glob("*__*.csv.gz")):
        note = store.provenance(path)
        source = f"{note['repository'].removeprefix('https://github.com/')}@{note['commit'][:8]}"
        steps = f"{note['total_timesteps']:,}"
        table.add_row(note["script"], note["env"], str(len(note["seeds"])), steps, "logs, decide", source)
    with (store.REFERENCE / "published.csv").open() as file:
        for row in csv.DictReader(file):
            steps = f"{int(row['total_timesteps']):,}" if row["total_timesteps"] else "unknown"
            figure = f"{row['mean']} ± {row['std']}, informs"
            table.add_row(row["script"], row["env"], row["seeds"], steps, figure, row["source"])
    console.print(table)


def refuse(message: str) -> None:
    """Say on stderr what is wrong with the input."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"compare: {message}", markup=False)


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
        if args.margin is not None:
            in_units(args.margin, np.ones(1))
        results, refused = [], False
        for runs in grouped(args.runs):
            try:
                results.append(compare(runs, args.reference, args.margin))
                print_result(results[-1], console)
                write_verdict(runs, results[-1])
            except (ValueError, OSError) as error:  # which says nothing of the others
                refused = True
                refuse(f"{runs[0].algo} on {runs[0].env}: {error}")
        if args.report and results:
            console.print(f"\nReport: {write_report(results, args.report)}")
    except (ValueError, OSError) as error:
        refuse(str(error))
        return BAD_INPUT
    except Exception:  # a fault of ours; Python's 1 means `worse` here
        traceback.print_exc()
        return BAD_INPUT
    except SystemExit as stop:  # 2, argparse's code for a bad command line, means `underpowered` here
        return BAD_INPUT if stop.code else 0
    codes = {result.exit_code for result in results}
    return BAD_INPUT if refused else next(code for code in SEVERITY if code in codes)


if __name__ == "__main__":
    sys.exit(main())
