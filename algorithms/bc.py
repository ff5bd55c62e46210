"""Behaviour cloning from a fixed data set, or from its best episodes, for vector observations.

Pomerleau 1991, Efficient training of artificial neural networks for autonomous navigation, Neural Computation 3(1).

    bounded Box:  L = E[|mu(s) - a|^2]          the mean over the components, in half the width of their bounds
    Discrete:     L = -E[log pi(a|s)]

`--fraction 0.1` learns from the episodes of highest return that hold a tenth of all transitions, 10 %-BC [Chen et al.
2021, Decision transformer, arXiv:2106.01345, section 5.1]. As CORL's BC (github.com/tinkoff-ai/CORL), the actor is
TD3+BC's and observations are standardised; CORL takes a tenth of the episodes, ordered by discounted return.

    python -m rl_lab.bc --dataset lab/halfcheetah/medium-replay-v0        expected results: docs/bc.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, logprob_and_entropy, sample, scaled, unscaled
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, stack
from rl_lab.offline import Dataset
from rl_lab.offline_training import OfflineArgs, OfflineRun, bounded_actions, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of the network


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are CORL's, but for the share of the data."""

    learning_rate: float = 3e-4  # of Adam
    fraction: float = 1.0  # share of the transitions to learn from, those of the episodes of highest return
    normalize_obs: bool = True  # standardise observations by the data's mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("fraction", 0 < self.fraction <= 1, "above 0 and at most 1")
        self.require("gamma", self.gamma == Args.gamma, "left out: nothing is discounted")


def best_episodes(data: Dataset, fraction: float) -> Dataset:
    """The episodes of highest return that hold `fraction` of all transitions, in their order; the last one whole."""
    lengths = data.episode_lengths
    order = data.episode_returns.argsort(descending=True, stable=True)
    before = lengths[order].cumsum(0) - lengths[order]  # transitions of the better episodes
    kept = torch.zeros(len(lengths), dtype=torch.bool)
    kept[order[before < fraction * len(data)]] = True
    rows = kept.repeat_interleave(lengths)
    return replace(data, columns={name: x[rows] for name, x in data.columns.items()})


def mu(actor: Params, obs: Tensor) -> Tensor:
    """The network: (B, *obs) -> (B, A)."""
    return mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu)


def loss(actor: Params, batch: Batch, actions: Actions) -> Tensor:
    """() mean squared error for Box, else minus the mean log-likelihood; batch: obs (B, *obs), actions (B, *shape)."""
    if actions.low:
        return (mu(actor, batch["obs"]).tanh() - unscaled(batch["actions"], actions)).square().mean()
    return -logprob_and_entropy({"logits": mu(actor, batch["obs"])}, batch["actions"], actions)[0].mean()


def update(
    actor: Params, opt: AdamState, batch: Batch, actions: Actions, learning_rate: float
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """One gradient step."""
    grads, value = grad_and_value(loss)(actor, batch, actions)
    return *adam(actor, grads, opt, learning_rate, eps=1e-8), {"actor_loss": value}


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    actions, obs_size, generators = Actions.of(env.action_space), flat_size(env.observation_space), args.generators(0)
    if actions.low:
        bounded_actions(args, env)
    data = best_episodes(data, args.fraction)
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    sizes = (obs_size, *HIDDEN, actions.num_outputs)
    actor = stack([init_uniform("actor", sizes, g) for g in generators])
    opt = contiguous(vmap(init_adam)(actor))
    step = vmap(partial(update, actions=actions, learning_rate=args.learning_rate))
    learner = Compiled(step, ("bc", args.key, actions), args.compile, donate=(0, 1))

    run = OfflineRun(args, "bc", data, env, generators, lambda: {"params": actor, "opt": opt, "normalizer": normalizer})
    if run.saved:
        actor, opt = on_device([run.saved[name] for name in ("params", "opt")], env.device)

    for gradient_steps in run.intervals():
        for _, batch in gradient_steps:
            actor, opt, metrics = learner(actor, opt, batch)
        run.log_losses(metrics)
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), actor, normalizer, test_env)
    run.finish(actor, normalizer)
    return run


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; a Box's `noise` is scaled by 0.1, as TD3's; None for none."""
    outputs = mu(params, standardize(normalizer, inputs["obs"]))
    if actions.low:
        return scaled(outputs.tanh() if noise is None else outputs.tanh() + 0.1 * noise, actions)
    return sample({"logits": outputs}, noise, actions)[1]


def defaults(env_id: str) -> Args:
    """CORL's hyper-parameters, for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
