"""List the commands of rl_lab."""

from __future__ import annotations

import ast
from pathlib import Path


def is_command(tree: ast.Module) -> bool:
    """Whether a module runs something as `python -m`: it has an `if __name__ == "__main__"` guard."""
    return any(isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree.body)


def commands(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Name and one line of every command in a folder, read from the files: nothing is imported."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[!_]*.py"))}
    return {
        name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items() if is_command(tree)
    }


def main() -> None:
    """Print one line per command."""
    found = commands()
    width = max(map(len, found), default=0)
    print("Commands of rl_lab (each explains itself with --help):\n")
    for name, line in found.items():
        print(f"    python -m rl_lab.{name:<{width}}  {line}")


if __name__ == "__main__":
    main()
