"""The description of a data set, its numbers worked out by hand."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from rich.console import Console

from rl_lab import dataset as command
from rl_lab.dataset import coverage, distributions, draw, main, print_summary
from rl_lab.offline import Dataset


def data(**changes: Any) -> Dataset:
    """Five transitions in two episodes, of returns 7 and 24: one terminated, one cut off."""
    obs = torch.tensor([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0]])
    columns = {
        "obs": obs,
        "next_obs": obs + 1,
        "actions": torch.tensor([[-2.0], [-1.97], [0.0], [1.0], [1.97]]),
        "rewards": torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]),
        "terminated": torch.tensor([False, False, True, False, False]),
        "truncated": torch.tensor([False, False, False, False, True]),
    }
    spaces = {"observation_space": Box(-9, 9, (2,)), "action_space": Box(-2, 2, (1,))}
    fields = {"name": "lab/hand-v0", "env_id": None, "columns": columns, **spaces, "scores": (2.0, 12.0)}
    return Dataset(**{**fields, "checksum": "abc", "notes": ("Cut.",), **changes})


def test_distributions() -> None:
    """Two values a and b have the quantile a + q (b - a)."""
    found = distributions(data())
    assert list(found) == ["return", "normalized", "length"]
    assert found["return"] == pytest.approx([15.5, 7, 8.7, 11.25, 15.5, 19.75, 22.3, 24])
    assert found["normalized"] == pytest.approx([135, 50, 67, 92.5, 135, 177.5, 203, 220])
    assert found["length"] == pytest.approx([2.5, 2, 2.1, 2.25, 2.5, 2.75, 2.9, 3])
    assert list(distributions(data(scores=None))) == ["return", "length"]


def test_coverage() -> None:
    """At the bounds -2 and 2 is what lies within 1 % of their distance: -2, -1.97 and 1.97."""
    found = coverage(data())
    assert found["obs 0"] == pytest.approx([0, 4, 2, 2**0.5])
    assert found["obs 1"] == [1, 1, 1, 0]
    assert found["action 0"] == pytest.approx([-2, 1.97, -0.2, 2.51236**0.5, 0.6])


def test_coverage_of_discrete_actions_and_images() -> None:
    columns = {**data().columns, "actions": torch.tensor([1, 1, 3, 1, 2])}
    columns["obs"] = torch.tensor([0, 10, 0, 10, 0], dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 2, 2, 1)
    pixels = Box(0, 255, (2, 2, 1), np.uint8)
    dataset = data(columns=columns, observation_space=pixels, action_space=Discrete(3, start=1))
    found = coverage(dataset)
    assert [found[f"action {i}"][2] for i in range(3)] == pytest.approx([0.6, 0.2, 0.2])
    bars = draw(dataset).axes[3]
    assert bars.get_xlabel() == "action: share of the transitions"
    assert [bar.get_height() for bar in bars.patches] == pytest.approx([0.6, 0.2, 0.2])
    assert found["obs 0"] == pytest.approx([0, 10, 4, 24**0.5])
    assert "obs 1" not in found


def test_half_a_bound_is_the_only_one_reached() -> None:
    space = Box(np.array([-2.0], np.float32), np.array([np.inf], np.float32))
    assert coverage(data(action_space=space))["action 0"][-1] == pytest.approx(0.2)  # one of five, exactly there


def test_coverage_of_actions_in_two_axes() -> None:
    """Each number of an action is a dimension, in rows."""
    actions = torch.arange(30.0).view(5, 2, 3)
    found = coverage(data(columns={**data().columns, "actions": actions}, action_space=Box(0, 29, (2, 3))))
    assert [found[f"action {i}"][:2] for i in range(6)] == [[i, 24 + i] for i in range(6)]
    assert [found[f"action {i}"][4] for i in (0, 1, 5)] == [0.2, 0, 0.2] and "action 6" not in found


def test_the_text() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    print_summary(data(), console)
    text = console.export_text()
    assert "lab/hand-v0: environment unknown" in text
    assert "5 transitions in 2 episodes, 50.0% terminated, 50.0% truncated" in text
    assert "reference scores: random 2, expert 12" in text and "note: Cut." in text and "sha256 abc" in text
    assert re.search(r"return +15\.5 +7\.0 +8\.7", text) and re.search(r"action 0 +-2 +1\.97 .* 0\.6 ", text)


@pytest.mark.parametrize(
    ("name", "figure"), [("lab/hand-v0", "lab-hand-v0.png"), ("./data/hopper-v2.hdf5", "hopper-v2.png")]
)
def test_the_figure_is_named_after_the_set(
    name: str, figure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Any] = []
    monkeypatch.setattr(command, "load", lambda *given: asked.append(given) or data(scores=None))
    assert main([name, "--env", "Hopper-v4", "--scores", "2", "12"]) == 1
    assert "--env Hopper-v4 has observations" in capsys.readouterr().err
    assert main([name, "--scores", "2", "12"]) == 0
    assert asked == [(name, (2.0, 12.0), "Hopper-v4"), (name, (2.0, 12.0), None)]
    assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert out.endswith(f"figure: {figure}\n") and "--scores RANDOM EXPERT gives them" in out


def test_faults_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no.hdf5"]) == 1
    assert re.fullmatch(r"error: no\.hdf5 is no file; .*\n", capsys.readouterr().err)
    monkeypatch.setattr(command, "load", lambda *_: data())
    assert main(["lab/hand-v0", "--png", str(tmp_path / "none/figure.png")]) == 1
    assert re.fullmatch(r"error: .*No such file.*none/figure\.png'\n", capsys.readouterr().err)
