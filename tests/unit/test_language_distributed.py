"""Language models under torchrun: two processes that share a batch are one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl_lab import checkpoint
from rl_lab.distributed import ranks
from rl_lab.language import load_model
from rl_lab.preference import dpo, kto, reward_model, sft
from rl_lab.run import flatten
from tests.language_runs import assert_equal_gradients, gradients, labelled, pairs, trained, write
from tests.language_runs import folder as folder_of

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# The second step's gradients: of a model that has moved from its reference, so that z_0 and KLs are not zero.
FLAGS: dict[str, Any] = {"steps": 2, "batch_size": 5, "learning_rate": 1e-3, "decay": False, "micro_tokens": 30}


EVEN = FLAGS | {"batch_size": 4, "micro_tokens": 1, "eval_examples": 3}  # of which a sharded run takes two


def found(tiny_model: Path, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Gradients of each method on a batch of five, of which one process has three and the other two; and of sharded
    runs on a batch of four, with what they save."""
    data, single = folder / "pairs.jsonl", folder / "labelled.jsonl"
    runs = {loss: trained(dpo, tiny_model, data, loss=loss, **FLAGS) for loss in ("sigmoid", "ipo", "tdpo2")}
    runs |= {"kto": trained(kto, tiny_model, single, **FLAGS), "sft": trained(sft, tiny_model, data, **FLAGS)}
    parts = {"shard": True} if ranks()[1] > 1 else {}
    sharded = {"tdpo2 sharded": trained(dpo, tiny_model, data, loss="tdpo2", **EVEN, **parts)}
    sharded |= {"adapters sharded": trained(dpo, tiny_model, data, lora_rank=2, **EVEN, **parts)}
    sharded |= {"kto sharded": trained(kto, tiny_model, single, **EVEN, **parts)}
    sharded |= {"sft sharded": trained(sft, tiny_model, data, **EVEN, **parts)}
    found = {name: gradients(run) for name, run in (runs | sharded).items()}
    for name, run in sharded.items():
        if not ranks()[0]:  # whose run folder lasts
            saved = checkpoint.load(folder_of(run))["state"]
            found |= {f"{name}, {what}": flatten(saved[what]) for what in ("params", "moments")}
            found[f"{name}, model"] = dict(load_model(str(folder_of(run))).named_parameters())
        if parts:
            assert all(isinstance(p, DTensor) for p in run.model.parameters())
            assert all(x.to_local().numel() < x.numel() for x in run.trained.values())
    return found


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "labelled.jsonl", labelled())
    return write(tmp_path / "pairs.jsonl", pairs())


def test_two_processes_have_the_gradient_of_one(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards counts of one process's share, a z_0 of its own, and reference numbers of which each has a part; and that
    a sharded model has the same gradients, not their mean or halves of them, and is whole in its files."""
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
        assert len(part) == len(whole) - 12 * rank
        for name, grads in [(name, whole[name]) for name in part]:
            # Adam takes a whole step also of a gradient that rounding alone makes differ from zero.
            assert_equal_gradients(grads, part[name], 1e-5 if "," not in name else 1e-3)


def test_the_command_leaves_one_run(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    """Guards logs and models of each process, and files of the reference that both write."""
    flags = ["--model", tiny_model, "--data", data, "--batch-size", 3, "--runs-dir", tmp_path / "runs"]
    words = [*TORCHRUN, "-m", "rl_lab.dpo", *map(str, flags), "--steps", "2", "--warmup", "0", "--no-bf16"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT, timeout=300)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "model" / "model.safetensors").is_file() and (run / "evaluation.json").is_file()
    assert done.stdout.count("held-out pairs") == 1
    assert all(path.suffix == ".safetensors" for path in (tmp_path / "cache" / "reference").iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "--shard True must be left out without torchrun"),
        ({"batch_size": 5, "size": 2}, "--batch-size 5 must be a multiple of the 2 processes for --shard"),
        ({"micro_tokens": 30, "size": 2}, "--micro-tokens 30 must be 1, that is one example at once, for --shard"),
        ({"eval_examples": 1, "size": 2}, r"--holdout .* must be a share with 2 examples or more for --shard"),
        ({"method": reward_model}, "--shard True must be left out: reward models are not divided"),
    ],
)
def test_ranks_that_would_wait_for_each_other_are_refused(
    flags: dict[str, Any], message: str, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, method = flags.pop("size", 1), flags.pop("method", sft)
    monkeypatch.setattr("rl_lab.language_training.ranks", lambda: (0, size))
    with pytest.raises(ValueError, match=message):
        trained(method, tiny_model, data, **EVEN | {"shard": True} | flags)
