"""Language models under torchrun: two processes that share a batch are one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lab.preference import dpo, kto, sft
from tests.language_runs import assert_equal_gradients, gradients, labelled, pairs, trained, write

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The second step's gradients: of a model that has moved from its reference, so that z_0 and KLs are not zero.
FLAGS: dict[str, Any] = {"steps": 2, "batch_size": 5, "learning_rate": 1e-3, "decay": False, "micro_tokens": 30}


def found(tiny_model: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Gradients of each method on a batch of five, of which one process has three and the other two."""
    data, single = folder / "pairs.jsonl", folder / "labelled.jsonl"
    runs = {loss: trained(dpo, tiny_model, data, loss=loss, **FLAGS) for loss in ("sigmoid", "ipo", "tdpo2")}
    runs |= {"kto": trained(kto, tiny_model, single, **FLAGS), "sft": trained(sft, tiny_model, data, **FLAGS)}
    return {name: gradients(run) for name, run in runs.items()}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "labelled.jsonl", labelled())
    return write(tmp_path / "pairs.jsonl", pairs())


def test_two_processes_have_the_gradient_of_one(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards counts of one process's share, a z_0 of its own, and reference numbers of which each has a part."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; from pathlib import Path; from rl_lab import reference\n"
        "from tests.unit import test_language_distributed as t; from rl_lab.distributed import ranks\n"
        "reference.CHUNK = 4\n"
        f"found = t.found(Path({str(tiny_model)!r}), Path({str(tmp_path)!r}))\n"
        f"torch.save(found, {str(tmp_path)!r} + f'/{{ranks()[0]}}.pt')\n"
    )
    subprocess.run([*TORCHRUN, str(script)], check=True, capture_output=True, cwd=ROOT, timeout=300)
    whole = found(tiny_model, tmp_path)
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, grads in whole.items():
            assert_equal_gradients(grads, part[name], 1e-5)


def test_the_command_leaves_one_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards logs and models of each process, and files of the reference that both write."""
    flags = ["--model", tiny_model, "--data", data, "--steps", 2, "--batch-size", 3, "--runs-dir", tmp_path / "runs"]
    words = [*TORCHRUN, "-m", "rl_lab.dpo", *map(str, flags), "--no-bf16"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, timeout=300)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file() and (run / "evaluation.json").is_file()
    assert done.stdout.count("held-out pairs") == 1
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "cache" / "reference").iterdir())
