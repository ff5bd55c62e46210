"""Who may import whom, and what an algorithm file comes with."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from rl_lab.__main__ import commands, is_command

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = frozenset(commands())
FOLDERS = ("algorithms", "envs", "preference", "curves")
ALLOWED = {  # importing area -> areas it may import; "contract" is rl_lab.vector, .memory and rl_lab itself
    "package": {"launcher"},  # rl_lab/__init__.py hands out `load`, on first use
    "core": {"contract", "core"},
    "envs": {"contract", "envs"},
    "algorithms": {"contract", "core", "envs"},
    "preference": {"contract", "core"},
    "curves": {"contract", "curves"},
}


def area_of_module(module: str) -> str:
    """`rl_lab.envs.classic` -> envs, `rl_lab.returns` -> core, `rl_lab.ppo` -> launcher."""
    first = module.split(".")[1] if "." in module else ""
    if first in FOLDERS:
        return first
    return "contract" if first in ("", "vector", "memory") else "launcher" if first in COMMANDS else "core"


def imports(tree: ast.AST) -> set[str]:
    """Dotted names a module imports; of `from rl_lab import x` also `rl_lab.x`, where that is a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            below = {f"{module}.{alias.name}" for alias in node.names} if module == "rl_lab" else set()
            names |= {module} | {name for name in below if any(ROOT.glob(name.replace(".", "/") + "*"))}
    return names


def violations(area: str, source: str) -> list[str]:
    """Imports in `source` that a module of `area` may not have; bare and relative ones no module may have."""
    tree = ast.parse(source)
    bare = [name for name in imports(tree) if name.startswith(".") or name.split(".")[0] in FOLDERS]
    if area == "core" and is_command(tree):  # a launcher joins the areas
        return bare
    ours = [name for name in imports(tree) if name.split(".")[0] == "rl_lab"]
    return sorted(bare + [name for name in ours if area_of_module(name) not in ALLOWED[area]])


def modules() -> list[tuple[str, Path]]:
    core = [("package" if path.stem == "__init__" else "core", path) for path in (ROOT / "rl_lab").glob("*.py")]
    folders = {"curves": ROOT / "rl_lab/curves"} | {name: ROOT / name for name in FOLDERS[:3]}
    return core + [(name, path) for name, folder in folders.items() for path in folder.rglob("*.py")]


@pytest.mark.parametrize(("area", "path"), [pytest.param(a, p, id=f"{a}-{p.stem}") for a, p in sorted(modules())])
def test_imports_follow_the_layers(area: str, path: Path) -> None:
    assert violations(area, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("area", "source", "expected"),
    [
        ("core", "from rl_lab.algorithms.ppo import loss", ["rl_lab.algorithms.ppo"]),
        ("core", "def f():\n    import rl_lab.envs", ["rl_lab.envs"]),  # a late import is an import
        ("core", "from rl_lab import preference", ["rl_lab.preference"]),
        ("core", "from rl_lab.ppo import main", ["rl_lab.ppo"]),  # it would bring an algorithm with it
        ("envs", "from rl_lab.returns import gae", ["rl_lab.returns"]),
        ("algorithms", "from rl_lab.algorithms.dqn import Args", ["rl_lab.algorithms.dqn"]),
        ("preference", "from rl_lab.envs import make", ["rl_lab.envs"]),
        ("curves", "from rl_lab.log import Run", ["rl_lab.log"]),
        ("algorithms", "from algorithms.dqn import Args", ["algorithms.dqn"]),
        ("algorithms", "from .dqn import Args", [".dqn"]),
        ("core", "import envs\nif __name__ == '__main__':\n    pass", ["envs"]),
        ("core", "from rl_lab.algorithms.ppo import main\nif __name__ == '__main__':\n    main()", []),
        ("envs", "import torch\nfrom rl_lab import require\nfrom rl_lab.vector import Step", []),
        ("algorithms", "from rl_lab.envs import make\nfrom rl_lab.returns import gae", []),
    ],
)
def test_a_forbidden_import_is_found(area: str, source: str, expected: list[str]) -> None:
    assert violations(area, source) == expected


METHODS = [path for path in (ROOT / "preference").glob("[!_]*.py") if path.stem in COMMANDS]


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "algorithms").glob("[!_]*.py"), *METHODS]), ids=lambda path: path.stem
)
def test_an_algorithm_has_a_launcher_a_page_and_few_lines(path: Path) -> None:
    assert path.stem in COMMANDS
    assert (ROOT / "docs" / f"{path.stem}.md").is_file()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def names(path: Path) -> set[str]:
    """What a module defines, uses, has as a key, and is called."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    fields = ("name", "id", "attr", "arg", "value")
    found = {x for node in nodes for field in fields if isinstance(x := getattr(node, field, None), str)}
    return found | {path.stem}


@functools.cache
def core_names() -> list[set[str]]:
    return [names(file) for folder in ("rl_lab", "envs") for file in (ROOT / folder).glob("*.py")]


@pytest.mark.parametrize("path", sorted((ROOT / "algorithms").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_page_names_what_there_is(path: Path) -> None:
    """Guards against tables that send a reader to what was renamed: to a name that the algorithm does not have, or
    to a `Class`, `Class.name` or `module.name` that the core does not."""
    own, where, unknown = names(path).union(file.stem for file in (ROOT / "rl_lab").glob("*.py")), False, []
    for line in (ROOT / "docs" / f"{path.stem}.md").read_text(encoding="utf-8").splitlines():
        last = line.rstrip("| ").rpartition("|")[2].strip()
        where = (where or last == "where") and line.startswith("|")
        for token in re.findall(r"`([a-zA-Z_.]+)`", last) if where else ():
            parts = {*token.removesuffix(".py").split(".")}
            elsewhere = any(parts <= module for module in core_names()) and (len(parts) > 1 or token[0].isupper())
            if not (parts <= own or elsewhere):
                unknown.append(token)
    assert unknown == []
