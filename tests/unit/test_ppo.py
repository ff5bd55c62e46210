"""PPO's parts and its training loop; each test names the bug it guards. Parity with the peers is in tests/parity."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal
from torch.func import vmap

from rl_lab import cli
from rl_lab.algorithms import ppo
from rl_lab.algorithms.ppo import Args
from rl_lab.distributions import Actions, draw_noise, logprob_and_entropy
from rl_lab.networks import Params, mlp, pack
from rl_lab.optim import fast_bf16, init_adam
from rl_lab.rollout import Inputs, Rollout, draw_shuffles
from rl_lab.vector import TensorEnv

DISCRETE = Actions((3,), ())
MULTI = Actions((3, 2, 4), (3,))
BOX = Actions((2,), (2,), (-1.0, -2.0), (1.0, 2.0))
SPACES = pytest.mark.parametrize("actions", [DISCRETE, MULTI, BOX], ids=["discrete", "multi", "box"])
SMALL = Args(num_envs=4, num_steps=16, total_timesteps=5 * 64, compile=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def vectors(size: int) -> gym.spaces.Box:
    return gym.spaces.Box(-np.inf, np.inf, (size,))


def evaluate_actions(params: Params, inputs: Inputs, taken: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    return logprob_and_entropy(ppo.network(params, inputs, actions)[0], taken, actions)


def some_params(actions: Actions, obs_size: int = 4) -> Params:
    """Weights away from their initial values, so that every choice has another probability."""
    params = ppo.init_params(vectors(obs_size), actions, generator())
    noise = generator(1)
    return {name: p + 0.3 * torch.randn(p.shape, generator=noise) for name, p in params.items()}


def some_batch(actions: Actions, masked: bool = False, size: int = 12) -> Rollout:
    """A minibatch whose log-probabilities are some way off, so that ratios are clipped."""
    random = generator(2)
    inputs = {"obs": torch.randn(size, 4, generator=random)}
    if masked:
        inputs["mask"] = torch.rand(size, sum(actions.sizes), generator=random) < 0.6
        for start in np.cumsum((0, *actions.sizes[:-1])):
            inputs["mask"][:, start] = True
    params = some_params(actions)
    taken, _ = ppo.act(params, inputs, draw_noise(actions, (size,), random), actions)
    logprobs, _ = evaluate_actions(params, inputs, taken, actions)
    columns = {name: torch.randn(size, generator=random) for name in ("values", "advantages", "returns")}
    off = 0.3 * torch.randn(size, generator=random)
    return {**inputs, "actions": taken, "logprobs": logprobs + off, **columns}


# --- policy -----------------------------------------------------------------------------------------------------------


def test_initial_agent() -> None:
    """Guards details 2, 13, 24 and 26: gains of the two heads, zero biases, separate networks, zero log-std."""
    params = ppo.init_params(vectors(4), BOX, generator())
    actor, critic = params["actor.2.weight"], params["critic.2.weight"]
    torch.testing.assert_close(actor @ actor.T, 1e-4 * torch.eye(2), rtol=0, atol=1e-9)
    torch.testing.assert_close(critic @ critic.T, torch.ones(1, 1), rtol=0, atol=1e-5)
    hidden = params["actor.1.weight"]
    assert hidden.shape == (64, 64)
    torch.testing.assert_close(hidden.T @ hidden, 2 * torch.eye(64), rtol=0, atol=1e-5)
    assert not torch.equal(hidden, params["critic.1.weight"])
    assert not params["logstd"].any()
    assert not any(p.any() for name, p in params.items() if name.endswith("bias"))
    assert "logstd" not in ppo.init_params(vectors(4), DISCRETE, generator())


def test_initial_agent_of_images() -> None:
    """Guards details 2 and 21: orthogonal filters of gain sqrt(2) and zero biases in one trunk; gains of the heads."""
    params = ppo.init_params(gym.spaces.Box(0, 255, (4, 84, 84), np.uint8), DISCRETE, generator())
    for layer in range(4):
        rows = params[f"trunk.{layer}.weight"].flatten(1)
        torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), rtol=0, atol=1e-5)
    actor, critic = params["actor.0.weight"], params["critic.0.weight"]
    torch.testing.assert_close(actor @ actor.T, 1e-4 * torch.eye(3), rtol=0, atol=1e-9)
    torch.testing.assert_close(critic @ critic.T, torch.ones(1, 1), rtol=0, atol=1e-5)
    assert not any(p.any() for name, p in params.items() if name.endswith("bias"))


@pytest.mark.parametrize("semantics", ["correct", "cleanrl"])
def test_normalisation_is_given_discount_and_semantics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, semantics: Any
) -> None:
    """Guards detail 30 where training uses it; the scaling itself is in test_normalize.py."""
    seen, observe = [], ppo.observe

    def recording(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return observe(*args, **kwargs)

    monkeypatch.setattr(ppo, "observe", recording)
    args = replace(SMALL, env="Pendulum-v1", gamma=0.8, normalize=True, semantics=semantics, runs_dir=tmp_path)
    ppo.train(args)
    assert seen and all(kwargs == {"gamma": 0.8, "cleanrl": semantics == "cleanrl"} for kwargs in seen)


def test_a_trained_policy_clips_what_it_sees() -> None:
    """Guards detail 29 in evaluation: 1e6 deviations are 10."""
    params, moments = some_params(BOX), {"obs": {"mean": torch.full((4,), 5.0), "var": torch.full((4,), 4.0)}}
    far, edge = (ppo.policy(params, moments, {"obs": torch.full((1, 4), x)}, None, BOX) for x in (2e6, 25.0))
    near = ppo.policy(params, moments, {"obs": torch.full((1, 4), 24.0)}, None, BOX)
    torch.testing.assert_close(far, edge, rtol=0, atol=1e-5)
    assert not torch.allclose(near, edge, rtol=0, atol=1e-4)


def test_multidiscrete_is_a_product() -> None:
    """Guards detail 37: log-probability and entropy are sums over independent components, in their order."""
    params, batch = some_params(MULTI), some_batch(MULTI)
    logits = mlp(params, "actor", batch["obs"])
    parts = [Categorical(logits=x) for x in (logits[:, :3], logits[:, 3:5], logits[:, 5:])]
    expected = sum(p.log_prob(a) for p, a in zip(parts, batch["actions"].unbind(1), strict=True))
    logprobs, entropy = evaluate_actions(params, batch, batch["actions"], MULTI)
    assert logprobs.shape == entropy.shape == (12,)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, sum(p.entropy() for p in parts), rtol=0, atol=1e-6)


def test_box_is_a_diagonal_gaussian() -> None:
    """Guards details 23-25: one density over all dimensions, with a scale that does not depend on the state."""
    params, batch = some_params(BOX), some_batch(BOX)
    peer = Independent(Normal(mlp(params, "actor", batch["obs"]), params["logstd"].exp().expand(12, 2)), 1)
    logprobs, entropy = evaluate_actions(params, batch, batch["actions"], BOX)
    torch.testing.assert_close(logprobs, peer.log_prob(batch["actions"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, peer.entropy(), rtol=0, atol=1e-6)


def test_samples_follow_the_probabilities() -> None:
    """Guards against noise of the wrong kind or sign: of 60,000 draws each frequency is within 4 standard errors."""
    size = 60_000
    for actions in (DISCRETE, MULTI):
        inputs = {"obs": torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(size, 4)}
        params = some_params(actions)
        taken, _ = ppo.act(params, inputs, draw_noise(actions, (size,), generator(3)), actions)
        logits = mlp(params, "actor", inputs["obs"][:1])[0]
        for component, logit in zip(taken.reshape(size, -1).T, logits.split(actions.sizes), strict=True):
            p = torch.softmax(logit, 0)
            error = component.bincount(minlength=len(p)) / size - p
            assert (error.abs() < 4 * (p * (1 - p) / size).sqrt()).all()
            assert (p.max() - p.min()) > 0.05  # a uniform sampler would show

    params, inputs = some_params(BOX), {"obs": torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(size, 4)}
    taken, _ = ppo.act(params, inputs, draw_noise(BOX, (size,), generator(3)), BOX)
    mean, std = mlp(params, "actor", inputs["obs"][:1])[0], params["logstd"].exp()
    assert ((taken.mean(0) - mean).abs() < 4 * std / size**0.5).all()
    assert ((taken.std(0) - std).abs() < 4 * std / (2 * size) ** 0.5).all()


@SPACES
def test_likeliest_action(actions: Actions) -> None:
    """Guards against evaluation that samples, or that takes the least likely action."""
    params, batch = some_params(actions), some_batch(actions)
    best, _ = ppo.act(params, batch, None, actions)
    assert torch.equal(best, ppo.act(params, batch, None, actions)[0])
    top, _ = evaluate_actions(params, batch, best, actions)
    for seed in range(20):
        other, _ = ppo.act(params, batch, draw_noise(actions, (12,), generator(seed)), actions)
        assert (evaluate_actions(params, batch, other, actions)[0] <= top + 1e-6).all()


def test_environment_sees_clipped_actions() -> None:
    """Guards detail 27: bounds by dimension; the stored action stays as it was drawn."""
    params = ppo.init_params(vectors(4), BOX, generator())  # mean about 0, standard deviation 1
    params["actor.2.weight"].zero_()
    noise = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [0.5, -1.5]])
    taken, seen = ppo.act(params, {"obs": torch.zeros(3, 4)}, noise, BOX)
    assert taken.tolist() == [[3.0, 3.0], [-3.0, -3.0], [0.5, -1.5]]
    assert seen.tolist() == [[1.0, 2.0], [-1.0, -2.0], [0.5, -1.5]]


@pytest.mark.parametrize("actions", [DISCRETE, MULTI], ids=["discrete", "multi"])
def test_masked_choices(actions: Actions) -> None:
    """Guards against masks that hold while acting and not in the update: never drawn, and probability zero there."""
    size, params = 4000, some_params(actions)
    batch = some_batch(actions, masked=True, size=size)
    mask = batch["mask"].split(list(actions.sizes), dim=1)
    for choice, allowed in zip(batch["actions"].reshape(size, -1).T, mask, strict=True):
        assert allowed.gather(1, choice.unsqueeze(1)).all()
    logits = mlp(params, "actor", batch["obs"]).split(list(actions.sizes), dim=1)
    parts = [Categorical(logits=x.masked_fill(~m, -math.inf)) for x, m in zip(logits, mask, strict=True)]
    choices = batch["actions"].reshape(size, -1).T
    expected = sum(p.log_prob(a) for p, a in zip(parts, choices, strict=True))
    logprobs, entropy = evaluate_actions(params, batch, batch["actions"], actions)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-6)
    expected = sum(torch.special.entr(p.probs).sum(1) for p in parts)
    torch.testing.assert_close(entropy, expected, rtol=0, atol=2e-6)


def test_refused_spaces() -> None:
    """Guards against spaces that would be trained on wrongly: counting from 1, nested, dictionaries."""
    spaces = gym.spaces
    for space in (spaces.Discrete(3, start=1), spaces.MultiBinary(2), spaces.MultiDiscrete([[2, 3], [4, 5]])):
        with pytest.raises(ValueError, match="actions are Discrete, MultiDiscrete"):
            Actions.of(space)
    assert Actions.of(spaces.MultiDiscrete([3, 2, 4])) == MULTI
    assert Actions.of(spaces.Box(np.float32([-1, -2]), np.float32([1, 2]))) == BOX


# --- loss and update --------------------------------------------------------------------------------------------------


@SPACES
@pytest.mark.parametrize("clip_vloss", [True, False])
def test_gradient_equals_finite_differences(
    actions: Actions, clip_vloss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a term that is detached, or a gradient that is not the loss's: float64 central differences."""
    args = Args(clip_vloss=clip_vloss, ent_coef=0.1)
    params = {name: p.double() for name, p in some_params(actions).items()}
    batch = some_batch(actions, masked=not actions.low)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # the networks cast observations to float32
    batch = {name: x.double() if x.dtype == torch.float32 else x for name, x in batch.items()}
    grads, metrics = ppo.gradient(params, batch, actions, args)
    assert 0 < metrics["clipfrac"] < 1
    random, h = generator(4), 1e-6
    for name, p in params.items():
        direction = torch.randn(p.shape, generator=random, dtype=torch.float64)
        ahead, behind = (
            ppo.loss({**params, name: p + sign * h * direction}, batch, actions, args)[0] for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * h)
        assert slope.item() == pytest.approx((grads[name] * direction).sum().item(), rel=1e-6, abs=1e-9), name
        assert slope != 0


