"""What all tests share: one torch thread, one cache of compiled code, the optional reference data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses; this one has torch loaded already
    torch.set_num_threads(1)
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")  # compiled graphs check shapes and strides, here only
    # What a test compiles, the later ones load, and so does the next session (`pytest --cache-clear` starts anew).
    if config.pluginmanager.has_plugin("cacheprovider"):
        assert config.cache is not None
        os.environ.setdefault("RL_LAB_CACHE", str(config.cache.mkdir("compiled")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the reference data in {path}")
    return path
