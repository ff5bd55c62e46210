"""The recurrent parts of PPO with an LSTM; each test names the bug it guards. Parity is in tests/parity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import rl_lab
from rl_lab.algorithms import ppo_lstm
from rl_lab.algorithms.ppo_lstm import CLEANRL, Args
from rl_lab.distributions import Actions
from rl_lab.envs.memory import Recall
from rl_lab.networks import Params, init_lstm, lstm, lstm_step, mlp
from rl_lab.optim import fast_bf16
from rl_lab.rollout import Collector, Rollout
from rl_lab.vector import TensorEnv

# Episodes of 10 steps in rollouts of 16: each rollout but the first starts in the middle of an episode.
SPACE = Recall((0,), 1).observation_space
SMALL = Args(num_envs=4, num_steps=16, total_timesteps=4 * 64, lstm_size=8, compile=False)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the memory task --------------------------------------------------------------------------------------------------


def answers(env: Recall, policy: Tensor) -> Tensor:
    """Returns of one episode in each row under pi(a | o) = policy[step]: (10, 4) probabilities, drawn by row."""
    env.reset()
    for probabilities in policy:
        actions = torch.multinomial(probabilities.expand(env.num_envs, -1), 1, True, generator=generator(1)).squeeze(1)
        step = env.step(actions)
    assert step.terminated.all()
    return step.rewards


def test_every_memoryless_policy_recalls_a_quarter() -> None:
    """Guards the bound: after the first step observations do not tell the cue, which each of 4 numbers is as often."""
    env = Recall((0,), 40_000)
    shown = env.reset()
    cues = env.state["physics"][:, 0]
    assert torch.equal(shown[:, :4].argmax(1), cues.long()) and (shown[:, :4].sum(1) == 1).all()
    assert torch.bincount(cues.long()).tolist() == pytest.approx([10_000] * 4, abs=4 * 87)  # 87: standard deviation
    for passed in range(1, 10):
        obs = env.step(torch.randint(4, (env.num_envs,), generator=generator(passed))).obs
        assert torch.equal(obs, torch.tensor([0, 0, 0, 0, passed / 10]).expand_as(obs))  # the same for every cue
    step = env.step(cues.long())  # with memory it can be done
    assert step.terminated.all() and (step.rewards == 1).all() and (env.episode_lengths == 10).all()
    for policy in (torch.eye(4)[:1].repeat(10, 1), torch.full((10, 4), 0.25), torch.rand(10, 4, generator=generator())):
        assert answers(Recall((0,), 40_000), policy).mean().item() == pytest.approx(0.25, abs=4 * 0.0022)


# --- the network ------------------------------------------------------------------------------------------------------


def sequences() -> tuple[Params, Tensor, tuple[Tensor, Tensor], Tensor]:
    params = init_lstm("lstm", 3, 5, generator())
    params = {name: p + 0.2 * torch.randn(p.shape, generator=generator(1)) for name, p in params.items()}
    keep = (torch.rand(7, 2, generator=generator(2)) < 0.6).float()
    assert keep[0].tolist() != [1, 1] and 0 < keep[1:].sum() < 12
    x = torch.randn(7, 2, 3, generator=generator(3))
    return params, x, tuple(torch.randn(2, 2, 5, generator=generator(4)).unbind()), keep  # type: ignore[return-value]


def torch_lstm(params: Params, x: Tensor, state: tuple[Tensor, Tensor], keep: Tensor) -> Tensor:
    """Hidden states (T, B, H) by torch's own module, called step by step."""
    module = torch.nn.LSTM(3, 5)
    tensors = {f"{name.removeprefix('lstm.')}_l0": p for name, p in params.items()}
    hidden, cell, found = *state, []
    for x_t, keep_t in zip(x, keep.unsqueeze(-1), strict=True):
        before = ((hidden * keep_t).unsqueeze(0), (cell * keep_t).unsqueeze(0))
        y, (h, c) = torch.func.functional_call(module, tensors, (x_t.unsqueeze(0), before))
        hidden, cell = h.squeeze(0), c.squeeze(0)
        found.append(y.squeeze(0))
    return torch.stack(found)


