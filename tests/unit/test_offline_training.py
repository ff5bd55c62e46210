"""What all offline algorithms share: batches, seeds, resuming, judgement; and BC and TD3+BC on a small task."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.utils._pytree as pytree
from torch import Tensor

import rl_lab
from rl_lab import cli
from rl_lab.algorithms import awac, bc, cql, discrete_cql, iql, td3_bc
from rl_lab.cli import Stopped
from rl_lab.curves import store
from rl_lab.distributions import Actions, scaled, unscaled
from rl_lab.envs import make
from rl_lab.evaluate import play
from rl_lab.log import RunLog
from rl_lab.offline import Dataset
from rl_lab.offline_training import OfflineRun, standardize, standardized

Lucky = Callable[..., Dataset]
ALGORITHMS = [awac, bc, iql, td3_bc]
EVERY = [*ALGORITHMS, cql, discrete_cql]
EACH = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=[a.__name__.rpartition(".")[2] for a in ALGORITHMS])
SHORT = {"total_timesteps": 60, "log_every": 20, "batch_size": 8, "eval_every": 20, "eval_episodes": 3}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks as small as the tasks."""
    for algorithm in EVERY:
        monkeypatch.setattr(algorithm, "HIDDEN", (32, 32))


def arguments(algorithm: ModuleType, folder: Path, **flags: Any) -> Any:
    return algorithm.Args(
        **{"dataset": "lucky", "runs_dir": folder, "device": "cpu", "compile": False, **SHORT, **flags}
    )


def episodes(folder: Path) -> str:
    return gzip.decompress((folder / "episodes.csv.gz").read_bytes()).decode()


def models(folders: list[Path]) -> list[dict[str, Tensor]]:
    return [safetensors.torch.load_file(folder / "model.safetensors") for folder in folders]


@EACH
def test_a_resumed_run_is_the_uninterrupted_one(algorithm: ModuleType, lucky: Lucky, tmp_path: Path) -> None:
    lucky(200)
    whole = algorithm.train(arguments(algorithm, tmp_path / "whole", num_seeds=2))
    with pytest.raises(Stopped, match="checkpointed at step 40"):
        algorithm.train(arguments(algorithm, tmp_path / "part", num_seeds=2, stop_at=40))
    (folder, _) = sorted((tmp_path / "part").iterdir())
    resumed = algorithm.train(arguments(algorithm, tmp_path / "part", num_seeds=2, resume=folder))
    tensors = [pytree.tree_leaves(run.state()) for run in (resumed, whole)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    for ours, theirs in zip(resumed.logs.folders, whole.logs.folders, strict=True):
        assert episodes(ours) == episodes(theirs)


@EACH
def test_other_data_are_refused_on_resume(
    algorithm: ModuleType, lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lucky(200)
    with pytest.raises(Stopped):
        algorithm.train(arguments(algorithm, tmp_path, stop_at=20))
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: replace(data, checksum="other"))
    (folder,) = tmp_path.iterdir()
    recorded = json.loads((folder / "config.json").read_text())["data"]
    assert recorded == {"name": "lucky", "env": "Pendulum-v1", "checksum": "none", "transitions": 200,
                        "scores": [-10.0, 0.0]}  # fmt: skip
    before = (folder / "config.json").read_bytes()
    for flags in ({}, {"total_timesteps": 80}):  # nor is a run prolonged that does not go on
        with pytest.raises(ValueError, match="--dataset lucky is not what the run has learned from"):
            algorithm.train(arguments(algorithm, tmp_path, resume=folder, **flags))
    assert (folder / "config.json").read_bytes() == before


def test_data_may_have_moved(lucky: Lucky, tmp_path: Path) -> None:
    """They are known by their checksum."""
    lucky(200)
    with pytest.raises(Stopped):
        bc.train(arguments(bc, tmp_path, stop_at=20))
    (folder,) = tmp_path.iterdir()
    args = cli.parse(["--resume", str(folder), "--dataset", "elsewhere"], bc.Args, bc.defaults)
    assert args.dataset == "elsewhere" and bc.train(args).iteration * args.log_every == 60  # type: ignore


@EACH
def test_a_seed_alone_and_among_others(algorithm: ModuleType, lucky: Lucky, tmp_path: Path) -> None:
    """Guards the seed axis, the batches' one included: seed 2 learns the same beside seed 1, to rounding."""
    lucky(200)
    flags = {"total_timesteps": 20, "eval_every": 0, "eval_episodes": 0}
    alone = models(algorithm.train(arguments(algorithm, tmp_path / "alone", seed=2, **flags)).logs.folders)[0]
    first, second = models(algorithm.train(arguments(algorithm, tmp_path / "both", num_seeds=2, **flags)).logs.folders)
    assert alone.keys() == second.keys()
    for name, x in alone.items():
        torch.testing.assert_close(x, second[name], rtol=0, atol=1e-6)
    assert any((first[name] - x).abs().max() > 1e-3 for name, x in alone.items())


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [awac, bc, iql, td3_bc, cql], ids=["awac", "bc", "iql", "td3_bc", "cql"])
def test_compiled_equals_eager(algorithm: ModuleType, lucky: Lucky, tmp_path: Path) -> None:
    """Guards what users run, which is compiled: two agents after five gradient steps."""
    lucky(200)
    found = []
    for compile in (False, True):
        flags = {"total_timesteps": 5, "log_every": 5, "eval_every": 0, "eval_episodes": 0, "num_seeds": 2}
        run = algorithm.train(arguments(algorithm, tmp_path / str(compile), compile=compile, **flags))
        found.append(models(run.logs.folders))
    for eager, compiled in zip(*found, strict=True):
        for name, x in eager.items():
            torch.testing.assert_close(compiled[name], x, rtol=0, atol=1e-5, msg=name)


