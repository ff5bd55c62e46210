"""Conservative Q-learning, CQL(H), from a fixed data set, for vector observations and Discrete actions.

Paper: Kumar, Zhou, Tucker and Levine 2020, Conservative Q-learning for offline reinforcement learning,
arXiv:2006.04779, on double DQN: van Hasselt et al. 2016, arXiv:1509.06461.

    L = E[huber(r + gamma * Q_target(s', a*) - Q(s, a))] + alpha * E[log sum_b exp Q(s, b) - Q(s, a)]           [Eq. 4]
    a* = argmax_b Q(s', b)                                                             [van Hasselt et al. 2016, Eq. 4]

Differs from the paper, whose discrete actions are Atari's, in: one Q where it has quantiles. As in d3rlpy's DiscreteCQL
(github.com/takuseno/d3rlpy), the error is Huber's: its slope is at most 1, so that `--cql-alpha`, which bounds that of
the second term, means the same whatever the size of rewards.

    python -m rl_lab.discrete_cql --dataset PATH        its page: docs/discrete_cql.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, sample
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, stack
from rl_lab.offline_training import OfflineArgs, OfflineRun, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of the network, d3rlpy's


@dataclass(frozen=True)
class Args(OfflineArgs):
    """The weight is d3rlpy's default, the rest ours: the paper's and d3rlpy's settings are for Atari's images."""

    total_timesteps: int = 100_000  # gradient steps
    eval_every: int = 10_000  # gradient steps between evaluations of 10 episodes; 0 for none
    learning_rate: float = 3e-4  # of Adam
    target_network_frequency: int = 100  # gradient steps between updates of the target network
    cql_alpha: float = 1.0  # weight of the conservative term
    normalize_obs: bool = False  # standardise observations by the data's mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("cql_alpha", 0 <= self.cql_alpha < math.inf, "finite and 0 or more")


def q_values(params: Params, obs: Tensor) -> Tensor:
    """Q(s, .): (B, *obs) -> (B, A)."""
    return mlp(params, "q", obs.flatten(1).float(), activation=torch.relu)


def loss(params: Params, target: Params, batch: Batch, alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean Huber loss of the TD error, and `alpha` times the gap between Q of all actions and of the data's [Eq. 4].

    Args:
        params, target: of the online and of the target network.
        batch: obs, next_obs (B, *obs), actions (B,), rewards, discounts (B,).
    Returns:
        () loss, and () tensors to log.
    """
    best = q_values(params, batch["next_obs"]).argmax(1, keepdim=True)
    next_q = q_values(target, batch["next_obs"]).gather(1, best).squeeze(1)
    wanted = batch["rewards"] + batch["discounts"] * next_q
    q = q_values(params, batch["obs"])
    taken = q.gather(1, batch["actions"].unsqueeze(1)).squeeze(1)
    assert taken.shape == wanted.shape == batch["rewards"].shape
    residual = F.huber_loss(taken, wanted.detach())
    gap = (q.logsumexp(1) - taken).mean()
    metrics = {"td_loss": residual, "gap": gap, "q": taken.mean()}
    return residual + alpha * gap, {name: x.detach() for name, x in metrics.items()}


def update(
    params: Params, target: Params, opt: AdamState, batch: Batch, args: Args
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """A step of Adam."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(params, target, batch, args.cql_alpha)
    params, opt = adam(params, grads, opt, args.learning_rate, eps=1e-8)
    return params, opt, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    args.require("env", discrete, f"one with Discrete actions, not {env.action_space}; rl_lab.cql takes a bounded Box")
    actions, obs_size, generators = Actions.of(env.action_space), flat_size(env.observation_space), args.generators(0)
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    sizes = (obs_size, *HIDDEN, actions.num_outputs)
    params = stack([init_uniform("q", sizes, g) for g in generators])
    target, opt = contiguous(params), contiguous(vmap(init_adam)(params))
    step = vmap(partial(update, args=args))
    learner = Compiled(step, ("discrete_cql", args.key, actions), args.compile, donate=(0, 2))

    def state() -> dict[str, Any]:
        return {"params": params, "target": target, "opt": opt, "normalizer": normalizer}

    run = OfflineRun(args, "discrete_cql", data, env, generators, state)
    if run.saved:
        params, target, opt = on_device([run.saved[name] for name in ("params", "target", "opt")], env.device)

    for gradient_steps in run.intervals():
        for i, batch in gradient_steps:
            params, opt, metrics = learner(params, target, opt, batch)
            if (i + 1) % args.target_network_frequency == 0:
                target = polyak(target, params, 1.0)
        # At the minimum of the loss Q is above its target by alpha at most, if that is below Huber's greatest slope, 1;
        # else maybe by more, but not above the highest of the targets: the gap's slopes over actions sum to 0.
        run.log_losses(metrics, min(args.cql_alpha, 1.0))
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), params, normalizer, test_env)
    run.finish(params, normalizer)
    return run


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` None for the best, else as likely as exp Q says."""
    return sample({"logits": q_values(params, standardize(normalizer, inputs["obs"]))}, noise, actions)[1]


def defaults(env_id: str) -> Args:
    """The same for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
