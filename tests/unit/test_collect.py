"""Recording data sets: what is in them, that they are whole or not there, and what is refused."""

from __future__ import annotations

import csv
import fcntl
import gzip
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import rl_lab
from rl_lab import checkpoint, offline
from rl_lab import collect as module
from rl_lab.algorithms import dqn, ppo, sac
from rl_lab.collect import Args, collect, episodes, main, replayed, uniform
from rl_lab.distributions import Actions
from rl_lab.envs import make
from rl_lab.replay import Replay, transitions
from rl_lab.vector import Step, VectorEnv

ROOT = Path(__file__).parents[2]
ID = "lab/pendulum/random-v0"
RANDOM = Args(dataset=ID, env="Pendulum-v1", random=True, steps=800, num_envs=2)


class Counting(VectorEnv):
    """Row 0 has episodes of 3 steps, row 1 of 4. Observations count: in row 1 from 100; an episode's end skips one."""

    observation_space, action_space = gym.spaces.Box(0, 999, (1,)), gym.spaces.Discrete(9)
    seeds, num_envs, device = (0,), 2, torch.device("cpu")

    def reset(self) -> Tensor:
        self.now, self.steps = torch.tensor([[0.0], [100.0]]), torch.zeros(2).long()
        return self.now

    def step(self, actions: Tensor) -> Step:
        next_obs, self.steps = self.now + 1, self.steps + 1
        terminated, truncated = self.steps == torch.tensor([3, 9]), self.steps == torch.tensor([9, 4])
        done = terminated | truncated
        self.steps, self.now = self.steps.masked_fill(done, 0), next_obs + done[:, None]
        return Step(next_obs, actions.double() * 10, terminated, truncated, self.now)

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def test_episodes_worked_out_by_hand() -> None:
    seen = []

    def act(obs: Tensor, mask: Tensor | None, begins: Tensor) -> Tensor:
        seen.append(begins.tolist())
        return torch.tensor([len(seen), len(seen) + 1])

    played, whole = zip(*episodes(Counting(), act, 5), strict=True)
    first, second, third, fourth = played
    assert whole == (True, True, False, False)
    assert first["observations"].tolist() == [[0], [1], [2], [3]]  # the last is the true successor, not 4
    assert first["actions"].tolist() == [1, 2, 3]
    assert first["rewards"].tolist() == [10, 20, 30]
    assert (first["terminations"].tolist(), first["truncations"].tolist()) == ([False, False, True], [False] * 3)
    assert second["observations"].tolist() == [[100], [101], [102], [103], [104]]
    assert second["actions"].tolist() == [2, 3, 4, 5]
    assert (second["terminations"].any(), second["truncations"].tolist()) == (False, [False, False, False, True])
    assert third["observations"].tolist() == [[4], [5], [6]]  # cut after two of its three steps
    assert (third["terminations"].any(), third["truncations"].tolist()) == (False, [False, True])
    assert fourth["observations"].tolist() == [[105], [106]]
    assert fourth["truncations"].tolist() == [True]
    assert seen == [[True, True], [False, False], [False, False], [True, False], [False, True]]


def test_an_episode_that_ends_with_the_steps_is_not_cut() -> None:
    (first, whole), (second, cut) = episodes(Counting(), lambda obs, mask, begins: torch.zeros(2), 3)
    assert whole and not cut
    assert (first["terminations"].tolist(), first["truncations"].any()) == ([False, False, True], False)
    assert second["truncations"].tolist() == [False, False, True]


