"""DQN here, in Stable-Baselines3 and in CleanRL, side by side: env steps per CPU-second, and time to result.

python -m benchmarks.dqn --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import race
from rl_lab.algorithms.dqn import defaults


def measure(flags: race.Flags) -> dict[str, Any]:
    """CleanRL marks each hundredth env step once it learns; the first turn starts when all learn."""
    args = defaults(flags.env)
    script = f"dqn{race.atari(flags.env)}.py"
    contenders = partial(race.field, "dqn", script, batch=args.log_every, cleanrl=(100, args.learning_starts))
    return race.measure(flags, args, contenders, args.log_every, first=args.learning_starts + 2 * args.log_every)


if __name__ == "__main__":
    race.main(__doc__, measure)
