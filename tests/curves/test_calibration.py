"""How often the harness errs: 1,000 synthetic comparisons of known truth at the declared margins; -s prints rates.

    python -m pytest -s tests/curves/test_calibration.py

A synthetic run climbs from `start` to its own final level, `level` ± `spread` (capped at `best`), around its own moment
of take-off, `onset` ± `jitter` of the budget. The numbers are set so that final score and area scatter over seeds as
in the measured CleanRL logs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from rl_lab.curves import statistics
from rl_lab.curves.compare import declared_margin, in_units
from rl_lab.curves.statistics import VERDICTS, Floats

DRAWS, CHUNK = 1_000, 100
TIME = (np.arange(statistics.GRID) + 0.5) / statistics.GRID


@dataclass(frozen=True)
class Task:
    env: str
    ours: int  # seeds
    reference: int
    start: float
    level: float
    spread: float
    best: float
    onset: float
    jitter: float
    low: float | None = None  # the level of the worse half of the runs, where returns are bimodal

    def curves(self, generator: np.random.Generator, seeds: int, drop: float = 0, delay: float = 0) -> Floats:
        """(CHUNK, seeds, G) curves whose final level is lower by `drop` and whose area is lower by `delay`."""
        shape = (CHUNK, seeds, 1)
        level = np.minimum(generator.normal(self.level, self.spread, shape), self.best)
        if self.low is not None:
            level = np.where(generator.random(shape) < 0.5, level, generator.normal(self.low, self.spread, shape))
        onset = np.maximum(generator.normal(self.onset, self.jitter, shape), 0.03) + delay / (self.level - self.start)
        return self.start + (level - drop - self.start) / (1 + np.exp(-(TIME - onset) / 0.02))

    def rates(self, drop: float = 0, delay: float = 0) -> dict[str, float]:
        """Share of each overall verdict among DRAWS comparisons; drop and delay in multiples of the margins."""
        generator = np.random.default_rng(7)
        declared = declared_margin(self.env, None)[:2]
        counts = np.zeros(len(VERDICTS))
        truth = self.scores(self.curves(generator, 50))
        margins = [in_units(margin, scores.ravel()) for margin, scores in zip(declared, truth, strict=True)]
        for _ in range(DRAWS // CHUNK):
            theirs = self.scores(self.curves(generator, self.reference))
            ours = self.scores(self.curves(generator, self.ours, drop * margins[0], delay * margins[1]))
            verdict = np.zeros(CHUNK, dtype=np.int64)
            for mine, other, margin in zip(ours, theirs, margins, strict=True):
                interval = statistics.difference_interval(mine, other, generator)
                verdict = np.maximum(verdict, statistics.decide(interval.low, interval.high, margin))
            counts += np.bincount(verdict, minlength=len(VERDICTS))
        rates = dict(zip(VERDICTS, counts / DRAWS, strict=True))
        told = ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())
        shift = f"{drop:g} and {delay:g} margins below in score and area" if drop or delay else "equal"
        print(f"\n{self.env}, {self.ours} seeds against {self.reference}, {shift}: {told}", end="")
        return rates

    @staticmethod
    def scores(curves: Floats) -> list[Floats]:
        """Final score and normalised area, (CHUNK, seeds) each."""
        return [curves[..., -1], statistics.normalised_area(curves)]


CARTPOLE = Task("CartPole-v1", 10, 5, start=20, level=489, spread=7, best=500, onset=0.14, jitter=0.015)
ACROBOT = Task("Acrobot-v1", 20, 10, start=-500, level=-84, spread=2, best=-60, onset=0.11, jitter=0.075)
CHEETAH = Task("HalfCheetah-v4", 10, 4, start=-300, level=3500, spread=300, best=9e9, onset=0.2, jitter=0.02, low=1400)


@pytest.mark.parametrize("task", [CARTPOLE, ACROBOT], ids=lambda task: task.env)
def test_regression_tests_have_power_and_rarely_err(task: Task) -> None:
    equal = task.rates()
    assert equal["worse"] <= 0.05
    assert equal["match"] >= 0.80
    assert task.rates(drop=2)["match"] <= 0.05
    assert task.rates(delay=2)["match"] <= 0.05
    for at_the_margin in ({"drop": 1.0}, {"delay": 1.0}):  # the size of the test: 5 % within the error of 1,000 draws
        assert task.rates(**at_the_margin)["match"] <= 0.065


def test_five_reference_seeds_are_too_few_for_acrobot() -> None:
    assert replace(ACROBOT, ours=30, reference=5).rates()["match"] < 0.5


def test_few_seeds_of_a_bimodal_task_decide_nothing() -> None:
    equal = CHEETAH.rates()
    assert equal["worse"] <= 0.05
    assert equal["underpowered"] >= 0.9
    assert CHEETAH.rates(drop=2, delay=2)["match"] <= 0.05


def false_alarms(shape: str, ours: int, reference: int) -> Floats:
    """Shares of DRAWS comparisons of equal sides whose 90 % interval lies wholly below and wholly above zero."""
    generator = np.random.default_rng(ours)
    draw = {
        "normal": lambda size: generator.normal(size=size),
        "skewed": lambda size: generator.exponential(size=size),
        "bimodal": lambda size: generator.normal(np.where(generator.random(size) < 0.5, -1.0, 1.0), 0.15),
    }[shape]
    wrong = np.zeros(2)
    for _ in range(DRAWS // CHUNK):
        interval = statistics.difference_interval(draw((CHUNK, ours)), draw((CHUNK, reference)), generator)
        wrong += [(interval.high < 0).sum() / DRAWS, (interval.low > 0).sum() / DRAWS]
    print(f"\n{shape}, {ours} seeds against {reference}: below {wrong[0]:.1%}, above {wrong[1]:.1%}", end="")
    return wrong


@pytest.mark.parametrize("seeds", [2, 3, 5, 10, 30])
@pytest.mark.parametrize("shape", ["normal", "skewed", "bimodal"])
def test_false_alarms_stay_below_five_percent(shape: str, seeds: int) -> None:
    assert (false_alarms(shape, seeds, 5) <= 0.055).all()  # 5 % within the error of 1,000 draws


@pytest.mark.parametrize("shape", ["normal", "skewed", "bimodal"])
def test_few_seeds_need_the_widening(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (false_alarms(shape, 3, 3) <= 0.055).all()
    monkeypatch.setattr(statistics, "widening", lambda runs, level: 1.0)
    print("\nwithout widening:", end="")
    assert (false_alarms(shape, 3, 3) > 0.10).all()
    false_alarms(shape, 10, 5)


def test_the_seeds_asked_for_decide() -> None:
    """With as many seeds as `seeds_needed` names, equal pairs match in about 80 %, for two shapes of scatter."""
    generator = np.random.default_rng(11)
    for name, margin, low in (("normal", 1.0, 0.0), ("bimodal", 0.6, -2.0)):

        def draw(size: int | tuple[int, int], low: float = low) -> Floats:
            return generator.normal(np.where(generator.random(size) < 0.5, low, 0.0), 1.0 if low == 0 else 0.2)

        seeds = statistics.seeds_needed(draw(400), draw(400), margin, generator)
        assert seeds is not None
        interval = statistics.difference_interval(draw((CHUNK, seeds)), draw((CHUNK, seeds)), generator)
        match = (statistics.decide(interval.low, interval.high, margin) == VERDICTS.index("match")).mean()
        print(f"\n{name}: {seeds} seeds a side, match {match:.1%}", end="")
        assert 0.7 < match < 0.95