def test_random_actions_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    box = uniform(Actions.of(gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))), None, 10_000, generator)
    quarters = torch.quantile(box, torch.tensor([0.25, 0.5, 0.75]), 0)
    np.testing.assert_allclose(quarters, [[-1, 0.25], [0, 0.5], [1, 0.75]], atol=0.06)
    mask = torch.tensor([[True, False, True]]).expand(3000, 3)
    chosen = uniform(Actions.of(gym.spaces.Discrete(3)), mask, 3000, generator)
    assert 1400 < (chosen == 0).sum() < 1600 and (chosen == 0).sum() + (chosen == 2).sum() == 3000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def recorded(dataset_id: str) -> Any:
    import minari

    return minari.load_dataset(dataset_id)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def assert_that_it_swings(episode: Any) -> None:
    """Each action and reward of a Pendulum's episode belongs to the observation that it stands beside."""
    env: Any = gym.make("Pendulum-v1").unwrapped
    for t in (0, len(episode) // 2, len(episode) - 1):
        cosine, sine, speed = episode.observations[t].astype(float)
        env.reset()
        env.state = np.array([math.atan2(sine, cosine), speed])
        obs, reward, *_ = env.step(episode.actions[t])
        np.testing.assert_allclose(episode.observations[t + 1], obs, atol=1e-4)
        np.testing.assert_allclose(episode.rewards[t], reward, atol=1e-4)


WHOLE = [f"{ID}/data/main_data.hdf5", f"{ID}/data/metadata.json"]


def test_minari_reads_what_was_played(root: Path) -> None:
    line = collect(RANDOM)
    assert line.startswith(f"{ID}: 800 steps, 4 episodes, of which 0 cut; whole") and "normalized" not in line
    data = recorded(ID)
    assert (data.total_episodes, data.total_steps, data.env_spec.id) == (4, 800, "Pendulum-v1")
    assert [len(episode) for episode in data] == [200] * 4
    for episode in data:
        assert episode.observations.dtype == episode.actions.dtype == np.float32
        assert not episode.terminations.any() and episode.truncations.tolist() == [False] * 199 + [True]
        assert_that_it_swings(episode)
    returns = [float(episode.rewards.sum()) for episode in data]
    assert f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}" in line
    assert files(root) == WHOLE
    assert "2 cut" in collect(replace(RANDOM, steps=500, overwrite=True))
    assert "4 episodes, of which 4 cut" in collect(replace(RANDOM, steps=4, num_envs=4, overwrite=True))


def test_a_data_set_loads_to_learn_from(root: Path) -> None:
    collect(RANDOM)
    dataset = offline.load(ID, env_id="Pendulum-v1")
    assert len(dataset) == 800 and dataset.notes == ()
    assert dataset.episode_lengths.tolist() == [200] * 4


def test_metadata_says_where_the_data_come_from(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collect(replace(RANDOM, seed=3))
    assert "no reference scores: D4RL has none for Pendulum-v1" in capsys.readouterr().out
    metadata = recorded(ID).storage.metadata
    about = metadata["rl_lab"]
    assert (about["policy"], about["env"], about["actions"]) == ({"kind": "random"}, "Pendulum-v1", "sampled")
    assert (about["seed"], about["num_envs"]) == (3, 2)
    assert {"command", "versions", "git_commit", "hardware"} <= about.keys()
    assert "ref_min_score" not in metadata and "ref_max_score" not in metadata
    collect(replace(RANDOM, overwrite=True, scores=(-1200.0, -150.0)))
    metadata = recorded(ID).storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-1200.0, -150.0)


def test_reference_scores_are_those_of_d4rl(root: Path) -> None:
    line = collect(Args(dataset="lab/hopper/random-v0", env="Hopper-v4", random=True, steps=600, num_envs=1))
    data = recorded("lab/hopper/random-v0")
    metadata = data.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-20.272305, 3234.3)  # d4rl/infos.py
    *whole, cut = data
    assert len(whole) > 5 and all(e.terminations[-1] and not e.truncations.any() for e in whole)
    assert cut.truncations[-1] and not cut.terminations.any()
    assert 0.4 < float(line.partition("normalized ")[2]) < 3  # D4RL's own hopper-random has 1.2


def test_a_seed_repeats(root: Path) -> None:
    def actions(**changes: Any) -> np.ndarray:
        collect(replace(RANDOM, overwrite=True, **changes))
        return np.concatenate([episode.actions for episode in recorded(ID)])

    first = actions()
    np.testing.assert_array_equal(actions(), first)
    assert not np.array_equal(actions(seed=1), first)


