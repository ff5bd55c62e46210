"""Where the time of one PPO iteration goes: CPU microseconds of its parts, compiled, one thread.

python -m benchmarks.profile --env HalfCheetah-v4
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import tyro
from rich.console import Console
from rich.table import Table

from rl_lab.algorithms import ppo
from rl_lab.compiler import Compiled
from rl_lab.envs.mujoco import MujocoEnv


@dataclass(frozen=True)
class Args:
    env: str = "HalfCheetah-v4"
    num_seeds: int = 1
    iterations: int = 12


def main() -> None:
    args = tyro.cli(Args)
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = function(*args, **kwargs)
            spent.setdefault(name, []).append(1e6 * (time.process_time() - start))
            return result

        return call

    flags = replace(ppo.defaults(args.env), num_seeds=args.num_seeds)
    flags = replace(flags, total_timesteps=args.iterations * flags.num_envs * flags.num_steps)
    with ExitStack() as stack:

        def patch(owner: type, method: str, wrap: Callable[..., Any]) -> None:
            sound = getattr(owner, method)
            stack.enter_context(mock.patch.object(owner, method, lambda self, *x: wrap(sound, self, *x)))

        for owner, method in ((ppo.Collector, "collect"), (MujocoEnv, "step"), (ppo.Run, "log")):
            patch(owner, method, timed(f"{owner.__name__}.{method}", lambda sound, self, *x: sound(self, *x)))
        patch(Compiled, "__call__", lambda sound, self, *x: timed(f"{self.key[0]}, compiled", sound)(self, *x))
        patch(Compiled, "on_leaves", lambda sound, self, *x: timed(f"{self.key[0]}, compiled", sound(self, *x)))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        ppo.train(replace(flags, runs_dir=Path(folder)))

    table = Table(title=f"{args.env}, {args.num_seeds} seed(s): CPU us", title_justify="left")
    for column in ("part", "calls an iteration", "median us a call", "least"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, values in spent.items():
        calls = len(values) / args.iterations
        table.add_row(name, f"{calls:,.0f}", f"{median(values):,.1f}", f"{min(values):,.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
