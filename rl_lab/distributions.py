"""Distributions from the numbers that a network puts out: of actions in Discrete, MultiDiscrete and Box spaces, and of
returns on fixed atoms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Actions:
    """An action space as a policy needs it: Box if `low` is set, else one categorical for each entry of `sizes`.

    The distribution over it comes from `Outputs`: for Box, `mean` (B, A) and `logstd` (A,) of a Gaussian with
    independent components; for the others `logits` (B, A) of independent categoricals, side by side.
    """

    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @classmethod
    def of(cls, space: gym.Space[Any]) -> Actions:
        """Raises ValueError for a space that is none of the three."""
        match space:
            case gym.spaces.Discrete(start=0):
                return cls((int(space.n),), ())
            case gym.spaces.MultiDiscrete() if space.nvec.ndim == 1 and not space.start.any():
                return cls(tuple(int(n) for n in space.nvec), space.shape)
            case gym.spaces.Box() if space.shape and np.issubdtype(space.dtype, np.floating):
                low, high = (tuple(float(x) for x in bound.flatten()) for bound in (space.low, space.high))
                return cls((len(low),), space.shape, low, high)
        known = "Discrete, MultiDiscrete (both starting at 0) or a Box of floating numbers with one axis or more"
        raise ValueError(f"actions are {known}, not {space}")

    @property
    def num_outputs(self) -> int:
        """A, what the network puts out."""
        return sum(self.sizes)

    @property
    def bounded(self) -> bool:
        """Whether they are in a Box that has a finite width in every component."""
        return bool(self.low) and all(0 < high - low < math.inf for low, high in zip(self.low, self.high, strict=True))


def draw_noise(actions: Actions, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(*shape, A) noise for sampling: standard normal for Box, standard exponential otherwise."""
    noise = torch.empty(*shape, actions.num_outputs, device=generator.device)
    return noise.normal_(generator=generator) if actions.low else noise.exponential_(generator=generator)


def scaled(squashed: Tensor, actions: Actions) -> Tensor:
    """(B, A), of which [-1, 1] are the bounds, to (B, *shape) in the action space, clipped to it."""
    columns = zip(squashed.unbind(1), actions.low, actions.high, strict=True)
    within = [((high + low) / 2 + (high - low) / 2 * x).clamp(low, high) for x, low, high in columns]
    return torch.stack(within, 1).reshape(-1, *actions.shape)


def unscaled(taken: Tensor, actions: Actions) -> Tensor:
    """What `scaled` takes to give these actions: (B, *shape), of bounded components, to (B, A) in [-1, 1]."""
    columns = zip(taken.flatten(1).unbind(1), actions.low, actions.high, strict=True)
    return torch.stack([(2 * x - high - low) / (high - low) for x, low, high in columns], 1)


def squashed_sample(mean: Tensor, logstd: Tensor, noise: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Actions (B, *shape) of a Gaussian squashed into the bounds of a Box, and their log-probabilities (B,).

    log pi(a|s) = log N(x; mean, std) - sum_i log(scale_i * (1 - tanh(x_i)^2)), x = mean + std * noise

    Haarnoja et al. 2018, Soft actor-critic algorithms and applications, arXiv:1812.05905, appendix C, with
    1 - tanh(x)^2 = 4 / (exp(x) + exp(-x))^2, so that its logarithm is 2 * (log 2 - x - softplus(-2x)).

    Args:
        mean, logstd: (B, A) before squashing.
        noise: (B, A) standard normal.
    """
    x = mean + logstd.exp() * noise
    normal = -0.5 * noise.square() - logstd - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - x - F.softplus(-2 * x))
    scale = sum(math.log((high - low) / 2) for low, high in zip(actions.low, actions.high, strict=True))
    return scaled(x.tanh(), actions), (normal - squash).sum(1) - scale


def sample(outputs: Outputs, noise: Tensor | None, actions: Actions) -> tuple[Tensor, Tensor]:
    """Sample actions, or take the likeliest where `noise` is None.

    Args:
        noise: (B, A) as `draw_noise` gives it.
    Returns:
        the actions to store and those for the environment, each (B, *shape). They differ for Box, where the
        environment's are clipped to its bounds.
    """
    if actions.low:
        drawn = outputs["mean"] if noise is None else outputs["mean"] + outputs["logstd"].exp() * noise
        bounds = zip(drawn.unbind(1), actions.low, actions.high, strict=True)  # a constant tensor fails inside `scan`
        clipped = torch.stack([x.clamp(low, high) for x, low, high in bounds], 1)
        return drawn.unflatten(1, actions.shape), clipped.unflatten(1, actions.shape)
    # -log of an exponential variable is a Gumbel variable: where logits + Gumbel is largest is a sample
    scores = outputs["logits"] if noise is None else outputs["logits"] - noise.log()
    choices = torch.stack([x.argmax(1) for x in scores.split(actions.sizes, 1)], 1).reshape(-1, *actions.shape)
    return choices, choices


def logprob_and_entropy(outputs: Outputs, taken: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Log-probability of the stored actions `taken` (B, *shape), and entropy, (B,) each: sums over the components."""
    if actions.low:
        mean, logstd = outputs["mean"], outputs["logstd"]
        z = (taken.flatten(1) - mean) / logstd.exp()
        logprobs = -0.5 * z.square() - logstd - 0.5 * math.log(2 * math.pi)
        return logprobs.sum(1), (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(mean))
    components = [F.log_softmax(x, 1) for x in outputs["logits"].split(actions.sizes, 1)]
    choices = taken.reshape(-1, len(components), 1).unbind(1)
    chosen = [p.gather(1, choice).squeeze(1) for p, choice in zip(components, choices, strict=True)]
    return torch.stack(chosen).sum(0), torch.stack([-(p.exp() * p).sum(1) for p in components]).sum(0)


def of_action(distributions: Tensor, actions: Tensor) -> Tensor:
    """Each row's distribution under its own action: (B, A, n_atoms) and (B,) -> (B, n_atoms)."""
    return distributions.gather(1, actions.view(-1, 1, 1).expand(-1, 1, distributions.shape[2])).squeeze(1)


def project(probabilities: Tensor, atoms: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
    """Distribution of r + discount * Z on the atoms again, the mass of each shared by its two neighbours.

    m_i = sum_j clip(1 - |clip(r + discount * z_j, z_first, z_last) - z_i| / dz, 0, 1) * p_j

    Bellemare, Dabney and Munos 2017, A distributional perspective on reinforcement learning, arXiv:1707.06887, Eq. 7.

    Args:
        probabilities: (B, n_atoms) of Z on the atoms.
        atoms: (n_atoms,) evenly spaced, ascending.
        rewards, discounts: (B,).
    Returns:
        (B, n_atoms); rows sum to 1, what falls beyond the first or the last atom counts there.
    """
    last = len(atoms) - 1
    moved = rewards.unsqueeze(1) + discounts.unsqueeze(1) * atoms
    place = ((moved - atoms[0]) / ((atoms[-1] - atoms[0]) / last)).clamp(0, last)  # in atoms from the first
    # The paper shares between floor and ceil, which loses the mass of an integral place. The next atom above gets 0.
    lower = place.floor().clamp(max=last - 1)
    upper_share, index = place - lower, lower.long()
    shared = torch.zeros_like(probabilities).scatter_add(1, index, probabilities * (1 - upper_share))
    return shared.scatter_add(1, index + 1, probabilities * upper_share)
