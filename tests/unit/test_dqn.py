"""DQN's parts and its training loop; each test names the bug it guards. Parity with CleanRL is in tests/parity."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from rl_lab import offpolicy
from rl_lab.algorithms import dqn
from rl_lab.algorithms.dqn import Args
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.envs.classic import CLASSIC
from rl_lab.networks import Params, polyak
from rl_lab.optim import init_adam
from rl_lab.replay import Batch, Replay
from rl_lab.vector import TensorEnv

TWO = Actions((2,), ())
SMALL = Args(
    total_timesteps=400, log_every=80, learning_starts=100, batch_size=16, buffer_size=200,
    target_network_frequency=80, learning_rate=1e-2, compile=False,
)  # fmt: skip
ALL = {"double": True, "dueling": True, "prioritized": True, "n_step": 3}


def linear(slopes: tuple[float, float], offsets: tuple[float, float], dueling: bool = False) -> Params:
    """Weights with which Q(s, a) = slopes[a] * s + offsets[a] for s >= 0, and V(s) = s + 10 where it is dueling."""
    blank = dqn.init_params(gym.spaces.Box(0.0, 9.0, (1,)), TWO, dueling, torch.Generator())
    params = {name: torch.zeros_like(p) for name, p in blank.items()}
    params["trunk.0.weight"][0, 0] = params["trunk.1.weight"][0, 0] = 1.0
    params["q.0.weight"][:, 0], params["q.0.bias"][:] = torch.tensor(slopes), torch.tensor(offsets)
    if dueling:
        params["value.0.weight"][0, 0], params["value.0.bias"][0] = 1.0, 10.0
    return params


ONLINE, TARGET = linear((1, 2), (0, -1)), linear((3, 1), (0, 0))


def three_rows() -> Batch:
    """Gamma is 1/2; the second row has terminated, the third was truncated.

    Online values of the states 2, 1, 3: (2, 3), (1, 1), (3, 5); the actions' are 3, 1, 3. Of the states after: online
    (2, 3), (4, 7), (0.5, 0), target (6, 2), (12, 4), (1.5, 0.5). So the rows' targets are 2 + 6/2 = 5, or with double
    2 + 2/2 = 3; 2; and 0 + 1.5/2 = 0.75 with either. TD errors: 2 or 0, 1, -2.25.
    """
    column = torch.tensor([[2.0, 2.0, 2.0, 0.5], [1.0, 4.0, 2.0, 0.0], [3.0, 0.5, 0.0, 0.5]])
    obs, next_obs, rewards, discounts = column.T.contiguous()
    batch = {"obs": obs.unsqueeze(1), "next_obs": next_obs.unsqueeze(1), "rewards": rewards, "discounts": discounts}
    return {**batch, "actions": torch.tensor([1, 0, 0])}


# --- network, targets, loss -------------------------------------------------------------------------------------------


def test_dueling_by_hand() -> None:
    """Guards Wang et al.'s Eq. 9: at 2, V = 12 and A = (2, 3), less its mean 2.5; the largest would make 11 and 12."""
    obs = torch.tensor([[2.0], [0.0]])
    assert dqn.q_values(linear((1, 2), (0, -1), dueling=True), obs).tolist() == [[11.5, 12.5], [10.5, 9.5]]
    assert dqn.q_values(ONLINE, obs).tolist() == [[2.0, 3.0], [0.0, -1.0]]