@EACH
def test_an_unfinished_run_gives_its_policy(algorithm: ModuleType, lucky: Lucky, tmp_path: Path) -> None:
    """With its statistics of observations, which the finished run's policy has too: both act alike."""
    lucky(200)
    policies = []
    for name, flags in (("part", {"stop_at": 40}), ("whole", {"total_timesteps": 40})):
        with contextlib.suppress(Stopped):
            algorithm.train(arguments(algorithm, tmp_path / name, **{"total_timesteps": 60, **flags, "eval_every": 0}))
        with warnings.catch_warnings(action="ignore"):
            policies.append(rl_lab.load(next((tmp_path / name).iterdir())))
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    if algorithm is iql:  # whose rate follows the total number of steps
        assert policies[0](obs).shape == policies[1](obs).shape == (5, 1)
    else:
        np.testing.assert_array_equal(policies[0](obs), policies[1](obs))
        shifted = policies[0].normalizer["mean"]
        policies[0].normalizer["mean"] = shifted + 1
        assert not np.array_equal(policies[0](obs), policies[1](obs))


@EACH
def test_judgement(algorithm: ModuleType, lucky: Lucky, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten episodes at each of --eval-every, --eval-episodes at the end: in episodes.csv.gz, and in what is printed.

    Scores by hand: 100 * (return + 10) / 10.
    """
    lucky(200)
    run = algorithm.train(arguments(algorithm, tmp_path))
    (read,) = store.load(run.logs.folders[0])
    assert read.steps.tolist() == [20] * 10 + [40] * 10 + [60] * 3
    assert {row["episodic_length"] for row in csv.DictReader(episodes(read.path).splitlines())} == {"200"}
    means = [read.returns[part].mean() for part in (slice(10), slice(10, 20), slice(20, 23))]
    score, best = (100 * (x + 10) / 10 for x in (means[2], max(means)))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert (
        f"normalized score {score:.1f}, return {means[2]:,.1f} ± {read.returns[20:].std():,.1f} in 3 episodes"
        in printed
    )
    assert printed.endswith(f"best evaluation {best:.1f}")


@pytest.mark.parametrize("algorithm", EVERY, ids=[a.__name__.rpartition(".")[2] for a in EVERY])
def test_what_is_judged_is_what_is_saved(
    algorithm: ModuleType, lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against raw observations for agents of standardised ones, slow networks, and returns for scores."""
    data = lucky(200)
    columns, space = {name: 3 * data.columns[name] + 5 for name in ("obs", "next_obs")}, data.action_space
    if algorithm is discrete_cql:
        peer = gym.make("CartPole-v1")
        obs, space = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(3)) + 5, peer.action_space
        columns = {"obs": obs, "next_obs": obs, "actions": (obs[:, 2] > 5).long()}
        data = replace(data, env_id="CartPole-v1", observation_space=peer.observation_space)
    data = replace(data, columns=data.columns | columns, action_space=space)
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    logged: dict[str, float] = {}
    monkeypatch.setattr(RunLog, "scalars", lambda self, index, step, row: logged.update(row))
    normalized = {} if not hasattr(algorithm.Args, "normalize_obs") else {"normalize_obs": True}
    run = algorithm.train(arguments(algorithm, tmp_path, **normalized))
    played = play(rl_lab.load(run.logs.folders[0]), 3, True, seed=0)
    assert run.recent[0] == pytest.approx(played["returns"], rel=1e-5) and len(set(played["returns"])) > 1
    assert logged["eval/normalized_score"] == pytest.approx(10 * (played["mean"] + 10))
    assert logged["eval/best_normalized_score"] == pytest.approx(10 * (logged["eval/best_return"] + 10))