def test_loss_by_hand() -> None:
    """Guards the signs: an action twice as likely as before with advantage 1 counts 1.2 (clipped) in the loss's favour,
    with advantage -1 it counts 2 against; the value 1 clipped to 0.2 from 0 against the return 2 costs 1.8^2 / 2; two
    equal choices have the entropy ln 2."""
    actions = Actions((2,), ())
    params = {name: torch.zeros_like(p) for name, p in ppo.init_params(vectors(1), actions, generator()).items()}
    params["critic.2.bias"] += 1.0
    args = Args(norm_adv=False, ent_coef=0.01, vf_coef=0.5)
    batch = {"obs": torch.zeros(1, 1), "actions": torch.zeros(1, dtype=torch.int64)}
    batch |= {"logprobs": torch.tensor([math.log(0.25)]), "values": torch.zeros(1), "returns": torch.tensor([2.0])}
    for advantage, policy_loss in ((1.0, -1.2), (-1.0, 2.0)):
        total, metrics = ppo.loss(params, {**batch, "advantages": torch.tensor([advantage])}, actions, args)
        assert metrics["policy_loss"].item() == pytest.approx(policy_loss, rel=1e-6)
        assert metrics["value_loss"].item() == pytest.approx(1.62, rel=1e-6)
        assert metrics["entropy"].item() == pytest.approx(0.6931472, rel=1e-6)
        assert metrics["clipfrac"] == 1
        assert metrics["approx_kl"].item() == pytest.approx(1 - 0.6931472, rel=1e-6)  # (2 - 1) - ln 2
        assert total.item() == pytest.approx(policy_loss - 0.006931472 + 0.81, rel=1e-6)


