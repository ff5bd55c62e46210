"""Writes actor_critic_numbers.json: gradient steps by CleanRL's sac_continuous_action.py and td3_continuous_action.py.

    git clone https://github.com/vwxyzjn/cleanrl && git -C cleanrl checkout fe8d8a03
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 gymnasium==0.29.1 numpy==1.26.4 tyro tensorboard
    peers/bin/python tests/parity/make_actor_critic_numbers.py cleanrl

The scripts' networks and the statements of their gradient steps run, taken out of their loops, in float64. Their replay
hands out batches written down here, weights are set before, and so is all noise. What is read off: the gradients before
and the weights after every step of an optimizer, in order, as digests (`make_ppo_numbers.digest`), and the losses.
One thing is changed: SAC's log-probability without the 1e-6 inside the logarithm, which keeps log(0) away.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from make_categorical_numbers import statements
from make_ppo_numbers import digest, initial, rounded
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

OBS, BATCH = 3, 12
LAYERS = [f"{layer}.{kind}" for layer in range(3) for kind in ("weight", "bias")]
FLAGS = {"gamma": 0.97, "tau": 0.1, "policy_frequency": 2}
SAC_FLAGS = {**FLAGS, "policy_lr": 3e-4, "q_lr": 1e-3, "target_network_frequency": 1, "autotune": True}
TD3_FLAGS = {**FLAGS, "learning_rate": 3e-4, "policy_noise": 0.4, "noise_clip": 0.3}
SAC_BOUNDS = [-2.0, -1.0], [2.0, 2.0]
TD3_BOUNDS = [-2.0, -2.0], [2.0, 2.0]  # its script clips the next action at the first component's
LOSSES = ("qf_loss", "qf1_loss", "qf2_loss", "actor_loss", "alpha_loss", "alpha")


def batch(seed: int, bounds: tuple[list[float], list[float]]) -> dict[str, list[Any]]:
    """Transitions of which some end an episode."""
    random = np.random.RandomState(seed)
    columns = {name: random.standard_normal((BATCH, OBS)) for name in ("obs", "next_obs")}
    columns |= {"actions": random.uniform(*bounds, (BATCH, 2)), "rewards": random.standard_normal(BATCH)}
    return {name: x.round(3).tolist() for name, x in columns.items()} | {
        "terminated": (np.arange(BATCH) % 5 < 2).tolist()
    }


def run(module: ModuleType, bounds: tuple[list[float], list[float]], flags: dict[str, Any], sac: bool) -> Any:
    """Gradient steps 1, 2 and 3, of which the second has the actor's, with everything seen."""
    low, high = (np.array(bound, np.float32) for bound in bounds)
    env = SimpleNamespace(single_observation_space=SimpleNamespace(shape=(OBS,)))
    env.single_action_space = SimpleNamespace(shape=(2,), low=low, high=high)
    kinds = {"actor": module.Actor, "qf1": module.SoftQNetwork if sac else module.QNetwork}
    kinds |= {"qf2": kinds["qf1"], "qf1_target": kinds["qf1"], "qf2_target": kinds["qf1"]}
    networks = {
        name: kind(env).double() for name, kind in (kinds | ({} if sac else {"target_actor": kinds["actor"]})).items()
    }
    names = {}
    for network, module_ in networks.items():
        layers = [*LAYERS[:4], *(f"2.{part}.{kind}" for part in ("mean", "logstd") for kind in ("weight", "bias"))]
        names[network] = [f"{network}.{layer}" for layer in (layers if sac and network == "actor" else LAYERS)]
        fill(module_, names[network])
    critics = [*networks["qf1"].parameters(), *networks["qf2"].parameters()]
    lr = [flags["q_lr"], flags["policy_lr"]] if sac else [flags["learning_rate"]] * 2
    log_alpha = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizers = {
        "q_optimizer": torch.optim.Adam(critics, lr[0]),
        "actor_optimizer": torch.optim.Adam(networks["actor"].parameters(), lr[1]),
        "a_optimizer": torch.optim.Adam([log_alpha], lr[0]),
    }
    of = {"q_optimizer": names["qf1"] + names["qf2"], "actor_optimizer": names["actor"], "a_optimizer": ["log_alpha"]}
    found: dict[str, Any] = {"bounds": bounds, "flags": flags, "batches": [], "noise": [], "steps": [], "losses": []}
    random = np.random.RandomState(7)

    def sample(_: int) -> SimpleNamespace:
        found["batches"].append(columns := batch(len(found["batches"]), bounds))
        obs, next_obs, actions, rewards, dones = (torch.tensor(x, dtype=torch.float64) for x in columns.values())
        return SimpleNamespace(
            observations=obs,
            next_observations=next_obs,
            actions=actions,
            rewards=rewards[:, None],
            dones=dones[:, None],
        )

    def draw(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        found["noise"].append(random.standard_normal(tuple(x.shape)).round(3).tolist())
        return torch.tensor(found["noise"][-1], dtype=torch.float64)

    def begin(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (name,) = (name for name, x in optimizers.items() if x is optimizer)
        found["steps"].append({"optimizer": name, "gradients": digests(of[name], (p.grad for p in tensors(optimizer)))})

    def end(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found["steps"][-1]["params"] = digests(of[found["steps"][-1]["optimizer"]], tensors(optimizer))

    scope = {**vars(module), **networks, **optimizers, "log_alpha": log_alpha, "alpha": 1.0, "target_entropy": -2.0}
    scope |= {"rb": SimpleNamespace(sample=sample), "envs": env, "device": None}
    scope["args"] = SimpleNamespace(**flags, batch_size=BATCH)
    hooks = register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)
    body = statements(module, "global_step > args.learning_starts")
    body = compile(ast.Module(body, []), str(module.__file__), "exec")
    patches = (
        mock.patch("torch.randn_like", draw),
        mock.patch("torch.distributions.Normal.rsample", lambda self: self.mean + self.stddev * draw(self.mean)),
    )
    with patches[0], patches[1]:
        for scope["global_step"] in (1, 2, 3):
            exec(body, scope)
            found["losses"].append({name: float(scope[name]) for name in LOSSES if name in scope})
    for hook in hooks:
        hook.remove()
    slow = [name for name in networks if "target" in name]
    found["targets"] = {k: x for name in slow for k, x in digests(names[name], networks[name].parameters()).items()}
    return found


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return optimizer.param_groups[0]["params"]


def fill(network: nn.Module, names: list[str]) -> None:
    for name, p in zip(names, network.parameters(), strict=True):
        p.data.copy_(torch.from_numpy(initial(name, p.shape)))


def digests(names: list[str], found: Any) -> dict[str, list[float]]:
    return {name: digest(name, x.detach().numpy()) for name, x in zip(names, found, strict=True)}


def load(path: Path, old: str = "", new: str = "") -> ModuleType:
    """The script as a module, `old` replaced by `new`."""
    source = path.read_text()
    assert source.count(old) == 1 or not old
    module = sys.modules[path.stem] = ModuleType(path.stem)  # where dataclasses look
    module.__file__ = str(path)
    exec(compile(source.replace(old, new) if old else source, path, "exec"), vars(module))
    return module


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()
    torch.set_num_threads(1)
    sys.path.insert(0, str(checkout))
    commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "HEAD"], text=True).strip()
    numbers: dict[str, Any] = {"versions": {"cleanrl": commit} | {name: version(name) for name in ("torch", "numpy")}}
    sac = load(checkout / "cleanrl" / "sac_continuous_action.py", "(1 - y_t.pow(2)) + 1e-6", "(1 - y_t.pow(2))")
    numbers["sac"] = run(sac, SAC_BOUNDS, SAC_FLAGS, sac=True)
    numbers["td3"] = run(load(checkout / "cleanrl" / "td3_continuous_action.py"), TD3_BOUNDS, TD3_FLAGS, sac=False)
    target = Path(__file__).resolve().with_name("actor_critic_numbers.json")
    target.write_text(json.dumps(rounded(numbers), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
