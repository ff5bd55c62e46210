"""Evaluation with frozen statistics, loading a run's policy, and evaluation during training."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

import rl_lab
import rl_lab.run
from rl_lab import checkpoint
from rl_lab.algorithms import c51, dqn, ppo, ppo_lstm, rainbow, sac, td3
from rl_lab.envs import make
from rl_lab.episodes import evaluate, evaluation_seeds
from rl_lab.evaluate import main, play
from rl_lab.run import Run
from rl_lab.vector import Step, VectorEnv

CARTPOLE = ppo.Args(total_timesteps=4096, num_seeds=2, compile=False, eval_every=1000)
PENDULUM = replace(
    ppo.BOX, env="Pendulum-v1", total_timesteps=500, num_seeds=2, num_envs=2, num_steps=125, num_minibatches=5,
    update_epochs=1, compile=False,
)  # fmt: skip


class Counting(VectorEnv):
    """Row 0 has episodes of 1 step, row 1 of 4; each step of a row's k-th episode is worth k. Action 1 is masked."""

    observation_space = gym.spaces.Box(0, 100, (1,))
    action_space = gym.spaces.Discrete(2)
    seeds, num_envs, device = (0,), 2, torch.device("cpu")

    def reset(self) -> Tensor:
        self.last, self.number = torch.tensor([1, 4]), torch.ones(2)
        self.episode_lengths, self.episode_returns = torch.zeros(2).long(), torch.zeros(2).double()
        return self.number[:, None]

    @property
    def action_mask(self) -> Tensor:
        return torch.tensor([[True, False]] * 2)

    def step(self, actions: Tensor) -> Step:
        fresh = self.episode_lengths == self.last
        self.episode_lengths = torch.where(fresh, 0, self.episode_lengths) + 1
        self.episode_returns = torch.where(fresh, 0.0, self.episode_returns) + self.number
        rewards, done = self.number, self.episode_lengths == self.last
        self.number = self.number + done
        terminated, truncated = done & (self.last == 1), done & (self.last == 4)  # either ends an episode
        return Step(rewards[:, None], rewards, terminated, truncated, self.number[:, None])

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def folders(runs: Path) -> list[Path]:
    return sorted(path for path in runs.iterdir() if path.is_dir())


def logged(run: Path) -> list[tuple[int, float, float]]:
    """(step, eval/episodic_return, eval/episodic_length) of each event that has both."""
    events = []
    for event in EventFileLoader(str(next(run.glob("events*")))).Load():
        values = {value.tag: value.tensor.float_val[0] for value in event.summary.value if value.tag[:5] == "eval/"}
        if values:
            events.append((event.step, values["eval/episodic_return"], values["eval/episodic_length"]))
    return events


def learned_the_same(run: Path, other: Path) -> bool:
    """Parameters and episodes, bit for bit."""
    models = [checkpoint.load_tensors(path / "model.safetensors")[0] for path in (run, other)]
    episodes = [gzip.decompress((path / "episodes.csv.gz").read_bytes()) for path in (run, other)]
    same = models[0].keys() == models[1].keys() and all(torch.equal(x, models[1][k]) for k, x in models[0].items())
    return same and episodes[0] == episodes[1] and episodes[0].count(b"\n") > 1


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ppo.train(replace(CARTPOLE, runs_dir=tmp_path_factory.mktemp("cartpole")))


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return ppo.train(replace(PENDULUM, runs_dir=tmp_path_factory.mktemp("pendulum")))


@pytest.fixture
def run(cartpole: Run, tmp_path: Path) -> Path:
    """A copy of a finished run's folder, with the other seed's beside it, to damage."""
    shutil.copytree(cartpole.args.runs_dir, tmp_path / "runs")
    return tmp_path / "runs" / cartpole.logs.folders[1].name


