"""Networks as pure functions of a dict of parameters, {"actor.0.weight": (out, in), "actor.0.bias": (out,), ...}."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


def flat_size(space: gym.Space[Any]) -> int:
    """Numbers in one observation; ValueError unless the space is a Box."""
    if not isinstance(space, gym.spaces.Box):
        raise ValueError(f"observations must be in a Box space, not {space}; a Gymnasium wrapper can flatten them")
    return math.prod(space.shape)


def stack(agents: Sequence[Params]) -> Params:
    """Agents' parameters with a leading seed axis S."""
    return {name: torch.stack([params[name] for params in agents]) for name in agents[0]}


def init_mlp(name: str, sizes: Sequence[int], output_gain: float, generator: torch.Generator) -> Params:
    """Orthogonal weights with gain sqrt(2), `output_gain` in the last layer, and zero biases.

    Args:
        name: prefix of the parameters' names.
        sizes: widths from input to output; L + 1 numbers for L layers.
    """
    params = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        gain = output_gain if layer == len(sizes) - 2 else 2**0.5
        weight = torch.empty(outputs, inputs, device=generator.device)
        params[f"{name}.{layer}.weight"] = torch.nn.init.orthogonal_(weight, gain, generator=generator)
        params[f"{name}.{layer}.bias"] = torch.zeros(outputs, device=generator.device)
    return params


def init_uniform(name: str, sizes: Sequence[int], generator: torch.Generator) -> Params:
    """As `init_mlp`, but weights and biases uniform within 1 / sqrt(inputs), which is torch.nn.Linear's default."""
    params = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        for part, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            draws = torch.empty(shape, device=generator.device)
            params[f"{name}.{layer}.{part}"] = draws.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return params


def mlp(
    params: Params, name: str, x: Tensor, num_layers: int = 3, activation: Callable[[Tensor], Tensor] = torch.tanh
) -> Tensor:
    """(B, in) -> (B, out), `activation` between the layers."""
    for layer in range(num_layers):
        x = F.linear(x, params[f"{name}.{layer}.weight"], params[f"{name}.{layer}.bias"])
        if layer < num_layers - 1:
            x = activation(x)
    return x


def is_image(space: gym.Space[Any]) -> TypeGuard[gym.spaces.Box]:
    """Whether observations are what the Nature CNN takes: uint8 images (C, 84, 84)."""
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[1:] == (84, 84)


NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # filters, kernel and stride of its convolutions


def init_nature_cnn(name: str, channels: int, generator: torch.Generator) -> Params:
    """Orthogonal weights with gain sqrt(2) and zero biases; layers 0 to 2 are convolutions, layer 3 is linear."""
    shapes, inputs = [], channels
    for filters, kernel, _ in NATURE_CNN:
        shapes.append((filters, inputs, kernel, kernel))
        inputs = filters
    params = {}
    for layer, shape in enumerate([*shapes, (512, inputs * 7 * 7)]):
        weight = torch.empty(shape, device=generator.device)
        params[f"{name}.{layer}.weight"] = torch.nn.init.orthogonal_(weight, 2**0.5, generator=generator)
        params[f"{name}.{layer}.bias"] = torch.zeros(shape[0], device=generator.device)
    return params


def nature_cnn(params: Params, name: str, images: Tensor) -> Tensor:
    """(B, C, 84, 84) uint8 -> (B, 512) float32, computed in the parameters' dtype.

    Mnih et al. 2015, Human-level control through deep reinforcement learning, Methods, "Model architecture".
    """
    x = images.to(params[f"{name}.0.weight"].dtype) / 255  # detail 22 of PPO, after Huang et al. 2022
    for layer, (_, _, stride) in enumerate(NATURE_CNN):
        x = F.relu(F.conv2d(x, params[f"{name}.{layer}.weight"], params[f"{name}.{layer}.bias"], stride))
    return F.relu(F.linear(x.flatten(1), params[f"{name}.3.weight"], params[f"{name}.3.bias"])).float()


def pack(params: Params) -> Tensor:
    """All parameters in one vector (P,)."""
    return torch.cat([p.flatten() for p in params.values()])


def unpack(vector: Tensor, layout: dict[str, torch.Size]) -> Params:
    """The views of a packed vector (P,), by name and shape."""
    parts = vector.split([shape.numel() for shape in layout.values()])
    return {name: part.view(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}
