"""Advantage-weighted actor-critic from a fixed data set, for vector observations and bounded actions.

Paper: Nair, Gupta, Dalal and Levine 2020, AWAC: Accelerating online reinforcement learning with offline datasets,
arXiv:2006.09359, Algorithm 1 without what follows once the agent acts.

    critics:  L = E[(r + gamma * min Q_target(s', a') - Q(s, a))^2],   a' ~ pi(.|s')
    actor:    L = -E[min(exp(A / lambda), 100) * log pi(a|s)],   A = min Q(s, a) - min Q(s, b),   b ~ pi(.|s)

Each gradient step takes the critics, then the actor, which sees the new ones, then the target critics. The actor is a
Gaussian, not squashed, whose deviation does not depend on the state; a' and b are clipped to the bounds. Observations
are standardised (`--no-normalize-obs` leaves them). So does CORL's awac.py (github.com/tinkoff-ai/CORL).
Differs from the paper, as CORL does, in: A takes one action b for the expectation over them; weights are bounded.
Differs from CORL in: bounds are the environment's, theirs -1 and 1; the mean is clipped to them in evaluation too.

    python -m rl_lab.awac --dataset lab/halfcheetah/medium-replay-v0        its page: docs/awac.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, Outputs, draw_noise, logprob_and_entropy, sample
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, q_values, stack
from rl_lab.offline_training import OfflineArgs, OfflineRun, bounded_actions, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256, 256)  # widths of every network
LOGSTD_MIN, LOGSTD_MAX = -20.0, 2.0
MOST = 100.0  # bound on the actor's weights

Agent = dict[str, Params]  # actor, critics (all with a leading axis E = 2)


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are CORL's for locomotion."""

    learning_rate: float = 3e-4  # of Adam, actor and critics alike
    tau: float = 0.005  # share of the critics that the target critics take over
    awac_lambda: float = 0.3333  # lambda, in units of Q: the larger, the closer to behaviour cloning
    normalize_obs: bool = True  # standardise observations by the data's mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("awac_lambda", 0 < self.awac_lambda < math.inf, "finite and above 0")


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Agent:
    """Networks of three hidden layers, torch's default initialisation; standard deviation 1; two critics."""
    actor = init_uniform("actor", (obs_size, *HIDDEN, actions.num_outputs), generator)
    actor["logstd"] = torch.zeros(actions.num_outputs, device=generator.device)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    return {"actor": actor, "critics": stack([init_uniform("critic", sizes, generator) for _ in range(2)])}


def gaussian(actor: Params, obs: Tensor) -> Outputs:
    """Mean (B, A) and logstd (A,), in the units of the actions."""
    mean = mlp(actor, "actor", obs.flatten(1).float(), len(HIDDEN) + 1, torch.relu)
    return {"mean": mean, "logstd": actor["logstd"].clamp(LOGSTD_MIN, LOGSTD_MAX)}


def of_policy(critics: Params, actor: Params, obs: Tensor, noise: Tensor, actions: Actions) -> Tensor:
    """(B,) lesser Q of an action that the policy takes; noise (B, A) standard normal."""
    taken = sample(gaussian(actor, obs), noise, actions)[1]
    return q_values(critics, obs, taken, len(HIDDEN) + 1).amin(0)


def critic_loss(
    critics: Params, target: Params, actor: Params, batch: Batch, noise: Tensor, actions: Actions
) -> tuple[Tensor, Tensor]:
    """Squared residual of both critics against r + gamma * min Q_target(s', a'); also the mean of Q.

    Args:
        target: of the target critics.
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (B, A) standard normal for the next action.
    """
    next_q = of_policy(target, actor, batch["next_obs"], noise, actions)
    wanted = batch["rewards"] + batch["discounts"] * next_q
    q = q_values(critics, batch["obs"], batch["actions"], len(HIDDEN) + 1)
    assert q.shape[1:] == wanted.shape == batch["rewards"].shape
    return (q - wanted.detach()).square().mean(1).sum(), q.mean().detach()


def actor_loss(
    actor: Params, critics: Params, batch: Batch, noise: Tensor, actions: Actions, awac_lambda: float
) -> tuple[Tensor, Tensor]:
    """Minus the mean log-likelihood of the data's actions, weighted by min(exp(A / lambda), 100); also the mean of A.

    Args:
        batch: obs (B, *obs), actions (B, *shape).
        noise: (B, A) standard normal for the action that A compares with.
    """
    q = q_values(critics, batch["obs"], batch["actions"], len(HIDDEN) + 1).amin(0)
    advantages = (q - of_policy(critics, actor, batch["obs"], noise, actions)).detach()
    logprobs, _ = logprob_and_entropy(gaussian(actor, batch["obs"]), batch["actions"], actions)
    assert logprobs.shape == advantages.shape
    return -((advantages / awac_lambda).exp().clamp(max=MOST) * logprobs).mean(), advantages.mean()


def update(
    agent: Agent,
    target: Params,
    opts: dict[str, AdamState],
    batch: Batch,
    noise: Tensor,
    actions: Actions,
    args: Args,
) -> tuple[Agent, Params, dict[str, AdamState], dict[str, Tensor]]:
    """One gradient step of everything.

    Args:
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (2, B, A) standard normal: of the next action, of the action that advantages compare with.
    """
    rate, metrics = args.learning_rate, dict[str, Tensor]()
    grads, (metrics["qf_loss"], metrics["q"]) = grad_and_value(critic_loss, has_aux=True)(
        agent["critics"], target, agent["actor"], batch, noise[0], actions
    )
    critics, critic_opt = adam(agent["critics"], grads, opts["critics"], rate, eps=1e-8)
    grads, (metrics["actor_loss"], metrics["advantages"]) = grad_and_value(actor_loss, has_aux=True)(
        agent["actor"], critics, batch, noise[1], actions, args.awac_lambda
    )
    actor, actor_opt = adam(agent["actor"], grads, opts["actor"], rate, eps=1e-8)
    opts = {"actor": actor_opt, "critics": critic_opt}
    return {"actor": actor, "critics": critics}, polyak(target, critics, args.tau), opts, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    actions, obs_size, generators = bounded_actions(args, env), flat_size(env.observation_space), args.generators(0)
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    agents = [init_params(obs_size, actions, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent["critics"]), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    step = vmap(partial(update, actions=actions, args=args))
    learner = Compiled(step, ("awac", args.key, actions), args.compile, donate=(0, 1, 2))

    def state() -> dict[str, Any]:
        return {"params": agent, "target": target, "opts": opts, "normalizer": normalizer}

    run = OfflineRun(args, "awac", data, env, generators, state)
    if run.saved:
        agent, target, opts = on_device([run.saved[name] for name in ("params", "target", "opts")], env.device)

    for gradient_steps in run.intervals():
        for _, batch in gradient_steps:
            noise = torch.stack([draw_noise(actions, (2, args.batch_size), g) for g in generators])
            agent, target, opts, metrics = learner(agent, target, opts, batch, noise)
        run.log_losses(metrics)
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), agent, normalizer, test_env)
    run.finish(agent, normalizer)
    return run


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment, the mean where `noise` is None."""
    return sample(gaussian(params["actor"], standardize(normalizer, inputs["obs"])), noise, actions)[1]


def defaults(env_id: str) -> Args:
    """CORL's hyper-parameters for locomotion, for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
