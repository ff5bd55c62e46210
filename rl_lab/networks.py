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
from torch.func import vmap

from rl_lab.compiler import scan

Params = dict[str, Tensor]


def flat_size(space: gym.Space[Any]) -> int:
    """Numbers in one observation; ValueError unless the space is a Box, and of no images."""
    if not isinstance(space, gym.spaces.Box):
        raise ValueError(f"observations must be in a Box space, not {space}; a Gymnasium wrapper can flatten them")
    if space.dtype == np.uint8 and len(space.shape) > 1 and sorted(space.shape)[-2] >= 32:  # grids of objects are less
        what = f"observations {space.shape} of bytes are images"
        raise ValueError(f"{what}: only dqn, ppo and their kin have a network, for PongNoFrameskip-v4's (C, 84, 84)")
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
        weight, bias = params[f"{name}.{layer}.weight"], params[f"{name}.{layer}.bias"]
        # Transposed beforehand, a narrow first layer has the gradient x^T g: g^T x takes BLAS several times as long.
        x = torch.addmm(bias, x, weight.mT.contiguous()) if layer == 0 else F.linear(x, weight, bias)
        if layer < num_layers - 1:
            x = activation(x)
    return x


def q_values(critics: Params, obs: Tensor, taken: Tensor, num_layers: int = 3) -> Tensor:
    """Q of each of E critics, whose parameters have a leading axis E: (B, *obs) and (B, *shape) -> (E, B)."""
    inputs = torch.cat([obs.flatten(1).float(), taken.flatten(1)], 1)
    q: Tensor = vmap(lambda critic: mlp(critic, "critic", inputs, num_layers, torch.relu))(critics)
    return q.squeeze(2)


def q_values_of_each(critics: Params, obs: Tensor, taken: Tensor) -> Tensor:
    """Q of each of E critics for K actions in each state: (B, *obs) and (K, B, *shape) -> (E, K, B).

    The first layer's product with the state serves all of its actions.
    """
    obs, shape, taken = obs.flatten(1).float(), taken.shape[:2], taken.flatten(0, 1).flatten(1)

    def q(critic: Params) -> Tensor:
        (w0, b0), (w1, b1), (w2, b2) = ((critic[f"critic.{i}.weight"], critic[f"critic.{i}.bias"]) for i in range(3))
        of_obs, of_action = (w.contiguous() for w in w0.mT.split([obs.shape[1], taken.shape[1]]))  # as in `mlp`
        hidden = (torch.addmm(b0, obs, of_obs) + (taken @ of_action).unflatten(0, shape)).relu()
        hidden = F.linear(hidden.flatten(0, 1), w1, b1).relu()
        return F.linear(hidden, w2, b2).view(shape)

    values: Tensor = vmap(q)(critics)
    return values


def is_image(space: gym.Space[Any]) -> TypeGuard[gym.spaces.Box]:
    """Whether observations are what the Nature CNN takes: uint8 images (C, 84, 84)."""
    return isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and space.shape[1:] == (84, 84)


NATURE_CNN = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # filters, kernel and stride of its convolutions
NATURE_CNN_SIZE = 32 * 20 * 20 + 64 * 9 * 9 + 64 * 7 * 7 + 512  # numbers that it computes for one image


def init_nature_cnn(
    name: str, channels: int, generator: torch.Generator, orthogonal: bool = True, linear: bool = True
) -> Params:
    """Layers 0 to 2 are convolutions, layer 3 is linear.

    Args:
        orthogonal: orthogonal weights with gain sqrt(2) and zero biases, else torch's default as in `init_uniform`.
        linear: False leaves layer 3 out, for `convolutions` alone.
    """
    shapes, inputs = [], channels
    for filters, kernel, _ in NATURE_CNN:
        shapes.append((filters, inputs, kernel, kernel))
        inputs = filters
    params: Params = {}
    for layer, shape in enumerate([*shapes, (512, inputs * 7 * 7)] if linear else shapes):
        weight, bias = torch.empty(shape, device=generator.device), torch.zeros(shape[0], device=generator.device)
        if orthogonal:
            torch.nn.init.orthogonal_(weight, 2**0.5, generator=generator)
        else:
            bound = weight[0].numel() ** -0.5
            weight.uniform_(-bound, bound, generator=generator)
            bias.uniform_(-bound, bound, generator=generator)
        params |= {f"{name}.{layer}.weight": weight, f"{name}.{layer}.bias": bias}
    return params


def nature_cnn(params: Params, name: str, images: Tensor) -> Tensor:
    """(B, C, 84, 84) uint8 -> (B, 512) float32, computed in the parameters' dtype.

    Mnih et al. 2015, Human-level control through deep reinforcement learning, Methods, "Model architecture".
    """
    x = convolutions(params, name, images)
    return F.relu(F.linear(x, params[f"{name}.3.weight"], params[f"{name}.3.bias"])).float()


def convolutions(params: Params, name: str, images: Tensor) -> Tensor:
    """The Nature CNN without its linear layer: (B, C, 84, 84) uint8 -> (B, 3136) in the parameters' dtype."""
    # Channels last in memory, as those of the other layers then are: it takes a third off a gradient step.
    x = images.permute(0, 2, 3, 1).contiguous().to(params[f"{name}.0.weight"].dtype)
    x = (x / 255).permute(0, 3, 1, 2)  # detail 22 of PPO, after Huang et al. 2022
    for layer, (_, _, stride) in enumerate(NATURE_CNN):
        x = F.relu(F.conv2d(x, params[f"{name}.{layer}.weight"], params[f"{name}.{layer}.bias"], stride))
    return x.flatten(1)