@pytest.mark.parametrize(("double", "first", "total"), [(False, 2.0, 10.0625 / 3), (True, 0.0, 6.0625 / 3)])
def test_loss_by_hand(double: bool, first: float, total: float) -> None:
    """Guards the target rule, its mask, and the gradient's sign and scale, -2/3 of the TD errors."""
    args, batch = Args(double=double), three_rows()
    grads, (loss, metrics) = grad_and_value(dqn.loss, has_aux=True)(ONLINE, TARGET, batch, args)
    assert metrics["td_errors"].tolist() == [first, 1.0, -2.25]
    assert loss.item() == metrics["td_loss"].item() == pytest.approx(total)
    assert metrics["q_values"].item() == pytest.approx(7 / 3)
    # By rows: action 1 at state 2, action 0 at 1 and at 3. The hidden unit has the slopes 2, 1, 1.
    assert grads["q.0.bias"].tolist() == pytest.approx([2.5 / 3, -2 * first / 3])
    assert grads["q.0.weight"][:, 0].tolist() == pytest.approx([11.5 / 3, -4 * first / 3])
    assert grads["trunk.1.weight"][0, 0].item() == pytest.approx((11.5 - 8 * first) / 3)


def test_weights_and_n_step_discounts() -> None:
    """Guards the importance weights, and gamma^n in place of gamma: with 1/8 the first target is 2.75."""
    batch = {**three_rows(), "weights": torch.tensor([1.0, 0.5, 0.2])}
    assert dqn.loss(ONLINE, TARGET, batch, Args())[0].item() == pytest.approx((4 + 0.5 + 1.0125) / 3)
    batch["discounts"][0] = 0.125
    assert dqn.loss(ONLINE, TARGET, batch, Args())[1]["td_errors"].tolist() == [-0.25, 1.0, -2.25]


