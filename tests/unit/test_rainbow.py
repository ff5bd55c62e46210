"""Rainbow's parts and its training loop; each test names the bug it guards. Parity with CleanRL is in tests/parity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

import rl_lab
from rl_lab import offpolicy
from rl_lab.algorithms import rainbow
from rl_lab.algorithms.rainbow import NOISY, Args
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import init_adam
from rl_lab.replay import Batch, Replay
from rl_lab.rollout import Collector

TWO = Actions((2,), ())
SMALL = Args(
    total_timesteps=96, learning_starts=16, log_every=16, train_frequency=4, batch_size=8, buffer_size=64,
    target_network_frequency=16, compile=False,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_params(seed: int = 0, args: Args | None = None) -> Params:
    space = gym.spaces.Box(-9.0, 9.0, (4,))
    return rainbow.init_params(space, TWO, args or Args(n_atoms=11, v_min=-5, v_max=5), generator(seed))


def some_batch(size: int = 6) -> Batch:
    random = generator(2)
    obs, next_obs = torch.randn(2, size, 4, generator=random)
    batch = {"obs": obs, "next_obs": next_obs, "actions": torch.arange(size) % 2}
    batch |= {"rewards": 2 * torch.randn(size, generator=random), "weights": torch.rand(size, generator=random) + 0.1}
    return {**batch, "discounts": torch.where(torch.arange(size) % 3 == 0, 0.0, 0.9)}


# --- noise ------------------------------------------------------------------------------------------------------------


def test_initial_agent() -> None:
    """Guards sigma_0 / sqrt(inputs) for weights and biases alike, in both layers of both streams."""
    params = some_params()
    for layer, inputs in zip(NOISY, (120, 84, 120, 84), strict=True):
        for part in ("weight", "bias"):
            mean, sigma = params[f"{layer}.{part}"], params[f"{layer}.{part}_sigma"]
            assert sigma.shape == mean.shape and sigma.unique().item() == pytest.approx(0.5 / inputs**0.5)
            assert inputs**-0.5 * 0.8 < mean.abs().max() <= inputs**-0.5
    assert params["value.1.weight"].shape == (11, 84) and params["advantage.1.weight"].shape == (22, 84)
    assert params["atoms"].tolist() == pytest.approx([-5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5])


def test_noisy_layer_by_hand() -> None:
    """Guards the factorisation: inputs 2 and 3 with noise 0.5 and -1, outputs with noise 2 and -0.5.

    First output: 1 * 2 + 2 * 3 + 0.25 = 8.25 and noise 2 * (0.1 * 0.5 * 2 + 0.2 * -1 * 3 + 0.3) = -0.4; second:
    -2 + 0 + 0.5 = -1.5 and noise -0.5 * (1 * 0.5 * 2 + 0 + 0.4) = -0.7.
    """
    params = {"x.weight": torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), "x.bias": torch.tensor([0.25, 0.5])}
    params |= {"x.weight_sigma": torch.tensor([[0.1, 0.2], [1.0, 0.0]]), "x.bias_sigma": torch.tensor([0.3, 0.4])}
    noise = {"x.in": torch.tensor([0.5, -1.0]), "x.out": torch.tensor([2.0, -0.5])}
    x = torch.tensor([[2.0, 3.0]])
    assert rainbow.noisy(params, "x", x, noise)[0].tolist() == pytest.approx([7.85, -2.2])
    assert rainbow.noisy(params, "x", x, {})[0].tolist() == pytest.approx([8.25, -1.5])


def test_drawn_noise() -> None:
    """Guards f: f(e)^2 sgn(e) is standard normal again, and no number is drawn twice."""
    noise = rainbow.draw_layers(some_params(), (300,), generator())
    assert noise.shape == (300, 2 * (120 + 84) + 84 + 11 + 84 + 22)
    e = noise.sign() * noise.square()
    size = e.numel()
    assert abs(e.mean()) < 4 / size**0.5 and abs(e.std() - 1) < 4 / (2 * size) ** 0.5
    assert abs(e.abs().mean() - (2 / math.pi) ** 0.5) < 4 * (1 - 2 / math.pi) ** 0.5 / size**0.5
    assert len(noise.unique()) > 0.99 * size


def test_each_row_may_have_its_own_noise() -> None:
    """Guards against noise of one environment in another's row."""
    params, obs = some_params(), torch.randn(3, 4, generator=generator(1))
    noise = rainbow.draw_layers(params, (3,), generator())
    rows = rainbow.distribution(params, obs, noise)
    for row in range(3):
        alone = rainbow.distribution(params, obs[row : row + 1], noise[row])
        torch.testing.assert_close(rows[row : row + 1], alone, rtol=0, atol=1e-6)
    assert (rows - rainbow.distribution(params, obs, None)).abs().amax((1, 2)).min() > 1e-3


