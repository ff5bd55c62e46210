"""DQN here, in Stable-Baselines3 and in CleanRL, side by side: env steps per CPU-second, and time to result.

python -m benchmarks.dqn --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import race
from rl_lab.algorithms.dqn import defaults


def measure(flags: race.Flags) -> dict[str, Any]:
    """CleanRL marks each hundredth env step once it learns; the first turn starts when all learn.

    On Atari with a replay of 100,000: CleanRL's million takes 28 GB. All start to learn after 10,000 steps there.
    """
    args = defaults(flags.env)
    fewer = {"buffer_size": 100_000, "learning_starts": 10_000} if race.atari(flags.env) else {}
    args = replace(args, **fewer)
    script = f"dqn{race.atari(flags.env)}.py"
    contenders = partial(
        race.field, "dqn", script, batch=args.log_every, cleanrl=(100, args.learning_starts), more=fewer
    )
    return race.measure(flags, args, contenders, args.log_every, first=args.learning_starts + 2 * args.log_every)


if __name__ == "__main__":
    race.main(__doc__, measure)