def test_memory_lasts_as_long_as_an_episode() -> None:
    """Guards detail 34 in evaluation: episodes are of one step in row 0, of four in row 1; what acts counts them."""
    seen = []

    def act(inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append(inputs["cell"][:, 0].tolist())
        return torch.zeros(2).long(), {"cell": inputs["cell"] + 1}

    evaluate(act, Counting(), episodes=2, memory={"cell": torch.zeros(2, 1)})
    assert seen == [[0, 0], [0, 1], [0, 2], [0, 3]] * 2


def test_every_environment_counts_its_own_episodes() -> None:
    seen = []

    def act(inputs: dict[str, Tensor]) -> Tensor:
        seen.append(inputs["obs"][:, 0].tolist())
        return inputs["mask"].long().argmax(1)

    returns, lengths = evaluate(act, Counting(), episodes=3)
    assert returns.tolist() == [[1, 2, 3], [4, 8, 12]]  # the first six to end would be 1, 2, 3, 4, 4 and 5
    assert lengths.tolist() == [[1, 1, 1], [4, 4, 4]]
    assert returns.dtype == lengths.dtype == np.float64
    assert len(seen) == 12 and seen[4] == [5, 2]  # acted on the new episode's observation


def test_evaluation_seeds_are_no_training_seeds() -> None:
    children = np.random.SeedSequence(7).spawn(4)
    for key in (0, 3):
        assert evaluation_seeds([7], (key,)) == tuple(children[key].generate_state(1, np.uint64).tolist())
    rows = {int(np.random.SeedSequence((7, row)).generate_state(1, np.uint64)[0]) for row in range(100)}
    seeds = {*evaluation_seeds(range(8)), *evaluation_seeds([7], (0, 1)), *evaluation_seeds([7], (1,))}
    assert len(seeds) == 10 and not rows & seeds
    assert min(seed % 2**32 for seed in seeds) > 1000  # torch's generator on the CPU takes 32 bits of a seed


@pytest.mark.parametrize("name", ["cartpole", "pendulum"])
def test_a_loaded_policy_acts_as_training_did(name: str, request: pytest.FixtureRequest) -> None:
    trained: Run = request.getfixturevalue(name)
    state, env = trained.state(), trained.env
    raw = env.observe(env.state["physics"]).unflatten(0, (2, -1))  # type: ignore[attr-defined]
    acted_on = state["collector"]["obs"].unflatten(0, (2, -1))  # as the collector normalised it
    assert torch.equal(raw, acted_on) == (name == "cartpole")
    actions = ppo.Actions.of(env.action_space)
    for index, folder in enumerate(trained.logs.folders):
        policy = rl_lab.load(folder)
        assert (policy.env_id, policy.algo, policy.config["seed"]) == (trained.args.env, "ppo", index + 1)
        params = {key: x[index] for key, x in state["params"].items()}
        obs = raw[index]
        best = ppo.act(params, {"obs": acted_on[index]}, None, actions)[1]
        torch.testing.assert_close(policy(obs), best)  # not bit for bit: BLAS minds how memory is aligned
        noise = ppo.draw_noise(actions, (len(obs),), torch.Generator().manual_seed(3))
        sample = ppo.act(params, {"obs": acted_on[index]}, noise, actions)[1]
        policy.generator.manual_seed(3)
        torch.testing.assert_close(policy(obs, deterministic=False), sample)
        batch, one = policy(obs.numpy()), policy(obs[0].numpy())
        assert isinstance(batch, np.ndarray) and np.allclose(batch, best.numpy(), rtol=1e-6)
        assert policy.action_space.contains(one) and np.allclose(one, best[0].numpy(), rtol=1e-6)


def test_a_masked_action_is_never_taken(cartpole: Run) -> None:
    policy, obs = rl_lab.load(cartpole.logs.folders[0]), np.random.default_rng(0).normal(size=(50, 4))
    free = policy(obs)
    assert set(free) == {0, 1}
    for allowed in (0, 1):
        mask = np.arange(2) == allowed
        assert (policy(obs, mask=np.tile(mask, (50, 1))) == allowed).all()
        assert (policy(obs, deterministic=False, mask=np.tile(mask, (50, 1))) == allowed).all()
        assert policy(obs[0], mask=mask) == allowed


def test_a_foreign_observation_is_refused(cartpole: Run) -> None:
    policy = rl_lab.load(cartpole.logs.folders[0])
    for shape in ((3,), (2, 3), (2, 2, 4), ()):
        with pytest.raises(ValueError, match=r"must be \(4,\) of CartPole-v1"):
            policy(np.zeros(shape))


def test_an_evaluation_repeats_and_leaves_the_policy_as_it_was(pendulum: Run) -> None:
    policy = rl_lab.load(pendulum.logs.folders[0])
    before = {name: x.clone() for name, x in policy.normalizer["obs"].items()}
    assert before["count"] > 500  # rollouts of 2 environments, 250 steps each, and first observations
    for deterministic in (True, False):
        first = play(policy, 4, deterministic, seed=0)
        assert first["lengths"] == [200.0] * 4
        assert play(policy, 4, deterministic, seed=0) == first != play(policy, 4, deterministic, seed=1)
    assert all(torch.equal(policy.normalizer["obs"][name], x) for name, x in before.items())


def test_statistics_of_episodes(cartpole: Run) -> None:
    result = play(rl_lab.load(cartpole.logs.folders[0]), 8, True, seed=0)
    returns = sorted(result["returns"])
    assert len(returns) == 8 and result["returns"] == result["lengths"]  # CartPole pays 1 a step
    assert (result["min"], result["max"]) == (returns[0], returns[-1])
    assert result["mean"] == sum(returns) / 8 == result["mean_length"]
    assert result["iqm"] == pytest.approx(sum(returns[2:6]) / 4)
    assert result["std"] ** 2 == pytest.approx(sum(x * x for x in returns) / 8 - result["mean"] ** 2)
    assert result["mean"] > 40  # random actions last 22 steps


def test_the_native_and_the_original_environment_give_the_same_return(tmp_path: Path) -> None:
    args = replace(ppo.BOX, env="Hopper-v4", total_timesteps=64, num_steps=64, num_minibatches=2, update_epochs=1)
    policy = rl_lab.load(ppo.train(replace(args, compile=False, runs_dir=tmp_path)).logs.folders[0])
    native = play(policy, 1, False, seed=0)
    policy.config["args"]["backend"] = "gymnasium"
    assert play(policy, 1, False, seed=0) == native
    assert native["mean"] != play(policy, 1, False, seed=1)["mean"]


def test_the_command_prints_a_table_and_writes_evaluations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = folders(run.parent)
    main([*map(str, runs), "--episodes", "10"])
    first = [(path / "evaluation.json").read_bytes() for path in runs]
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(text) for text in first]
    for path, result in zip(runs, found, strict=True):
        assert (result["env"], result["episodes"], result["source"]) == ("CartPole-v1", 10, "model.safetensors")
        for mode in ("deterministic", "sampled"):
            assert len(result[mode]["returns"]) == len(result[mode]["lengths"]) == 10
            (line,) = (line.split() for line in lines if path.name in line and mode in line)
            assert line[2] == f"{sum(result[mode]['returns']) / 10:.1f}"
    assert len({tuple(result[mode]["returns"]) for result in found for mode in ("deterministic", "sampled")}) == 4
    mean = sum(result["deterministic"]["mean"] for result in found) / 2
    (line,) = (line.split() for line in lines if "mean of 2 runs, CartPole-v1" in line and "deterministic" in line)
    assert line[6] == f"{mean:.1f}"

    main([*map(str, runs), "--episodes", "10"])
    assert [(path / "evaluation.json").read_bytes() for path in runs] == first
    main([str(run), "--episodes", "3", "--sampled", "--seed", "5"])
    sampled = json.loads((run / "evaluation.json").read_text())
    assert "deterministic" not in sampled and len(sampled["sampled"]["returns"]) == 3