# --- loss and update --------------------------------------------------------------------------------------------------


def test_streams_are_dueling() -> None:
    """Guards the mean of the advantages: what is added to the advantages of all actions changes nothing."""
    params, obs = some_params(), torch.randn(5, 4, generator=generator(1))
    shifted = dict(params)
    shifted["advantage.1.bias"] = params["advantage.1.bias"] + torch.linspace(-3, 3, 11).repeat(2)
    before = rainbow.distribution(params, obs, None)
    torch.testing.assert_close(rainbow.distribution(shifted, obs, None), before, rtol=0, atol=1e-6)
    shifted["value.1.bias"] = params["value.1.bias"] + torch.linspace(-3, 3, 11)
    assert (rainbow.distribution(shifted, obs, None) - before).abs().max() > 0.1
    assert before.shape == (5, 2, 11) and before.sum(2).sub(1).abs().max() < 1e-6


def constant(rows: list[list[float]]) -> Params:
    """Parameters under which every observation has the probabilities `rows`, (2, 3), on -1, 0, 1."""
    args = Args(n_atoms=3, v_min=-1, v_max=1)
    params = {name: torch.zeros_like(p) for name, p in some_params(args=args).items()}
    logits = torch.tensor(rows).log()
    biases = {"advantage.1.bias": logits.flatten(), "value.1.bias": logits.mean(0)}  # which the dueling streams lose
    return {**params, **biases, "atoms": torch.tensor([-1.0, 0.0, 1.0])}


def test_loss_by_hand() -> None:
    """Guards double Q-learning, the end of an episode, importance weights and priorities.

    The online network prefers action 1, the target network action 0. Of action 1 the target network says (0.5, 0.25,
    0.25) on -1, 0, 1: shifted by reward 1 (discount 1) that is (0, 0.5, 0.5); ended with reward 0.5: the same.
    """
    online = constant([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5]])
    target = constant([[0.2, 0.2, 0.6], [0.5, 0.25, 0.25]])
    none = torch.zeros(3, sum(rainbow.noise_sizes(online).values()))
    probabilities = rainbow.distribution(online, torch.zeros(1, 4), none[0])[0]
    assert probabilities[0].tolist() == pytest.approx([0.5, 0.3, 0.2])
    batch = {"obs": torch.zeros(2, 4), "next_obs": torch.zeros(2, 4), "actions": torch.tensor([0, 1])}
    batch |= {"rewards": torch.tensor([1.0, 0.5]), "discounts": torch.tensor([1.0, 0.0])}
    batch["weights"] = torch.tensor([0.5, 1.0])
    total, metrics = rainbow.loss(online, target, batch, none, Args())
    going, ended = -0.5 * (math.log(0.3) + math.log(0.2)), -0.5 * (math.log(0.25) + math.log(0.5))
    assert metrics["priorities"].tolist() == pytest.approx([going, ended], abs=1e-5)
    assert total.item() == pytest.approx((0.5 * going + ended) / 2, abs=1e-6)
    assert metrics["q_values"].item() == pytest.approx((-0.3 + 0.25) / 2, abs=1e-6)


