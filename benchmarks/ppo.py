"""PPO here, in Stable-Baselines3 and in CleanRL, side by side: env steps per CPU-second, and time to result.

python -m benchmarks.ppo --env HalfCheetah-v4 --cleanrl ../cleanrl --cleanrl-python ../cleanrl/.venv/bin/python
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import race
from rl_lab.algorithms.ppo import defaults


def measure(flags: race.Flags) -> dict[str, Any]:
    """All mark the end of each iteration."""
    args = replace(defaults(flags.env), **flags.changed)
    batch = args.num_envs * args.num_steps
    script = "ppo_continuous_action.py" if args.normalize else f"ppo{race.atari(flags.env)}.py"
    contenders = partial(race.field, "ppo", script, batch=batch, cleanrl=(batch, 0), more=flags.changed)
    return race.measure(flags, args, contenders, batch, first=batch)


if __name__ == "__main__":
    race.main(__doc__, measure)