def test_an_unfinished_run_gives_its_checkpoint(run: Path) -> None:
    obs = np.random.default_rng(0).normal(size=(100, 4))
    finished = rl_lab.load(run)
    (run / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is not finished: this is its checkpoint after iteration 8"):
        policy = rl_lab.load(run)
    assert policy.source == "checkpoint after iteration 8"
    assert all(torch.equal(policy.params[name], x) for name, x in finished.params.items())  # of its own seed
    assert np.array_equal(policy(obs), finished(obs))
    shutil.rmtree(folders(run.parent)[0])  # which held the checkpoint of both
    with pytest.raises(ValueError, match="is missing"):
        rl_lab.load(run)


def test_a_later_run_s_fault_leaves_the_table(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="is no run folder of rl_lab"):
        main([str(run), str(tmp_path), "--episodes", "1"])
    assert run.name in capsys.readouterr().out


def test_bad_input_is_refused_in_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*argv: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, argv), "--episodes", "1"])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        return stop.value.code

    assert "name one or more run folders" in error()
    assert "is no run folder of rl_lab" in error(tmp_path)
    assert "must end in .gif or .mp4" in error(run, "--video", "x.avi")
    assert "films one run, not 2" in error(run, run, "--video", "x.gif")
    assert "--seed -1 must be 0 or more" in error(run, "--seed", -1)
    with monkeypatch.context() as patch:
        patch.setattr("rl_lab.evaluate.play", lambda *_: pytest.fail("played before it is known that it can be filmed"))
        patch.setattr("rl_lab.video.gym.make", lambda *_, **__: (_ for _ in ()).throw(ImportError("no pygame")))
        assert "--video: CartPole-v1 cannot be drawn here: no pygame" in error(run, "--video", "x.gif")
    config = json.loads((run / "config.json").read_text())
    for algo in ("../evil", "sarsa"):
        (run / "config.json").write_text(json.dumps({**config, "algo": algo}))
        assert f"was trained by {algo!r}; rl_lab has" in error(run)
    (run / "config.json").write_text(json.dumps({**config, "env": "CartPole-v9"}))
    assert "CartPole-v9" in error(run)
    (run / "config.json").write_text(json.dumps(config))
    model = run / "model.safetensors"
    blob = bytearray(model.read_bytes())
    blob[-1] ^= 1
    model.write_bytes(blob)
    assert "model.safetensors is damaged" in error(run)
    shutil.copy(run.parent / folders(run.parent)[0] / "checkpoint.safetensors", model)
    assert "model.safetensors holds no parameters of ppo" in error(run)


