"""`python -m rl_lab` and what every command shares."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rl_lab
from rl_lab.__main__ import commands

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_list_names_each_command_with_its_line() -> None:
    result = python("-m", "rl_lab")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^ +python -m rl_lab\.ppo +Train PPO", result.stdout, re.MULTILINE)
    assert "vector" not in result.stdout and "__main__" not in result.stdout


def test_a_command_is_a_module_with_a_guard(tmp_path: Path) -> None:
    (tmp_path / "fly.py").write_text('"""Fly.\n\nFar."""\nraise SystemExit\nif __name__ == "__main__":\n    pass\n')
    (tmp_path / "helper.py").write_text('"""Help."""\n')
    (tmp_path / "__main__.py").write_text('"""List."""\nif __name__ == "__main__":\n    pass\n')
    assert commands(tmp_path) == {"fly": "Fly."}


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_exits_well(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"[A-Z][a-z]+ .*\.", commands()[name]), "the docstring's first line is a sentence: verb first"
    assert "python -m" not in commands()[name], "the list says how to call it"
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"rl_lab.{name}", run_name="__main__", alter_sys=True)
    assert exit.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: python -m rl_lab.{name} ")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_exist(page: Path) -> None:
    named = re.findall(r"python -m ((?:rl_lab|benchmarks)[\w.]*)", page.read_text(encoding="utf-8"))
    for module in {name.rstrip(".") for name in named}:
        path = ROOT / module.replace(".", os.sep)
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_importing_the_package_is_light() -> None:
    result = python("-c", "import sys, rl_lab.__main__; print('torch' in sys.modules, 'numpy' in sys.modules)")
    assert result.stdout == "False False\n", result.stderr


def test_load_is_found_late() -> None:
    from rl_lab.evaluate import load

    assert rl_lab.load is load
    with pytest.raises(AttributeError, match="'rl_lab' has no attribute 'lode'"):
        _ = rl_lab.lode


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert rl_lab.require("json", "atari").dumps(1) == "1"
    with pytest.raises(ModuleNotFoundError, match=r"^no_such_game is not installed; .* -e '\.\[atari\]'$"):
        rl_lab.require("no_such_game.core", "atari")
    (tmp_path / "broken_game.py").write_text("import no_such_engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_engine'"):  # the cause is not hidden
        rl_lab.require("broken_game", "atari")
