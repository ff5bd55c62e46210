"""DQN, C51 and Rainbow on images, and every algorithm's seeds and graphs there; each test names the bug it guards.

Parity with CleanRL is in tests/parity.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

import rl_lab
from rl_lab import offpolicy
from rl_lab.algorithms import c51, dqn, ppo, ppo_lstm, rainbow
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import fast_bf16, init_adam
from rl_lab.replay import Batch, Replay
from rl_lab.rollout import contiguous, over_seeds
from rl_lab.run import Run
from rl_lab.vector import TensorEnv

EACH = pytest.mark.parametrize("algorithm", [dqn, c51, rainbow], ids=["dqn", "c51", "rainbow"])
THREE, SPACE = Actions((3,), ()), gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
SMALL = {
    "env": "BreakoutNoFrameskip-v4", "total_timesteps": 96, "learning_starts": 48, "log_every": 48, "num_envs": 2,
    "train_frequency": 8, "batch_size": 4, "buffer_size": 96, "target_network_frequency": 64, "compile": False,
}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_params(algorithm: ModuleType, seed: int) -> Params:
    settings = False if algorithm is dqn else algorithm.IMAGES
    return algorithm.init_params(SPACE, THREE, settings, generator(seed))  # type: ignore[no-any-return]


def some_batch(size: int = 3) -> Batch:
    random = generator(2)
    obs, next_obs = torch.randint(0, 256, (2, size, *SPACE.shape), dtype=torch.uint8, generator=random)
    batch = {"obs": obs, "next_obs": next_obs, "actions": torch.arange(size) % 3}
    batch |= {"rewards": torch.arange(size) - 1.0, "weights": torch.rand(size, generator=random) + 0.1}
    return {**batch, "discounts": torch.where(torch.arange(size) == 0, 0.0, 0.9)}


def arguments(algorithm: ModuleType) -> tuple[Any, ...]:
    """Online and target network, a batch, and Rainbow's noise: what its loss takes before its settings."""
    params, target = (some_params(algorithm, seed) for seed in (0, 1))
    noise = (rainbow.draw_layers(params, (3,), generator(3)),) if algorithm is rainbow else ()
    return params, target, some_batch(), *noise


CONVOLUTIONS = {"trunk.0": (32, 4, 8, 8), "trunk.1": (64, 32, 4, 4), "trunk.2": (64, 64, 3, 3)}
LAYERS = {
    dqn: {**CONVOLUTIONS, "trunk.3": (512, 3136), "q.0": (3, 512)},
    c51: {**CONVOLUTIONS, "trunk.3": (512, 3136), "q.0": (153, 512)},
    rainbow: {
        **CONVOLUTIONS,
        "value.0": (512, 3136),
        "value.1": (51, 512),
        "advantage.0": (512, 3136),
        "advantage.1": (153, 512),
    },
}


@EACH
def test_initial_agent(algorithm: ModuleType) -> None:
    """Guards CleanRL's layers for three actions, uniform within 1 / sqrt(inputs): 256, 512, 576, 3136 or 512."""
    params = some_params(algorithm, 0)
    weights = {name.removesuffix(".weight"): tuple(p.shape) for name, p in params.items() if name.endswith("weight")}
    assert weights == LAYERS[algorithm]
    for layer, shape in weights.items():
        bound = np.prod(shape[1:]) ** -0.5
        assert 0.99 * bound < params[f"{layer}.weight"].abs().max() <= bound
        assert 0.4 * bound < params[f"{layer}.bias"].abs().max() <= bound
    sigmas = {name: p for name, p in params.items() if name.endswith("sigma")}
    assert len(sigmas) == (8 if algorithm is rainbow else 0)
    if sigmas:
        assert sigmas["value.0.weight_sigma"].unique().item() == pytest.approx(0.5 / 56)  # of 3136 inputs
        assert rainbow.draw_layers(params, (), generator()).shape == (2 * (3136 + 512) + (512 + 51) + (512 + 153),)


