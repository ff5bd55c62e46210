"""What a run will take of memory, told before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes to be had on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if (info := Path("/proc/meminfo")).exists():  # which counts what caches would give back
        return 1024 * int(info.read_text().partition("MemAvailable:")[2].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_memory(num_envs: int, num_seeds: int, bytes_each: int, device: torch.device) -> None:
    """Raise a ValueError that says how many would fit, unless `num_seeds * num_envs` times `bytes_each` are free."""
    taken, free = num_envs * num_seeds * bytes_each, free_memory(device)
    if taken > free:
        raise ValueError(
            f"num_envs={num_envs} takes {taken / 1e9:.1f} GB (seeds: {num_seeds}), {free / 1e9:.1f} GB are free on "
            f"{device}; {free // bytes_each // num_seeds} would fit"
        )
