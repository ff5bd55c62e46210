"""Checkpoints that survive a kill at any moment, and files of parameters. Loading runs no code from a file.

Both are safetensors files (https://huggingface.co/docs/safetensors, "Format"): a JSON header, then raw numbers. That
format has no checksum, so the metadata carries the SHA-256 of the whole file, taken with zeros in the digest's place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

NAME, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
_TREE, _SHA256 = "rl_lab.tree", "rl_lab.sha256"
_ZEROS = b"0" * 64
_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DIGEST = re.compile(rb'(?<="rl_lab\.sha256":")[0-9a-f]{64}')  # within a JSON string the quotes would have backslashes


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` as the folder's checkpoint; the one before becomes the previous one, so one is always complete.

    Args:
        state: nested dicts with str keys; leaves are tensors or JSON values (None, bool, int, float, str, lists).
    Raises:
        ValueError: for another kind of leaf, or a key that holds "/".
        OSError: if the file cannot be written (it is named); the earlier checkpoints stay.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_take_tensors(state, (), tensors))
    save_tensors(folder / NAME, tensors, {_TREE: tree}, keep=folder / PREVIOUS)


def load(folder: Path, to_go_on: bool = False) -> dict[str, Any]:
    """The newest good state in `folder`, tensors on the CPU. Warns if it is the previous one, ValueError if none.

    Args:
        to_go_on: whether a damaged newest one goes, which the next `save` would put in the place of the good one.
    """
    found: list[str] = []
    for path in (folder / NAME, folder / PREVIOUS):
        try:
            tensors, metadata = load_tensors(path)
            state: dict[str, Any] = _put_tensors(json.loads(metadata[_TREE]), (), tensors)
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except KeyError:
            found.append(f"{path} holds tensors but no checkpoint")
        except ValueError as error:
            found.append(str(error))
        else:
            for reason in found:
                warnings.warn(f"{reason}; going on from {path}", stacklevel=2)
            if found and to_go_on:
                (folder / NAME).unlink(missing_ok=True)
            return state
    raise ValueError(f"{'; '.join(found)}; name a run folder with a complete checkpoint")


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], keep: Path | None = None) -> None:
    """Write, as `replace_file` does, a file that any safetensors reader can load.

    No tensor is copied that is dense and on the CPU: a replay may take most of the memory.
    """
    dense = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata | {_SHA256: _ZEROS.decode()}}
    chunks, end = [], 0
    for name, t in sorted(dense.items(), key=lambda item: -item[1].element_size()):  # largest first, so all are aligned
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
        flat = t.as_strided((t.numel(),), (1,))  # of one number the stride may be anything
        chunks.append(flat.view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(head)
    for chunk in chunks:
        digest.update(chunk)
    replace_file(path, head.replace(_ZEROS, digest.hexdigest().encode(), 1), *chunks, keep=keep)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, on the CPU, and metadata of a file written here; ValueError if it is foreign or damaged."""
    with open(path, "rb") as file:
        head = file.read(8)
        head += file.read(min(int.from_bytes(head, "little"), _LONGEST_HEADER))
        if (found := _DIGEST.search(head)) is None:
            raise ValueError(f"{path} has no rl_lab checksum: it was cut short or another program wrote it")
        digest = hashlib.sha256(head.replace(found[0], _ZEROS, 1))
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest().encode() != found[0]:
        raise ValueError(f"{path} is damaged: its content does not match its checksum")
    with safetensors.safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        # Clones, because kernels round differently where memory is not aligned as torch aligns it.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 (no mapping)
    return tensors, {key: x for key, x in metadata.items() if key != _SHA256}


def replace_file(path: Path, *chunks: bytes | memoryview, keep: Path | None = None) -> None:
    """Write a file so that a kill or a power cut leaves the old one (moved to `keep`) or the new; OSError names it."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # only now are the names on disk
        os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_json(leaf: Any) -> bool:
    return leaf is None or type(leaf) in (bool, int, float, str) or (type(leaf) is list and all(map(_is_json, leaf)))


def _take_tensors(node: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """`node` in JSON, dicts in their order; null for a tensor, which `tensors` gets as "a/b/c"; [x] for a leaf x."""
    if isinstance(node, dict):
        for key in node:
            if not isinstance(key, str) or "/" in key or key == "__metadata__":  # the latter is safetensors' own
                raise ValueError(f"checkpoint key {key!r} in {'/'.join(path)!r}: use strings without '/'")
        return {key: _take_tensors(child, (*path, key), tensors) for key, child in node.items()}
    if isinstance(node, Tensor):
        tensors["/".join(path)] = node
        return None
    if _is_json(node):
        return [node]
    raise ValueError(f"{'/'.join(path)} is a {type(node).__name__}; a checkpoint holds tensors and JSON values")


def _put_tensors(tree: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        return {key: _put_tensors(child, (*path, key), tensors) for key, child in tree.items()}
    return tensors["/".join(path)] if tree is None else tree[0]