@EACH
def test_bf16_is_close_and_reaches_the_convolutions_only(algorithm: ModuleType) -> None:
    """Guards against a flag without effect, one that changes results, and gradients or weights left in bfloat16."""
    given, opt = arguments(algorithm), init_adam(some_params(algorithm, 0))
    rough, exact = (replace(algorithm.IMAGES, bf16=bf16) for bf16 in (True, False))
    loss, expected = (algorithm.loss(*given, args)[0].item() for args in (rough, exact))
    assert loss != expected and loss == pytest.approx(expected, rel=0.01)
    updates = [algorithm.update(*given[:2], opt, *given[2:], args)[:2] for args in (rough, exact)]
    for name, p in updates[0][0].items():
        assert p.dtype == torch.float32
        gradient, other = (state["first"][name].flatten() for _, state in updates)  # a tenth of it
        assert name == "atoms" or torch.cosine_similarity(gradient, other, 0) > 0.98, name


@EACH
@pytest.mark.slow
def test_compiled_equals_eager(algorithm: ModuleType) -> None:
    """Guards against a graph that computes something else than the functions that were tested."""
    params, target, *rest = pytree.tree_map(lambda x: x.unsqueeze(0), arguments(algorithm))
    update = over_seeds(partial(algorithm.update, args=replace(algorithm.IMAGES, bf16=False)), images=True)
    results = []
    for compile in (False, True):
        learner = Compiled(update, ("test_images", algorithm.IMAGES.key), compile, donate=(0, 2))
        new, opt = contiguous((params, vmap(init_adam)(params)))
        for _ in range(2):
            new, opt, metrics = learner(new, target, opt, *rest)
        results.append((new, opt, metrics))
    for eager, compiled in zip(*map(pytree.tree_leaves, results), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@EACH
@pytest.mark.cuda
def test_seeds_side_by_side_equal_one_by_one(algorithm: ModuleType) -> None:
    """Guards the streams of three seeds within a captured graph: what one writes is read after it, and no other's."""
    params, target, *rest = pytree.tree_map(lambda x: x.cuda(), arguments(algorithm))
    agents = [(params, target, *rest), (target, params, *rest), (params, params, *rest)]
    opt, update = init_adam(params), partial(algorithm.update, args=replace(algorithm.IMAGES, bf16=False))
    calls = [(params, target, opt, *rest) for params, target, *rest in agents]
    stacked = pytree.tree_map(lambda *x: torch.stack(x), *calls)
    learner = Compiled(over_seeds(update, images=True), ("test_images", algorithm.IMAGES.key))
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = pytree.tree_map(lambda *x: torch.stack(x), *(update(*call) for call in calls))
        for _ in range(3):
            torch.testing.assert_close(learner(*stacked), expected, rtol=1e-4, atol=1e-5)


@EACH
def test_training(algorithm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against images kept for the log, convolutions that do not learn, and a policy that does not come back."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    logged: list[set[str]] = []
    log = Run.log

    def watched(run: Run, rollout: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        assert rollout["rewards"].shape == (24, 2)
        logged.append(set(rollout))
        log(run, rollout, metrics)

    monkeypatch.setattr(Run, "log", watched)
    monkeypatch.setattr("os.fsync", lambda _: None)  # a disk may take longer than the training
    run = algorithm.train(replace(algorithm.IMAGES, **SMALL, runs_dir=tmp_path))
    assert len(logged) == 2
    assert all({"rewards", "actions", "game_over"} <= names and not names & {"obs", "next_obs"} for names in logged)
    state = run.state()
    assert state["opt"]["step"].tolist() == [6]  # after env steps 56, 64, ..., 96
    params, target = ({name: p[0] for name, p in state[name].items()} for name in ("params", "target"))
    moved = (params["trunk.0.weight"] - target["trunk.0.weight"]).abs().max()  # since the copy at step 64
    assert 0 < moved < 4.1 * algorithm.IMAGES.learning_rate
    policy, obs = rl_lab.load(run.logs.folders[0]), some_batch()["obs"]
    assert torch.equal(policy(obs), algorithm.act(params, {"obs": obs}, None)[0])


class Colours(TensorEnv):
    """Three colours of an episode's step t, of which none was seen before: 40 t + 10, 20 and 30."""

    observation_space = gym.spaces.Box(0, 255, (3, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(3)
    max_episode_steps, reset_draws = 5, 1

    def initial(self, draws: Tensor) -> Tensor:
        return torch.zeros_like(draws)

    def transition(self, physics: Tensor, actions: Tensor, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return physics + 1, physics[:, 0], physics[:, 0] < 0

    def observe(self, physics: Tensor) -> Tensor:
        colours = 40 * physics + torch.tensor([10, 20, 30])
        return colours[:, :, None, None].expand(-1, -1, 84, 84).to(torch.uint8)


@EACH
def test_colours_are_no_stack(algorithm: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a replay that keeps an image's last channel alone, and takes earlier steps' for the others."""
    monkeypatch.setattr(algorithm, "make", lambda _, seeds, num_envs, *__: Colours(seeds, num_envs))
    batches: list[Batch] = []

    class Watched(Replay):
        def sample(self, *args: Any) -> Batch:
            batches.append(super().sample(*args))
            return batches[-1]

    monkeypatch.setattr(offpolicy, "Replay", Watched)
    algorithm.train(replace(algorithm.IMAGES, **SMALL, runs_dir=tmp_path))
    obs, rewards, next_obs = (torch.cat([b[name][0] for b in batches]) for name in ("obs", "rewards", "next_obs"))
    if algorithm is rainbow:  # whose rewards are of three steps
        rewards = (obs[:, 0, 0, 0].float() - 10) / 40
    else:
        assert torch.equal(next_obs[:, 0, 0, 0], 40 * rewards.byte() + 50)
    assert len(rewards.unique()) == 5
    for channel, value in enumerate((10, 20, 30)):
        assert torch.equal(obs[:, channel, 5, 5], 40 * rewards.byte() + value)
        assert (next_obs[:, channel, 5, 5] - next_obs[:, 0, 0, 0] == value - 10).all()


@EACH
def test_small_images_are_vectors(algorithm: ModuleType, tmp_path: Path) -> None:
    """Guards against a network by the observation's type that was made by its size: a MiniGrid's view is uint8, too."""
    flags = {**SMALL, "env": "MiniGrid-Empty-5x5-v0", "runs_dir": tmp_path}
    run = algorithm.train(replace(algorithm.Args(), **flags))
    obs = torch.zeros(2, 7, 7, 3, dtype=torch.uint8)
    assert rl_lab.load(run.logs.folders[0])(obs).shape == (2,)


@EACH
def test_the_first_batch_has_a_next_frame(algorithm: ModuleType, tmp_path: Path) -> None:
    """Guards against a run that ends at its first batch: the newest frame, and Rainbow's last three, have to wait."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    least = 12 if algorithm is rainbow else 4
    flags = {**SMALL, "num_envs": 4, "train_frequency": 4, "runs_dir": tmp_path / "runs"}
    message = f"--learning-starts {least - 1} must be at least {least}: a transition takes {least // 4 + 1} steps"
    with pytest.raises(ValueError, match=message):
        algorithm.train(replace(algorithm.IMAGES, **{**flags, "learning_starts": least - 1}))
    assert not (tmp_path / "runs").exists()
    env = algorithm.make("BreakoutNoFrameskip-v4", (1,), 4)
    args = replace(algorithm.IMAGES, **{**flags, "learning_starts": least})
    replay = args.replay(env, getattr(args, "n_step", 1))
    obs = env.reset().expand(least // 4 + 1, -1, -1, -1, -1)
    row = torch.zeros(obs.shape[:2])
    ends = {name: row.bool() for name in ("terminated", "truncated")}
    replay.add({"obs": obs, "next_obs": obs, "actions": row.long(), "rewards": row, **ends})
    assert len(replay) == 4


SHORT = {"total_timesteps": 64, "num_envs": 2, "num_steps": 16, "num_minibatches": 2, "update_epochs": 1}


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [(ppo, SHORT), (ppo_lstm, SHORT), (dqn, SMALL)],
    ids=["ppo", "ppo_lstm", "dqn"],
)
def test_a_seed_beside_another_is_that_seed_alone(
    algorithm: ModuleType, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against convolutions, games, replays or draws that one seed shares with another."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    monkeypatch.setattr("os.fsync", lambda _: None)  # a disk may take longer than the training
    # In bfloat16 a convolution of two seeds at once rounds otherwise than one of each.
    args = replace(algorithm.defaults("BreakoutNoFrameskip-v4"), **{**settings, "compile": False, "bf16": False})
    both, alone = (
        algorithm.train(replace(args, **seeds, runs_dir=tmp_path / str(seeds))).state()
        for seeds in ({"num_seeds": 2}, {"seed": 2})
    )
    assert torch.equal(both["collector"]["obs"][2:], alone["collector"]["obs"])
    for name, p in both["params"].items():
        torch.testing.assert_close(p[1:], alone["params"][name], rtol=0, atol=1e-5)
    for name, x in both["opt"]["first"].items():  # a tenth of the last gradient, and what is left of the others
        assert alone["opt"]["first"][name].norm() > 0 and not torch.allclose(x[:1], x[1:])
        torch.testing.assert_close(x[1:], alone["opt"]["first"][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("algorithm", [ppo, ppo_lstm], ids=["ppo", "ppo_lstm"])
@pytest.mark.slow
def test_compiled_training_equals_eager(algorithm: ModuleType, tmp_path: Path) -> None:
    """Guards what users run: of images a loop's body did not compile while every function in it passed its tests."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    args = replace(algorithm.defaults("BreakoutNoFrameskip-v4"), **SHORT, bf16=False)
    eager, compiled = (
        algorithm.train(replace(args, compile=compile, runs_dir=tmp_path / str(compile))).state()["params"]
        for compile in (False, True)
    )
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


DEFAULTS = {  # of CleanRL's dqn_atari.py, c51_atari.py and rainbow_atari.py
    dqn: {"learning_rate": 1e-4, "target_network_frequency": 1_000, "end_e": 0.01, "exploration_fraction": 0.1},
    c51: {"learning_rate": 2.5e-4, "target_network_frequency": 10_000, "end_e": 0.01, "exploration_fraction": 0.1},
    rainbow: {"learning_rate": 6.25e-5, "target_network_frequency": 8_000, "n_step": 3, "priority_alpha": 0.5},
}
SHARED = {"total_timesteps": 10_000_000, "buffer_size": 1_000_000, "batch_size": 32, "learning_starts": 80_000}
SHARED |= {"train_frequency": 4, "num_envs": 1}


@EACH
def test_defaults(algorithm: ModuleType) -> None:
    """Guards against the settings of vectors on Atari."""
    pytest.importorskip("ale_py", reason="Atari needs ale_py")
    args = algorithm.defaults("PongNoFrameskip-v4")
    atoms = {} if algorithm is dqn else {"n_atoms": 51, "v_min": -10, "v_max": 10}
    expected = {**SHARED, **DEFAULTS[algorithm], **atoms}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.env, args.gamma, args.bf16) == ("PongNoFrameskip-v4", 0.99, fast_bf16())
    assert algorithm.defaults("Acrobot-v1") == algorithm.Args(env="Acrobot-v1")


@EACH
def test_bf16_is_refused_for_vectors(algorithm: ModuleType, tmp_path: Path) -> None:
    """Guards against --bf16 that changes nothing."""
    with pytest.raises(ValueError, match="--bf16 True must be off for vectors"):
        algorithm.train(algorithm.Args(bf16=True, compile=False, runs_dir=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()