def test_three_noises() -> None:
    """Guards against a network that takes another's noise, or none."""
    params, target, batch = some_params(0), some_params(1), some_batch()
    noise = rainbow.draw_layers(params, (3,), generator(5))
    wanted = rainbow.targets(params, target, batch, noise)
    first = torch.cat([torch.zeros_like(noise[:1]), noise[1:]])
    assert torch.equal(rainbow.targets(params, target, batch, first), wanted)
    losses = [rainbow.loss(params, target, batch, x, Args())[0].item() for x in (first, noise)]
    assert losses[0] != losses[1]
    last = torch.cat([noise[:2], torch.zeros_like(noise[:1])])
    assert not torch.equal(rainbow.targets(params, target, batch, last), wanted)
    second = torch.stack([noise[0], -3 * noise[1], noise[2]])
    chosen, other = (rainbow.act(params, {"obs": batch["next_obs"]}, x[1])[0] for x in (noise, second))
    moved = (rainbow.targets(params, target, batch, second) - wanted).abs().amax(1) > 1e-4
    assert torch.equal(moved, (chosen != other) & (batch["discounts"] > 0)) and moved.any()


def test_gradient_equals_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a gradient through the target, and sigmas that do not learn: float64 central differences."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the networks cast observations to float32
    params, target = ({name: p.double() for name, p in some_params(seed).items()} for seed in (0, 1))
    batch = {name: x.double() if x.is_floating_point() else x for name, x in some_batch().items()}
    noise = rainbow.draw_layers(params, (3,), generator()).double()
    grads, _ = grad_and_value(rainbow.loss, has_aux=True)(params, target, batch, noise, Args())
    random, h = generator(4), 1e-6
    for name in sorted(params.keys() - {"atoms"}):
        direction = torch.randn(params[name].shape, generator=random, dtype=torch.float64)
        ahead, behind = (
            rainbow.loss({**params, name: params[name] + sign * h * direction}, target, batch, noise, Args())[0]
            for sign in (1, -1)
        )
        slope = ((ahead - behind) / (2 * h)).item()
        assert slope == pytest.approx((grads[name] * direction).sum().item(), rel=1e-5, abs=1e-9), name
        assert slope != 0
    to_target = grad_and_value(lambda t: rainbow.loss(params, t, batch, noise, Args())[0])(target)[0]
    assert not any(x.any() for x in [grads["atoms"], *to_target.values()])


def test_atoms_stay() -> None:
    """Guards against an optimizer that moves the constants among the parameters."""
    params = some_params()
    noise = rainbow.draw_layers(params, (3,), generator())
    new, _, _ = rainbow.update(params, params, init_adam(params), some_batch(), noise, Args())
    assert torch.equal(new["atoms"], params["atoms"])
    assert not any(torch.equal(new[name], p) for name, p in params.items() if name != "atoms")


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Callable[[Args], Any]:
    """Trains by `Args`; returns the run."""

    def run(args: Args) -> Any:
        return rainbow.train(replace(args, runs_dir=tmp_path / str(len(list(tmp_path.iterdir())))))

    return run


