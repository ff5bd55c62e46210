"""A training command of rl_lab with a line "SPS: ..." after each iteration, as CleanRL's scripts print.

Where a reference's log-probabilities are computed at the start, there is also one before and one after that.

python -m benchmarks.ours ppo --env CartPole-v1 ...
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from rl_lab import reference
from rl_lab.language import Tree
from rl_lab.run import BaseRun

iterations, cached_logprobs = BaseRun.iterations, reference.cached_logprobs


def marked(self: BaseRun, num_iterations: int, steps: int) -> Iterator[int]:
    """What `BaseRun.iterations` yields, with a line after each."""
    begin = time.time()
    for iteration in iterations(self, num_iterations, steps):
        yield iteration
        print("SPS:", int((iteration + 1) * steps / (time.time() - begin)), flush=True)


def marked_reference(model: Any, trees: Sequence[Tree], micro_tokens: int, bf16: bool) -> Tensor:
    """`cached_logprobs`, with a line before and after."""
    print("SPS: 0", flush=True)
    found = cached_logprobs(model, trees, micro_tokens, bf16)
    print("SPS: 0", flush=True)
    return found


if __name__ == "__main__":
    BaseRun.iterations = marked  # type: ignore[method-assign]
    reference.cached_logprobs = marked_reference
    runpy.run_module(f"rl_lab.{sys.argv.pop(1)}", run_name="__main__")