def test_statistics_follow_the_parameters_to_their_device(lucky: Lucky, tmp_path: Path) -> None:
    """Guards against a judgement on a GPU of observations there by a mean on the CPU."""
    args, given = arguments(bc, tmp_path, env="Pendulum-v1"), list[Any]()
    run = OfflineRun(args, "bc", lucky(50), make(args.env, args.seeds, 1), args.generators(0), lambda: {"params": {}})

    class Elsewhere:
        device = torch.device("meta")

    def evaluate(policy: Any, agent: Any, normalizer: Any, env: Any) -> tuple[Any, Any]:
        given.append(normalizer)
        return np.zeros((1, 2)), np.ones((1, 2))

    run.evaluate = evaluate  # type: ignore
    for _ in run.intervals():
        run.judge(bc.policy, {}, standardized(run.data, 1)[1], Elsewhere())  # type: ignore
    assert {x.device.type for x in given[0].values()} == {"meta"} and given[0].keys() == {"mean", "scale"}


@pytest.mark.cuda
@EACH
def test_a_run_on_a_gpu_is_judged_there(algorithm: ModuleType, lucky: Lucky, tmp_path: Path) -> None:
    lucky(200)
    run = algorithm.train(arguments(algorithm, tmp_path, device="cuda", compile=True))
    assert len(run.recent[0]) == 3 and np.isfinite(run.recent[0]).all()