def test_lstm_and_its_gradients_are_torchs() -> None:
    """Guards the backward pass written here: by parameter and input, over resets, alone and under vmap."""
    params, x, state, keep = sequences()
    weights = torch.randn(7, 2, 5, generator=generator(5))

    def ours(params: Params, x: Tensor) -> Tensor:
        return (weights * lstm(params, "lstm", x, state, keep)[0]).sum()

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()} | {"x": x.clone().requires_grad_()}
    theirs = torch_lstm({name: p for name, p in leaves.items() if name != "x"}, leaves["x"], state, keep)
    torch.testing.assert_close(lstm(params, "lstm", x, state, keep)[0], theirs.detach(), rtol=0, atol=1e-6)
    (weights * theirs).sum().backward()
    found, found_x = grad(ours, argnums=(0, 1))(params, x)
    twice = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    batched, batched_x = vmap(grad(ours, argnums=(0, 1)), in_dims=(0, None))(twice, x)
    for name, leaf in leaves.items():
        gradient, batch = ({**g, "x": g_x}[name] for g, g_x in ((found, found_x), (batched, batched_x)))
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(batch[0], leaf.grad, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(batch[1], batch[0])


def test_lstm_steps_are_its_sequence() -> None:
    """Guards against acting by another network than the one that learns."""
    params, x, state, keep = sequences()
    hidden, cell = lstm(params, "lstm", x, state, keep)
    for t in range(7):
        state = lstm_step(params, "lstm", x[t], (state[0] * keep[t, :, None], state[1] * keep[t, :, None]))
        torch.testing.assert_close(state, (hidden[t], cell[t]), rtol=0, atol=1e-6)


def test_initialisation() -> None:
    """Guards detail 32: orthogonal columns of length 1 and zero biases; heads with gains 0.01 and 1; zero memory."""
    params = ppo_lstm.init_params(SPACE, Actions((4,), ()), CLEANRL, generator(), 1)
    for part in ("ih", "hh"):
        weight = params[f"lstm.weight_{part}"]
        torch.testing.assert_close(weight.T @ weight, torch.eye(weight.shape[1]), rtol=0, atol=1e-5)
        assert not params[f"lstm.bias_{part}"].any()
    hidden = params["body.1.weight"]
    torch.testing.assert_close(hidden.T @ hidden, 2 * torch.eye(64), rtol=0, atol=1e-5)
    assert params["actor.0.weight"].norm(dim=1).tolist() == pytest.approx([0.01] * 4, rel=1e-4)
    assert params["critic.0.weight"].norm().item() == pytest.approx(1, rel=1e-4)
    memory = ppo_lstm.init_memory(params, 3)
    assert {name: x.tolist() for name, x in memory.items()} == dict.fromkeys(("hidden", "cell"), [[0.0] * 128] * 3)


# --- training ---------------------------------------------------------------------------------------------------------


class Cut(Recall):
    """The same, truncated after 7 steps and before any reward; not terminated."""

    max_episode_steps = 7


Logged = list[tuple[Rollout, dict[str, Tensor], dict[str, Tensor], Params]]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], Logged]]:
    """Trains in an own folder: the last state, and by iteration rollout, metrics, memory and parameters before it."""

    def run(args: Args, task: type[TensorEnv] = Recall) -> tuple[dict[str, Any], Logged]:
        logged: Logged = []
        learn = ppo_lstm.learn

        def recording_learn(params: Params, opt: Any, rollout: Rollout, memory: Any, *rest: Any, **named: Any) -> Any:
            new = learn(params, opt, rollout, memory, *rest, **named)
            logged.append((rollout, new[2], memory, params))
            return new

        with monkeypatch.context() as patch:
            patch.setattr(ppo_lstm, "learn", recording_learn)
            patch.setattr(ppo_lstm, "make", lambda _, seeds, num_envs, *__: task(seeds, num_envs))
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            return ppo_lstm.train(replace(args, runs_dir=folder)).state(), logged

    return run


def test_the_learning_rate_falls_to_zero(trained: Any) -> None:
    """Guards detail 4: by iterations, and not with --no-anneal-lr."""
    for anneal, shares in ((True, (1, 0.75, 0.5, 0.25)), (False, (1, 1, 1, 1))):
        _, logged = trained(replace(SMALL, learning_rate=0.01, anneal_lr=anneal))
        rates = [float(metrics["charts/learning_rate"]) for _, metrics, *_ in logged]
        assert rates == pytest.approx([0.01 * share for share in shares])