def test_evaluations_are_logged_at_their_steps_and_agree_with_the_command(cartpole: Run) -> None:
    for folder in cartpole.logs.folders:
        events = logged(folder)
        assert [step for step, _, _ in events] == [1024, 2048, 3072, 4096]  # rollouts of 512 steps
        assert len(set(events)) > 1
        result = play(rl_lab.load(folder), 10, True, seed=0)
        assert events[-1][1:] == pytest.approx((result["mean"], result["mean_length"]))


@pytest.mark.parametrize("algorithm", [c51, dqn, ppo_lstm, rainbow, sac, td3])
def test_every_command_evaluates_on_the_way(algorithm: Any, tmp_path: Path) -> None:
    """Guards against an evaluation of a target network, by a memory that was not kept, or of episodes trained on."""
    flags: dict[str, Any] = {"total_timesteps": 96, "learning_starts": 16, "log_every": 16, "train_frequency": 4}
    flags |= {"batch_size": 8, "buffer_size": 64}
    flags |= {"env": "Pendulum-v1"} if algorithm in (sac, td3) else {"target_network_frequency": 64}
    if algorithm is ppo_lstm:
        flags = {"env": "CartPole-v1", "num_envs": 2, "num_steps": 16, "num_minibatches": 1, "total_timesteps": 96}
    elif algorithm is not rainbow:
        flags |= {"q_lr": 1e-2} if algorithm is sac else {"learning_rate": 1e-2}
    run = algorithm.train(algorithm.Args(**flags, eval_every=48, num_seeds=2, compile=False, runs_dir=tmp_path))
    for folder in run.logs.folders:
        _, (last, *second) = logged(folder)
        result = play(rl_lab.load(folder), 10, True, seed=0)
        assert last == 96 and second == pytest.approx([result["mean"], result["mean_length"]])