def test_masks_of_actions_are_refused(lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a policy that takes what is forbidden, and a score of that."""
    args, env = arguments(bc, tmp_path, env="Pendulum-v1"), make("Pendulum-v1", (1,), 1)
    monkeypatch.setattr(type(env), "action_mask", torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="--env Pendulum-v1 must be one without masks of actions"):
        OfflineRun(args, "bc", lucky(50), env, args.generators(0), lambda: {"params": {}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithm", EVERY, ids=[a.__name__.rpartition(".")[2] for a in EVERY])
def test_without_reference_scores(algorithm: ModuleType, lucky: Lucky, tmp_path: Path, monkeypatch: Any) -> None:
    data = replace(lucky(50), scores=None)
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    wanted = (
        r"--scores None must be two numbers: neither D4RL nor lucky has the mean returns of a random .* Pendulum-v1"
    )
    with pytest.raises(ValueError, match=wanted):
        algorithm.train(arguments(algorithm, tmp_path))
    assert not list(tmp_path.iterdir())


def test_without_judgement(lucky: Lucky, tmp_path: Path) -> None:
    lucky(50)
    assert bc.train(arguments(bc, tmp_path / "not", total_timesteps=20, eval_episodes=0)).score(0) == "not judged"
    # Not of the parameters before the last either.
    assert bc.train(arguments(bc, tmp_path / "early", total_timesteps=60, eval_episodes=0)).score(0) == "not judged"


def test_every_agent_draws_all_of_the_data(lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two agents differ, and hold each of 10 transitions about equally often: 1600 draws, 160 ± 12 each."""
    lucky(10)
    seen: list[Tensor] = []
    monkeypatch.setattr(
        bc,
        "Compiled",
        lambda *_, **__: (
            lambda actor, opt, batch: (
                seen.append(batch["actions"].squeeze(2)),
                (actor, opt, {"actor_loss": torch.zeros(2)}),
            )[1]
        ),
    )
    flags = {"total_timesteps": 200, "log_every": 200, "eval_every": 0, "eval_episodes": 0}
    bc.train(arguments(bc, tmp_path, num_seeds=2, **flags))
    draws = torch.stack(seen)
    assert draws.shape == (200, 2, 8) and not torch.equal(draws[:, 0], draws[:, 1])
    for agent in range(2):
        _, counts = draws[:, agent].unique(return_counts=True)
        assert len(counts) == 10 and (counts - 160).abs().max() < 5 * 12


def test_observations_standardised_by_hand(lucky: Lucky) -> None:
    """Columns 0 and 2: mean 1, deviation 1; the second is constant, and stays finite. next_obs by the same numbers."""
    data = lucky(2)
    columns = {"obs": torch.tensor([[0.0, 5, 0], [2, 5, 2]]), "next_obs": torch.tensor([[2.0, 5, 4], [2, 6, 4]])}
    data, normalizer = standardized(replace(data, columns=data.columns | columns), num_seeds=2)
    unit = 1 / 1.001
    torch.testing.assert_close(data.columns["obs"], torch.tensor([[-unit, 0, -unit], [unit, 0, unit]]))
    torch.testing.assert_close(data.columns["next_obs"], torch.tensor([[unit, 0, 3 * unit], [unit, 1000, 3 * unit]]))
    assert normalizer["mean"].tolist() == [[1, 5, 1]] * 2
    assert standardize({}, columns["obs"]) is columns["obs"]


def test_unscaled_undoes_scaled() -> None:
    actions = Actions((2,), (2,), (-2.0, 0.0), (2.0, 1.0))
    x = torch.tensor([[-1.0, 1.0], [0.5, -0.25]])
    torch.testing.assert_close(unscaled(scaled(x, actions), actions), x)
    torch.testing.assert_close(unscaled(torch.tensor([[1.0, 0.25]]), actions), torch.tensor([[0.5, -0.5]]))


def mean_action(algorithm: ModuleType, tmp_path: Path, **flags: Any) -> float:
    """Of the policy after training, for observations as the data's."""
    settings = {"total_timesteps": 300, "log_every": 100, "eval_every": 0, "eval_episodes": 0, "learning_rate": 3e-3}
    run = algorithm.train(arguments(algorithm, tmp_path, **{**settings, "batch_size": 64, **flags}))
    obs = torch.randn(100, 3, generator=torch.Generator().manual_seed(1))
    return float(rl_lab.load(run.logs.folders[0])(obs).mean())


def test_td3_bc_takes_better_actions_than_the_data(
    lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data's mean action is 0, the best is 1. With alpha 0 it clones; with Q's sign lost it takes worse ones."""
    lucky()
    assert mean_action(td3_bc, tmp_path / "td3_bc") > 0.5
    assert mean_action(td3_bc, tmp_path / "bc", alpha=0.0) == pytest.approx(0.0, abs=0.2)
    sound = td3_bc.q_values
    monkeypatch.setattr(
        td3_bc, "q_values", lambda *args: sound(*args) * (1 if len(args[0]["critic.2.bias"]) > 1 else -1)
    )
    assert mean_action(td3_bc, tmp_path / "flipped") < -0.5


def test_td3_bc_s_actor_moves_on_every_second_step(lucky: Lucky, tmp_path: Path, monkeypatch: Any) -> None:
    """The second, the fourth, ..., as CORL's counter has it."""
    lucky()
    delayed: list[bool] = []
    sound = td3_bc.update

    def recorded(*args: Any, **flags: Any) -> Any:
        delayed.append(flags["delayed"])
        return sound(*args, **flags)

    monkeypatch.setattr(td3_bc, "update", recorded)
    td3_bc.train(arguments(td3_bc, tmp_path, total_timesteps=5, log_every=5, eval_episodes=0))
    assert delayed == [True, False, True, False, True]


def test_nothing_compiles_anew_for_another_data_set() -> None:
    for algorithm in EVERY:
        args = algorithm.Args(dataset="x")
        assert args.key == replace(args, dataset="y", scores=(0.0, 1.0), eval_episodes=5).key
        assert (
            args.key
            != replace(
                args, eval_every=args.eval_every, **{"tau": 0.5} if hasattr(args, "tau") else {"learning_rate": 0.5}
            ).key
        )


def test_runs_are_prolonged_where_nothing_is_annealed(lucky: Lucky, tmp_path: Path) -> None:
    lucky(200)
    (folder,) = bc.train(arguments(bc, tmp_path)).logs.folders
    args = cli.parse(["--resume", str(folder), "--total-timesteps", "80"], bc.Args, bc.defaults)
    assert bc.train(args).iteration * args.log_every == 80  # type: ignore
    (folder,) = iql.train(arguments(iql, tmp_path)).logs.folders
    with pytest.raises(ValueError, match=r"--total-timesteps 80: the run in .* has 60, which its schedules follow"):
        cli.parse(["--resume", str(folder), "--total-timesteps", "80"], iql.Args, iql.defaults)


def test_data_are_held_against_the_environment(lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is made, also where --env is not given: and whether there is room for them."""
    data = lucky(200)
    wide = replace(data, action_space=gym.spaces.Box(-3, 3, (1,)))
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: wide)
    with pytest.raises(ValueError, match=r"--env Pendulum-v1 has actions Box\(-2.0, 2.0.*lucky has Box\(-3.0, 3.0"):
        bc.train(arguments(bc, tmp_path))
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    monkeypatch.setattr("rl_lab.offline_training.free_memory", lambda _: 1000)
    with pytest.raises(ValueError, match=r"--dataset lucky must be one for which there is room: it takes 0\.0 GB"):
        bc.train(arguments(bc, tmp_path))
    monkeypatch.setattr("rl_lab.offline_training.free_memory", lambda _: 10**9)
    with pytest.raises(ValueError, match=r"--batch-size 99999999 must be one for which there is room: it takes \d+"):
        bc.train(replace(arguments(bc, tmp_path), batch_size=99_999_999))
    assert not list(tmp_path.iterdir())


def test_ten_percent_bc_takes_the_best_episodes(lucky: Lucky, tmp_path: Path) -> None:
    """All of the data has the mean action 0; of the best tenth every action is within 0.2 of 1."""
    lucky()
    assert mean_action(bc, tmp_path / "all") == pytest.approx(0.0, abs=0.15)
    assert mean_action(bc, tmp_path / "best", fraction=0.1) == pytest.approx(1.0, abs=0.15)


def test_best_episodes_by_hand(lucky: Lucky) -> None:
    """Episodes of 2, 1, 3 steps with returns 3, 5, 4: half of six steps are the second and the third, whole."""
    data = lucky(6)
    ends = torch.tensor([0, 1, 1, 0, 0, 1]).bool()
    columns = {"rewards": torch.tensor([1.0, 2, 5, 1, 1, 2]), "terminated": ends, "truncated": torch.zeros(6).bool()}
    data = replace(data, columns=data.columns | columns)
    for fraction, rows in ((0.1, [2]), (0.5, [2, 3, 4, 5]), (1.0, [0, 1, 2, 3, 4, 5])):
        kept = bc.best_episodes(data, fraction)
        assert torch.equal(kept.columns["obs"], data.columns["obs"][rows]), fraction


def test_bc_of_discrete_actions(lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data take action 1 where the first observation is positive, and so does the clone; shuffled, it cannot."""
    data, peer = lucky(), gym.make("CartPole-v1")
    obs = torch.randn(2000, 4, generator=torch.Generator().manual_seed(3))
    columns = data.columns | {"obs": obs, "next_obs": obs, "actions": (obs[:, 0] > 0).long()}
    data = replace(data, env_id="CartPole-v1", columns=columns, observation_space=peer.observation_space)
    right = []
    for name, order in (("data", torch.arange(2000)), ("shuffled", torch.randperm(2000, generator=torch.Generator()))):
        shown = replace(data, action_space=peer.action_space, columns=columns | {"actions": columns["actions"][order]})
        monkeypatch.setattr("rl_lab.offline_training.load", lambda *_, shown=shown: shown)
        flags = {"total_timesteps": 300, "log_every": 100, "eval_every": 0, "eval_episodes": 0, "batch_size": 64}
        run = bc.train(arguments(bc, tmp_path / name, learning_rate=3e-3, **flags))
        right.append(float((rl_lab.load(run.logs.folders[0])(obs) == (obs[:, 0] > 0)).float().mean()))
    assert right[0] > 0.95 and right[1] < 0.7


@pytest.mark.parametrize("algorithm", [awac, iql, td3_bc], ids=["awac", "iql", "td3_bc"])
def test_discrete_actions_are_refused(
    algorithm: ModuleType, lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(lucky(10), env_id="CartPole-v1")
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)
    with pytest.raises(ValueError, match="--env CartPole-v1 must be one with actions in a bounded Box, not Discrete"):
        algorithm.train(arguments(algorithm, tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("off", [200.0, -1100.0])
@pytest.mark.parametrize("algorithm", [awac, iql, td3_bc], ids=["awac", "iql", "td3_bc"])
def test_divergence_stops_with_its_cause(
    algorithm: ModuleType, off: float, lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards in [-9, 0] allow Q in [-900, 0] at gamma 0.99, and 90 more on either side as estimates err."""
    lucky(200)
    sound = algorithm.init_params

    def inflated(*args: Any) -> dict[str, dict[str, Tensor]]:
        agent = sound(*args)
        agent["critics"]["critic.2.bias"] += off
        return agent

    monkeypatch.setattr(algorithm, "init_params", inflated)
    with pytest.raises(
        FloatingPointError, match=r"Q of seed 1 is \S+, the rewards allow -8[67]\d to 0 after .*; values of actions"
    ):
        algorithm.train(arguments(algorithm, tmp_path))
    (folder,) = tmp_path.iterdir()  # the run is there to be looked at
    assert json.loads((folder / "config.json").read_text())["algo"] == algorithm.__name__.rpartition(".")[2]


def test_values_near_those_that_the_rewards_allow_are_no_divergence(
    lucky: Lucky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of their range beyond. Where nothing was rewarded only 0 is allowed, and no untrained network has it."""
    data, args = lucky(50), arguments(bc, tmp_path / "near", env="Pendulum-v1", total_timesteps=20)
    least = 100 * float(data.columns["rewards"].min())
    run = OfflineRun(args, "bc", data, make(args.env, args.seeds, 1), args.generators(0), lambda: {"params": {}})
    for _ in run.intervals():
        for q in (0.09 * -least, 1.09 * least):
            run.log_losses({"q": torch.tensor([q])})
        run.log_losses({"q": torch.tensor([1.19 * least])}, extra=0.1 * -least / 100)
        for q in (0.11 * -least + 1, 1.11 * least - 1, float("nan")):
            with pytest.raises(FloatingPointError, match="the rewards allow"):
                run.log_losses({"q": torch.tensor([q])})
    unrewarded = replace(data, columns=data.columns | {"rewards": torch.zeros_like(data.columns["rewards"])})
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: unrewarded)
    assert td3_bc.train(arguments(td3_bc, tmp_path, eval_episodes=0)).score(0) == "not judged"


@pytest.mark.parametrize("algorithm", EVERY, ids=[a.__name__.rpartition(".")[2] for a in EVERY])
def test_flags_come_in_any_company(algorithm: ModuleType, tmp_path: Path) -> None:
    """Guards against defaults of an environment that want a data set, and against no flags at all."""
    args = cli.parse(["--env", "Hopper-v4", "--dataset", "x"], algorithm.Args, algorithm.defaults)
    assert (args.env, args.dataset) == ("Hopper-v4", "x")
    args = replace(cli.parse([], algorithm.Args, algorithm.defaults), runs_dir=tmp_path)
    with pytest.raises(ValueError, match="--dataset is missing: a Minari id or a path"):
        algorithm.train(args)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("algorithm", "flags", "message"),
    [
        (bc, {"total_timesteps": 1500}, "--total-timesteps 1500 must be a multiple of --log-every 1000"),
        (bc, {"until_return": 5.0, "eval_every": 10}, "--until-return 5.0 must be left out: to end by what is played"),
        (bc, {"fraction": 0.0}, "--fraction 0.0 must be above 0 and at most 1"),
        (bc, {"fraction": 1.5}, "--fraction 1.5 must be above 0 and at most 1"),
        (bc, {"gamma": 0.9}, "--gamma 0.9 must be left out: nothing is discounted"),
        (cql, {"target_action_gap": 5.0}, "--target-action-gap 5.0 must be left out without --lagrange"),
        (iql, {"expectile": 1.0}, "--expectile 1.0 must be between 0 and 1"),
        (iql, {"beta": -1.0}, "--beta -1.0 must be finite and 0 or more"),
        (iql, {"reward_scale": 0.0}, "--reward-scale 0.0 must be finite and above 0"),
        (awac, {"awac_lambda": 0.0}, "--awac-lambda 0.0 must be finite and above 0"),
        (td3_bc, {"alpha": -1.0}, "--alpha -1.0 must be finite and 0 or more"),
        (td3_bc, {"noise_clip": float("inf")}, "--noise-clip inf must be finite and 0 or more"),
    ],
)
def test_refusals(algorithm: ModuleType, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm.Args(**{"dataset": "x", **flags})
