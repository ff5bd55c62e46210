"""Figures of a comparison: learning curves over the reference's band, scores of the single runs, performance profile.

One drawing serves print and page: PNG on white, and SVG without background whose ink is the page's text colour.
"""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib

from rl_lab.curves import statistics
from rl_lab.curves.compare import Result, seeds_of

INK = "#14171d"  # replaced by currentColor in SVG
COLOURS = {"reference": "#e08214", "ours": "#2f7de1"}  # told apart by all, on light and dark
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "rl_lab",
}


def draw(result: Result) -> Figure:
    """The three panels of a result; a side without runs is left out."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        curves, scores, profile = figure.subplots(1, 3, width_ratios=(2.6, 1.0, 1.2))
        _curves(curves, result)
        _scores(scores, result)
        _profile(profile, result)
        for axes in (curves, scores, profile):
            axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        return figure


def short(x: float, _: object = None) -> str:
    """A number of steps as an axis has it: 0, 500k, 1M."""
    return f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k" if x else "0"


def png(figure: Figure) -> bytes:
    """The figure as PNG on white, in 64 colours: a third of the bytes."""
    whole, small = io.BytesIO(), io.BytesIO()
    figure.savefig(whole, format="png", dpi=160, facecolor="white")
    Image.open(whole).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return small.getvalue()


def svg(figure: Figure) -> str:
    """The figure as an <svg> element to stand in a page, in the page's text colour."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _curves(axes: Axes, result: Result) -> None:
    first = result.start if result.unit == "gradient steps" else 0  # before an evaluation there is nothing to draw
    steps = (np.arange(first, statistics.GRID) + 0.5) * result.budget / statistics.GRID
    for side, colour in COLOURS.items():
        if side not in result.curves:
            continue
        curves = result.curves[side][:, first:]
        band = statistics.iqm_interval(curves.T, np.random.default_rng(0))
        axes.plot(steps, curves.T, color=colour, alpha=0.22, linewidth=0.6)
        if len(curves) > 1:
            low, high = np.clip([band.low, band.high], curves.min(), curves.max())  # no return beyond those seen
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, band.estimate, color=colour, linewidth=1.8, label=f"{side}, IQM of {seeds_of(len(curves))}")
    if 1 < result.start < statistics.GRID:
        axes.axvspan(0, result.start * result.budget / statistics.GRID, color=INK, alpha=0.05, linewidth=0)
    axes.set_xlim(0, result.budget)
    axes.set_xlabel(result.unit)
    axes.set_ylabel("return")
    axes.xaxis.set_major_formatter(short)
    axes.legend(frameon=False, loc="lower right")


def _scores(axes: Axes, result: Result) -> None:
    sides = [side for side in COLOURS if side in result.scores]
    for x, side in enumerate(sides):
        scores = result.scores[side]
        interval = statistics.iqm_interval(scores, np.random.default_rng(0))
        spread = np.linspace(-0.16, 0.16, len(scores)) if len(scores) > 1 else np.zeros(1)
        axes.plot(x + spread, scores, "o", color=COLOURS[side], markersize=4, alpha=0.6, markeredgewidth=0)
        if len(scores) > 1:
            axes.vlines(x + 0.3, interval.low, interval.high, color=COLOURS[side], linewidth=2)
        axes.plot([x + 0.3], [interval.estimate], "D", color=COLOURS[side], markersize=5)
    axes.set_xticks(range(len(sides)), sides)
    axes.set_xlim(-0.5, len(sides) - 0.3)
    axes.set_title("last-100 score, IQM and 90 %", fontsize=9)


def _profile(axes: Axes, result: Result) -> None:
    every = np.concatenate(list(result.scores.values()))
    room = 0.05 * (np.ptp(every) or 1.0)
    thresholds = np.linspace(every.min() - room, every.max() + room, 400)
    for side, colour in COLOURS.items():
        if side in result.scores:
            profile = statistics.performance_profile(result.scores[side], thresholds)
            axes.step(thresholds, profile, where="post", color=colour, linewidth=1.6)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("score")
    axes.set_title("share of seeds above a score", fontsize=9)
