"""C51's parts and its training loop; each test names the bug it guards. Parity with CleanRL is in tests/parity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad_and_value

import rl_lab
from rl_lab.algorithms import c51
from rl_lab.algorithms.c51 import Args
from rl_lab.cli import Stopped
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.replay import Batch

TWO, FOUR = Actions((2,), ()), gym.spaces.Box(-9.0, 9.0, (4,))
SMALL = Args(
    total_timesteps=96, learning_starts=16, log_every=16, train_frequency=4, batch_size=8, buffer_size=64,
    target_network_frequency=16, compile=False,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_batch(size: int = 6, discount: float = 0.9) -> Batch:
    random = generator(2)
    obs, next_obs = torch.randn(2, size, 4, generator=random)
    batch = {"obs": obs, "next_obs": next_obs, "actions": torch.arange(size) % 2}
    batch["rewards"] = 2 * torch.randn(size, generator=random)
    return {**batch, "discounts": torch.where(torch.arange(size) % 3 == 0, 0.0, discount)}


def constant(rows: list[list[float]], atoms: list[float]) -> Params:
    """Parameters under which every observation has the probabilities `rows`, (A, n_atoms)."""
    params = {"trunk.0.weight": torch.zeros(120, 4), "trunk.0.bias": torch.zeros(120)}
    params |= {"trunk.1.weight": torch.zeros(84, 120), "trunk.1.bias": torch.zeros(84)}
    params |= {"q.0.weight": torch.zeros(len(rows) * len(atoms), 84), "q.0.bias": torch.tensor(rows).flatten().log()}
    return params | {"atoms": torch.tensor(atoms)}


# --- policy, loss and update ------------------------------------------------------------------------------------------


def test_acts_on_the_mean() -> None:
    """Guards against the action of the likeliest, or of the highest, return: 0 or 10 against 5 for sure."""
    low = constant([[0.6, 0.0, 0.4], [0.0, 1.0, 0.0]], [0.0, 5.0, 10.0])  # means 4 and 5
    high = constant([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]], [0.0, 5.0, 10.0])  # means 6 and 5
    assert c51.act(low, {"obs": torch.zeros(3, 4)}, None)[0].tolist() == [1, 1, 1]
    assert c51.act(high, {"obs": torch.zeros(3, 4)}, None)[0].tolist() == [0, 0, 0]
    noise = torch.tensor([-1, 1, 0])
    assert c51.act(high, {"obs": torch.zeros(3, 4)}, noise)[0].tolist() == [0, 1, 0]


def test_random_actions_come_as_often_as_asked() -> None:
    """Guards against epsilon by row or action ignored: within 4 standard errors of 0.5 and 0.1, each action alike."""
    epsilon = torch.tensor([[0.5], [0.1]])
    noise = c51.draw_noise(Actions((4,), ()), (2, 40_000), generator(), epsilon)
    share = (noise >= 0).float().mean(1)
    assert ((share - epsilon[:, 0]).abs() < 4 * (epsilon[:, 0] * (1 - epsilon[:, 0]) / 40_000).sqrt()).all()
    counts = noise[0][noise[0] >= 0].bincount()
    assert len(counts) == 4 and (counts - 5000).abs().max() < 4 * (20_000 * 3 / 16) ** 0.5


def test_loss_by_hand() -> None:
    """Guards the target's action, the end of an episode, and the sign.

    The target network's means are -0.3 and 0.2, so action 1 follows: (0.2, 0.4, 0.4) on -1, 0, 1. Ended with reward
    1/2: halves on 0 and 1; going on with reward 0 and discount 1/2: (0.1, 0.1 + 0.4 + 0.2, 0.2). The online network
    says (0.5, 0.25, 0.25) of action 1, (0.125, 0.125, 0.75) of action 0.
    """
    target = constant([[0.5, 0.3, 0.2], [0.2, 0.4, 0.4]], [-1.0, 0.0, 1.0])
    params = constant([[0.125, 0.125, 0.75], [0.5, 0.25, 0.25]], [-1.0, 0.0, 1.0])  # its own best action would be 0
    batch = {"obs": torch.zeros(2, 4), "next_obs": torch.zeros(2, 4), "actions": torch.tensor([0, 1])}
    batch |= {"rewards": torch.tensor([0.5, 0.0]), "discounts": torch.tensor([0.0, 0.5])}
    ended = -(0.5 * math.log(0.125) + 0.5 * math.log(0.75))
    going = -(0.1 * math.log(0.5) + 0.7 * math.log(0.25) + 0.2 * math.log(0.25))
    total, metrics = c51.loss(params, target, batch, Args())
    assert total.item() == pytest.approx((ended + going) / 2, abs=1e-6)
    assert metrics["q_values"].item() == pytest.approx((0.625 - 0.25) / 2, abs=1e-6)


def test_gradient_equals_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a gradient through the target, and one that is not the loss's: float64 central differences."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the networks cast observations to float32
    args = Args(n_atoms=11, v_min=-5, v_max=5)
    params, target = (
        {name: p.double() for name, p in c51.init_params(FOUR, TWO, args, generator(seed)).items()} for seed in (0, 1)
    )
    batch = {name: x.double() if x.is_floating_point() else x for name, x in some_batch().items()}
    grads, _ = grad_and_value(c51.loss, has_aux=True)(params, target, batch, args)
    random, h = generator(4), 1e-6
    for name in sorted(params.keys() - {"atoms"}):
        direction = torch.randn(params[name].shape, generator=random, dtype=torch.float64)
        ahead, behind = (
            c51.loss({**params, name: params[name] + sign * h * direction}, target, batch, args)[0] for sign in (1, -1)
        )
        slope = ((ahead - behind) / (2 * h)).item()
        assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-5, abs=1e-9), name
        assert slope != 0
    assert not grads["atoms"].any()
    assert not any(x.any() for x in grad_and_value(lambda t: c51.loss(params, t, batch, args)[0])(target)[0].values())


def test_atoms_stay() -> None:
    """Guards against an optimizer that moves the constants among the parameters."""
    params = c51.init_params(FOUR, TWO, Args(), generator())
    assert params["atoms"][:3].tolist() == [-100, -98, -96] and params["atoms"][-1] == 100
    new, _, _ = c51.update(params, params, init_adam(params), some_batch(), Args())
    assert torch.equal(new["atoms"], params["atoms"])
    assert not torch.equal(new["q.0.bias"], params["q.0.bias"])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[Args], Any]:
    """Trains by `Args`; returns the run."""

    def run(args: Args) -> Any:
        return c51.train(replace(args, runs_dir=tmp_path / str(len(list(tmp_path.iterdir())))))

    return run


def test_target_network_stands_still_between_copies(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a target that is the network itself, never copied, or copied at other steps: 16, 32, ..., 80.

    Gradient steps come after env steps 20, 24, ..., 96: at 20 to 32 the target is what the network was at the start, at
    36 to 48 what it was after 32, and so on.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    class Watched(Compiled):
        def __call__(self, *args: Any) -> Any:
            if self.key[0] == "learn":  # type: ignore[index]
                seen.append((args[0]["q.0.bias"].clone(), args[1]["q.0.bias"].clone()))
            return super().__call__(*args)

    monkeypatch.setattr(c51, "Compiled", Watched)
    trained(SMALL)
    assert len(seen) == 20
    for index, (_, target) in enumerate(seen):
        assert torch.equal(target, seen[index // 4 * 4][0])
    assert len({tuple(params.flatten().tolist()) for params, _ in seen}) == 20


@pytest.mark.parametrize("num_envs", [1, 2])
def test_epsilon_schedule(trained: Any, monkeypatch: pytest.MonkeyPatch, num_envs: int) -> None:
    """Guards a schedule by iterations or by steps of one environment: from 1 to 0.1 over the first 48 steps of 96."""
    used: list[Tensor] = []
    draw_noise = c51.draw_noise

    def recording(actions: Actions, shape: Any, generator: torch.Generator, epsilon: Tensor) -> Tensor:
        used.append(epsilon.expand(shape).flatten())
        return draw_noise(actions, shape, generator, epsilon)

    monkeypatch.setattr(c51, "draw_noise", recording)
    trained(replace(SMALL, num_envs=num_envs, start_e=1.0, end_e=0.1, exploration_fraction=0.5))
    epsilon = torch.cat(used)
    assert len(epsilon) == 96
    assert epsilon[[0, 24, 36, 48, 95]].tolist() == pytest.approx([1.0, 0.55, 0.325, 0.1, 0.1], abs=1e-6)


def test_a_resumed_run_is_the_uninterrupted_one(trained: Any) -> None:
    """Guards a target network, a replay or a generator that starts anew; at step 64 the target is the one of 48."""
    args = replace(SMALL, target_network_frequency=48)
    whole = trained(args)
    with pytest.raises(Stopped, match="checkpointed at step 64") as stopped:
        trained(replace(args, stop_at=64))
    folder = str(stopped.value).rpartition(" ")[2]
    resumed = trained(replace(args, resume=Path(folder)))
    for ours, theirs in zip(*(pytree.tree_leaves(run.state()) for run in (resumed, whole)), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_seed_in_a_batch_of_ten_is_that_seed_alone(trained: Any) -> None:
    """Guards against noise, batches or targets that one seed shares with another."""
    together = trained(replace(SMALL, num_seeds=10)).state()["params"]
    for index in (0, 6):
        alone = trained(replace(SMALL, seed=1 + index)).state()["params"]
        for name, p in alone.items():
            torch.testing.assert_close(together[name][index], p[0], rtol=0, atol=1e-5)
    assert not torch.allclose(together["q.0.weight"][0], together["q.0.weight"][6], atol=0.01)


def test_a_run_gives_its_policy_back(trained: Any) -> None:
    """Guards against saved parameters without the atoms, and actions by another network."""
    run = trained(replace(SMALL, v_max=50.0))
    policy, obs = rl_lab.load(run.logs.folders[0]), torch.randn(50, 4, generator=generator())
    params = {name: p[0] for name, p in run.state()["params"].items()}
    assert torch.equal(policy(obs), c51.act(params, {"obs": obs}, None)[0])
    assert policy.params["atoms"][-1] == 50
    assert (policy(obs, deterministic=False) != policy(obs)).sum() < 25  # few are random


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"start_e": 0.0}, "--end-e 0.05 must be at most --start-e 0.0"),
        ({"n_atoms": 1}, "--n-atoms 1 must be at least 2"),
        ({"v_min": 100.0}, "--v-max 100.0 must be finite and above --v-min 100.0"),
        ({"v_max": math.nan}, "--v-max nan must be finite and above --v-min -100.0"),
        ({"v_min": -math.inf}, "--v-min -inf must be finite"),
        ({"target_network_frequency": 15}, "--target-network-frequency 15 must be a multiple of 10"),
    ],
)
def test_refused_flags(flags: dict[str, Any], message: str) -> None:
    """Guards against atoms that do not ascend, and a target that would be copied late."""
    with pytest.raises(ValueError, match=message):
        Args(**flags)


def test_refused_environments(trained: Any) -> None:
    """Guards against Box actions rounded to choices."""
    with pytest.raises(ValueError, match="--env Pendulum-v1: this command needs one Discrete action, not Box"):
        trained(replace(SMALL, env="Pendulum-v1"))


def test_a_loss_that_is_not_finite_stops_the_run(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a diverged run that goes on: the loss is logged as losses/loss here."""
    monkeypatch.setattr(c51, "loss", partial(_spoiled, c51.loss))
    with pytest.raises(FloatingPointError, match="losses/loss of seed 1 is not finite after step 16"):
        trained(SMALL)


def _spoiled(loss: Any, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
    total, metrics = loss(*args)
    return total, {**metrics, "loss": metrics["loss"] * math.nan}
