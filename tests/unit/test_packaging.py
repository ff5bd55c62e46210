"""The wheel holds what it should under one name; the pins fit what the project asks for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rl_lab

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built through the source distribution, from a copy, without network."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in ("rl_lab", "algorithms", "envs", "preference"):
        shutil.copytree(ROOT / name, clone / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clone)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


def test_wheel_installs_one_name(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"rl_lab", f"rl_lab-{rl_lab.__version__}.dist-info"}


def test_wheel_holds_every_file(wheel: Path) -> None:
    """Every module and every data file of a clone, at the place where the links show it."""
    folders = {ROOT / name: f"rl_lab/{name}" for name in ("algorithms", "envs", "preference")}
    expected = {
        f"{inside}/{path.relative_to(folder).as_posix()}"
        for folder, inside in (folders | {ROOT / "rl_lab": "rl_lab"}).items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {"rl_lab/py.typed", "rl_lab/algorithms/__init__.py", "rl_lab/ppo.py"} <= expected
    assert {name for name in found if name.startswith("rl_lab/")} == expected


def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    result = subprocess.run([sys.executable, "-m", "rl_lab"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "python -m rl_lab.ppo " in result.stdout


def pins() -> dict[str, str]:
    """Name -> version of constraints.txt, where every line is `name==version`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", requirement
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


@pytest.mark.parametrize("extra", ["base", *PROJECT["optional-dependencies"]])
def test_every_dependency_has_a_pin_it_accepts(extra: str) -> None:
    wanted = PROJECT["dependencies"] if extra == "base" else PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement
        assert {s.operator for s in requirement.specifier} == {">="}, "caps and pins belong in constraints.txt"


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in [*ROOT.glob("*.md"), ROOT / ".ci/run"]:
        used = set(re.findall(r"(?:^|`|\s{4})make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert used <= targets, page.name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make ppo" in readme and "make test" in readme