def online_for_target(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    return targets(params, params, batch, double)


def through_termination(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    return targets(params, target, {**batch, "discounts": torch.full_like(batch["rewards"], 0.5)}, double)


def not_through_truncation(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    return targets(params, target, {**batch, "discounts": torch.tensor([0.5, 0.0, 0.0])}, double)


def other_rule(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    return targets(params, target, batch, not double)


def online_valued(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    return targets(target, params, batch, double)


targets = dqn.targets
FAULTS = [online_for_target, through_termination, not_through_truncation, other_rule, online_valued]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize(("double", "first", "total"), [(False, 2.0, 10.0625 / 3), (True, 0.0, 6.0625 / 3)])
def test_faults_show(monkeypatch: pytest.MonkeyPatch, fault: Any, double: bool, first: float, total: float) -> None:
    """Guards the test by hand itself: it fails under each wrong target rule."""
    monkeypatch.setattr(dqn, "targets", fault)
    with pytest.raises(AssertionError):
        test_loss_by_hand(double, first, total)


def test_targets_have_no_gradient() -> None:
    """Guards against a gradient through the next state's values: with the target's weights the online ones it shows."""
    loss = grad_and_value(lambda p: dqn.loss(p, p, three_rows(), Args())[0])
    grads, _ = loss(ONLINE)
    # Targets 2 + 3/2, 2, 0.5/2; TD errors 0.5, 1, -2.75; the biases' gradient -2/3 of their sums by action.
    assert grads["q.0.bias"].tolist() == pytest.approx([3.5 / 3, -1 / 3])


@pytest.mark.parametrize(("share", "expected"), [(0.0, 3.0), (0.25, 2.4975), (1.0, 0.99)])
def test_target_network(share: float, expected: float) -> None:
    """Guards the target network's move: none, a quarter of the way to the new parameters, all of it.

    Adam's first step is the learning rate against the gradient's sign: the slope of action 0 goes from 1 to 0.99.
    """
    params, *_ = dqn.update(ONLINE, TARGET, init_adam(ONLINE), three_rows(), Args(learning_rate=0.01))
    target = polyak(TARGET, params, share)
    assert params["q.0.weight"][0, 0].item() == pytest.approx(0.99, abs=1e-6)
    assert target["q.0.weight"][0, 0].item() == pytest.approx(expected, abs=1e-6)


# --- acting -----------------------------------------------------------------------------------------------------------


def test_epsilon_greedy() -> None:
    """Guards the share of random actions, their evenness, and the best action elsewhere: 4 standard errors."""
    noise = dqn.draw_noise(Actions((4,), ()), (40_000,), torch.Generator().manual_seed(0), epsilon=0.2)
    assert noise.dtype == torch.int64
    shares = (noise + 1).bincount(minlength=5) / 40_000
    assert shares.tolist() == pytest.approx([0.8, 0.05, 0.05, 0.05, 0.05], abs=0.008)
    obs = {"obs": torch.tensor([[2.0], [0.5], [2.0], [0.5]])}
    actions, env_actions = dqn.act(ONLINE, obs, torch.tensor([-1, -1, 0, 1]))
    assert actions.tolist() == env_actions.tolist() == [1, 0, 0, 1]
    assert dqn.act(ONLINE, obs, None)[1].tolist() == [1, 0, 1, 0]


# --- training ---------------------------------------------------------------------------------------------------------


class Toy(TensorEnv):
    """Two numbers, of which the second is paid; episodes last 7 steps, or end by chance."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Discrete(3)
    max_episode_steps, reset_draws = 7, 2

    def initial(self, draws: Tensor) -> Tensor:
        return 2 * draws - 1

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = torch.stack([physics[:, 1], (7 * physics[:, 0] + 3 * physics[:, 1] + actions).sin()], -1)
        return physics, physics[:, 0], physics[:, 1] > 0.9

    def observe(self, physics: Tensor) -> Tensor:
        return physics


Trained = Callable[[Args], dict[str, Any]]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Trains in the toy environment and returns the final state."""
    monkeypatch.setattr(dqn, "make", lambda _, seeds, num_envs, *__: Toy(seeds, num_envs))

    def run(args: Args) -> dict[str, Any]:
        return dqn.train(replace(args, runs_dir=tmp_path / str(len([*tmp_path.iterdir()])))).state()

    return run


@pytest.mark.parametrize("num_envs", [1, 2])
def test_epsilon_schedule(trained: Trained, monkeypatch: pytest.MonkeyPatch, num_envs: int) -> None:
    """Guards a schedule by iterations or by steps of one environment: from 1 to 0.1 over the first 200 steps of 400."""
    used: list[Tensor] = []
    draw_noise = dqn.draw_noise

    def recording(actions: Actions, shape: Any, generator: torch.Generator, epsilon: Tensor) -> Tensor:
        used.append(epsilon.expand(shape).flatten())
        return draw_noise(actions, shape, generator, epsilon)

    monkeypatch.setattr(dqn, "draw_noise", recording)
    trained(replace(SMALL, num_envs=num_envs, start_e=1.0, end_e=0.1, exploration_fraction=0.5))
    epsilon = torch.cat(used)
    assert len(epsilon) == 400
    assert epsilon[[0, 100, 150, 200, 399]].tolist() == pytest.approx([1.0, 0.55, 0.325, 0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "updates", "moves"),
    [
        ({}, 30, [6, 14, 22, 30]),  # at steps 110, 120, ..., 400; the target's at 160, 240, 320, 400
        ({"num_envs": 8, "train_frequency": 4}, 76, [16, 36, 56, 76]),  # two at each of 104, 112, ..., 400
        ({"num_envs": 8, "train_frequency": 16}, 19, [4, 9, 14, 19]),  # at 112, 128, ..., 400
        ({"num_envs": 8, "train_frequency": 8, "learning_starts": 0}, 50, [10, 20, 30, 40, 50]),
    ],
)
def test_update_counts(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int], updates: int, moves: list[int]
) -> None:
    """Guards gradient steps per env step whatever the number of environments, and the target's one move when due."""
    steps, seen, shares = [], [], []
    adam, polyak = dqn.adam, dqn.polyak
    monkeypatch.setattr(dqn, "adam", lambda *args, **kwargs: (steps.append(1), adam(*args, **kwargs))[1])
    monkeypatch.setattr(
        dqn, "polyak", lambda *args: (seen.append(len(steps)), shares.append(args[2]), polyak(*args))[2]
    )
    state = trained(replace(SMALL, tau=0.25, **flags))
    assert state["opt"]["step"].tolist() == [updates] == [len(steps)]
    assert seen == moves and {*shares} == {0.25}


def test_hard_update(trained: Trained) -> None:
    """Guards tau = 1: the run ends with an update of the target network, which is then the online one."""
    state = trained(SMALL)
    assert all(torch.equal(p, state["params"][name]) for name, p in state["target"].items())
    state = trained(replace(SMALL, target_network_frequency=500))
    assert not any(torch.equal(p, state["params"][name]) for name, p in state["target"].items())


def test_priorities_are_those_of_the_last_errors(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards |TD error| + 1e-6, alpha, beta's way from 0.4 to 1, and the rows that the priorities are given to."""
    betas: list[float] = []
    errors: list[Tensor] = []

    class Watched(Compiled):
        def __call__(self, *args: Any) -> Any:
            learned = super().__call__(*args)
            if self.key[0] == "learn":  # type: ignore[index]
                errors.append(learned[2]["td_errors"])
            return learned

    class Recording(Replay):
        def sample(self, points: Tensor, beta: float = 1.0) -> Batch:
            betas.append(beta)
            self.batch = super().sample(points, beta)
            return self.batch

        def prioritize(self, leaves: Tensor, priorities: Tensor) -> None:
            assert leaves is self.batch["leaves"] and self.alpha == 0.7
            assert torch.equal(priorities, errors[-1].abs() + 1e-6) and len(priorities.unique()) > 1
            super().prioritize(leaves, priorities)

    monkeypatch.setattr(dqn, "Compiled", Watched)
    monkeypatch.setattr(offpolicy, "Replay", Recording)
    trained(replace(SMALL, prioritized=True, priority_alpha=0.7))
    assert len(errors) == len(betas) == 30
    assert (betas[0], betas[-1]) == (pytest.approx(0.4 + 0.6 * 110 / 400), 1.0)


def assert_close(left: Params, right: Params, atol: float) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        torch.testing.assert_close(x, right[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("variants", [{}, ALL], ids=["plain", "all"])
def test_seed_in_a_batch_of_three_is_that_seed_alone(trained: Trained, variants: dict[str, Any]) -> None:
    """Guards against noise, draws, transitions or priorities that one seed shares with another."""
    args = replace(SMALL, num_envs=2, total_timesteps=240, learning_rate=1e-3, **variants)
    together = trained(replace(args, num_seeds=3))["params"]
    for index in (0, 2):
        alone = trained(replace(args, seed=1 + index))["params"]
        assert_close({name: p[index : index + 1] for name, p in together.items()}, alone, atol=1e-5)
    assert not torch.allclose(together["trunk.1.weight"][0], together["trunk.1.weight"][2], atol=0.01)


@pytest.mark.slow
def test_compiled_equals_eager(trained: Trained) -> None:
    """Guards against graphs that compute something else than the functions that were tested."""
    args = replace(SMALL, num_envs=2, num_seeds=2, total_timesteps=240, learning_rate=1e-3, **ALL)
    eager, compiled = (trained(replace(args, compile=compile)) for compile in (False, True))
    assert_close(eager["params"], compiled["params"], atol=1e-5)
    columns = [state["replay"]["columns"] for state in (eager, compiled)]
    assert torch.equal(columns[0]["actions"], columns[1]["actions"])


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_starts": 400}, "--learning-starts 400 must be below --total-timesteps 400"),
        ({"total_timesteps": 79}, "--total-timesteps 79 must be a multiple of --log-every 80"),
        # 80 steps would be done, and none of them learned from.
        ({"total_timesteps": 150}, "--total-timesteps 150 must be a multiple of --log-every 80"),
        ({"num_envs": 3}, "--train-frequency 10 must be a multiple or a divisor of --num-envs 3"),
        ({"num_envs": 8, "train_frequency": 12}, "--train-frequency 12 must be a multiple or a divisor"),
        ({"log_every": 75}, "--log-every 75 must be a multiple of 10, the env steps between updates"),
        ({"target_network_frequency": 45}, "--target-network-frequency 45 must be a multiple of 10"),
        (
            {"num_envs": 8, "train_frequency": 8, "buffer_size": 100},
            "--buffer-size 100 must be a multiple of --num-envs",
        ),
        ({"n_step": 0}, "--n-step 0 must be at least 1"),
        ({"tau": 1.5}, r"--tau 1.5 must be in \[0, 1\]"),
        ({"end_e": -0.1}, r"--end-e -0.1 must be in \[0, 1\]"),
        ({"start_e": 0.01}, "--end-e 0.05 must be at most --start-e 0.01"),
        (
            {"prioritized": True, "priority_alpha": 0.0},
            "--priority-alpha 0.0 must be above 0 and at most 1 with",
        ),
        ({"priority_alpha": 0.5}, "--priority-alpha 0.5 must be left out, or with --prioritized"),
        ({"priority_beta": 0.5}, "--priority-beta 0.5 must be left out, or with --prioritized"),
        ({"priority_alpha": 2.0}, r"--priority-alpha 2.0 must be in \[0, 1\]"),
        ({"exploration_fraction": 0.0}, "--exploration-fraction 0.0 must be finite and above 0"),
    ],
)
def test_refused_flags(flags: dict[str, Any], message: str) -> None:
    """Guards against a run that starts and fails, or that ignores what it was given."""
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **flags)


def test_an_environment_with_masks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a mask that is ignored: forbidden actions would be taken, and valued."""
    monkeypatch.setattr(CLASSIC["CartPole-v1"], "mask", lambda env, physics: torch.ones(len(physics), 2).bool())
    with pytest.raises(ValueError, match=r"--env CartPole-v1 masks actions, .*rl_lab\.ppo"):
        dqn.train(replace(SMALL, runs_dir=tmp_path / "runs"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"env": "Pendulum-v1"}, "--env Pendulum-v1: this command needs one Discrete action, not Box"),
        ({"buffer_size": 10**13}, "--buffer-size 10000000000000 needs .* GB"),
        ({"learning_starts": 9, "n_step": 11}, "--learning-starts 9 must be at least 10: a transition takes 11 steps"),
        ({"buffer_size": 5, "n_step": 6}, "--buffer-size 5 must be at least 6: a transition takes 6 steps of each"),
    ],
)
def test_refused_before_a_run_exists(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    """Guards against a folder that a refused command leaves behind."""
    with pytest.raises(ValueError, match=message):
        dqn.train(replace(SMALL, runs_dir=tmp_path / "runs", **flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "copies"),
    [({}, 3), ({"checkpoint_every": 80}, 3), ({"checkpoint_every": 240}, 2), ({"checkpoint_every": 0}, 1)],
)
def test_room_for_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, int], copies: int
) -> None:
    """Guards against a disk that is full after hours: a transition takes 46 bytes, 400 of 800 are ever kept."""
    flags = {"buffer_size": 800, "checkpoint_every": 100, **flags}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(offpolicy.shutil, "disk_usage", lambda _: usage(copies * 400 * 46 - 1))
    wanted = (
        r"--runs-dir .*/runs needs 0\.0 GB for checkpoints, 0\.0 GB are free; a smaller --buffer-size, --checkpoint"
    )
    with pytest.raises(ValueError, match=wanted):
        dqn.train(replace(SMALL, runs_dir=tmp_path / "runs", **flags))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(offpolicy.shutil, "disk_usage", lambda _: usage(copies * 400 * 46))
    dqn.train(replace(SMALL, runs_dir=tmp_path / "runs", **flags))


def test_a_relative_replay_folder_is_one_wherever_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Args(replay_folder=Path("files")).replay_folder == tmp_path / "files"