@pytest.mark.parametrize("task", [Recall, Cut])
def test_first_minibatch_has_ratio_one(trained: Any, task: type[Recall]) -> None:
    """Guards details 34 and 36: the replay must have the memory of acting, from the rollout's first step, over ends."""
    args = replace(SMALL, num_minibatches=1, update_epochs=1, clip_coef=1e-6, learning_rate=0.01)
    _, logged = trained(args, task)
    assert len(logged) == 4
    for iteration, (rollout, metrics, memory, params) in enumerate(logged):
        assert metrics["losses/clipfrac"].item() == 0
        assert (memory["hidden"].abs().sum() > 0) == (iteration > 0)
        agent = {name: p[0] for name, p in params.items()}
        acted = dict(memory)
        for t in range(16):
            noise = torch.ones(4, 4)  # equal for all: the likeliest
            *_, acted = ppo_lstm.act(agent, {"obs": rollout["obs"][t], **acted}, noise, Actions((4,), ()))
            acted = {name: x * ~(rollout["terminated"] | rollout["truncated"])[t, :, None] for name, x in acted.items()}
        if iteration < 3:
            for name, x in acted.items():
                torch.testing.assert_close(x, logged[iteration + 1][2][name], rtol=0, atol=1e-6)


def test_stored_logprobs_are_those_of_acting(trained: Any) -> None:
    """Guards details 34 and 36 in `targets`: a memory kept over an episode's end, or begun at zero in mid-episode.

    The memory is worked out here episode by episode, from the whole history of each environment.
    """
    _, logged = trained(replace(SMALL, learning_rate=1e-9))  # parameters stay, so one history is one policy's
    agent = {name: p[0] for name, p in logged[0][3].items()}
    obs = torch.cat([rollout["obs"] for rollout, *_ in logged])  # (64, 4, 5)
    actions = torch.cat([rollout["actions"] for rollout, *_ in logged])
    batches = [ppo_lstm.targets(agent, rollout, memory, Actions((4,), ()), SMALL) for rollout, _, memory, _ in logged]
    logprobs = torch.cat([batch["logprobs"] for batch in batches])
    values = torch.cat([batch["values"] for batch in batches])
    for env in range(4):
        for start in range(0, 64, 10):  # an episode
            x = torch.tanh(mlp(agent, "body", obs[start : start + 10, env], num_layers=2))
            zeros = torch.zeros(1, 8)
            hidden = torch_lstm_of(agent, x, zeros)
            logits = mlp(agent, "actor", hidden, num_layers=1).log_softmax(1)
            expected = logits.gather(1, actions[start : start + 10, env, None]).squeeze(1)
            torch.testing.assert_close(logprobs[start : start + 10, env], expected, rtol=0, atol=1e-6)
            expected = mlp(agent, "critic", hidden, num_layers=1).squeeze(1)
            torch.testing.assert_close(values[start : start + 10, env], expected, rtol=0, atol=1e-5)


def torch_lstm_of(agent: Params, x: Tensor, zeros: Tensor) -> Tensor:
    module = torch.nn.LSTM(64, 8)
    tensors = {f"{name.removeprefix('lstm.')}_l0": p for name, p in agent.items() if name.startswith("lstm.")}
    y, _ = torch.func.functional_call(module, tensors, (x, (zeros, zeros)))
    return y


def test_the_memory_sees_the_newest_frame_but_every_colour() -> None:
    space, actions = gym.spaces.Box(0, 255, (3, 84, 84), np.uint8), Actions((4,), ())
    obs = torch.randint(0, 256, (1, 3, 84, 84), dtype=torch.uint8, generator=generator())
    changed = obs.clone()
    changed[:, 0] = 0
    for seen in (1, 3):
        params = ppo_lstm.init_params(space, actions, CLEANRL, generator(), seen)
        assert torch.equal(ppo_lstm.body(params, obs), ppo_lstm.body(params, changed)) == (seen == 1)


