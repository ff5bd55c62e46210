"""A training command of rl_lab with a line "SPS: ..." after each iteration, as CleanRL's scripts print.

python -m benchmarks.ours ppo --env CartPole-v1 ...
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator

from rl_lab.run import Run

iterations = Run.iterations


def marked(self: Run, num_iterations: int, steps: int) -> Iterator[int]:
    """What `Run.iterations` yields, with a line after each."""
    begin = time.time()
    for iteration in iterations(self, num_iterations, steps):
        yield iteration
        print("SPS:", int((iteration + 1) * steps / (time.time() - begin)), flush=True)


if __name__ == "__main__":
    Run.iterations = marked  # type: ignore[method-assign]
    runpy.run_module(f"rl_lab.{sys.argv.pop(1)}", run_name="__main__")
