"""Agents out of Stable-Baselines3's zips: they act as Stable-Baselines3 does, and nothing in a zip is run."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from rl_lab.envs import make
from rl_lab.episodes import evaluate
from rl_lab.sb3 import load

AGENTS = Path(__file__).resolve().parents[3] / "shared/agents"
ZIPS = sorted(AGENTS.glob("*/*/*.zip")) or [pytest.param(None, marks=pytest.mark.skip(reason=f"no agents in {AGENTS}"))]
OBS, ACTION = gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-2, 2, (1,))
SAC = {"policy_class": {"__module__": "stable_baselines3.sac.policies"}, "policy_kwargs": {}}
BOX = ":type:", "<class 'gymnasium.spaces.box.Box'>"
# h = relu(s, -s), mean = 2 h_0 + 1 h_1 and log_std = 3 for both: 3 is clipped to 2
ACTOR = {
    "latent_pi.0": ([[1.0], [-1.0]], [0.0, 0.0]),
    "mu": ([[2.0, 1.0]], [0.0]),
    "log_std": ([[0.0, 0.0]], [3.0]),
}


def write(path: Path, data: dict[str, Any] | None = None, actor: Any = ACTOR, prefix: str = "actor") -> Path:
    """A zip like Stable-Baselines3's, with only what is read of it."""
    space = {"observation_space": dict([BOX]), "action_space": {**dict([BOX]), "low": "[-2.]", "high": "[2.]"}}
    parts = [(f"{prefix}.{name}", values) for name, values in actor.items()]
    tensors = {
        f"{name}.{part}": torch.tensor(x) for name, v in parts for part, x in zip(("weight", "bias"), v, strict=True)
    }
    weights = io.BytesIO()
    torch.save(tensors, weights)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", json.dumps({**SAC, **space, **(data or {})}))
        file.writestr("policy.pth", weights.getvalue())
    return path


def test_actions_worked_out_by_hand(tmp_path: Path) -> None:
    agent = load(write(tmp_path / "agent.zip"), OBS, ACTION)
    assert agent.algo == "sac"
    obs = torch.tensor([[0.5], [-0.25]], dtype=torch.float64)
    # means 2 * 0.5 = 1 and 1 * 0.25; 2 tanh(1) = 1.5231884, 2 tanh(0.25) = 0.4898373
    np.testing.assert_allclose(agent(obs, None).numpy(), [[1.5231884], [0.4898373]], rtol=1e-6)
    generator, copy = (torch.Generator().manual_seed(5) for _ in range(2))
    drawn = torch.atanh(agent(obs.tile(500, 1) * 0, generator) / 2).flatten()
    noise = torch.empty(1000, 1).normal_(generator=copy).flatten()
    small = noise.abs() < 0.4  # beyond, tanh(e^2 noise) is 1 in float32
    np.testing.assert_allclose(drawn[small] / noise[small], 7.389056, rtol=1e-3)  # e^2, where e^3 is 20.1


def test_hand_made_td3(tmp_path: Path) -> None:
    module = {"policy_class": {"__module__": "stable_baselines3.td3.policies"}}
    actor = {"mu.0": ([[1.0], [-1.0]], [0.0, 0.0]), "mu.2": ([[2.0, 1.0]], [0.0])}
    agent = load(write(tmp_path / "agent.zip", module, actor), OBS, ACTION)
    assert agent.algo == "td3"
    assert agent(torch.tensor([[0.5]]), torch.Generator()).item() == pytest.approx(1.5231884)


@pytest.mark.parametrize("algo", ["SAC", "TD3", "DDPG"])
def test_acts_as_stable_baselines3(algo: str, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    torch.manual_seed(1)
    model = getattr(sb3, algo)("MlpPolicy", "Pendulum-v1", buffer_size=1, policy_kwargs={"net_arch": [8, 4]})
    if algo == "SAC":
        model.actor.log_std.bias.data.fill_(2.5)  # above the largest
    model.save(tmp_path / "agent.zip")
    agent = load(tmp_path / "agent.zip", model.observation_space, model.action_space)
    obs = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    wanted, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(agent(torch.from_numpy(obs), None), wanted, atol=1e-6)
    torch.manual_seed(7)
    wanted, _ = model.predict(obs, deterministic=False)
    generator = torch.Generator().manual_seed(7)
    np.testing.assert_allclose(agent(torch.from_numpy(obs), generator), wanted, atol=1e-5)


@pytest.mark.parametrize("path", ZIPS, ids=lambda path: "-".join(path.parts[-3::2]) if path else "")
def test_real_agents_act_as_their_libraries_do(path: Path) -> None:
    algo, env_id = path.parts[-3], path.stem.replace("v3", "v4")
    library = pytest.importorskip("stable_baselines3" if algo == "sac" else "sb3_contrib")
    model = getattr(library, algo.upper())("MlpPolicy", gym.make(env_id), buffer_size=1, device="cpu")
    model.set_parameters(path, device="cpu")  # of `data`, whose pickles need an old gym, this reads nothing
    agent = load(path, model.observation_space, model.action_space)
    assert agent.algo == algo
    obs = np.random.default_rng(0).normal(size=(64, *model.observation_space.shape))
    wanted, _ = model.predict(obs, deterministic=True)
    np.testing.assert_allclose(agent(torch.from_numpy(obs), None), wanted, atol=2e-5)
    torch.manual_seed(7)
    wanted, _ = model.predict(obs, deterministic=False)
    np.testing.assert_allclose(agent(torch.from_numpy(obs), torch.Generator().manual_seed(7)), wanted, atol=2e-5)


def test_a_real_agent_runs_as_fast_as_it_was_trained_to() -> None:
    path = AGENTS / "tqc/HalfCheetah-v3_1/HalfCheetah-v3.zip"
    if not path.exists():
        pytest.skip(f"no agents in {AGENTS}")
    env = make("HalfCheetah-v4", (0,), 4)
    agent = load(path, env.observation_space, env.action_space)
    returns, lengths = evaluate(lambda inputs: agent(inputs["obs"], None), env, 1)
    assert (lengths == 1000).all()
    assert returns.mean() == pytest.approx(12_050, rel=0.03)  # as Stable-Baselines3 plays it


class Malice:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Malice.path),)

    path: Path


