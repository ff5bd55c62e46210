"""Describe an offline data set: returns, lengths, ends and coverage, as text and PNG."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from gymnasium import spaces
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rl_lab.curves.plot import COLOURS, INK, STYLE, png
from rl_lab.curves.store import set_name
from rl_lab.envs import make
from rl_lab.offline import Dataset, load

QUANTILES = {"min": 0.0, "10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "max": 1.0}
AT_BOUNDS = 0.01  # of an action's range: what counts as at its bounds; ours


@dataclass(frozen=True)
class Args:
    """Describe an offline data set, as text and PNG."""

    dataset: tyro.conf.Positional[str]
    """Minari id, Minari folder or D4RL file (.hdf5)."""
    env: str | None = None
    """Environment id that the data must fit; the data set's own if not given."""
    scores: tuple[float, float] | None = None
    """Mean returns of a random and of an expert policy, instead of the data set's own and D4RL's."""
    png: Path | None = None
    """Where the figure goes; into the current folder, named after the data set, if not given."""


def distributions(dataset: Dataset) -> dict[str, list[float]]:
    """Mean and quantiles, over episodes, of returns, of normalized scores where they are known, and of lengths."""
    columns = {"return": dataset.episode_returns, "length": dataset.episode_lengths.double()}
    if dataset.scores:
        columns = {"return": columns["return"], "normalized": dataset.normalized(columns["return"]), **columns}
    points = torch.tensor(list(QUANTILES.values()), dtype=torch.float64)
    return {name: [float(x.mean()), *x.quantile(points).tolist()] for name, x in columns.items()}


def coverage(dataset: Dataset) -> dict[str, list[float]]:
    """What the data reach of each dimension: min, max, mean and standard deviation over all transitions.

    Of the dimensions of bounded actions also the share of transitions within 1 % of the range from either bound. All
    values of an image are one dimension, and each discrete action is one of zeros and ones.
    """
    rows: dict[str, list[float]] = {}
    space = dataset.action_space
    for name, x in (("obs", dataset.columns["obs"]), ("action", dataset.columns["actions"])):
        if name == "action" and isinstance(space, spaces.Discrete):
            x = torch.nn.functional.one_hot(x - int(space.start), int(space.n))
        x = x.float().reshape(-1, 1) if name == "obs" and x.dim() > 2 else x.float().reshape(len(x), -1)
        stats = torch.stack([x.amin(0), x.amax(0), x.mean(0), x.std(0, correction=0)], 1).tolist()
        rows |= {f"{name} {i}": row for i, row in enumerate(stats)}
    if isinstance(space, spaces.Box):
        for i, share in enumerate(_at_bounds(dataset.columns["actions"], space).tolist()):
            rows[f"action {i}"].append(share)
    return rows


def _at_bounds(actions: Tensor, space: spaces.Box) -> Tensor:
    """(A,) share of the actions (n, ...) at the bounds, dimension by dimension."""
    low, high = (torch.from_numpy(bound).double() for bound in (space.low, space.high))
    room = AT_BOUNDS * (high - low).nan_to_num(posinf=0.0)
    return ((actions <= low + room) | (actions >= high - room)).double().mean(0).flatten()


def print_summary(dataset: Dataset, console: Console) -> None:
    """The text."""
    ends = {key: dataset.columns[key].sum().item() for key in ("terminated", "truncated")}
    episodes = len(dataset.episode_lengths)
    console.print(f"{dataset.name}: {dataset.env_id or 'environment unknown'}", markup=False)
    console.print(f"{len(dataset):,} transitions in {episodes:,} episodes", end=", ")
    console.print(", ".join(f"{count / episodes:.1%} {key}" for key, count in ends.items()))
    if dataset.scores:
        console.print("reference scores: random {:g}, expert {:g}".format(*dataset.scores))
    else:
        console.print("reference scores: unknown; --scores RANDOM EXPERT gives them")
    for note in dataset.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"sha256 {dataset.checksum}")
    console.print(_table("of episodes", ["mean", *QUANTILES], distributions(dataset), ",.1f"))
    titles = ["min", "max", "mean", "std"] + ["at bounds"] * isinstance(dataset.action_space, spaces.Box)
    console.print(_table("of transitions", titles, coverage(dataset), ".3g"))


def _table(first: str, titles: Sequence[str], rows: dict[str, list[float]], form: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(format(value, form) for value in row))
    return table


def draw(dataset: Dataset) -> Figure:
    """Histograms of returns and lengths, and what is covered of each dimension."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 6.0), layout="constrained")
        figure.suptitle(f"{dataset.name}: {len(dataset):,} transitions", fontsize=10)
        (returns, lengths), (obs, actions) = figure.subplots(2, 2)
        _returns(returns, dataset)
        lengths.hist(dataset.episode_lengths.numpy(), bins=50, color=COLOURS["ours"])
        lengths.set_xlabel("length, steps")
        rows = coverage(dataset)
        dimensions = [np.array([row[:4] for key, row in rows.items() if key.startswith(x)]) for x in ("obs", "action")]
        _ranges(obs, "obs", dimensions[0])
        if isinstance(dataset.action_space, spaces.Discrete):
            actions.bar(np.arange(len(dimensions[1])), dimensions[1][:, 2], color=COLOURS["ours"])
            actions.xaxis.set_major_locator(MaxNLocator(integer=True))
            actions.set_xlabel("action: share of the transitions")
        else:
            _ranges(actions, "action", dimensions[1])
        for axes in (returns, lengths):
            axes.set_ylabel("episodes")
        for axes in (returns, lengths, obs, actions):
            axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        return figure


def _returns(axes: Axes, dataset: Dataset) -> None:
    axes.hist(dataset.episode_returns.numpy(), bins=50, color=COLOURS["ours"])
    axes.set_xlabel("return")
    if dataset.scores:
        random, expert = dataset.scores
        scale = (lambda x: dataset.normalized(x), lambda x: x * (expert - random) / 100 + random)
        axes.secondary_xaxis("top", functions=scale).set_xlabel("normalized score")


def _ranges(axes: Axes, name: str, rows: np.ndarray) -> None:
    """Range as a thin line, mean ± one standard deviation as a thick one."""
    low, high, mean, std = rows.T
    x = np.arange(len(rows))
    axes.vlines(x, low, high, color=COLOURS["ours"], linewidth=0.8)
    axes.vlines(x, mean - std, mean + std, color=COLOURS["ours"], linewidth=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"{name}: range, and mean ± standard deviation, by dimension")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False, soft_wrap=True)
    args = tyro.cli(Args, prog="python -m rl_lab.dataset", args=argv)
    try:
        dataset = load(args.dataset, args.scores, args.env)
        if args.env:
            env = make(args.env, (0,), 1)
            dataset.require_env(args.env, env.observation_space, env.action_space)
        print_summary(dataset, console)
        path = args.png or Path(f"{set_name(args.dataset)}.png")
        path.write_bytes(png(draw(dataset)))
        console.print(f"figure: {path}", markup=False)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