def test_a_run_is_recorded_with_its_checksum(root: Path, tmp_path: Path) -> None:
    args = replace(
        ppo.BOX, env="Pendulum-v1", total_timesteps=500, num_envs=2, num_steps=125, num_minibatches=5, update_epochs=1,
        compile=False, runs_dir=tmp_path / "runs",
    )  # fmt: skip
    (run,) = ppo.train(args).logs.folders
    taken = Args(dataset=ID, run=run, steps=400, num_envs=2, deterministic=True)
    collect(taken)
    data, policy = recorded(ID), rl_lab.load(run)
    for episode in data:
        np.testing.assert_allclose(policy(episode.observations[:-1]), episode.actions, atol=1e-5)
    about = data.storage.metadata["rl_lab"]
    digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    parameters = {"parameters": "model.safetensors", "sha256": digest}
    assert about["policy"] == {"kind": "run", "algo": "ppo", "run": run.name, **parameters}
    assert about["actions"] == "deterministic"
    collect(replace(taken, deterministic=False, overwrite=True))
    episode = recorded(ID)[0]
    assert np.abs(policy(episode.observations[:-1]) - episode.actions).mean() > 0.1
    with pytest.raises(ValueError, match=r"--env CartPole-v1: .* learned Pendulum-v1; leave --env out"):
        collect(replace(taken, env="CartPole-v1", overwrite=True))


class Counter:
    """Stands for a recurrent policy: answers how many steps its memory has seen, modulo 4."""

    env_id, algo, source = "Recall-v0", "ppo_lstm", "model.safetensors"

    def environments(self, seed: int, num_envs: int) -> VectorEnv:
        return make("Recall-v0", (seed,), num_envs)

    def reset(self, rows: int) -> None:
        self.memory = {"seen": torch.zeros(rows, 1)}

    def __call__(self, obs: Tensor, deterministic: bool, mask: Tensor | None) -> Tensor:
        seen = self.memory["seen"]
        self.memory = {"seen": seen + 1}
        return seen[:, 0].long() % 4


def test_a_recurrent_policy_forgets_between_episodes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = Counter()
    policy.config = {"group": ["run"]}
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(module, "load", lambda run: policy)
    collect(Args(dataset=ID, run=tmp_path, steps=40, num_envs=2))
    assert [episode.actions.tolist() for episode in recorded(ID)] == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]] * 4


