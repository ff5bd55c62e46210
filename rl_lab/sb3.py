"""Policies of SAC, TD3, DDPG and TQC out of Stable-Baselines3's zips, without Stable-Baselines3 and without pickle.

Such a zip holds `policy.pth`, tensors by name, which is loaded as tensors only; and `data`, JSON in which some values
are pickled objects. Of `data` only the readable parts are read. The networks, from the tensors' names and shapes
(stable_baselines3/{sac,td3}/policies.py, 2.9.2; sb3_contrib's TQC has SAC's actor):

    SAC, TQC:    h = relu(latent_pi(s)),  a = tanh(mu(h) + exp(clip(log_std(h), -20, 2)) * noise), scaled to the bounds
    TD3, DDPG:   a = tanh(mu(s)), scaled
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from rl_lab.distributions import Actions, draw_noise, scaled
from rl_lab.networks import Params, flat_size, mlp

LOGSTD_MIN, LOGSTD_MAX = -20.0, 2.0  # LOG_STD_MIN and LOG_STD_MAX of stable_baselines3/sac/policies.py
ALGORITHMS = {  # by the module of the policy's class
    "stable_baselines3.sac.policies": "sac",
    "sb3_contrib.tqc.policies": "tqc",
    "stable_baselines3.td3.policies": "td3",  # DDPG's too
}


@dataclass(frozen=True)
class Agent:
    """The actor of a zip; `load` makes it.

    Attributes:
        algo: "sac", "tqc" or "td3".
        params: "actor.{layer}.weight" and ".bias"; the last layer of SAC and TQC puts out means, then log_stds.
        num_layers: of the network.
        actions: the environment's.
    """

    algo: str
    params: Params
    num_layers: int
    actions: Actions

    def __call__(self, obs: Tensor, generator: torch.Generator | None) -> Tensor:
        """Act.

        Args:
            obs: (B, *obs), any dtype.
            generator: what sampled actions are drawn with; None for the likeliest ones.
        Returns:
            (B, *shape) float32, in the environment's bounds.
        """
        outputs = mlp(self.params, "actor", obs.flatten(1).float(), self.num_layers, torch.relu)
        if self.algo == "td3":
            return scaled(outputs.tanh(), self.actions)
        x, logstd = outputs.chunk(2, 1)
        if generator is not None:
            noise = draw_noise(self.actions, (len(obs),), generator)
            x = x + logstd.clamp(LOGSTD_MIN, LOGSTD_MAX).exp() * noise
        return scaled(x.tanh(), self.actions)


def load(path: Path, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Agent:
    """The actor of a zip, for an environment of these spaces. Nothing in the zip is run.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such zip, needs more than it holds (a VecNormalize's statistics), has another network
            than the above, or was trained in other spaces; it says which.
    """
    try:
        with zipfile.ZipFile(path) as opened:
            data, weights = json.loads(opened.read("data")), opened.read("policy.pth")
        module = str(data["policy_class"]["__module__"])
        tensors = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        named = {name.removeprefix("actor."): x.float() for name, x in tensors.items() if name.startswith("actor.")}
    except (
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        UnpicklingError,
    ) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no agent that Stable-Baselines3 saved: {type(error).__name__}: {reason}") from None
    if (algo := ALGORITHMS.get(module)) is None:
        raise ValueError(f"{path} has a policy of {module}; those of SAC, TQC, TD3 and DDPG can be read")
    _refuse_normalized(path)
    layers = _layers(path, algo, named)
    activation = str((data.get("policy_kwargs") or {}).get("activation_fn", ".ReLU'>"))
    if not activation.endswith(".ReLU'>"):
        raise ValueError(f"{path} has {activation} between its layers; only networks with ReLU can be read")
    actions = Actions.of(action_space)
    _check_spaces(path, data, layers, observation_space, actions, 1 if algo == "td3" else 2)
    params = {f"actor.{i}.{part}": x for i, layer in enumerate(layers) for part, x in layer.items()}
    return Agent(algo, params, len(layers), actions)


def _refuse_normalized(path: Path) -> None:
    """Such an agent's observations went through statistics that only a pickle beside the zip holds."""
    found = [p for pattern in ("*.pkl", "*/*.pkl") for p in sorted(path.parent.glob(pattern))]
    for pickled in found:
        if "vecnormalize" in pickled.name.lower().replace("_", ""):
            raise ValueError(
                f"{path}: {pickled} says that it was trained on normalized observations, and a pickle is never loaded; "
                "train without VecNormalize, or move the zip if that file belongs to another agent"
            )


def _layers(path: Path, algo: str, named: dict[str, Tensor]) -> list[Params]:
    """Weight and bias of each layer, from tensors by their names in the actor."""
    hidden, heads = ("mu", ()) if algo == "td3" else ("latent_pi", ("mu", "log_std"))
    indices = sorted({int(found[1]) for name in named if (found := re.match(rf"{hidden}\.(\d+)\.", name))})
    names = [(f"{hidden}.{i}",) for i in indices] + ([heads] if heads else [])
    wanted = {f"{name}.{part}" for layer in names for name in layer for part in ("weight", "bias")}
    if not wanted or named.keys() != wanted:
        odd = ", ".join(sorted(named.keys() ^ wanted)) or "no actor"
        raise ValueError(f"{path} has another network than linear layers of {algo} without gSDE: {odd}")
    return [
        {part: torch.cat([named[f"{name}.{part}"] for name in layer]) for part in ("weight", "bias")} for layer in names
    ]


def _check_spaces(
    path: Path, data: Any, layers: list[Params], observation_space: gym.Space[Any], actions: Actions, heads: int
) -> None:
    """ValueError unless the agent was trained in observations of this width and actions of these bounds."""
    width, size = layers[0]["weight"].shape[1], layers[-1]["weight"].shape[0] // heads
    spaces = [str(data.get(f"{kind}_space", {}).get(":type:")) for kind in ("observation", "action")]
    if not all(space.endswith("box.Box'>") for space in spaces) or width != flat_size(observation_space):
        given = f"{width} numbers in {spaces[0]}"
        raise ValueError(f"{path} was trained on observations of {given}; the environment gives {observation_space}")
    bounds = {"low": actions.low, "high": actions.high}
    if size != actions.num_outputs or not actions.bounded:
        raise ValueError(f"{path} acts with {size} bounded numbers; the environment's actions are {actions}")
    for name, bound in bounds.items():
        trained = [float(x) for x in re.findall(r"[^\s\[\],]+", str(data["action_space"].get(name)))]
        if len(trained) != len(bound) or not np.allclose(trained, bound, rtol=1e-6):
            raise ValueError(f"{path} was trained with actions of {name} {trained}; the environment has {list(bound)}")
