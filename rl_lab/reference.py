"""Log-probabilities under the model that training starts from, computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.compiler import cache_folder
from rl_lab.language import Tree, autocast, micro_batches, pack, token_logprobs

CHUNK = 64  # trees of a file: what an interruption can cost


def digest(model: Any) -> str:
    """SHA-256 of a model's weights."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, x in model.state_dict().items():
        found.update(name.encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.no_grad()
def branch_logprobs(model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    """(branches,) float32 log-probabilities of all branches, sums over their tokens, in the order of the trees."""
    device, sums = next(model.parameters()).device, []
    with autocast(device, bf16):
        for group in micro_batches(trees, micro_tokens):
            packed = pack([trees[i] for i in group], device)
            sums.append(packed.sums(token_logprobs(model, packed)))
    return torch.cat(sums)


def cached_logprobs(model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    """`branch_logprobs`, kept in files named by a hash of the weights, the tokens and how they are computed."""
    folder: Path = cache_folder() / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    weights, found = digest(model), []
    for i in range(0, len(trees), CHUNK):
        chunk = trees[i : i + CHUNK]
        key = json.dumps([weights, chunk, micro_tokens, bf16, torch.__version__])
        path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        try:
            logps = checkpoint.load_tensors(path)[0]["logps"].to(model.device)
        except (OSError, ValueError, KeyError):  # not there yet, or damaged
            logps = branch_logprobs(model, chunk, micro_tokens, bf16)
            checkpoint.save_tensors(path, {"logps": logps}, {})
        found.append(logps)
    return torch.cat(found)