def polyak(target: Params, params: Params, tau: Tensor | float) -> Params:
    """`target` moved by the share `tau` towards `params`, which it then equals where tau is 1."""
    return {name: torch.lerp(p, params[name], tau) for name, p in target.items()}


def pack(params: Params) -> Tensor:
    """All parameters in one vector (P,)."""
    return torch.cat([p.flatten() for p in params.values()])


def unpack(vector: Tensor, layout: dict[str, torch.Size]) -> Params:
    """The views of a packed vector (P,), by name and shape."""
    parts = vector.split([shape.numel() for shape in layout.values()])
    return {name: part.view(shape) for (name, shape), part in zip(layout.items(), parts, strict=True)}


LSTMState = tuple[Tensor, Tensor]  # hidden and cell, (B, H) each


def init_lstm(name: str, inputs: int, size: int, generator: torch.Generator) -> Params:
    """One layer of `size` cells: orthogonal weights with gain 1 for the gates together, and zero biases.

    Detail 32 of PPO, after Huang et al. 2022. Names, shapes and order of the gates are torch.nn.LSTM's.
    """
    params = {}
    for part, width in (("ih", inputs), ("hh", size)):
        weight = torch.empty(4 * size, width, device=generator.device)
        params[f"{name}.weight_{part}"] = torch.nn.init.orthogonal_(weight, generator=generator)
        params[f"{name}.bias_{part}"] = torch.zeros(4 * size, device=generator.device)
    return params


def lstm(params: Params, name: str, x: Tensor, state: LSTMState, keep: Tensor) -> LSTMState:
    """Long short-term memory over sequences (Hochreiter and Schmidhuber 1997, with forget gates: Gers et al. 2000).

    Gradients flow to the parameters and to `x` through the hidden states, not through cells nor to `state`.

    Args:
        x: (T, B, in)
        state: before the first step.
        keep: (T, B) 1.0, or 0.0 where the state is set to zero before the step (detail 34).
    Returns:
        hidden and cell states after each step, (T, B, H) each.
    """
    inputs = F.linear(x, params[f"{name}.weight_ih"], params[f"{name}.bias_ih"] + params[f"{name}.bias_hh"])
    weight = params[f"{name}.weight_hh"]
    hidden, cell, *_ = _Recurrence.apply(inputs, weight, keep.unsqueeze(-1), *state)  # type: ignore[no-untyped-call]
    return hidden, cell


def lstm_step(params: Params, name: str, x: Tensor, state: LSTMState) -> LSTMState:
    """One step of `lstm`: (B, in), and hidden and cell (B, H), to the new ones."""
    z = F.linear(x, params[f"{name}.weight_ih"], params[f"{name}.bias_ih"] + params[f"{name}.bias_hh"])
    return _gates(z + state[0] @ params[f"{name}.weight_hh"].mT, state[1])


def _gates(z: Tensor, cell: Tensor) -> LSTMState:
    """(..., 4 H) sums at the gates and (..., H) cells to new hidden and cell states."""
    i, f, g, o = z.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


class _Recurrence(torch.autograd.Function):
    """The loop over time, and in `_Reverse` its backward pass: torch differentiates no loop that it has traced.

    Both take any axes between time and batch, which is how `vmap` adds one.
    """

    @staticmethod
    def forward(inputs: Tensor, weight: Tensor, keep: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        def step(carry: LSTMState, x: tuple[Tensor, Tensor], weight: Tensor) -> tuple[LSTMState, tuple[Tensor, ...]]:
            hidden, cell = carry[0] * x[1], carry[1] * x[1]
            new = _gates(x[0] + hidden @ weight.mT, cell)
            return new, (*new, hidden, cell)

        return scan(step, (hidden, cell), (inputs, keep), (weight,))[1]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:3], *output[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        z_grads, weight_grads = _Reverse.apply(grads[0], *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return z_grads, weight_grads, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> Any:
        args = _batched(info, in_dims, args, (1, 0, 1, 0, 0))
        return _Recurrence.apply(*args), (1, 1, 1, 1)  # type: ignore[no-untyped-call]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(grads: Tensor, inputs: Tensor, weight: Tensor, keep: Tensor, hidden: Tensor, cell: Tensor) -> Any:
        def step(carry: LSTMState, x: tuple[Tensor, ...], weight: Tensor) -> tuple[LSTMState, Tensor]:
            grad, z, cell, keep = x
            vjp = torch.func.vjp(_gates, z, cell)[1]
            z_grad, cell_grad = vjp((carry[0] + grad, carry[1]))
            return (keep * (z_grad @ weight), keep * cell_grad), z_grad

        xs = tuple(x.flip(0) for x in (grads, inputs + hidden @ weight.mT, cell, keep))
        zeros = torch.zeros_like(cell[0])
        _, z_grads = scan(step, (zeros, zeros.clone()), xs, (weight,))
        z_grads = z_grads.flip(0)
        return z_grads, torch.einsum("t...bg,t...bh->...gh", z_grads, hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Tensor) -> Any:
        args = _batched(info, in_dims, args, (1, 1, 0, 1, 1, 1))
        return _Reverse.apply(*args), (1, 0)  # type: ignore[no-untyped-call]


def _batched(info: Any, in_dims: Any, args: tuple[Tensor, ...], out_dims: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Every argument of a `vmap` rule with its new axis at `out_dims`."""
    expanded = (
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims, strict=True)
    )
    return tuple(x.movedim(0, out).contiguous() for x, out in zip(expanded, out_dims, strict=True))