def test_truncation_bootstraps_under_the_episodes_own_memory() -> None:
    """Guards against the value of the true successor under a memory that was cleared, or not moved on."""
    args, actions = replace(SMALL, gamma=0.5, gae_lambda=0.0), Actions((4,), ())
    params = ppo_lstm.init_params(SPACE, actions, args, generator(), 1)
    memory = {name: torch.randn(1, 8, generator=generator(1)) for name in ("hidden", "cell")}
    obs, next_obs = torch.randn(2, 2, 1, 5, generator=generator(2))
    no, yes = torch.tensor([[False], [False]]), torch.tensor([[True], [False]])
    rollout = {"obs": obs, "next_obs": next_obs, "actions": torch.zeros(2, 1, dtype=torch.long)}
    rollout |= {"rewards": torch.zeros(2, 1), "terminated": no, "truncated": yes}
    batch = ppo_lstm.targets(params, rollout, memory, actions, args)
    after = ppo_lstm.remember(params, obs[0], memory)
    successor = mlp(params, "critic", ppo_lstm.remember(params, next_obs[0], after)["hidden"], num_layers=1).squeeze(1)
    torch.testing.assert_close(batch["returns"][0], 0.5 * successor)  # returns: r + gamma * V, with lambda 0
    cleanrl = ppo_lstm.targets(params, rollout, memory, actions, replace(args, semantics="cleanrl"))
    assert cleanrl["returns"][0].item() == 0


def test_seed_beside_another_is_that_seed_alone(trained: Any) -> None:
    """Guards against memory, noise or shuffles that one seed shares with another."""
    together, _ = trained(replace(SMALL, num_seeds=3))
    alone, _ = trained(replace(SMALL, seed=2))
    for name, p in together["params"].items():
        torch.testing.assert_close(p[1:2], alone["params"][name], rtol=0, atol=1e-5)
    for name, x in together["collector"]["memory"].items():
        torch.testing.assert_close(x[4:8], alone["collector"]["memory"][name], rtol=0, atol=1e-5)
    assert not torch.allclose(together["params"]["lstm.weight_hh"][0], together["params"]["lstm.weight_hh"][1])