def step_rollout(done: str) -> Rollout:
    """Two steps of one environment, (2, 1, ...), rewards 1 and 1; the first ends the episode as `done` says."""
    obs, next_obs = torch.tensor([[[0.0]], [[0.0]]]), torch.tensor([[[9.0]], [[0.0]]])
    ended = {name: torch.tensor([[name == done], [False]]) for name in ("terminated", "truncated")}
    actions = torch.zeros(2, 1, dtype=torch.int64)
    return {"obs": obs, "next_obs": next_obs, "actions": actions, "rewards": torch.ones(2, 1), **ended}


@pytest.mark.parametrize(
    ("semantics", "done", "first"),
    [("correct", "truncated", 5.5), ("correct", "terminated", 0.0), ("cleanrl", "truncated", 0.0)],
)
def test_semantics_of_truncation(semantics: Any, done: str, first: float) -> None:
    """Guards against truncation taken for termination, or the two semantics exchanged.

    V is 1 at observation 0 and 11 at 9, the true successor of the first step, gamma and lambda are 1/2. So the first
    advantage is 1 + 11/2 - 1 = 5.5 with the bootstrap and 1 - 1 = 0 without; the second 1 + 1/2 - 1 = 0.5 in any case.
    """
    actions = Actions((2,), ())
    params = {name: torch.zeros_like(p) for name, p in ppo.init_params(vectors(1), actions, generator()).items()}
    for layer, weight in enumerate((100.0, 100.0, 10.0)):  # saturated tanh: 10 * 1 + 1 at observation 9
        params[f"critic.{layer}.weight"][0, 0] = weight
    params["critic.2.bias"] += 1.0
    args = Args(gamma=0.5, gae_lambda=0.5, semantics=semantics)
    data = ppo.targets(params, step_rollout(done), actions, args)
    assert data["advantages"].tolist() == [first, 0.5]
    assert data["returns"].tolist() == [first + 1, 1.5]


