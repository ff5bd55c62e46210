"""One iteration of PPO against CleanRL's scripts and Stable-Baselines3, from the same weights on the same stream.

ppo_numbers.json holds what the peers computed, with their versions; make_ppo_numbers.py wrote it. CleanRL is met with
`--semantics cleanrl`; Stable-Baselines3 with the default semantics and without a clipped value loss, where the two
agree. The streams hold steps that terminate, that are truncated, and that do both.
"""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from rl_lab.algorithms import ppo
from rl_lab.distributions import Actions
from rl_lab.networks import Params, pack
from rl_lab.normalize import begin, observe
from rl_lab.optim import init_adam
from rl_lab.rollout import Rollout
from rl_lab.vector import Step

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "ppo_numbers.json").read_text())
CASES = ["cleanrl_discrete", "cleanrl_box", "sb3_discrete", "sb3_box"]
spec = importlib.util.spec_from_file_location("make_ppo_numbers", HERE / "make_ppo_numbers.py")
assert spec and spec.loader
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)  # its weights and digests; it runs no peer unless called


class Case:
    """The peer's numbers, and our arguments for the same iteration."""

    def __init__(self, name: str) -> None:
        self.numbers: dict[str, Any] = NUMBERS[name]
        box = name.endswith("box")
        low_high = ((-1.0, -1.0), (1.0, 1.0)) if box else ()
        self.actions = Actions((2,) if box else (3,), (2,) if box else (), *low_high)
        self.args = ppo.Args(**self.numbers["flags"])
        space = gym.spaces.Box(-np.inf, np.inf, (3 + box,))
        blank = ppo.init_params(space, self.actions, torch.Generator())
        self.params = {name: torch.from_numpy(peers.initial(name, p.shape)) for name, p in blank.items()}
        stream = {name: torch.tensor(column) for name, column in self.numbers["stream"].items()}
        first = stream.pop("first").double()
        ended = stream["terminated"], stream["truncated"]
        assert (ended[0] & ~ended[1]).any() and (ended[1] & ~ended[0]).any() and (ended[0] & ended[1]).any()
        normalizer, obs = begin(first) if self.args.normalize else ({}, first)
        rows = []
        for t in range(self.args.num_steps):
            step = Step(**{name: column[t] for name, column in stream.items()})
            if self.args.normalize:
                normalizer, step = observe(normalizer, step, self.args.gamma, self.args.semantics == "cleanrl")
            rows.append({"obs": obs, **step._asdict() | {"obs": obs}})
            obs = step.obs
        self.rollout: Rollout = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        self.rollout["actions"] = self.column("actions")
        if not box:
            self.rollout["actions"] = self.rollout["actions"].long()
        self.shuffles = torch.tensor(self.numbers["shuffles"])

    def column(self, name: str) -> Tensor:
        """(T, N, ...) as the peer has it."""
        return torch.tensor(self.numbers["rollout"][name])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    digests = {name: peers.digest(name, x.numpy()) for name, x in tensors.items()}
    assert digests.keys() == expected.keys()
    for name, numbers in expected.items():  # sums over a tensor: one near zero is as rounded as the largest
        atol = 1e-6 * max(1.0, *map(abs, numbers))
        np.testing.assert_allclose(digests[name], numbers, rtol=1e-6, atol=atol, err_msg=name)


def test_normalised_stream_equals_gymnasium_wrappers() -> None:
    """Guards details 28-31: statistics that miss the true successor or the first observation of an episode, a return
    that runs on or stops where Gymnasium's does not, a mean subtracted from rewards."""
    case = Case("cleanrl_box")
    torch.testing.assert_close(case.rollout["obs"], case.column("obs"), rtol=0, atol=1e-6)
    torch.testing.assert_close(case.rollout["rewards"], case.column("rewards"), rtol=0, atol=1e-6)
    raw = torch.tensor(case.numbers["stream"]["rewards"])
    assert not torch.allclose(case.rollout["rewards"], raw, atol=0.1)


def test_values_and_advantages(case: Case) -> None:
    """Guards detail 5, detail 25, and a truncation or termination treated otherwise than the peer does."""
    data = ppo.targets(case.params, case.rollout, case.actions, case.args)
    for name in ("values", "logprobs", "advantages", "returns"):
        peer = case.column(name)
        torch.testing.assert_close(data[name].reshape(peer.shape), peer, rtol=1e-6, atol=2e-6)


def test_each_minibatch(case: Case) -> None:
    """Guards details 3, 7-12 and 25: eight minibatches in a row, the gradient before and the weights after each."""
    data = ppo.targets(case.params, case.rollout, case.actions, case.args)
    params, opt, history = case.params, init_adam(case.params), []
    learning_rate = torch.tensor(case.args.learning_rate)
    for t, indices in enumerate(case.shuffles):
        batch = {name: column[indices] for name, column in data.items()}
        loss, _ = ppo.loss(params, batch, case.actions, case.args)
        grads, metrics = ppo.gradient(params, batch, case.actions, case.args)
        assert_digests(grads, case.numbers["gradients"][t])
        params, opt = ppo.step(params, opt, grads, learning_rate, case.args)
        assert_digests(params, case.numbers["params"][t])
        history.append({name: x.item() for name, x in {**metrics, "loss": loss}.items()})

    for name, number in case.numbers.get("last", {}).items():  # CleanRL logs the last minibatch, the share over all
        if name == "explained_var":
            continue
        ours = np.mean([m[name] for m in history]) if name == "clipfrac" else history[-1][name]
        assert ours == pytest.approx(number, abs=1e-6), name
    if logged := case.numbers.get("logged"):  # Stable-Baselines3 logs means, the KL's over the last epoch
        mean = {name: np.mean([m[name] for m in history]) for name in history[0]}
        assert history[-1]["loss"] == pytest.approx(logged["loss"], abs=1e-6)
        assert mean["policy_loss"] == pytest.approx(logged["policy_loss"], abs=1e-6)
        assert 2 * mean["value_loss"] == pytest.approx(logged["value_loss"], abs=1e-6)
        assert -mean["entropy"] == pytest.approx(logged["entropy"], abs=1e-6)
        assert mean["clipfrac"] == pytest.approx(logged["clipfrac"], abs=1e-6)
        assert np.mean([m["approx_kl"] for m in history[4:]]) == pytest.approx(logged["approx_kl"], abs=1e-6)
    assert 0 < np.mean([m["clipfrac"] for m in history]) < 1  # the clipped branch counts


def test_whole_iteration(case: Case) -> None:
    """Guards the loop around the minibatches: their order, the data's flattening, the metrics that are logged."""
    params = {name: x.unsqueeze(0) for name, x in case.params.items()}
    params, opt, metrics = ppo.learn(
        params,
        vmap(init_adam)({"all": vmap(pack)(params)}),
        case.rollout,
        case.shuffles.unsqueeze(1),
        torch.tensor(case.args.learning_rate),
        vmap(partial(ppo.gradient, actions=case.actions, args=case.args)),
        case.actions,
        case.args,
    )
    assert_digests({name: p.squeeze(0) for name, p in params.items()}, case.numbers["params"][-1])
    assert opt["step"].tolist() == [8]
    logged = case.numbers.get("last", case.numbers.get("logged"))
    assert metrics["losses/explained_variance"].item() == pytest.approx(logged["explained_var"], abs=1e-5)
    for name, number in case.numbers.get("last", {}).items():
        if name not in ("loss", "explained_var"):
            assert metrics[f"losses/{name}"].item() == pytest.approx(number, abs=1e-6), name
