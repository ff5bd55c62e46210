"""Initialisation and forward pass of the multi-layer perceptron."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from torch import nn
from torch.func import grad

from rl_lab.networks import flat_size, init_mlp, init_uniform, mlp, q_values, q_values_of_each, stack


def test_images_are_no_vectors() -> None:
    """Grids of objects are, however many there are of them; frames that only lack their preprocessing are not."""
    for shape, dtype in (((7, 7, 3), np.uint8), ((16, 16, 20), np.uint8), ((40, 40), np.float32), ((128,), np.uint8)):
        assert flat_size(Box(0, 255, shape, dtype)) == np.prod(shape)
    for shape in ((210, 160, 3), (84, 84, 1), (84, 84), (3, 64, 64)):
        with pytest.raises(ValueError, match=rf"observations {re.escape(str(shape))} of bytes are images: .*Pong"):
            flat_size(Box(0, 255, shape, np.uint8))


def test_orthogonal_initialisation() -> None:
    """Guards against a wrong gain, a gain on the wrong layer, and biases that are not zero."""
    params = init_mlp("net", (5, 16, 16, 3), 0.01, torch.Generator().manual_seed(0))
    assert {name: tuple(p.shape) for name, p in params.items()} == {
        "net.0.weight": (16, 5),
        "net.0.bias": (16,),
        "net.1.weight": (16, 16),
        "net.1.bias": (16,),
        "net.2.weight": (3, 16),
        "net.2.bias": (3,),
    }
    first, second, last = (params[f"net.{i}.weight"] for i in range(3))
    torch.testing.assert_close(first.T @ first, 2 * torch.eye(5), rtol=0, atol=1e-5)  # gain sqrt(2), squared
    torch.testing.assert_close(second.T @ second, 2 * torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(last @ last.T, 1e-4 * torch.eye(3), rtol=0, atol=1e-9)
    assert not any(params[f"net.{i}.bias"].any() for i in range(3))


def test_initialisation_draws_from_its_generator_only() -> None:
    """Guards against weights that depend on the global generator, so that a seed would not reproduce."""
    before = torch.get_rng_state()
    same = [init_mlp("net", (4, 8, 2), 1.0, torch.Generator().manual_seed(3))["net.1.weight"] for _ in range(2)]
    other = init_mlp("net", (4, 8, 2), 1.0, torch.Generator().manual_seed(4))["net.1.weight"]
    assert torch.equal(*same)
    assert not torch.equal(same[0], other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layers", [2, 3])
def test_forward_pass_equals_modules(layers: int) -> None:
    """Guards against a tanh too many, one missing, and weights in the wrong orientation."""
    sizes = (5, 16, 16)[:layers]
    params = init_mlp("net", (*sizes, 3), 1.0, torch.Generator().manual_seed(0))
    params = {name: p + 0.1 for name, p in params.items()}  # biases count
    modules: list[nn.Module] = []
    for i in range(layers):
        linear = nn.Linear(*params[f"net.{i}.weight"].T.shape)
        linear.load_state_dict({"weight": params[f"net.{i}.weight"], "bias": params[f"net.{i}.bias"]})
        modules += [linear, nn.Tanh()]
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mlp(params, "net", x, layers), nn.Sequential(*modules[:-1])(x), rtol=0, atol=1e-6)


def test_q_values_of_each_action_of_a_state() -> None:
    """As one state after the other gives them, in value and in gradient."""
    generator = torch.Generator().manual_seed(0)
    critics = stack([init_uniform("critic", (5 + 6, 16, 16, 1), generator) for _ in range(2)])
    obs, taken = torch.randn(4, 5, generator=generator), torch.randn(7, 4, 2, 3, generator=generator)
    wanted = q_values(critics, obs.repeat(7, 1), taken.flatten(0, 1)).view(2, 7, 4)
    torch.testing.assert_close(q_values_of_each(critics, obs, taken), wanted)
    slopes = grad(lambda critics: q_values_of_each(critics, obs, taken).square().sum())(critics)
    plain = grad(lambda critics: q_values(critics, obs.repeat(7, 1), taken.flatten(0, 1)).square().sum())(critics)
    torch.testing.assert_close(slopes, plain, rtol=1e-4, atol=1e-5)