def test_each_epoch_is_a_fresh_permutation() -> None:
    """Guards detail 6: sampling with replacement, an order reused, an index dropped at the end."""
    shuffles = draw_shuffles(24, 5, 4, generator())
    assert shuffles.shape == (20, 6)
    epochs = shuffles.reshape(5, 24)
    assert all(epoch.sort().values.tolist() == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def scripted_learn(kls: list[list[float]], semantics: Any, num_seeds: int = 1) -> tuple[list[int], dict[str, Tensor]]:
    """`learn` with minibatches whose divergence is scripted, by seed; how many steps each seed took, and the log."""
    args = Args(num_envs=1, num_steps=8, num_minibatches=4, update_epochs=3, target_kl=0.5, semantics=semantics)
    script = iter(torch.tensor(kls).reshape(num_seeds, -1).T.unbind())

    def gradients(params: Params, batch: Rollout) -> tuple[Params, dict[str, Tensor]]:
        kl = next(script)
        return {name: torch.ones_like(p) for name, p in params.items()}, {"approx_kl": kl, "clipfrac": kl}

    agent = some_params(DISCRETE)
    params = {name: p.expand(num_seeds, *p.shape) for name, p in agent.items()}
    random = generator()
    rollout = {"obs": torch.randn(8, num_seeds, 4, generator=random), "rewards": torch.ones(8, num_seeds)}
    rollout |= {"next_obs": rollout["obs"], "actions": torch.zeros(8, num_seeds, dtype=torch.int64)}
    rollout |= {name: torch.zeros(8, num_seeds, dtype=torch.bool) for name in ("terminated", "truncated")}
    shuffles = draw_shuffles(8, 3, 4, random).unsqueeze(1).expand(-1, num_seeds, -1)
    opt = vmap(init_adam)({"all": vmap(pack)(params)})
    new, opt, log = ppo.learn(params, opt, rollout, shuffles, torch.tensor(1e-3), gradients, DISCRETE, args)
    moved = (params["actor.0.bias"] - new["actor.0.bias"])[
        :, 0
    ] / 1e-3  # Adam's step at a constant gradient is the rate
    steps = [int(x) for x in opt["step"]]
    assert moved.tolist() == pytest.approx(steps, rel=0.01)
    return steps, log


LATE = [0.0, 0.0, 0.0, 0.9]  # mean 0.225, last 0.9
EARLY = [0.9, 0.9, 0.9, 0.1]  # mean 0.7, last 0.1
CALM = [0.1, 0.2, 0.1, 0.2]


def test_target_kl_looks_at_the_epochs_mean() -> None:
    """Guards against a stop by one minibatch, or in the middle of an epoch; the three epochs have 4 minibatches."""
    assert scripted_learn([LATE + EARLY + CALM], "correct")[0] == [8]
    assert scripted_learn([EARLY + CALM + CALM], "correct")[0] == [4]
    assert scripted_learn([CALM + CALM + CALM], "correct")[0] == [12]
    assert scripted_learn([[0.4] * 12], "correct")[0] == [12]  # the mean is the epoch's own


def test_target_kl_of_cleanrl_looks_at_the_last_minibatch() -> None:
    """Guards against the two semantics exchanged."""
    assert scripted_learn([EARLY + LATE + CALM], "cleanrl")[0] == [8]
    assert scripted_learn([EARLY + EARLY + EARLY], "cleanrl")[0] == [12]


def test_target_kl_stops_each_seed_by_itself() -> None:
    """Guards against one seed's divergence that stops all, and against a log of minibatches not taken."""
    steps, log = scripted_learn([EARLY + [7.0] * 8, CALM + EARLY + [7.0] * 4, CALM * 3], "correct", num_seeds=3)
    assert steps == [4, 8, 12]
    assert log["losses/approx_kl"].tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert log["losses/clipfrac"].tolist() == pytest.approx([0.7, (0.6 + 2.8) / 8, 0.15])


# --- training ---------------------------------------------------------------------------------------------------------


class Toy(TensorEnv):
    """Two numbers; each action of the space is as good as another. Episodes last 5 steps, or end by chance."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space: gym.Space[Any] = gym.spaces.MultiDiscrete([3, 2])
    max_episode_steps, reset_draws = 5, 2

    def initial(self, draws: Tensor) -> Tensor:
        return 2 * draws - 1

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = torch.stack([physics[:, 1], (7 * physics[:, 0] + 3 * physics[:, 1]).sin()], -1)
        return physics, physics[:, 0], physics[:, 1] > 0.9

    def observe(self, physics: Tensor) -> Tensor:
        return physics


class MaskedToy(Toy):
    """As a third choice, only a positive observation allows the last."""

    action_space = gym.spaces.Discrete(3)

    def mask(self, physics: Tensor) -> Tensor:
        return torch.stack([physics[:, 0] <= 1, physics[:, 0] <= 1, physics[:, 0] > 0], -1)


class BoxToy(Toy):
    action_space = gym.spaces.Box(-0.5, 0.5, (2,))


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains by `Args`, in a toy environment if one is given; returns the final state and each iteration's log."""

    def run(args: Args, toy: type[Toy] | None = None) -> tuple[dict[str, Any], list[tuple[Rollout, dict[str, Tensor]]]]:
        logged = []
        log = ppo.Run.log

        def recording_log(self: ppo.Run, rollout: Rollout, metrics: dict[str, Tensor]) -> None:
            logged.append((rollout, metrics))
            log(self, rollout, metrics)

        with monkeypatch.context() as patch:
            patch.setattr(ppo.Run, "log", recording_log)
            if toy:
                patch.setattr(ppo, "make", lambda _, seeds, num_envs, *__: toy(seeds, num_envs))
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            state = ppo.train(replace(args, runs_dir=folder)).state()
        return state, logged

    return run


@pytest.mark.parametrize("toy", [Toy, MaskedToy, BoxToy])
@pytest.mark.parametrize("normalize", [False, True])
def test_first_minibatch_has_ratio_one(trained: Any, toy: type[Toy], normalize: bool) -> None:
    """Guards against log-probabilities of other observations, actions, masks or parameters than the update's."""
    args = replace(SMALL, total_timesteps=64, num_minibatches=1, update_epochs=1, clip_coef=1e-5, normalize=normalize)
    (_, [(rollout, metrics)]) = trained(args, toy)
    assert metrics["losses/clipfrac"].item() == 0  # every ratio within 1e-5 of 1
    assert metrics["losses/approx_kl"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["losses/policy_loss"].item() == pytest.approx(0, abs=1e-6)  # the mean of normalised advantages
    assert ("mask" in rollout) == (toy is MaskedToy)


def test_stored_actions_in_training(trained: Any) -> None:
    """Guards detail 27 and the masks in the whole loop: Box actions beyond the bounds are stored, masked ones never."""
    _, logged = trained(SMALL, BoxToy)
    assert max(rollout["actions"].abs().max() for rollout, _ in logged) > 1.5
    _, logged = trained(SMALL, MaskedToy)
    assert len(logged) == 5
    for rollout, _ in logged:
        assert rollout["mask"].gather(2, rollout["actions"].unsqueeze(2)).all()
        assert (rollout["actions"] == 2).any()


@pytest.mark.parametrize(("anneal", "expected"), [(True, [1e-3, 8e-4, 6e-4, 4e-4, 2e-4]), (False, [1e-3] * 5)])
def test_learning_rate(trained: Any, monkeypatch: pytest.MonkeyPatch, anneal: bool, expected: list[float]) -> None:
    """Guards detail 4: a rate that is logged and not used, or that falls by epoch, or from the second iteration on."""
    used: list[float] = []
    adam = ppo.adam

    def recording_adam(params: Params, grads: Params, opt: Any, learning_rate: Tensor, eps: float) -> Any:
        used.append(learning_rate.item())
        assert eps == 1e-5  # detail 3
        return adam(params, grads, opt, learning_rate, eps)

    monkeypatch.setattr(ppo, "adam", recording_adam)
    _, logged = trained(replace(SMALL, learning_rate=1e-3, anneal_lr=anneal), Toy)
    assert used == pytest.approx(np.repeat(expected, 16).tolist(), rel=1e-6)  # 4 epochs of 4 minibatches
    assert [m["charts/learning_rate"].item() for _, m in logged] == pytest.approx(expected, rel=1e-6)


def assert_close(left: dict[str, Tensor], right: dict[str, Tensor], atol: float, rtol: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, x in left.items():
        torch.testing.assert_close(x, right[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "args", [SMALL, replace(SMALL, env="Pendulum-v1", normalize=True)], ids=["CartPole", "Pendulum"]
)
def test_seed_in_a_batch_of_ten_is_that_seed_alone(trained: Any, args: Args) -> None:
    """Guards against statistics, noise, shuffles or clipping that one seed shares with another."""
    together, logs = trained(replace(args, num_seeds=10))
    assert len(logs) == 5
    for index in (0, 6):
        alone, [*_, (rollout, metrics)] = trained(replace(args, seed=1 + index))
        agent = {name: p[index : index + 1] for name, p in together["params"].items()}
        assert_close(agent, alone["params"], atol=1e-5)
        last, logged = logs[-1]
        rows = slice(4 * index, 4 * index + 4)
        assert_close({name: x[:, rows] for name, x in last.items()}, rollout, atol=1e-4, rtol=1e-4)
        assert_close({name: x[index : index + 1] for name, x in logged.items()}, metrics, atol=1e-4)
    params = together["params"]["actor.1.weight"]
    assert not torch.allclose(params[0], params[6], atol=0.1)


def test_training_repeats_bit_for_bit(trained: Any) -> None:
    """Guards against a generator that is not seeded."""
    first, second = (trained(replace(SMALL, num_seeds=2), MaskedToy)[0]["params"] for _ in range(2))
    assert_close(first, second, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", [False, True])
def test_compiled_equals_eager(trained: Any, normalize: bool) -> None:
    """Guards against a graph that computes something else than the functions that were tested: two seeds, masks."""
    args = replace(SMALL, num_seeds=2, total_timesteps=3 * 64, target_kl=0.01, normalize=normalize)
    toy = BoxToy if normalize else MaskedToy
    eager, eager_logs = trained(args, toy)
    compiled, compiled_logs = trained(replace(args, compile=True), toy)
    assert_close(eager["params"], compiled["params"], atol=1e-5)
    for (rollout, metrics), (other, logged) in zip(eager_logs, compiled_logs, strict=True):
        assert_close(rollout, other, atol=1e-5)
        assert_close(metrics, logged, atol=1e-5)


# --- flags ------------------------------------------------------------------------------------------------------------


def test_defaults_follow_the_action_space() -> None:
    """Guards against the discrete defaults on a continuous task: 1 environment of 2048 steps there, 4 of 128 here."""
    box, discrete = ppo.defaults("Pendulum-v1"), ppo.defaults("Acrobot-v1")
    assert (box.env, box.num_envs, box.num_steps, box.num_minibatches, box.update_epochs) == (
        "Pendulum-v1",
        1,
        2048,
        32,
        10,
    )
    assert (box.learning_rate, box.ent_coef, box.normalize, box.total_timesteps) == (3e-4, 0.0, True, 1_000_000)
    assert (discrete.env, discrete.num_envs, discrete.num_steps, discrete.num_minibatches) == ("Acrobot-v1", 4, 128, 4)
    assert (discrete.learning_rate, discrete.ent_coef, discrete.normalize) == (2.5e-4, 0.01, False)


def test_a_flag_given_twice_counts_once() -> None:
    """Guards against one task with another's settings, as of make ppo ARGS="--env CartPole-v1"."""
    for words in (["--env", "Pendulum-v1", "--env", "CartPole-v1"], ["--env=Pendulum-v1", "--env=CartPole-v1"]):
        assert cli.parse(words, Args, ppo.defaults) == cli.parse(["--env", "CartPole-v1"], Args, ppo.defaults)


def test_defaults_of_images() -> None:
    """Guards against the defaults of vectors on Atari: CleanRL's ppo_atari.py has 8 environments and clips at 0.1."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    images = ppo.defaults("PongNoFrameskip-v4")
    assert (images.env, images.num_envs, images.num_steps, images.clip_coef) == ("PongNoFrameskip-v4", 8, 128, 0.1)
    assert (images.total_timesteps, images.learning_rate, images.ent_coef) == (10_000_000, 2.5e-4, 0.01)
    assert (images.bf16, images.normalize) == (fast_bf16(), False)


def test_flags_that_do_not_fit_the_observations() -> None:
    """Guards against --bf16 that changes nothing, and against images that are normalised and then scaled."""
    with pytest.raises(ValueError, match="--bf16 True must be off for vectors"):
        ppo.train(replace(SMALL, bf16=True))
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    with pytest.raises(ValueError, match="--normalize True must be off for images"):
        ppo.train(replace(SMALL, env="PongNoFrameskip-v4", normalize=True))


def test_whole_games_are_logged(trained: Any, tmp_path: Path) -> None:
    """Guards against lives that are logged as games, on Breakout, where a blind game of five lives lasts 110 steps."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    flags = {"total_timesteps": 320, "num_envs": 2, "num_steps": 160, "num_minibatches": 8, "update_epochs": 1}
    args = replace(SMALL, env="BreakoutNoFrameskip-v4", bf16=True, **flags)
    state, [(rollout, metrics)] = trained(args)
    assert (rollout["obs"].dtype, rollout["obs"].shape) == (torch.uint8, (160, 2, 4, 84, 84))
    assert rollout["terminated"].sum() >= 5 * rollout["game_over"].sum() > 0
    assert all(p.dtype == torch.float32 for p in state["params"].values())
    assert all(x.isfinite() for x in metrics.values())
    (path,) = tmp_path.rglob("episodes.csv.gz")
    rows = [line.split(",") for line in gzip.decompress(path.read_bytes()).decode().splitlines()[1:]]
    times, envs = rollout["game_over"].nonzero(as_tuple=True)
    assert [int(row[0]) for row in rows] == (2 * (times + 1)).tolist()
    assert [float(row[1]) for row in rows] == rollout["episode_returns"][times, envs].tolist()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_minibatches": 3}, "--num-minibatches 3 .* 512"),
        ({"total_timesteps": 511}, "--total-timesteps 511 .* 512"),
        ({"total_timesteps": 532}, "--total-timesteps 532 must be a multiple of .* = 512, or at most 2 %"),
        ({"num_envs": 0}, "--num-envs 0 .* 1"),
    ],
)
def test_refused_flags(flags: dict[str, Any], message: str) -> None:
    """Guards against a run that trains on a part of its data, or ends well having done nothing."""
    with pytest.raises(ValueError, match=message):
        Args(**flags)


def test_frozen_policy(trained: Any) -> None:
    """Guards against evaluation without the statistics of training, or with statistics that go on moving."""
    state, _ = trained(replace(SMALL, normalize=True), BoxToy)
    params = {name: p[0] for name, p in state["params"].items()}
    normalizer = state["collector"]["normalizer"]["obs"]
    statistics = {"obs": {name: x[0] for name, x in normalizer.items()}}
    inputs: Inputs = {"obs": torch.tensor([[0.3, -0.2], [0.9, 0.9]])}
    acting = partial(ppo.policy, params, statistics, inputs, actions=Actions.of(BoxToy.action_space))
    actions = acting(noise=None)
    assert torch.equal(actions, acting(noise=None))
    scaled = (inputs["obs"] - statistics["obs"]["mean"]) / statistics["obs"]["var"].sqrt()
    expected = mlp(params, "actor", scaled.float()).clamp(-0.5, 0.5)
    torch.testing.assert_close(actions, expected, rtol=0, atol=1e-6)
    assert (acting(noise=torch.full((2, 2), 50.0)) == 0.5).all()