def test_td3_is_recorded_without_sampling_only(root: Path, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.TD3("MlpPolicy", "Pendulum-v1", buffer_size=1, policy_kwargs={"net_arch": [8]})
    model.save(tmp_path / "agent.zip")
    args = Args(dataset=ID, env="Pendulum-v1", sb3=tmp_path / "agent.zip", steps=200, num_envs=1)
    with pytest.raises(ValueError, match=r"agent\.zip is of TD3 or DDPG, which have no .* add --deterministic"):
        collect(args)
    collect(replace(args, deterministic=True))
    data = recorded(ID)
    wanted, _ = model.predict(data[0].observations[:-1], deterministic=True)
    np.testing.assert_allclose(data[0].actions, wanted, atol=1e-5)
    digest = hashlib.sha256((tmp_path / "agent.zip").read_bytes()).hexdigest()
    wanted = {"kind": "sb3", "algo": "td3", "file": "agent.zip", "sha256": digest}
    assert data.storage.metadata["rl_lab"]["policy"] == wanted


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_agents_actions_are_sampled_unless_asked(
    deterministic: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Agent:
        algo = "sac"

        def __call__(self, obs: Tensor, generator: torch.Generator | None) -> Tensor:
            return torch.full((len(obs), 1), 1.0 if generator is None else 0.5)

    monkeypatch.setattr(module.sb3, "load", lambda path, observation_space, action_space: Agent())
    (tmp_path / "agent.zip").write_bytes(b"")
    flags = {"sb3": tmp_path / "agent.zip", "deterministic": deterministic, "steps": 4, "num_envs": 1}
    collect(Args(dataset=ID, env="Pendulum-v1", **flags))
    assert (recorded(ID)[0].actions == (1.0 if deterministic else 0.5)).all()


# --- what a run has learned from --------------------------------------------------------------------------------------


def ring(steps: int, capacity: int) -> Replay:
    """What a replay holds after `steps` steps of `Counting`, `capacity` of them in each of its rows."""
    env = Counting()
    replay, obs = Replay(transitions(env), 1, 2, 2 * capacity, 0.99), env.reset()
    for index in range(steps):
        actions = torch.tensor([index, index + 1])
        step = env.step(actions)
        row = {**step._asdict(), "obs": obs, "actions": actions}
        replay.add({name: x.unsqueeze(0) for name, x in row.items()})
        obs = step.obs
    return replay


def test_a_replays_episodes_worked_out_by_hand() -> None:
    replay = ring(5, 8)
    columns = replay.state_dict()["columns"]
    (first, _), (second, cut), (third, whole), (fourth, _) = played = [*replayed(columns, replay.written)]
    assert [whole for _, whole in played] == [True, False, True, False] and whole and not cut
    assert first["observations"].tolist() == [[0], [1], [2], [3]]  # the last is the true successor, not 4
    assert (first["actions"].tolist(), first["rewards"].tolist()) == ([0, 1, 2], [0, 10, 20])
    assert (first["terminations"].tolist(), first["truncations"].tolist()) == ([False, False, True], [False] * 3)
    assert second["observations"].tolist() == [[4], [5], [6]]
    assert (second["actions"].tolist(), second["truncations"].tolist()) == ([3, 4], [False, True])
    assert third["observations"].tolist() == [[100], [101], [102], [103], [104]]
    assert third["actions"].tolist() == [1, 2, 3, 4]
    assert (third["terminations"].any(), third["truncations"].tolist()) == (False, [False, False, False, True])
    assert fourth["observations"].tolist() == [[105], [106]]
    assert (fourth["terminations"].any(), fourth["truncations"].tolist()) == (False, [True])


def test_a_ring_that_has_come_around_is_put_in_order() -> None:
    replay = ring(9, 7)  # steps 2 to 8 of 0 to 8 are left
    played = [*replayed(replay.state_dict()["columns"], replay.written)]
    steps = [(episode["actions"].tolist(), whole) for episode, whole in played]
    assert steps[:3] == [([2], False), ([3, 4, 5], True), ([6, 7, 8], True)]  # the first has lost its beginning
    assert steps[3:] == [([3, 4], False), ([5, 6, 7, 8], True), ([9], False)]
    assert played[0][0]["observations"].tolist() == [[2], [3]]
    assert played[0][0]["terminations"].tolist() == [True]
    assert played[4][0]["observations"].tolist() == [[105], [106], [107], [108], [109]]
    assert [episode["truncations"][-1] for episode, _ in played] == [False, False, False, True, True, True]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run folders of two seeds that learned in two environments each."""
    args = sac.Args(
        env="Pendulum-v1", total_timesteps=600, num_seeds=2, num_envs=2, train_frequency=2, log_every=100,
        learning_starts=590, batch_size=8, buffer_size=600, compile=False, runs_dir=tmp_path_factory.mktemp("runs"),
    )  # fmt: skip
    return sac.train(args).logs.folders


def test_a_replay_becomes_a_data_set(root: Path, learned: list[Path]) -> None:
    sets = []
    for run in learned:
        line = collect(Args(dataset=ID, replay=run, overwrite=True))
        assert line.startswith(f"{ID}: 600 steps, 4 episodes, of which 2 cut; whole ones return")
        data = recorded(ID)
        sets.append([episode.rewards for episode in data])
        for episode, length in zip(data, (200, 100, 200, 100), strict=True):
            assert len(episode) == length and not episode.terminations.any()
            assert episode.truncations.tolist() == [False] * (length - 1) + [True]
            assert_that_it_swings(episode)
        with gzip.open(run / "episodes.csv.gz", "rt") as file:
            returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]  # in the order of environments
        np.testing.assert_allclose([sets[-1][0].sum(), sets[-1][2].sum()], returns, rtol=1e-5)
    assert not np.array_equal(sets[0][0], sets[1][0])
    assert len(offline.load(ID, env_id="Pendulum-v1")) == 600


def test_metadata_say_which_replay(root: Path, learned: list[Path]) -> None:
    collect(Args(dataset=ID, replay=learned[1], scores=(-1200.0, -150.0)))
    metadata = recorded(ID).storage.metadata
    about = metadata["rl_lab"]
    digest = hashlib.sha256((learned[0] / checkpoint.NAME).read_bytes()).hexdigest()  # of both seeds
    source = {"kind": "replay", "algo": "sac", "run": learned[1].name, "steps": 600, "sha256": digest}
    assert (about["policy"], about["actions"]) == (source, "replayed")
    assert (about["env"], about["seed"], about["num_envs"]) == ("Pendulum-v1", 2, 2)
    assert metadata["description"] == "600 replayed steps of Pendulum-v1, recorded by rl_lab.collect"
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == (-1200.0, -150.0)


def test_the_newest_transitions_of_an_unfinished_run(root: Path, tmp_path: Path) -> None:
    args = dqn.Args(total_timesteps=1_000, learning_starts=900, buffer_size=250, log_every=100, stop_at=600)
    with pytest.raises(KeyboardInterrupt):
        dqn.train(replace(args, compile=False, runs_dir=tmp_path / "runs"))
    (run,) = (tmp_path / "runs").iterdir()
    with pytest.warns(UserWarning, match="is not finished: this is its checkpoint after iteration 6"):
        collect(Args(dataset=ID, replay=run))
    data = recorded(ID)
    assert (data.total_steps, data.storage.metadata["rl_lab"]["policy"]["steps"]) == (250, 600)
    first, *others, last = data
    with gzip.open(run / "episodes.csv.gz", "rt") as file:
        lengths = [int(row["episodic_length"]) for row in csv.DictReader(file)]
    assert [len(episode) for episode in others] == lengths[-len(others) :]
    assert 0 < len(first) <= lengths[-len(others) - 1] and len(last) == 600 - sum(lengths)
    assert first.terminations[-1] and last.truncations[-1] and not last.terminations.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 200_000}, "--steps says how to play, and --replay plays nothing: leave it out"),
        ({"num_envs": 10}, "--num-envs says how to play"),
        ({"deterministic": True}, "--deterministic says how to play"),
        ({"seed": 1}, "--seed says how to play"),
        ({"random": True}, "one of --sb3 ZIP, --run FOLDER, --replay FOLDER and --random"),
        ({"env": "CartPole-v1"}, "--env CartPole-v1: .* learned Pendulum-v1; leave --env out"),
    ],
)
def test_what_does_not_go_with_a_replay(changes: dict[str, Any], message: str, root: Path, learned: list[Path]) -> None:
    with pytest.raises(ValueError, match=message):
        collect(replace(Args(dataset=ID, replay=learned[0]), **changes))
    assert not root.exists() or files(root) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("replay"), "sac keeps no replay; a run of sac, td3 or dqn does"),
        (lambda state: state["replay"]["columns"].clear(), "in --replay-folder, not in its checkpoint"),
        (lambda state: state["replay"]["columns"].pop("next_obs"), "keeps frames of stacked images, no transitions"),
        (lambda state: state["replay"].update(written=0), "is empty, as its checkpoint is of step 0"),
        (None, r"--replay \S+: its replay would be in a checkpoint in \S+, where there is none"),
    ],
)
def test_a_run_without_transitions_is_refused(
    damage: Any, message: str, root: Path, learned: list[Path], tmp_path: Path
) -> None:
    runs = shutil.copytree(learned[0].parent, tmp_path / "runs")
    folder = runs / learned[0].name
    state = checkpoint.load(folder)
    for path in folder.glob("checkpoint*"):
        path.unlink()
    if damage:
        damage(state["state"])
        checkpoint.save(folder, state)
    with pytest.raises(ValueError, match=message):
        collect(Args(dataset=ID, replay=runs / learned[1].name))
    assert files(root) == []


# --- whole or not there -----------------------------------------------------------------------------------------------


def test_a_data_set_is_replaced_only_when_asked(root: Path) -> None:
    collect(RANDOM)
    with pytest.raises(ValueError, match=r"random-v0 exists: choose another --dataset, or --overwrite"):
        collect(replace(RANDOM, steps=400))
    assert recorded(ID).total_steps == 800
    collect(replace(RANDOM, steps=400, overwrite=True))
    assert recorded(ID).total_steps == 400
    assert files(root) == WHOLE
    with pytest.raises(ValueError, match="pendulum-v0 is there but holds no data set"):
        (root / "lab/pendulum-v0/random-v0").mkdir(parents=True)
        collect(replace(RANDOM, dataset="lab/pendulum-v0", overwrite=True))


def test_environments_of_this_package_are_known_again(root: Path) -> None:
    """Which Gymnasium has no entry of."""
    collect(Args(dataset="lab/recall/random-v0", env="Recall-v0", random=True, steps=20, num_envs=2))
    assert offline.load("lab/recall/random-v0").env_id == "Recall-v0"


def test_an_environment_of_ones_own_is_known_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its module, which registers it; a class in the registry is nothing that metadata could name."""
    (tmp_path / "halls.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n\n"
        "gym.register('Hall-v0', PendulumEnv, max_episode_steps=10)\n"
        "gym.register('Hall-v1', 'gymnasium.envs.classic_control:PendulumEnv', max_episode_steps=10)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for env in ("halls:Hall-v0", "halls:Hall-v1"):
        dataset = f"lab/{env[-7:].lower()}/random-v0"
        collect(Args(dataset=dataset, env=env, random=True, steps=20, num_envs=1))
        assert offline.load(dataset).env_id == env and not offline.load(dataset, env_id=env).notes


def test_what_is_replaced_is_put_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process is interrupted, or killed, after it moved the old one away."""
    collect(RANDOM)
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(replace(RANDOM, steps=400, overwrite=True))
    assert recorded(ID).total_steps == 800 and files(root) == WHOLE
    temporary = root / "lab/pendulum/.random-v0.tmp"
    temporary.mkdir()
    (root / ID).rename(temporary / "old")
    with pytest.raises(ValueError, match=r"random-v0 exists"):
        collect(replace(RANDOM, steps=400))
    assert recorded(ID).total_steps == 800 and files(root) == WHOLE


def test_a_full_disk_is_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(root.parent)._replace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(
            ValueError, match=r"800 steps take 0\.0 GB, 0\.0 GB are free: fewer --steps, or another disk"
        ):
            collect(RANDOM)

    def refuse(*_: Any) -> None:
        raise RuntimeError("Can't write data (no space left on device)")

    storage = pytest.importorskip("minari.dataset._storages.hdf5_storage").HDF5Storage
    monkeypatch.setattr(storage, "update_episodes", refuse)
    with pytest.raises(OSError, match="the data set cannot be written: Can't write data"):
        collect(RANDOM)
    assert files(root) == []


def interrupted(*_: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Episodes until somebody stops the process."""
    for index, episode in enumerate(episodes(*_)):
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield episode


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts back what the command makes of signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_an_interruption_leaves_the_old_or_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--dataset", ID, "--env", "Pendulum-v1", "--random", "--steps", "800", "--num-envs", "2"]
    monkeypatch.setattr(module, "WRITE_STEPS", 1)  # so that some are written already
    with monkeypatch.context() as patch:
        patch.setattr(module, "episodes", interrupted)
        with pytest.raises(SystemExit) as exit:
            main(command)
    assert exit.value.code == 143 and "interrupted: nothing was recorded" in capsys.readouterr().err
    assert not list(root.rglob("*"))  # nor folders
    main(command)
    assert f"{ID}: 800 steps" in capsys.readouterr().out
    monkeypatch.setattr(module, "episodes", interrupted)
    with pytest.raises(SystemExit):
        main([*command, "--seed", "1", "--overwrite"])
    assert (recorded(ID).total_steps, recorded(ID).storage.metadata["rl_lab"]["seed"]) == (800, 0)
    assert files(root) == WHOLE


def test_what_a_killed_process_left_is_removed(root: Path) -> None:
    left = root / "lab/pendulum/.random-v0.tmp/new/data"
    left.mkdir(parents=True)
    (left / "main_data.hdf5").write_bytes(b"half")
    collect(RANDOM)
    assert files(root) == WHOLE


def test_two_processes_do_not_record_one_data_set(root: Path) -> None:
    temporary = root / "lab/pendulum/.random-v0.tmp"
    temporary.mkdir(parents=True)
    lock = os.open(temporary, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process is recording"):
            collect(RANDOM)
    finally:
        os.close(lock)
    collect(RANDOM)


def test_an_unwritable_folder_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root.write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"datasets.* cannot be written: .*; set MINARI_DATASETS_PATH to a folder"):
        collect(RANDOM)
    root.unlink()
    (root / "lab").mkdir(parents=True)
    (root / "lab/pendulum").write_text("")
    with pytest.raises(ValueError, match=r"pendulum.* cannot be written: "):
        collect(RANDOM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random": False}, "one of --sb3 ZIP, --run FOLDER, --replay FOLDER and --random"),
        ({"sb3": Path("a.zip")}, "one of --sb3 ZIP, --run FOLDER, --replay FOLDER and --random"),
        ({"env": None}, "--env is missing"),
        ({"steps": 801}, "--steps 801 must be a multiple of --num-envs 2"),
        ({"steps": 0}, "--steps 0 must be a multiple of --num-envs 2, both at least 1"),
        ({"num_envs": 0}, "--num-envs 0, both at least 1"),
        ({"seed": -1}, "--seed -1 must be 0 or more"),
        ({"deterministic": True}, "--deterministic: random actions are sampled"),
        ({"scores": (5.0, 5.0)}, r"--scores 5\.0 5\.0 must be finite, the random policy's first and smaller"),
        ({"scores": (0.0, math.nan)}, r"--scores 0\.0 nan must be finite"),
        ({"dataset": "lab/../random-v0"}, r"--dataset 'lab/\.\./random-v0' must look like lab/halfcheetah/expert-v0"),
        ({"dataset": "random"}, "--dataset 'random' must look like"),
        ({"env": "Pendulm-v1"}, "the nearest ids are Pendulum-v1"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(ValueError, match=message):
        collect(replace(RANDOM, **changes))
    assert not root.exists() or files(root) == []


@pytest.mark.usefixtures("handlers")
def test_faults_end_in_one_line(root: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*nowhere\.zip'?$"):
        main(["--dataset", ID, "--env", "Pendulum-v1", "--sb3", "nowhere.zip"])
    with pytest.raises(SystemExit, match=r"^error: --run takes one path, not runs/a__1 and runs/a__2"):
        main(["--dataset", ID, "--run", "runs/a__1", "runs/a__2"])
    assert files(root) == []


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_recipe_makes_what_is_not_there(root: Path, tmp_path: Path) -> None:
    """All but the training, which has ended; the expert's set is there, and random actions stand for the expert."""
    args = sac.Args(env="Hopper-v4", total_timesteps=200, learning_starts=190, log_every=100, batch_size=8)
    args = replace(args, compile=False, runs_dir=tmp_path / "runs/offline", eval_every=200, until_return=-100.0)
    (run,) = sac.train(args).logs.folders
    script = shutil.copy(ROOT / "runs/make_offline_data.sh", tmp_path / "runs")
    collect(Args(dataset="lab/hopper/expert-v0", env="Hopper-v4", random=True, steps=30))
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "STEPS": "50", "AGENTS": "nowhere"}

    def called(*tasks: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([script, *tasks], env=environment | more, capture_output=True, text=True)

    made = called("hopper")
    assert made.returncode == 0, made.stderr
    rows = re.findall(r"^\| `lab/hopper/([-\w]+)-v0` \| (\d+) \|", made.stdout, re.MULTILINE)
    steps = {"random": 50, "medium": 50, "expert": 30, "medium-expert": 80, "medium-replay": 200}
    assert {name: int(count) for name, count in rows} == steps
    actor = tmp_path / "runs/offline/hopper-medium"
    obs = torch.linspace(-1, 1, 55).view(5, 11)
    assert torch.equal(rl_lab.load(actor)(obs), rl_lab.load(run)(obs))
    assert sum(path.stat().st_size for path in actor.iterdir()) < 1_000_000
    both = offline.load("lab/hopper/medium-expert-v0")
    parts = [offline.load(f"lab/hopper/{name}-v0").columns["rewards"] for name in ("medium", "expert")]
    assert torch.equal(both.columns["rewards"], torch.cat(parts)) and both.scores == (-20.272305, 3234.3)

    before = {path: (root / path).stat().st_mtime_ns for path in files(root)}
    shutil.rmtree(run)  # what is there needs no training
    assert called("hopper").stdout.count("is there; remove") == 5
    assert {path: (root / path).stat().st_mtime_ns for path in files(root)} == before
    skipped = called("walker2d", SETS="expert medium-expert")
    assert "there is no nowhere/tqc/Walker2d-v3_1/Walker2d-v3.zip" in skipped.stdout
    assert "skipped: it takes the medium and the expert set" in skipped.stdout and skipped.returncode == 0
    assert called("ant").returncode == called("hopper", SETS="expart").returncode == 2
    sac.train(replace(args, env="Walker2d-v4", until_return=1e6))
    below = called("walker2d", SETS="medium")
    assert below.returncode == 1 and "ended below the medium level" in below.stderr
