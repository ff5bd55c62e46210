"""Log-probabilities under the model that training starts from, computed once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_lab import checkpoint, require
from rl_lab.compiler import cache_folder
from rl_lab.distributed import ranks, summed
from rl_lab.language import Tree, micro_batches, pack, token_logprobs

CHUNK = 64  # trees of a file: what an interruption can cost


def digest(model: Any) -> str:
    """SHA-256 of what a model is and of its weights; adapters, which change nothing at their start, do not count."""
    config = {name: x for name, x in model.config.to_dict().items() if name not in ("_name_or_path", "use_cache")}
    found = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, x in model.state_dict().items():
        if ".lora_" in name:
            continue
        found.update(name.encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


@torch.no_grad()
def branch_logprobs(model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    """(branches,) float32 log-probabilities of all branches, sums over their tokens, in the order of the trees."""
    device = next(model.parameters()).device
    sums = [torch.zeros(0, device=device)]
    for group in micro_batches(trees, micro_tokens):
        packed = pack([trees[i] for i in group], device)
        sums.append(packed.sums(token_logprobs(model, packed, bf16=bf16)))
    return torch.cat(sums)


def cached_logprobs(model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    """`branch_logprobs`, kept in files named by a hash of the model, the tokens and how they are computed.

    Processes share the work.
    """
    folder: Path = cache_folder() / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    versions = torch.__version__, require("transformers", "preference").__version__
    how = [digest(model), micro_tokens, bf16, model.device.type, *versions]
    rank, size = ranks()
    found = []
    for number, i in enumerate(range(0, len(trees), CHUNK)):
        chunk = trees[i : i + CHUNK]
        if number % size == rank:
            key = hashlib.sha256(json.dumps([how, chunk]).encode()).hexdigest()[:32]
            found.append(_kept(folder / f"{key}.safetensors", model, chunk, micro_tokens, bf16))
        else:
            found.append(torch.zeros(sum(len(tree.branches) for tree in chunk), device=model.device))
    summed(found)
    return torch.cat(found)


def _kept(path: Path, model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    try:
        return checkpoint.load_tensors(path)[0]["logps"].to(model.device)
    except (OSError, ValueError, KeyError):  # not there yet, or damaged
        logps = branch_logprobs(model, trees, micro_tokens, bf16)
    mine = path.with_suffix(f".{os.getpid()}")  # another run may be writing the same
    checkpoint.save_tensors(mine, {"logps": logps}, {})
    os.replace(mine, path)
    return logps