@pytest.mark.parametrize("args", [replace(CARTPOLE, total_timesteps=2048), PENDULUM], ids=["cartpole", "pendulum"])
def test_training_is_the_same_with_and_without_evaluation(args: ppo.Args, tmp_path: Path) -> None:
    runs = [ppo.train(replace(args, eval_every=n, runs_dir=tmp_path / str(n))) for n in (0, 250)]
    assert [len(logged(run.logs.folders[1])) for run in runs] == [0, args.num_iterations]
    for without, with_evaluation in zip(*(run.logs.folders for run in runs), strict=True):
        assert learned_the_same(without, with_evaluation)


def test_a_resumed_run_evaluates_as_the_uninterrupted_one(
    cartpole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    calls = []

    def killing(act: Any, env: VectorEnv, episodes: int, memory: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise Killed  # in the third evaluation: the checkpoint is an iteration older
        return evaluate(act, env, episodes, memory)

    monkeypatch.setattr(rl_lab.run, "evaluate", killing)
    args = replace(CARTPOLE, runs_dir=tmp_path, checkpoint_every=512)
    with pytest.raises(Killed):
        ppo.train(args)
    resumed = ppo.train(replace(args, resume=folders(tmp_path)[0]))
    for whole, continued in zip(cartpole.logs.folders, resumed.logs.folders, strict=True):
        assert logged(continued) == logged(whole)
        assert learned_the_same(whole, continued)


UNTIL = replace(CARTPOLE, until_return=4.0, checkpoint_every=512)


@pytest.fixture
def returns(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What both seeds' episodes return in the evaluations to come: each reaches 4 alone, then both do."""
    table = [(10.0, 2.0), (1.0, 5.0), (4.0, 4.0), (9.0, 9.0)]

    def scripted(*_: Any, **__: Any) -> tuple[np.ndarray, np.ndarray]:
        column = np.repeat(table.pop(0), 10)[:, None]
        return column, column

    monkeypatch.setattr(rl_lab.run, "evaluate", scripted)
    return table


def test_a_run_ends_when_every_seed_returns_enough(
    returns: list[tuple[float, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = ppo.train(replace(UNTIL, runs_dir=tmp_path))
    assert "--until-return 4.0: reached at step 3072" in capsys.readouterr().out
    for folder in ended.logs.folders:
        assert [step for step, _, _ in logged(folder)] == [1024, 2048, 3072]
        assert (folder / "model.safetensors").exists()
    assert checkpoint.load(ended.logs.folders[0])["run"]["iteration"] == 6
    ppo.train(replace(UNTIL, resume=ended.logs.folders[1]))
    assert f"{ended.logs.folders[0]} is finished: 3072 steps" in capsys.readouterr().out
    assert returns == [(9.0, 9.0)]


def test_a_run_that_does_not_return_enough_ends_as_always(
    returns: list[tuple[float, float]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = ppo.train(replace(UNTIL, runs_dir=tmp_path, until_return=9.5))
    assert [step for step, _, _ in logged(ended.logs.folders[0])] == [1024, 2048, 3072, 4096]
    assert "--until-return" not in capsys.readouterr().out


def test_a_run_killed_as_it_ends_ends_again(
    returns: list[tuple[float, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def killed(self: Run) -> None:
        if self.reached:
            raise Killed  # between the evaluation and its checkpoint: the last one is of step 2560
        save(self)

    save, before = Run.checkpoint, [*returns]
    whole = ppo.train(replace(UNTIL, runs_dir=tmp_path / "whole"))
    returns[:] = before
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "checkpoint", killed)
        ppo.train(replace(UNTIL, runs_dir=tmp_path / "killed"))
    returns[:] = before[2:]
    resumed = ppo.train(replace(UNTIL, resume=folders(tmp_path / "killed")[0]))
    for one, other in zip(whole.logs.folders, resumed.logs.folders, strict=True):
        assert logged(one) == logged(other)
        assert learned_the_same(one, other)


@pytest.mark.parametrize("backend", ["native", "gymnasium"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v4"])
def test_evaluation_starts_from_states_of_its_own(env_id: str, backend: str) -> None:
    training, testing = (make(env_id, seeds, 5, backend=backend) for seeds in ((1,), evaluation_seeds([1])))
    starts = torch.cat([env.reset()[:, :4] for env in (training, training, testing)])
    assert len(starts.unique(dim=0)) == 15
