"""`--env module:Class`: the examples of docs/environments.md, as they stand there."""

from __future__ import annotations

import gzip
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rl_lab.algorithms import dqn, ppo
from rl_lab.cli import Stopped
from rl_lab.envs import make
from rl_lab.vector import TensorEnv

PAGE = Path(__file__).resolve().parents[2] / "docs" / "environments.md"

SIMULATOR = '''
import gymnasium as gym
import torch


class Countdown:
    """Row i ends every i + 2 steps; obs is (row, steps left), the reward the step's number."""

    single_observation_space = gym.spaces.Box(0.0, 100.0, (2,))
    single_action_space = gym.spaces.Discrete(2)

    def __init__(self, num_envs):
        self.rows = torch.arange(num_envs, dtype=torch.float32)

    def obs(self):
        return torch.stack([self.rows, self.left], -1)

    def reset(self, seed=None):
        self.left = self.rows + 2
        return self.obs(), {}

    def step(self, actions):
        self.left = self.left - 1
        rewards, truncated = self.rows + 2 - self.left, self.left == 0
        last = self.obs()
        self.left = torch.where(truncated, self.rows + 2, self.left)
        info = {"final_observation": last} if truncated.any() else {}
        return self.obs(), rewards, torch.zeros_like(truncated), truncated, info


def make_vector(num_envs, seed, device):
    return Countdown(num_envs)
'''


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path with the page's two modules."""
    point, simulated = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert point.count("\n") <= 30
    for name, source in (("point", point), ("simulated", simulated), ("simulator", SIMULATOR)):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_task_of_one_s_own_is_learned(page: Path) -> None:
    env = make("point:Point", (1, 2), 3)
    assert isinstance(env, TensorEnv)
    args = replace(
        ppo.BOX, env="point:Point", num_envs=64, num_steps=32, num_minibatches=4, update_epochs=4, learning_rate=3e-3,
        total_timesteps=60 * 2048, normalize=False, compile=False, device="cpu", runs_dir=page / "runs",
    )  # fmt: skip
    run = ppo.train(args)
    first, last = ppo_returns(run.logs.folders[0])
    assert run.logs.folders[0].name.startswith("point-Point__ppo__1__")
    assert last > 0.6 * first  # both are negative: distances summed over an episode


def ppo_returns(folder: Path) -> tuple[float, float]:
    """Means of the first and of the last hundred episodes."""
    rows = gzip.decompress((folder / "episodes.csv.gz").read_bytes()).decode().splitlines()[1:]
    returns = [float(row.split(",")[1]) for row in rows]
    return sum(returns[:100]) / 100, sum(returns[-100:]) / 100


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_simulator_that_cannot_be_saved_begins_anew(page: Path, n_step: int) -> None:
    """Guards against a step from before the checkpoint to a new episode, and against a return that goes on into one."""
    args = dqn.Args(
        env="simulated:Simulated", num_envs=5, n_step=n_step, total_timesteps=100, log_every=20, train_frequency=5,
        target_network_frequency=20, learning_starts=50, batch_size=32, buffer_size=100, stop_at=40, compile=False,
        runs_dir=page / "runs",
    )  # fmt: skip
    with pytest.raises(Stopped):
        dqn.train(args)
    (folder,) = (page / "runs").iterdir()
    run = dqn.train(replace(args, stop_at=0, resume=folder))
    columns = run.state()["replay"]["columns"]
    assert torch.equal(columns["next_obs"], columns["obs"] - torch.tensor([0, 1]))
    assert columns["obs"][8, :, 1].tolist() == [2, 3, 4, 5, 6]  # the first after 40 steps
    over = columns["obs"][:8, :, 1] == 1  # as the simulator says
    assert torch.equal(columns["truncated"][:7], over[:7]) and columns["truncated"][7].all()


def test_a_foreign_simulator_keeps_the_contract(page: Path) -> None:
    env = make("simulated:Simulated", (7,), 3)
    assert env.reset().tolist() == [[0, 2], [1, 3], [2, 4]]
    actions = torch.zeros(3, dtype=torch.int64)
    env.step(actions)
    step = env.step(actions)
    assert step.truncated.tolist() == [True, False, False]
    assert step.next_obs.tolist() == [[0, 0], [1, 1], [2, 2]]  # the true successor
    assert step.obs.tolist() == [[0, 2], [1, 1], [2, 2]]  # and what to act on
    assert env.episode_returns.tolist() == [3, 3, 3]
    env.step(actions)
    assert env.episode_returns.tolist() == [1, 6, 6]
    assert env.episode_lengths.tolist() == [1, 3, 3]


def test_a_compiled_task_is_told_by_its_bases_too(page: Path) -> None:
    """A change to the module of a base class makes other dynamics of the same class."""
    (page / "heavy.py").write_text("import point\n\n\nclass Heavy(point.Point):\n    pass\n")
    key = make("heavy:Heavy", (1,), 1).key  # type: ignore[attr-defined]
    assert any("def transition" in source and "class Point" in source for source in key[1])


def test_another_seed_compiles_nothing_anew_and_what_a_key_cannot_tell_is_refused(page: Path) -> None:
    """A list may change without a trace in the key, and the old dynamics would be trained."""
    keys = [make("CartPole-v1", (seed,), 4).key for seed in (1, 2)]  # type: ignore[attr-defined]
    assert keys[0] == keys[1]
    (page / "listed.py").write_text(
        "import point\n\n\nclass Listed(point.Point):\n    def __init__(self, *args):\n"
        "        super().__init__(*args)\n        self.goals, self.gain, self.none = GOALS, 2.0, None\n\n\n"
        "GOALS = (1, 2)\n"
    )
    env = make("listed:Listed", (1,), 1)
    assert ("goals", (1, 2)) in env.key[2]  # type: ignore[attr-defined]
    env.goals = [1, 2]  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"Listed.goals is a list, which a compiled step would not see change: make it"
    ):
        env.key  # type: ignore[attr-defined]  # noqa: B018


def test_what_names_no_environment_is_refused(page: Path) -> None:
    with pytest.raises(ValueError, match="point:Nothing cannot be made"):
        make("point:Nothing", (1,), 1)
    with pytest.raises(ValueError, match="point:Tensor cannot be made"):  # a class, but no environment
        make("point:Tensor", (1,), 1)
    with pytest.raises(ValueError, match="nowhere:Point cannot be made: No module named 'nowhere'"):
        make("nowhere:Point", (1,), 1)
