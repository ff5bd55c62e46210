"""FQE on a task whose values are known, what makes it miss them, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.utils._pytree as pytree
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch import Tensor

import rl_lab
from rl_lab.algorithms import bc, fqe
from rl_lab.algorithms.fqe import Args
from rl_lab.cli import Stopped
from rl_lab.distributions import Actions
from rl_lab.envs import make
from rl_lab.episodes import evaluate, evaluation_seeds
from rl_lab.offline import Dataset
from rl_lab.run import flatten

BOX, DISCRETE = Actions((1,), (1,), (-2.0,), (2.0,)), Actions((2,), ())
GAMMA = 0.9
V = [-3 + 0.9 * 3.7, 1 + 0.9 * 3, 3.0]  # of the states 0, 1, 2 under `Walker`, by hand
VALUE = 0.75 * V[0] + 0.25 * V[2]  # where episodes begin, in 0 and in 2


def chain(env_id: str, num_episodes: int = 400) -> tuple[Dataset, Tensor]:
    """Random steps on a chain of three states, seen as unit vectors, in the spaces of `env_id`.

    Walking leads from 0 to 1 for a reward of -3, to 2 for 1, and to the end for 0; stopping ends it, for -1 in 0 and 1
    and for 3 in 2. What follows an end is state 2, for whoever looks. Three episodes of four begin in 0, the others in
    2. All are cut by time after the step from 1 to 2. Also returns the actions that the data take next, (n, *shape).
    """
    random, rows = torch.Generator().manual_seed(0), []
    for episode in range(num_episodes):
        state, over = (0, 0, 0, 2)[episode % 4], False
        while not over:
            walks = int(torch.rand((), generator=random) < 0.5)
            ended, reward = not walks or state == 2, ((-1, -3), (-1, 1), (3, 0))[state][walks]
            rows.append((state, walks, reward, 2 if ended else state + 1, ended, not ended and state == 1))
            state, over = state + 1, ended or state == 1
    table = torch.tensor(rows)
    env = gym.make(env_id)
    assert isinstance(env.observation_space, gym.spaces.Box)
    seen = torch.eye(3, env.observation_space.shape[0])
    walks = table[:, 1] if isinstance(env.action_space, gym.spaces.Discrete) else 2.0 * table[:, 1:2] - 1
    columns = {
        "obs": seen[table[:, 0]],
        "actions": walks,
        "rewards": table[:, 2].float(),
        "next_obs": seen[table[:, 3]],
    }
    columns |= {"terminated": table[:, 4].bool(), "truncated": table[:, 5].bool()}
    data = Dataset("chain", env_id, columns, env.observation_space, env.action_space, (-1.0, 9.0), "sum of the data")
    return data, walks.roll(-1, 0)


class Walker:
    """As a policy that rl_lab.load gives: walks in the states 0 and 1 and stops in 2."""

    def __init__(self, env_id: str, /, **changes: Any) -> None:
        env = gym.make(env_id)
        self.env_id, self.algo, self.source = env_id, "walker", "by hand"
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.params, self.normalizer, self.memory = {"weight": torch.ones(2)}, dict[str, Tensor](), dict[str, Tensor]()
        self.__dict__ |= changes

    def __call__(self, obs: Tensor) -> Tensor:
        walks = (obs[:, 2] < 0.5).long()
        return walks if isinstance(self.action_space, gym.spaces.Discrete) else 2.0 * walks.unsqueeze(1) - 1


def settings(tmp_path: Path, **flags: Any) -> Args:
    given = {"total_timesteps": 200, "log_every": 100, "learning_rate": 5e-3, "target_network_frequency": 20}
    given |= {"batch_size": 32, "gamma": GAMMA, "eval_every": 100, "eval_episodes": 0, "device": "cpu"}
    return Args(dataset="chain", policy=Path("walker"), compile=False, runs_dir=tmp_path, **{**given, **flags})


def use(monkeypatch: pytest.MonkeyPatch, data: Dataset) -> None:
    monkeypatch.setattr("rl_lab.offline_training.load", lambda *_: data)


@pytest.mark.parametrize("actions", [BOX, DISCRETE], ids=["box", "discrete"])
def test_loss_by_hand(actions: Actions) -> None:
    """Q = 2 and Q_target = 10 everywhere, rewards 1 and 3: residuals 2 - 1 at the end, 2 - (3 + 0.5 * 10) before."""

    def constant(*values: float) -> dict[str, Tensor]:
        params = fqe.init_params(1, actions, torch.Generator())
        params = {name: torch.zeros_like(p) for name, p in params.items()}
        return params | {"critic.2.bias": torch.tensor(values[: len(params["critic.2.bias"])])}

    taken, following = torch.zeros(2, 1), torch.ones(2, 1)
    if not actions.low:
        taken, following = taken[:, 0].long(), following[:, 0].long()
    batch = {"obs": torch.zeros(2, 1), "actions": taken, "next_obs": torch.zeros(2, 1), "next_actions": following}
    batch |= {"rewards": torch.tensor([1.0, 3.0]), "discounts": torch.tensor([0.0, 0.5])}
    target = constant(10.0) if actions.low else constant(99.0, 10.0)
    critic = constant(2.0, 77.0)
    value, metrics = fqe.loss(critic, target, batch, actions)
    gradient = torch.func.grad(fqe.loss, has_aux=True)(critic, target, batch, actions)[0]
    assert value.item() == pytest.approx((1 + 36) / 2)
    assert metrics["q"].item() == 2.0
    assert gradient["critic.2.bias"][0].item() == pytest.approx(1 - 6)  # nothing flows into the target
    assert not gradient["critic.2.bias"][1:].any()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_finds_the_value(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, chain(env_id)[0])
    run = fqe.train(settings(tmp_path), Walker(env_id))
    assert run.results[0]["estimate"]["mean"] == pytest.approx(VALUE, abs=0.03)
    spread = (V[2] - V[0]) * math.sqrt(0.75 * 0.25 * 400 / 399) / math.sqrt(400)  # 300 of 400 begin in 0
    assert run.results[0]["estimate"]["standard_error"] == pytest.approx(spread, rel=0.05)
    assert run.results[0]["estimate"]["count"] == 400


@pytest.mark.parametrize("fault", ["actions of the data", "through the end", "cut by time", "all states"])
def test_misses_the_value_where_it_must(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault by itself is off by ten times the tolerance above, and more."""
    data, following = chain("CartPole-v1")
    ended, cut = data.columns["terminated"], data.columns["truncated"]
    match fault:
        case "actions of the data":
            acted = fqe.acted
            monkeypatch.setattr(fqe, "acted", lambda p, obs: following if len(obs) == len(data) else acted(p, obs))
        case "through the end":
            data = replace(data, columns=data.columns | {"terminated": ended & False, "truncated": ended | cut})
        case "cut by time":
            data = replace(data, columns=data.columns | {"terminated": ended | cut})
        case "all states":
            monkeypatch.setattr(fqe, "first_steps", lambda data: torch.arange(len(data)))
    use(monkeypatch, data)
    monkeypatch.setattr(fqe, "discounted_returns", lambda *_: torch.zeros(2))
    found = fqe.train(settings(tmp_path), Walker("CartPole-v1")).results[0]["estimate"]["mean"]
    assert abs(found - VALUE) > 0.3


