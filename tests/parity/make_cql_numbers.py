"""Writes cql_numbers.json: two gradient steps of CORL's ContinuousCQL and of d3rlpy's DiscreteCQL, in float64.

    git clone https://github.com/tinkoff-ai/CORL && git -C CORL checkout 6afec90
    python3.11 -m venv peers
    peers/bin/pip install torch==2.13.0 numpy d3rlpy==2.8.1
    peers/bin/python tests/parity/make_cql_numbers.py CORL

CORL's classes run as they are, taken out of algorithms/offline/cql.py without the imports of d4rl and of its logger,
on noise that is handed to them; its actor gets a network of two hidden layers, and the factor and offset that it learns
for its log standard deviation stay at 1 and 0. What is read off: losses, gradients, and the weights after each step, as
digests.
"""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution

HERE = Path(__file__).resolve().parent
OBS, ACTIONS, BATCH, SAMPLES, CHOICES = 3, 2, 12, 4, 3
SHARED = {"discount": 0.96875, "soft_target_update_rate": 0.1, "policy_lr": 2e-4, "qf_lr": 3e-4, "cql_alpha": 3.0}
SHARED |= {"bc_steps": 0, "cql_n_actions": SAMPLES, "target_entropy": -ACTIONS}
VARIANTS = {
    "plain": {"backup_entropy": False, "cql_lagrange": False},
    "lagrange": {"backup_entropy": True, "cql_lagrange": True, "cql_target_action_gap": 4.0},
}
DISCRETE = {"gamma": 0.96875, "learning_rate": 3e-4, "alpha": 1.5, "target_update_interval": 2}
WANTED = {"ContinuousCQL", "FullyConnectedQFunction", "TanhGaussianPolicy", "ReparameterizedTanhGaussian", "Scalar"}
WANTED |= {"soft_update", "extend_and_repeat", "init_module_weights", "TensorBatch"}


