"""`python -m rl_lab.ppo` with a line "SPS: ..." after each iteration, as CleanRL's scripts print."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rl_lab.algorithms.ppo import main
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
    main()
