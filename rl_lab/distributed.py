"""Data-parallel training under torchrun: each rank takes its share of the work, gradients are summed or averaged."""

from __future__ import annotations

import atexit
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor

from rl_lab.cli import BaseArgs, RunArgs
from rl_lab.compiler import Compiled

B = TypeVar("B", bound=BaseArgs)
A = TypeVar("A", bound=RunArgs)


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks, (0, 1) without torchrun; joins the others at the first call.

    Each rank of a machine takes a GPU of its own, if there are enough of them; else all take the first one.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and not dist.is_initialized():
        apart = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", size))
        if apart:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if apart else "gloo")
        atexit.register(dist.destroy_process_group)
    return rank, size


def lasting(args: B) -> B:
    """The flags, with a run folder that does not last on all ranks but the first, which alone prints.

    Raises:
        ValueError: for --resume: a checkpoint holds one rank's state only.
    """
    rank, size = ranks()
    if size > 1:
        args.require("resume", args.resume is None, "left out: a run under torchrun cannot be continued")
    if rank:
        args = dataclasses.replace(args, runs_dir=Path(tempfile.mkdtemp(prefix="rl_lab-rank-")))
        atexit.register(shutil.rmtree, args.runs_dir, ignore_errors=True)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (rank 0 says the same)
    return args


def share(args: A) -> tuple[A, A]:
    """The flags of the run, and those of this rank with its share of `num_envs`. Only rank 0's run folders last.

    Raises:
        ValueError: if num_envs does not divide, for --until-return, and for --resume: a checkpoint holds one rank's
            environments only.
    """
    size = ranks()[1]
    if size == 1:
        return args, args
    num_envs: int = getattr(args, "num_envs", 1)
    args.require("num_envs", num_envs % size == 0, f"a multiple of torchrun's {size} ranks")
    alone = "left out: torchrun's ranks, each with statistics of its own, might not end together"
    args.require("until_return", args.until_return is None, alone)
    args = lasting(args)
    return args, dataclasses.replace(args, num_envs=num_envs // size)  # type: ignore[call-arg]


def summed(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over the ranks, in place."""
    if ranks()[1] > 1:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat)
        for x, part in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(part.view_as(x))


def summed_table(table: dict[str, float]) -> dict[str, float]:
    """Each number of a table summed over the ranks, whose tables have the same names in the same order."""
    numbers = torch.tensor(list(table.values()), dtype=torch.float64)
    summed([numbers])
    return dict(zip(table, numbers.tolist(), strict=True))


def shard(model: torch.nn.Module, device: torch.device) -> None:
    """Divide a model's weights among the ranks, in place: FSDP2 [Zhao et al. 2023, arXiv:2304.11277].

    Each layer is whole only while it is computed. Gradients become those of the mean over the ranks' losses, divided as
    the weights are. All ranks have to compute forward and backward equally often, or they wait for each other for ever.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here, as these take longer to import than all else
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks()[1],))
    for stack in [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)][::-1]:
        for layer in stack:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """A tensor that may be divided among the ranks, which all have to ask for it; on the CPU if it was."""
    if ranks()[1] == 1:
        return x
    from torch.distributed.tensor import DTensor

    return x.full_tensor().cpu() if isinstance(x, DTensor) else x


def averaged(function: Callable[..., Any], key: object, compile: bool) -> tuple[Callable[..., Any], bool]:
    """`function` with its output, a tree of float32 tensors, averaged over the ranks.

    Returns:
        the function, and whether what calls it may be compiled as one graph. With several ranks it may not, as they
        talk from Python in between; `function` itself then is, under `key`.
    """
    size = ranks()[1]
    if size == 1:
        return function, compile
    function = Compiled(function, ("averaged", key), compile)

    def average(*args: Any) -> Any:
        leaves, treespec = pytree.tree_flatten(function(*args))
        flat = torch.cat([x.flatten() for x in leaves])
        dist.all_reduce(flat)
        parts = (flat / size).split([x.numel() for x in leaves])
        return pytree.tree_unflatten([part.view_as(x) for part, x in zip(parts, leaves, strict=True)], treespec)

    return average, False


def gathered(rollout: dict[str, Tensor], num_seeds: int) -> dict[str, Tensor]:
    """Every (T, S * N, ...) column of this rank's rollout as (T, S * N * ranks, ...), each seed's rows together."""
    size = ranks()[1]
    if size == 1:
        return rollout

    def gather(column: Tensor) -> Tensor:
        parts = [torch.empty_like(column) for _ in range(size)]
        dist.all_gather(parts, column.contiguous())
        return torch.cat([part.unflatten(1, (num_seeds, -1)) for part in parts], dim=2).flatten(1, 2)

    return {name: gather(column) for name, column in rollout.items()}
