"""d3rlpy's IQL on a data set of ours, played as ours is: a reference set of episodes for `rl_lab.compare`.

    python -m benchmarks.iql_scores --d3rlpy-python ../d3rlpy/bin/python --dataset lab/hopper/medium-expert-v0
    python -m rl_lab.compare runs/results/offline/lab-hopper-medium-expert-v0/iql__Hopper-v4.csv.gz \
        --reference benchmarks/results/d3rlpy/lab-hopper-medium-expert-v0/iql__Hopper-v4.csv.gz

It learns from the same transitions and scaled rewards with the same hyper-parameters (d3rlpy_peer.py). Its policies
play in environments of this project, seeded as no agent's was: 10 episodes at every `--eval-every` gradient steps, 100
after the last. d3rlpy's interpreter is made as offline.py says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from benchmarks import race
from benchmarks.report import machine
from rl_lab.algorithms import iql
from rl_lab.curves.store import set_name, write_set
from rl_lab.distributions import Actions
from rl_lab.envs import make
from rl_lab.episodes import evaluate, evaluation_seeds
from rl_lab.offline import Dataset, load

# d3rlpy's names of the actor's layers, ours
LAYERS = (("_encoder._layers.0", "actor.0"), ("_encoder._layers.2", "actor.1"), ("_mu", "actor.2"))


@dataclass(frozen=True)
class Flags:
    """Flags of the comparison."""

    d3rlpy_python: Path
    """interpreter with d3rlpy"""
    dataset: str
    """a Minari id or a path"""
    total_timesteps: int = 50_000
    """gradient steps"""
    eval_every: int = 10_000
    """gradient steps between evaluations"""
    seeds: int = 3
    """agents, trained one after the other"""
    folder: Path = Path("benchmarks/results/d3rlpy")
    """where the episodes are kept, in a folder of the data set's"""


def write_data(data: Dataset, scale: float, path: Path) -> None:
    """A D4RL file of the data, rewards times `scale`."""
    columns = data.columns | {"rewards": data.columns["rewards"] * scale}
    names = {"obs": "observations", "truncated": "timeouts", "terminated": "terminals"}
    with h5py.File(path, "w") as file:
        for name in ("obs", "actions", "rewards", "terminated", "truncated"):
            file[names.get(name, name)] = columns[name].numpy()


def play(path: Path, env_id: str, seed: int, episodes: int) -> NDArray[np.float64]:
    """Returns (episodes,) of the likeliest actions of the policy whose weights d3rlpy wrote to `path`."""
    weights = np.load(path, allow_pickle=False)
    env = make(env_id, evaluation_seeds([seed]), episodes)
    actions = Actions.of(env.action_space)
    parts = [(f"{ours}.{part}", weights[f"{theirs}.{part}"]) for theirs, ours in LAYERS for part in ("weight", "bias")]
    actor = {name: torch.from_numpy(x) for name, x in parts} | {"logstd": torch.zeros(actions.num_outputs)}
    act = partial(iql.policy, {"actor": actor}, {}, noise=None, actions=actions)
    return evaluate(act, env, 1)[0].flatten()


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    if flags.total_timesteps % flags.eval_every:
        raise SystemExit(
            f"--total-timesteps {flags.total_timesteps} must be a multiple of --eval-every {flags.eval_every}"
        )
    data = load(flags.dataset)
    if data.env_id is None:
        raise SystemExit(f"--dataset {flags.dataset}: does not say what it is of")
    scale = iql.authors_scale(data, data.env_id)
    played = {}
    python = [str(flags.d3rlpy_python.absolute()), "-P"]  # or profile.py beside it would stand for Python's own
    peer, budget = str(Path(__file__).with_name("d3rlpy_peer.py")), [str(flags.total_timesteps), str(flags.eval_every)]
    with tempfile.TemporaryDirectory() as name:
        write_data(data, scale, file := Path(name, "data.hdf5"))
        for seed in range(1, flags.seeds + 1):
            command = [*python, peer, "iql", str(file), *budget, "cpu", str(seed), name]
            subprocess.run(command, cwd=name, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=sys.stderr)
            steps, returns = [], []
            for step in range(flags.eval_every, flags.total_timesteps + 1, flags.eval_every):
                episodes = 100 if step == flags.total_timesteps else 10
                steps.append(np.full(episodes, step))
                returns.append(play(Path(name, f"{step}.npz"), data.env_id, seed, episodes))
                score = data.normalized(returns[-1].mean())
                print(f"seed {seed}, step {step:,}: normalized score {score:.1f}", flush=True)
            played[seed] = (np.concatenate(steps), np.concatenate(returns))
    note = {
        "script": "iql",
        "env": data.env_id,
        "source": "d3rlpy, github.com/takuseno/d3rlpy",
        "seeds": list(range(1, flags.seeds + 1)),
        "total_timesteps": flags.total_timesteps,
        "finished": True,
        "reward_scale": scale,
        "versions": race.versions(str(flags.d3rlpy_python), race.ROOT),
        "hardware": machine(),
        "data": {"name": data.name, "checksum": data.checksum, "transitions": len(data), "scores": data.scores},
    }
    folder = flags.folder / set_name(data.name)
    folder.mkdir(parents=True, exist_ok=True)
    write_set(folder / f"iql__{data.env_id}.csv.gz", note, played)


if __name__ == "__main__":
    main()
