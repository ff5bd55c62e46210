"""What a run will take of memory, told before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes to be had on the device, in a container no more than it may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (info := Path("/proc/meminfo")).exists():  # which counts what caches would give back
        available = 1024 * int(info.read_text().partition("MemAvailable:")[2].split()[0])
        return min([available, *_group_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _group_room(own: Path, root: Path) -> list[int]:
    """Bytes that each control group which limits this process leaves it, caches it would give back included.

    Of version 2 (kernel documentation, admin-guide/cgroup-v2.rst, "Memory Interface Files").
    """
    lines = own.read_text().splitlines() if own.is_file() else []  # of a kernel without control groups
    groups = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    found = []
    for folder in (root / groups[0], *(root / groups[0]).parents) if groups else ():
        if (limit := folder / "memory.max").is_file() and (text := limit.read_text().strip()) != "max":
            caches = int((folder / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])
            found.append(int(text) - int((folder / "memory.current").read_text()) + caches)
    return found


def require_memory(num_envs: int, num_seeds: int, bytes_each: int, device: torch.device) -> None:
    """Raise a ValueError that says how many would fit, unless `num_seeds * num_envs` times `bytes_each` are free."""
    taken, free = num_envs * num_seeds * bytes_each, free_memory(device)
    if taken > free:
        raise ValueError(
            f"num_envs={num_envs} takes {taken / 1e9:.1f} GB (seeds: {num_seeds}), {free / 1e9:.1f} GB are free on "
            f"{device}; {free // bytes_each // num_seeds} would fit"
        )
