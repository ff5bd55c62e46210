"""Three gradient steps of FQE against d3rlpy's own classes, from the same weights on the same batches.

fqe_numbers.json holds what they computed, in float64, with the versions; make_fqe_numbers.py wrote it. They sum losses
in float32, so these agree to 1e-6. For Discrete actions their loss is Huber's: where no error reaches 1, as here, half
of ours, and so are its gradients.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value

from rl_lab.algorithms import fqe
from rl_lab.distributions import Actions
from rl_lab.networks import Params
from rl_lab.optim import adam, init_adam

HERE = Path(__file__).parent
NUMBERS = json.loads((HERE / "fqe_numbers.json").read_text())
FLAGS = NUMBERS["flags"]
spec = importlib.util.spec_from_file_location("make_fqe_numbers", HERE / "make_fqe_numbers.py")
assert spec and spec.loader
peer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peer)  # its weights and digests; it runs nothing unless called


def assert_digests(tensors: Params, expected: dict[str, list[float]]) -> None:
    assert tensors.keys() == expected.keys()
    for name, x in tensors.items():
        np.testing.assert_allclose(peer.digest(name, x.numpy()), expected[name], rtol=1e-7, atol=1e-8, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "actions", "share"),
    [("box", Actions((2,), (2,), (-1.0, -1.0), (1.0, 1.0)), 1.0), ("discrete", Actions((2,), ()), 0.5)],
)
def test_three_steps(kind: str, actions: Actions, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the action at s', the target network and its copy, the terminal, the network, the mean, Adam."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # float32's rounding would hide faults of its size
    blank = fqe.init_params(peer.OBS, actions, torch.Generator())
    critic, target = (
        {name: torch.from_numpy(peer.initial(prefix + name, tuple(p.shape))).double() for name, p in blank.items()}
        for prefix in ("", "target.")
    )
    opt = init_adam(critic)
    for step, (columns, seen) in enumerate(zip(NUMBERS[kind]["batches"], NUMBERS[kind]["steps"], strict=True), 1):
        batch = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
        batch["discounts"] = FLAGS["gamma"] * (1 - batch["terminated"])
        grads, (value, _) = grad_and_value(fqe.loss, has_aux=True)(critic, target, batch, actions)
        assert share * value.item() == pytest.approx(seen["losses"]["loss"], rel=1e-6)
        grads = {name: share * g for name, g in grads.items()}
        assert_digests(grads, seen["gradients"])
        rate = torch.tensor(FLAGS["learning_rate"], dtype=torch.float64)
        critic, opt = adam(critic, grads, opt, rate, eps=1e-8)
        assert_digests(critic, seen["params"])
        if step % FLAGS["target_update_interval"] == 0:
            target = critic
    value = fqe.q_values(critic, batch["obs"], batch["next_actions"], actions).mean()
    assert value.item() == pytest.approx(NUMBERS[kind]["value"], rel=1e-9)
