"""Reinforcement learning whose training curves can be trusted; `python -m rl_lab` lists the commands."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_lab.evaluate import load

__all__ = ["__version__", "load", "require"]

__version__ = "0.1.0"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: its import name, such as "ale_py".
        extra: the extra of rl_lab that installs it, such as "atari".
    Raises:
        ModuleNotFoundError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # installed, but broken: the error says more than we could
            raise
        message = f"{package} is not installed; in a clone of rl_lab: pip install -c constraints.txt -e '.[{extra}]'"
        raise ModuleNotFoundError(message, name=package) from None


def __getattr__(name: str) -> Any:
    if name == "load":  # on first use, so that importing rl_lab does not import torch
        from rl_lab.evaluate import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