def test_the_data_s_episodes_by_hand() -> None:
    """Of rewards 1, 2, 3 and 4, 5 with gamma 1/2: 1 + 1 + 3/4 and 4 + 5/2."""
    ends = torch.tensor([False, False, True, False, True])
    columns = {"rewards": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "terminated": ends, "truncated": ends & False}
    space = gym.spaces.Discrete(2)
    data = Dataset("", None, columns, space, space, None, "")
    assert fqe.first_steps(data).tolist() == [0, 3]
    assert fqe.discounted_returns(data, 0.5).tolist() == [2.75, 6.5]
    assert fqe.summary(torch.tensor([2.75, 6.5])) == {"mean": 4.625, "standard_error": pytest.approx(1.875), "count": 2}


def test_played_returns_by_hand() -> None:
    """CartPole pays 1 a step: T steps return (1 - gamma^T) / (1 - gamma). What comes after them does not count."""
    discounted, plain = fqe.play(Walker("CartPole-v1"), make("CartPole-v1", (3,), 20), 0.9)
    lengths = evaluate(lambda x: Walker("CartPole-v1")(x["obs"]), make("CartPole-v1", (3,), 20), 1)[1]
    assert plain.tolist() == lengths.squeeze(1).tolist() and len(set(plain.tolist())) > 1
    torch.testing.assert_close(discounted, (1 - 0.9**plain) / 0.1)
    undiscounted, plain = fqe.play(Walker("Pendulum-v1"), make("Pendulum-v1", (3,), 2), 1.0)  # cut by time
    returns = evaluate(lambda x: Walker("Pendulum-v1")(x["obs"]), make("Pendulum-v1", (3,), 2), 1)[0]
    assert plain.tolist() == undiscounted.tolist() == pytest.approx(returns.squeeze(1).tolist())