def test_what_a_gradient_step_sees(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a target that moves, noise used twice, a constant beta, priorities that stay what they were.

    Gradient steps come after env steps 20, 24, ..., 96, copies of the network at 16, 32, ..., 96. Beta rises from 0.4
    at step 0 to 1 at step 96, so it is 0.525 at 20. Every env step has noise of its own to act by.
    """
    acting: list[Tensor] = []
    collect = Collector.collect

    def collecting(self: Collector, params: Any, noise: Tensor) -> Any:
        acting.append(noise)
        return collect(self, params, noise)

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    betas: list[float] = []
    prioritized: list[Tensor] = []

    class Watched(Compiled):
        def __call__(self, *args: Any) -> Any:
            if self.key[0] == "learn":  # type: ignore[index]
                seen.append((args[0]["value.1.bias"].clone(), args[1]["value.1.bias"].clone(), args[4].clone()))
            return super().__call__(*args)

    class WatchedReplay(Replay):
        def sample(self, points: Tensor, beta: float = 1.0) -> Batch:
            assert (self.n_step, self.alpha, self.capacity, self.gamma) == (3, 0.5, 64, 0.99)
            betas.append(beta)
            self.batch = super().sample(points, beta)
            return self.batch

        def prioritize(self, leaves: Tensor, priorities: Tensor) -> None:
            assert torch.equal(leaves, self.batch["leaves"]) and len(priorities.unique()) > 1
            prioritized.append(priorities)
            super().prioritize(leaves, priorities)

    monkeypatch.setattr(Collector, "collect", collecting)
    monkeypatch.setattr(rainbow, "Compiled", Watched)
    monkeypatch.setattr(offpolicy, "Replay", WatchedReplay)
    trained(SMALL)
    assert len(seen) == len(prioritized) == 20
    for index, (_, target, _) in enumerate(seen):
        assert torch.equal(target, seen[index // 4 * 4][0])
    noise = torch.cat([noise for _, _, noise in seen])
    assert noise.shape[:2] == (20, 3) and len(noise.unique()) > 0.99 * noise.numel()
    assert (betas[0], betas[-1]) == pytest.approx((0.525, 1))
    noise = torch.cat(acting)
    assert noise.shape[:2] == (96, 1) and len(noise.unique()) > 0.99 * noise.numel()


def test_seed_in_a_batch_of_ten_is_that_seed_alone(trained: Any) -> None:
    """Guards against noise, batches, priorities or targets that one seed shares with another."""
    together = trained(replace(SMALL, num_seeds=10)).state()["params"]
    for index in (0, 6):
        alone = trained(replace(SMALL, seed=1 + index)).state()["params"]
        for name, p in alone.items():
            torch.testing.assert_close(together[name][index], p[0], rtol=0, atol=1e-5)
    assert not torch.allclose(together["value.1.weight"][0], together["value.1.weight"][6], atol=0.01)


@pytest.mark.slow
def test_compiled_equals_eager(trained: Any) -> None:
    """Guards against a graph that computes something else than the functions that were tested."""
    args = replace(SMALL, num_seeds=2, num_envs=2, log_every=32)
    eager, compiled = (trained(replace(args, compile=compile)).state() for compile in (False, True))
    for name, p in eager["params"].items():
        torch.testing.assert_close(compiled["params"][name], p, rtol=0, atol=1e-5, msg=name)
    torch.testing.assert_close(compiled["replay"]["tree"], eager["replay"]["tree"], rtol=0, atol=1e-4)


def test_a_run_gives_its_policy_back(trained: Any) -> None:
    """Guards against noise in evaluation, its absence in sampled actions, and samples that do not repeat."""
    run = trained(SMALL)
    policy, obs = rl_lab.load(run.logs.folders[0]), torch.randn(200, 4, generator=generator())
    params = {name: p[0] for name, p in run.state()["params"].items()}
    assert torch.equal(policy(obs), rainbow.act(params, {"obs": obs}, None)[0])
    samples = []
    for _ in range(2):
        policy.generator.manual_seed(7)
        samples.append(policy(obs, deterministic=False))
    assert torch.equal(*samples)
    same_noise = rainbow.act(params, {"obs": obs}, rainbow.draw_layers(params, (), generator()))[0]
    assert not torch.equal(samples[0], policy(obs)) and not torch.equal(samples[0], same_noise)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"n_atoms": 1}, "--n-atoms 1 must be at least 2"),
        ({"v_min": 100.0}, "--v-max 100.0 must be finite and above --v-min 100.0"),
        ({"noise_std": 0.0}, "--noise-std 0.0 must be finite and above 0: nothing else explores"),
        ({"priority_alpha": 0.0}, "--priority-alpha 0.0 must be above 0 and at most 1"),
        ({"target_network_frequency": 15}, "--target-network-frequency 15 must be a multiple of 10"),
    ],
)
def test_refused_flags(flags: dict[str, Any], message: str) -> None:
    """Guards against a run without exploration, priorities or a range of returns."""
    with pytest.raises(ValueError, match=message):
        Args(**flags)


def test_refused_environments(trained: Any) -> None:
    """Guards against Box actions rounded to choices."""
    with pytest.raises(ValueError, match="--env Pendulum-v1: this command needs one Discrete action, not Box"):
        trained(replace(SMALL, env="Pendulum-v1"))