def initial(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As make_ppo_numbers.initial, which needs packages that this does not; smaller, for moderate deviations."""
    return 0.08 * np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def digest(name: str, x: np.ndarray) -> list[float]:
    """As make_ppo_numbers.digest."""
    x = np.asarray(x, np.float64).ravel()
    directions = np.random.RandomState(zlib.crc32(name.encode()) ^ 1).standard_normal((3, x.size))
    return [round(float(value), 9) for value in (np.linalg.norm(x), *(directions @ x))]


def batch(seed: int, discrete: bool) -> dict[str, list[Any]]:
    """Transitions, a third of which end an episode."""
    random = np.random.RandomState(seed)
    columns = {name: np.round(random.standard_normal((BATCH, OBS)), 3) for name in ("obs", "next_obs")}
    actions = random.randint(0, CHOICES, BATCH) if discrete else np.round(random.uniform(-1, 1, (BATCH, ACTIONS)), 3)
    columns["actions"], columns["rewards"] = actions, np.round(2 * random.standard_normal(BATCH), 3)
    columns["terminated"] = (np.arange(BATCH) % 3 == 0).astype(float)
    return {name: column.tolist() for name, column in columns.items()}


def draws(seed: int) -> list[Any]:
    """(2 + 3 * SAMPLES, BATCH, ACTIONS) standard normal numbers, in the order that our update takes them."""
    shape = (2 + 3 * SAMPLES, BATCH, ACTIONS)
    return np.round(np.random.RandomState(seed + 100).standard_normal(shape), 3).tolist()


class Injected:
    """Takes the place of torch's generators in CORL's step: hands out `noise`, and checks the shapes asked for."""

    def __init__(self, noise: list[Any]) -> None:
        acting, following, *rest = torch.tensor(noise)
        here, there, anywhere = torch.stack(rest).transpose(0, 1).split(SAMPLES, 1)
        self.normal, self.uniform = [acting, following, here, there], [torch.erf(anywhere / 2**0.5)]

    def __enter__(self) -> None:
        def standard_normal(shape: Any, dtype: Any, device: Any) -> Tensor:
            return self._next(self.normal, tuple(shape))

        def uniform(x: Tensor, low: float, high: float) -> Tensor:
            assert (low, high) == (-1, 1)
            return self._next(self.uniform, tuple(x.shape))

        self.saved = torch.distributions.normal._standard_normal, Tensor.uniform_
        torch.distributions.normal._standard_normal, Tensor.uniform_ = standard_normal, uniform

    def __exit__(self, *_: Any) -> None:
        torch.distributions.normal._standard_normal, Tensor.uniform_ = self.saved
        assert not self.normal and not self.uniform

    @staticmethod
    def _next(queue: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        x = queue.pop(0)
        assert x.shape == shape
        return x.clone()


def classes(script: Path) -> SimpleNamespace:
    """What the script defines of WANTED."""

    def name(node: ast.stmt) -> str:
        return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", "")

    body = [node for node in ast.parse(script.read_text()).body if name(node) in WANTED]
    scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "np": np, "deepcopy": copy.deepcopy, "Normal": Normal}
    scope |= {"TanhTransform": TanhTransform, "TransformedDistribution": TransformedDistribution}
    exec("from typing import *", scope)
    exec(compile(ast.Module(body, []), str(script), "exec"), scope)
    return SimpleNamespace(**scope)


def parameters(networks: dict[str, nn.Sequential]) -> dict[str, nn.Parameter]:
    """By our names: <network>.<layer>.<kind>."""
    found = {}
    for network, module in networks.items():
        for name, p in module.named_parameters():
            layer, kind = name.split(".")
            found[f"{network}.{int(layer) // 2}.{kind}"] = p
    return found


def fill(params: dict[str, nn.Parameter], prefix: str = "") -> None:
    for name, p in params.items():
        p.data.copy_(torch.from_numpy(initial(f"{prefix}{name}", tuple(p.shape))))


def digests(params: dict[str, Any]) -> dict[str, list[float]]:
    return {name: digest(name, p.detach().numpy()) for name, p in params.items()}


def continuous(peer: SimpleNamespace, flags: dict[str, Any]) -> dict[str, Any]:
    """Two steps of CORL's."""
    critics = [peer.FullyConnectedQFunction(OBS, ACTIONS, n_hidden_layers=2) for _ in range(2)]
    actor = peer.TanhGaussianPolicy(OBS, ACTIONS, 1.0, log_std_offset=0.0)
    layers = (nn.Linear(OBS, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2 * ACTIONS))
    actor.base_network = nn.Sequential(*layers)
    rates = (flags["policy_lr"], flags["qf_lr"], flags["qf_lr"])
    networks = (actor.base_network, *(critic.network for critic in critics))
    optimizers = [torch.optim.Adam(x.parameters(), lr=rate) for x, rate in zip(networks, rates, strict=True)]
    pairs = (critics[0], optimizers[1], critics[1], optimizers[2], actor, optimizers[0])
    agent = peer.ContinuousCQL(*pairs, **flags)
    for scalar in (agent.log_alpha, agent.log_alpha_prime, actor.log_std_multiplier, actor.log_std_offset):
        scalar.constant.data = scalar.constant.data.double()
    params = parameters(dict(zip(("actor", "critic0", "critic1"), networks, strict=True)))
    targets = parameters(
        {f"critic{e}": x.network for e, x in enumerate((agent.target_critic_1, agent.target_critic_2))}
    )
    fill(params)
    fill(targets, "target.")
    scalars = {"log_alpha": agent.log_alpha.constant, "log_weight": agent.log_alpha_prime.constant}
    found: dict[str, Any] = {"flags": flags, "log_weight": float(scalars["log_weight"]), "batches": [], "noise": []}
    found["steps"] = []
    for seed in range(2):
        columns, noise = batch(seed, discrete=False), draws(seed)
        found["batches"].append(columns)
        found["noise"].append(noise)
        x = {name: torch.tensor(column) for name, column in columns.items()}
        rewards, dones = (x[name].unsqueeze(1) for name in ("rewards", "terminated"))
        with Injected(noise):
            losses = agent.train([x["obs"], x["actions"], rewards, x["next_obs"], dones])
        step = {"losses": losses, "gradients": digests({name: p.grad for name, p in params.items()})}
        step |= {"params": digests(params), "targets": digests(targets)}
        found["steps"].append(step | {"scalars": {name: float(p) for name, p in scalars.items()}})
    return found


def discrete() -> dict[str, Any]:
    """Two steps of d3rlpy's, after the second of which the target is the online network."""
    import d3rlpy
    from d3rlpy.torch_utility import TorchMiniBatch

    algorithm = d3rlpy.algos.DiscreteCQLConfig(**DISCRETE).create()
    algorithm.create_impl((OBS,), CHOICES)
    modules = algorithm.impl.modules

    def named(functions: Any) -> dict[str, nn.Parameter]:
        (function,) = functions
        linear = [m for m in function.modules() if isinstance(m, nn.Linear)]
        assert [m.out_features for m in linear] == [256, 256, CHOICES]
        return {f"q.{layer}.{kind}": p for layer, m in enumerate(linear) for kind, p in m.named_parameters()}

    params, targets = named(modules.q_funcs), named(modules.targ_q_funcs)
    fill(params)
    fill(targets, "target.")
    found: dict[str, Any] = {"flags": DISCRETE, "batches": [], "steps": []}
    for step in range(2):
        columns = batch(step, discrete=True)
        found["batches"].append(columns)
        x = {name: torch.tensor(column) for name, column in columns.items()}
        ones = torch.ones(BATCH, 1)
        transitions = TorchMiniBatch(
            observations=x["obs"], actions=x["actions"].unsqueeze(1), rewards=x["rewards"].unsqueeze(1),
            next_observations=x["next_obs"], next_actions=x["actions"].unsqueeze(1), returns_to_go=ones,
            terminals=x["terminated"].unsqueeze(1), intervals=ones, device="cpu",
        )  # fmt: skip
        losses = algorithm.impl.inner_update(transitions, step + 1)
        gradients = digests({name: p.grad for name, p in params.items()})
        seen = {"losses": losses, "gradients": gradients, "params": digests(params), "targets": digests(targets)}
        found["steps"].append(seen)
    return found | {"version": d3rlpy.__version__}


def main() -> None:
    corl = Path(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    peer = classes(corl / "algorithms/offline/cql.py")
    found: dict[str, Any] = {name: continuous(peer, SHARED | flags) for name, flags in VARIANTS.items()}
    found["discrete"] = discrete()
    commit = subprocess.run(["git", "-C", str(corl), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    found["versions"] = {"corl": commit.strip(), "d3rlpy": found["discrete"].pop("version")}
    found["versions"] |= {"torch": torch.__version__, "numpy": np.__version__}
    (HERE / "cql_numbers.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