def test_the_target_network_is_a_copy_of_some_steps_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy after the steps 3 and 6; the estimate is the critic's all the same."""
    data, policy = chain("CartPole-v1", 40)[0], Walker("CartPole-v1")
    use(monkeypatch, data)

    def after(steps: int) -> fqe.Evaluation:
        flags = {"total_timesteps": steps, "log_every": 1, "target_network_frequency": 3, "batch_size": 8}
        return fqe.train(settings(tmp_path / str(steps), **flags), policy)

    runs = [after(steps) for steps in (2, 3, 6, 7)]
    second, third, sixth, seventh = (run.state() for run in runs)
    for name, p in seventh["target"].items():
        assert torch.equal(p, sixth["params"][name]) and torch.equal(p, sixth["target"][name])
        assert not torch.equal(p, seventh["params"][name]) and not torch.equal(p, third["target"][name])
        assert not torch.equal(second["target"][name], second["params"][name])
    critic, first = {name: p[0] for name, p in seventh["params"].items()}, data.columns["obs"][fqe.first_steps(data)]
    value = fqe.q_values(critic, first, policy(first), DISCRETE).mean().item()
    assert runs[-1].results[0]["estimate"]["mean"] == pytest.approx(value, rel=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards what users run, which is compiled, also with another rate than the graph before."""
    monkeypatch.setattr(fqe, "HIDDEN", (32, 32))
    use(monkeypatch, chain("CartPole-v1", 40)[0])
    for rate in (1e-2, 1e-3):
        flags = {"total_timesteps": 6, "log_every": 6, "batch_size": 8, "num_seeds": 2, "target_network_frequency": 2}
        args = settings(tmp_path / str(rate), **flags, learning_rate=rate)
        eager, compiled = (fqe.train(replace(args, compile=x), Walker("CartPole-v1")).state() for x in (False, True))
        for name, p in eager["params"].items():
            torch.testing.assert_close(compiled["params"][name], p, rtol=0, atol=1e-5, msg=name)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, chain("Pendulum-v1", 40)[0])
    policy = Walker("Pendulum-v1")
    flags = {"total_timesteps": 60, "log_every": 20, "batch_size": 8, "num_seeds": 2, "target_network_frequency": 30}
    whole = fqe.train(settings(tmp_path / "whole", **flags), policy)
    with pytest.raises(Stopped, match="checkpointed at step 40"):
        fqe.train(settings(tmp_path / "part", stop_at=40, **flags), policy)
    folder = sorted((tmp_path / "part").iterdir())[1]
    again = settings(tmp_path / "part", resume=folder, **flags)

    with pytest.raises(ValueError, match="--policy walker is not what the run has evaluated: put that back"):
        fqe.train(again, Walker("Pendulum-v1", params={"weight": torch.tensor([1.0, 1.0 + 1e-7])}))
    with pytest.raises(ValueError, match="--policy walker is not what"):
        fqe.train(again, Walker("Pendulum-v1", normalizer={"mean": torch.zeros(3)}))
    resumed = fqe.train(again, policy)
    tensors = [pytree.tree_leaves(run.state()) for run in (resumed, whole)]
    for ours, theirs in zip(*tensors, strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs
    assert resumed.results == whole.results
    assert fqe.train(again, policy).results == whole.results  # of a run that is finished


def test_a_seed_among_others_is_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, chain("Pendulum-v1", 40)[0])
    flags = {"total_timesteps": 20, "log_every": 20, "batch_size": 8, "target_network_frequency": 5}
    both = fqe.train(settings(tmp_path / "both", num_seeds=2, **flags), Walker("Pendulum-v1"))
    alone = fqe.train(settings(tmp_path / "alone", seed=2, **flags), Walker("Pendulum-v1"))
    for name, p in alone.state()["params"].items():
        torch.testing.assert_close(both.state()["params"][name][1], p[0], rtol=1e-4, atol=1e-6)
    first, second = both.results
    assert second["estimate"]["mean"] == pytest.approx(alone.results[0]["estimate"]["mean"], rel=1e-4)
    assert first["estimate"]["mean"] != pytest.approx(second["estimate"]["mean"], rel=1e-3)
    assert first["seeds"] == second["seeds"] == {1: first["estimate"]["mean"], 2: second["estimate"]["mean"]}


def test_the_command_evaluates_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behaviour cloning, normaliser included, of data without the chain's wrong steps walks as `Walker` does."""
    data = chain("CartPole-v1")[0]
    wise = data.columns["actions"] == Walker("CartPole-v1")(data.columns["obs"])
    use(monkeypatch, replace(data, columns={name: x[wise] for name, x in data.columns.items()}))
    given = {"batch_size": 64, "eval_every": 0, "eval_episodes": 0, "device": "cpu", "compile": False}
    bc.train(bc.Args(dataset="wise", total_timesteps=60, log_every=60, runs_dir=tmp_path, learning_rate=3e-3, **given))
    (folder,) = tmp_path.iterdir()
    policy = rl_lab.load(folder)
    assert torch.equal(policy(torch.eye(3, 4)), torch.tensor([1, 1, 0]))

    use(monkeypatch, data)

    def command(*flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["fqe", "--device", "cpu", *flags])
        fqe.main(rl_lab.load)

    flags = ["--dataset", "chain", "--env", "CartPole-v1", "--runs-dir", str(tmp_path / "fqe"), "--no-compile"]
    flags += ["--total-timesteps", "200", "--log-every", "50", "--eval-every", "150", "--eval-episodes", "5"]
    flags += ["--learning-rate", "5e-3", "--target-network-frequency", "20", "--batch-size", "32", "--gamma", "0.9"]
    command("--policy", str(folder), *flags)
    (run,) = (tmp_path / "fqe").iterdir()
    found = json.loads((run / "fqe.json").read_text())
    assert found["estimate"]["mean"] == pytest.approx(VALUE, abs=0.03)
    digest = fqe.checksum(flatten({"params": policy.params, "normalizer": policy.normalizer}))
    assert found["policy"] == {"run": str(folder), "algo": "bc", "parameters": "model.safetensors", "sha256": digest}
    assert found["dataset"] == {"name": "chain", "sha256": "sum of the data"}
    assert found["data"]["mean"] == pytest.approx(fqe.discounted_returns(data, GAMMA).mean().item())
    lengths = fqe.play(policy, make("CartPole-v1", evaluation_seeds((1,)), 5), GAMMA)[1]
    assert found["undiscounted"] == fqe.summary(lengths)
    assert found["normalized"]["mean"] == pytest.approx(10 * (lengths.mean().item() + 1))  # scores -1 and 9
    assert found["played"]["mean"] == pytest.approx(((1 - GAMMA**lengths) / (1 - GAMMA)).mean().item())
    last = capsys.readouterr().out.splitlines()[-1]
    for name in ("estimate", "data", "played", "undiscounted", "normalized"):
        assert f"{name} {found[name]['mean']:,.2f} ± {found[name]['standard_error']:,.2f}" in last
    assert "; not settled, 35% of it hangs on the initial network)" in last  # 0.9 ** 10

    def logged() -> list[tuple[int, float]]:
        events = EventFileLoader(str(next(run.glob("events*")))).Load()
        return [(e.step, v.tensor.float_val[0]) for e in events for v in e.summary.value if v.tag == "eval/value"]

    before = logged()
    assert [step for step, _ in before] == [150, 200]  # the last one though 200 is no multiple
    assert before[-1][1] == pytest.approx(found["estimate"]["mean"], rel=1e-6)
    command("--resume", str(run), "--total-timesteps", "250")
    after = json.loads((run / "fqe.json").read_text())
    assert logged() == [*before, (250, pytest.approx(after["estimate"]["mean"], rel=1e-6))]
    assert after["played"] == found["played"] and after["estimate"] != found["estimate"]

    with pytest.raises(ValueError, match="a run of fqe has values and no policy"):
        rl_lab.load(run)(torch.zeros(4))
    with pytest.raises(SystemExit):
        command("--policy", str(tmp_path / "nowhere"), *flags)
    assert "nowhere is no run folder of rl_lab" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Walker("Pendulum-v1"), "--policy walker learned Pendulum-v1, not CartPole-v1; a run of CartPole-v1"),
        (Walker("Pendulum-v1", env_id="CartPole-v1"), "--env CartPole-v1 has observations Box"),
        (Walker("CartPole-v1", action_space=gym.spaces.Discrete(3)), "--env CartPole-v1 has actions Discrete.3."),
        (Walker("CartPole-v1", memory={"hidden": torch.zeros(1, 2)}), "--policy walker heeds what it saw before"),
    ],
    ids=["env", "observations", "actions", "memory"],
)
def test_policies_that_do_not_fit_are_refused(
    policy: Walker, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, chain("CartPole-v1", 4)[0])
    with pytest.raises(ValueError, match=message):
        fqe.train(settings(tmp_path), policy)
    assert not list(tmp_path.iterdir())


def test_masks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, chain("CartPole-v1", 4)[0])
    monkeypatch.setattr("rl_lab.envs.classic.CartPole.action_mask", torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="--policy walker heeds masks of actions; one that acts on the observation"):
        fqe.train(settings(tmp_path), Walker("CartPole-v1"))


def test_divergence_stops_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards up to 3 allow Q of 30 at gamma 0.9."""
    use(monkeypatch, chain("CartPole-v1", 40)[0])
    sound = fqe.init_params

    def inflated(*args: Any) -> dict[str, Tensor]:
        params = sound(*args)
        return params | {"critic.2.bias": params["critic.2.bias"] + 1e3}

    monkeypatch.setattr(fqe, "init_params", inflated)
    with pytest.raises(FloatingPointError, match=r"Q of seed 1 is \d+, the rewards allow \S+ to 30"):
        fqe.train(settings(tmp_path, total_timesteps=5, log_every=5), Walker("CartPole-v1"))


def test_a_policy_is_asked_for() -> None:
    with pytest.raises(ValueError, match="--policy None must be a run folder"):
        Args(dataset="x")