@pytest.mark.parametrize("env_id", ["Recall-v0", "BreakoutNoFrameskip-v4"])
def test_a_resumed_run_is_the_uninterrupted_one(env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a memory that the checkpoint lacks: resumed in mid-episode, parameters and memory are the same bits."""
    args = replace(SMALL, num_seeds=2, checkpoint_every=64, runs_dir=tmp_path / "whole")
    if env_id != SMALL.env:
        pytest.importorskip("ale_py", reason="Atari needs ale_py")
        monkeypatch.setattr("os.fsync", lambda _: None)  # a disk may take longer than the training
        images = {"num_envs": 2, "num_steps": 8, "num_minibatches": 2, "update_epochs": 1, "bf16": True}
        args = replace(args, env=env_id, num_seeds=1, total_timesteps=64, checkpoint_every=16, **images)
    whole = ppo_lstm.train(args).state()
    learn, calls = ppo_lstm.learn, []

    def failing(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise ArithmeticError
        return learn(*arguments, **named)

    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(ppo_lstm, "learn", failing)
        ppo_lstm.train(replace(args, runs_dir=tmp_path / "cut"))
    folder = min((tmp_path / "cut").iterdir())
    resumed = ppo_lstm.train(replace(args, runs_dir=tmp_path / "cut", resume=folder)).state()
    for name, p in whole["params"].items():
        assert torch.equal(p, resumed["params"][name]), name
    for name, x in whole["collector"]["memory"].items():
        assert torch.equal(x, resumed["collector"]["memory"][name]) and x.any(), name


@pytest.mark.slow
def test_compiled_equals_eager(trained: Any) -> None:
    """Guards the loop within a loop in the compiled graph: two seeds, episodes that end inside rollouts."""
    args = replace(SMALL, num_seeds=2)
    eager, compiled = (trained(replace(args, compile=flag))[0] for flag in (False, True))
    for name, p in eager["params"].items():
        torch.testing.assert_close(p, compiled["params"][name], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_equals_eager_on_images(tmp_path: Path) -> None:
    """Guards the same without `vmap`, as images have it, and a lone seed's gradients, whose layout matters."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    args = replace(SMALL, env="BreakoutNoFrameskip-v4", num_envs=2, num_minibatches=2, total_timesteps=64)
    eager, compiled = (
        ppo_lstm.train(replace(args, compile=flag, runs_dir=tmp_path / str(flag))).state()["params"]
        for flag in (False, True)
    )
    for name, p in eager.items():
        torch.testing.assert_close(p, compiled[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["native", "gymnasium"])
def test_memory_follows_from_what_was_seen(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards both loops that step environments: each part under its name, moved at every step, zero after an end."""
    seen, collect = list[Any](), Collector.collect

    def recorded(self: Collector, params: Any, noise: Tensor) -> Rollout:
        before = {name: x.clone() for name, x in self.memory.items()}
        rollout = collect(self, params, noise)
        seen.append((params, before, rollout, self.memory))
        return rollout

    monkeypatch.setattr(Collector, "collect", recorded)
    flags = {"num_envs": 2, "num_steps": 15, "num_minibatches": 1, "update_epochs": 1, "total_timesteps": 90}
    ppo_lstm.train(replace(SMALL, env="CartPole-v1", backend=backend, runs_dir=tmp_path, **flags))
    ends = []
    for params, memory, rollout, after in seen:
        lone = {name: p[0] for name, p in params.items()}
        ends.append(rollout["terminated"] | rollout["truncated"])
        for obs, ended in zip(rollout["obs"], ends[-1], strict=True):
            memory = ppo_lstm.remember(lone, obs, memory)
            memory = {name: x.masked_fill(ended.unsqueeze(1), 0.0) for name, x in memory.items()}
        torch.testing.assert_close(after, memory, rtol=0, atol=1e-6)
    assert len(seen) == 3 and all(x.any() for x in seen[1][1].values()) and torch.stack(ends).any()


# --- what users see ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_minibatches": 3}, "--num-minibatches 3 must be a divisor of num_envs = 32: sequences stay whole"),
        ({"num_minibatches": 64}, "--num-minibatches 64 must be a divisor of num_envs = 32"),
        ({"total_timesteps": 639}, "--total-timesteps 639 .* 640"),
        ({"total_timesteps": 660}, "--total-timesteps 660 must be a multiple of .* = 640, or at most 2 %"),
        ({"lstm_size": 0}, "--lstm-size 0 .* 1"),
    ],
)
def test_refused_flags(flags: dict[str, Any], message: str) -> None:
    """Guards against a run that cuts sequences, or ends well having done nothing."""
    with pytest.raises(ValueError, match=message):
        Args(**flags)


def test_bf16_is_refused_for_vectors(trained: Any) -> None:
    """Guards against --bf16 that changes nothing."""
    with pytest.raises(ValueError, match="--bf16 True must be off for vectors"):
        trained(replace(SMALL, bf16=True))


def test_defaults() -> None:
    """Guards against the settings of the memory task elsewhere: CleanRL's ppo_atari_lstm.py has these."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    assert ppo_lstm.defaults("Recall-v0") == Args()
    images, vectors = (ppo_lstm.defaults(env_id) for env_id in ("PongNoFrameskip-v4", "CartPole-v1"))
    expected = {"num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "lstm_size": 128}
    expected |= {"total_timesteps": 10_000_000, "clip_coef": 0.1, "anneal_lr": True, "norm_adv": True}
    expected |= {"clip_vloss": True, "ent_coef": 0.01, "vf_coef": 0.5, "max_grad_norm": 0.5}
    for args in (images, vectors):
        assert {name: getattr(args, name) for name in expected} == expected
        assert (args.learning_rate, args.gamma, args.gae_lambda) == (2.5e-4, 0.99, 0.95)
    assert (images.env, images.bf16, vectors.bf16) == ("PongNoFrameskip-v4", fast_bf16(), False)


def test_a_loaded_policy_remembers(tmp_path: Path) -> None:
    """Guards evaluation that forgets, or that remembers over an episode's end."""
    run = ppo_lstm.train(replace(SMALL, runs_dir=tmp_path))
    policy = rl_lab.load(run.logs.folders[0])
    obs = Recall((5,), 3).reset()
    policy.reset(3)
    policy(obs)
    once = {name: x.clone() for name, x in policy.memory.items()}
    agent = {name: p[0] for name, p in run.state()["params"].items()}
    expected = ppo_lstm.remember(agent, obs, ppo_lstm.init_memory(agent, 3))
    for name, x in expected.items():
        torch.testing.assert_close(once[name], x, rtol=0, atol=1e-6)
    policy(obs)
    assert not torch.allclose(policy.memory["hidden"], once["hidden"])
    with pytest.raises(ValueError, match=r"1 observations do not fit the memory: call reset\(1\)"):
        policy(obs[0])
    policy.reset()
    assert policy(obs[0]).ndim == 0