def test_nothing_in_a_zip_is_run(tmp_path: Path) -> None:
    Malice.path = tmp_path / "harm"
    weights = io.BytesIO()
    torch.save({"actor.mu.weight": Malice()}, weights)
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as file:
        file.writestr("data", json.dumps(SAC))
        file.writestr("policy.pth", weights.getvalue())
    with pytest.raises(ValueError, match="is no agent that Stable-Baselines3 saved: UnpicklingError"):
        load(tmp_path / "agent.zip", OBS, ACTION)
    assert not Malice.path.exists()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    with pytest.raises(FileNotFoundError):
        load(path, OBS, ACTION)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"agent\.zip is no agent .*: BadZipFile"):
        load(path, OBS, ACTION)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", "{}")
    with pytest.raises(ValueError, match=r"is no agent .*: KeyError: .*policy\.pth"):
        load(path, OBS, ACTION)
    write(path, {"policy_class": {"__module__": "stable_baselines3.common.policies"}})
    with pytest.raises(ValueError, match=r"policy of stable_baselines3\.common\.policies; those of SAC, TQC, TD3 and"):
        load(path, OBS, ACTION)


@pytest.mark.parametrize("name", ["vecnormalize.pkl", "vec_normalize.pkl", "Env-v1/vecnormalize.pkl"])
def test_normalized_agents_are_refused(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "agent.zip")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "replay_buffer.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name} says that it was trained on normalized observations"):
        load(path, OBS, ACTION)


def test_other_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "agent.zip"
    write(path, {"policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.Tanh'>"}})
    with pytest.raises(ValueError, match="Tanh'> between its layers; only networks with ReLU"):
        load(path, OBS, ACTION)
    write(path, {"policy_kwargs": {"activation_fn": "<class 'torch.nn.modules.activation.LeakyReLU'>"}})
    with pytest.raises(ValueError, match="LeakyReLU"):
        load(path, OBS, ACTION)
    write(path, actor={**ACTOR, "features_extractor.cnn.0": ([[1.0]], [1.0])})
    with pytest.raises(ValueError, match=r"another network .*: features_extractor\.cnn\.0\.bias"):
        load(path, OBS, ACTION)
    write(path, actor={name: x for name, x in ACTOR.items() if name != "log_std"})  # gSDE has another one
    with pytest.raises(ValueError, match=r"without gSDE: log_std\.bias, log_std\.weight"):
        load(path, OBS, ACTION)
    write(path, prefix="critic")
    with pytest.raises(ValueError, match="another network"):
        load(path, OBS, ACTION)


@pytest.mark.parametrize(
    ("data", "obs", "action", "message"),
    [
        ({}, gym.spaces.Box(-1, 1, (2,)), ACTION, r"observations of 1 numbers .*; the environment gives Box.*\(2,\)"),
        (
            {"observation_space": {":type:": "<class 'x.dict.Dict'>"}},
            OBS,
            ACTION,
            r"1 numbers in <class 'x\.dict\.Dict'>",
        ),
        ({}, OBS, gym.spaces.Box(-2, 2, (3,)), "acts with 1 bounded numbers"),
        ({}, OBS, gym.spaces.Discrete(2), "acts with 1 bounded numbers"),
        ({}, OBS, gym.spaces.Box(-np.inf, np.inf, (1,)), "acts with 1 bounded numbers"),
        ({}, OBS, gym.spaces.Box(-1, 2, (1,)), r"actions of low \[-2\.0\]; the environment has \[-1\.0\]"),
        ({}, OBS, gym.spaces.Box(-2, 1, (1,)), r"actions of high \[2\.0\]; the environment has \[1\.0\]"),
    ],
)
def test_other_spaces_are_refused(data: Any, obs: Any, action: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "agent.zip", data), obs, action)
