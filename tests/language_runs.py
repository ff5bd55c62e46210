"""Training runs of a tiny language model, and what they leave; the peers that they are held against."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.distributed import whole
from rl_lab.language_training import LanguageRun

# One gradient step of 4 examples in float32, not clipped, evaluated on two.
SHORT: dict[str, Any] = {
    "steps": 1, "batch_size": 4, "warmup": 0, "max_grad_norm": 1e9, "max_tokens": 64, "eval_examples": 2, "bf16": False,
    "device": "cpu",
}  # fmt: skip


def words(count: int, seed: int = 0, low: int = 1, high: int = 9) -> list[str]:
    random = np.random.RandomState(seed)
    return ["".join(random.choice(list("abcdefgh"), random.randint(low, high))) for _ in range(count)]


def pairs(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs of random letters, of different lengths; every prompt is another one."""
    columns = zip(*(words(count, seed + i) for i in range(3)), strict=True)
    return [{"prompt": f"{i} {p}", "chosen": c, "rejected": r} for i, (p, c, r) in enumerate(columns)]


def labelled(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    """Completions of random letters, two in three desirable."""
    rows = pairs(count, seed)
    return [{"prompt": x["prompt"], "completion": x["chosen"], "label": i % 3 > 0} for i, x in enumerate(rows)]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trained(method: ModuleType, model: Path, data: Path, **flags: Any) -> LanguageRun:
    """The method's run with these flags, in a folder of its own beside the data."""
    runs_dir = Path(tempfile.mkdtemp(dir=data.parent))
    args = method.Args(model=str(model), data=str(data), runs_dir=runs_dir, **SHORT | flags)
    run: LanguageRun = method.train(args)
    return run


def command(method: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit status of the method's command."""
    monkeypatch.setattr(sys, "argv", [method.__name__, *map(str, words)])
    try:
        method.main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def folder(run: LanguageRun) -> Path:
    return run.logs.folders[0]


def scalars(folder: Path) -> dict[str, list[float]]:
    """What was logged, by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def evaluation(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return report


def gradients(run: LanguageRun) -> dict[str, Tensor]:
    """Of the last step."""
    return {name: whole(p.grad).clone() for name, p in run.trained.items() if p.grad is not None}


def assert_equal_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    """Up to a share of the largest number in them, which is not zero."""
    assert a.keys() == b.keys()
    largest = max(float(x.abs().max()) for x in a.values())
    assert largest > 1e-6
    error = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert error <= tolerance * largest, (error, largest)


def left(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, but wall times and speeds."""
    saved = checkpoint.load(folder)["state"]
    report = {name: x for name, x in evaluation(folder).items() if name != "seconds"}
    logs = {tag: x for tag, x in scalars(folder).items() if tag != "charts/SPS"}
    return {"state": frozen(saved), "report": report, "logs": logs, "model": model_bytes(folder)}


def model_bytes(folder: Path) -> bytes:
    (path,) = (folder / "model").glob("*.safetensors")
    return path.read_bytes()


def frozen(tree: Any) -> Any:
    """Nested dicts of tensors as something that `==` compares bit for bit."""
    if isinstance(tree, dict):
        return {name: frozen(child) for name, child in tree.items()}
    return (str(tree.dtype), tuple(tree.shape), tree.numpy().tobytes()) if isinstance(tree, Tensor) else tree


def logits_alone(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """(T, V) log-probabilities of the next token along a completion, by the plain forward pass of one sequence."""
    with torch.no_grad():
        scores = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return scores.double().log_softmax(1)


def logp_alone(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Log-probability of a completion."""
    return float(logits_alone(model, prompt, tokens).gather(1, torch.tensor(tokens)[:, None]).sum())


def kl_alone(model: Any, reference: Any, prompt: list[int], tokens: list[int]) -> float:
    """sum_t KL(reference || model) over the whole vocabulary along a completion."""
    p, q = (logits_alone(x, prompt, tokens) for x in (reference, model))
    return float((p.exp() * (p - q)).sum())


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
