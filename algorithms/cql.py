"""Conservative Q-learning, CQL(H), from a fixed data set, for vector observations and bounded actions.

Paper: Kumar, Zhou, Tucker and Levine 2020, Conservative Q-learning for offline reinforcement learning,
arXiv:2006.04779. The rest is soft actor-critic: Haarnoja et al. 2018, arXiv:1812.05905.

    critics:      L = E[(Q(s, a) - r - gamma * min Q_target(s', a'))^2] + weight * gap                          [Eq. 4]
                  gap = E[log sum_b exp(Q(s, b) - log density(b)) - Q(s, a)]                                [appendix F]
    actor:        L = E[alpha * log pi(b|s) - min Q(s, b)],   b ~ pi(.|s)
    temperature:  L = E[-log(alpha) * (log pi(b|s) + target entropy)],   target entropy = -dim(A)
    weight:       L = -weight * (gap - target gap), with --lagrange; else --cql-alpha throughout            [appendix F]

The b of the gap are N uniform actions, N of pi(.|s) and N of pi(.|s'), all valued at s. Every network learns from the
others as they were before the gradient step. As in the authors' code (github.com/aviralkumar2907/CQL): no factor 1/2
before the squared error, a sum over b where the paper has a mean, no entropy in the target (`--backup-entropy` adds
it). Theirs has three hidden layers, and its actor clones behaviour in the first 40,000 gradient steps (`--bc-steps`).

    python -m rl_lab.cql --dataset lab/halfcheetah/medium-replay-v0        its page: docs/cql.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import CompiledEach, scan
from rl_lab.distributions import Actions, draw_noise, scaled, squashed_sample, unscaled
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, q_values, q_values_of_each, stack
from rl_lab.offline_training import OfflineArgs, OfflineRun, bounded_actions, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of every network
LOGSTD_MIN, LOGSTD_MAX = -5.0, 2.0
MOST = 1e6  # bound on the multiplier
INSIDE = 1 - 1e-6  # bound on the data's actions, in half the width of their bounds, where squashing is undone

Agent = dict[str, Params]  # actor, critics (leading axis E = 2), temperature (log_alpha), multiplier (log_weight)
Gaussian = tuple[Tensor, Tensor]  # mean and log of the standard deviation before squashing, (B, A) each


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are the authors' for locomotion, but for `bc_steps`."""

    policy_lr: float = 1e-4  # learning rate of the actor's and of the temperature's Adam
    q_lr: float = 3e-4  # learning rate of the critics' and of the multiplier's Adam
    tau: float = 0.005  # share of the critics that the target critics take over
    cql_alpha: float = 10.0  # weight of the gap in the critics' loss
    num_samples: int = 10  # N, actions of each of the three kinds that the gap weighs against the data's
    lagrange: bool = False  # learn a multiplier of the weight, which grows while the gap is above its target
    target_action_gap: float = 10.0  # that target, in units of Q
    bc_steps: int = 0  # gradient steps at the start in which the actor clones behaviour
    autotune: bool = True  # learn the temperature
    alpha: float = 1.0  # the temperature, at the start where it is learned
    backup_entropy: bool = False  # let the entropy of the next action count in the target
    normalize_obs: bool = False  # standardise observations by the data's mean and deviation

    may_be_zero: ClassVar[set[str]] = {*OfflineArgs.may_be_zero, "bc_steps"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("policy_lr", "q_lr", "alpha"):
            self.require(name, 0 < getattr(self, name) < math.inf, "finite and above 0")
        self.require("cql_alpha", 0 <= self.cql_alpha < math.inf, "finite and 0 or more")
        self.require("cql_alpha", self.cql_alpha > 0 or not self.lagrange, "above 0 with --lagrange")
        self.require("target_action_gap", math.isfinite(self.target_action_gap), "finite")
        used = self.lagrange or self.target_action_gap == Args.target_action_gap
        self.require("target_action_gap", used, "left out without --lagrange")


def init_params(obs_size: int, actions: Actions, alpha: float, generator: torch.Generator) -> Agent:
    """Networks of two hidden layers, torch's default initialisation; two critics side by side; multiplier 1."""
    actor = init_uniform("actor", (obs_size, *HIDDEN, 2 * actions.num_outputs), generator)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    critics = stack([init_uniform("critic", sizes, generator) for _ in range(2)])
    temperature = {"log_alpha": torch.tensor(math.log(alpha), device=generator.device)}
    multiplier = {"log_weight": torch.tensor(0.0, device=generator.device)}
    return {"actor": actor, "critics": critics, "temperature": temperature, "multiplier": multiplier}


def gaussian(actor: Params, obs: Tensor) -> Gaussian:
    """The policy before squashing: (B, *obs) to mean and logstd."""
    mean, logstd = mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu).chunk(2, 1)
    return mean, logstd.clamp(LOGSTD_MIN, LOGSTD_MAX)


def logprobs_of(taken: Tensor, policy: Gaussian, actions: Actions) -> Tensor:
    """Log-probabilities (B,) of the data's actions (B, *shape): those of the noise that would give them."""
    mean, logstd = policy
    x = unscaled(taken, actions).clamp(-INSIDE, INSIDE).atanh()
    return squashed_sample(mean, logstd, (x - mean) / logstd.exp(), actions)[1]


def proposals(here: Gaussian, there: Gaussian, noise: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Actions (3N, B, *shape) to weigh against the data's, and their log-probabilities (3N, B).

    Args:
        here, there: the policy at s and at s'.
        noise: (3N, B, A) standard normal; for the uniform actions its distribution function makes it uniform.
    """
    of_here, of_there, uniform = noise.chunk(3)
    sample = vmap(partial(squashed_sample, actions=actions), in_dims=(None, None, 0))
    (near, near_logprobs), (far, far_logprobs) = sample(*here, of_here), sample(*there, of_there)
    anywhere = vmap(partial(scaled, actions=actions))(torch.erf(uniform / 2**0.5))
    logprob = -sum(math.log(high - low) for low, high in zip(actions.low, actions.high, strict=True))
    logprobs = torch.cat([near_logprobs, far_logprobs, torch.full_like(near_logprobs, logprob)])
    return torch.cat([near, far, anywhere]).detach(), logprobs.detach()


def gap_weight(multiplier: Params, args: Args) -> Tensor:
    """() what the gap counts in the critics' loss."""
    return args.cql_alpha * multiplier["log_weight"].exp().clamp(max=MOST)


def actor_loss(
    actor: Params, agent: Agent, batch: Batch, noise: Tensor, actions: Actions, cloning: bool
) -> tuple[Tensor, tuple[Gaussian, Tensor]]:
    """() mean of alpha * log pi(b|s) - min Q(s, b) over b ~ pi; where `cloning`, with log pi(a|s) in the place of Q.

    Args:
        agent: whose critics and temperature judge.
        batch: obs (B, *obs), actions (B, *shape).
        noise: (B, A) standard normal.
    Returns:
        the loss; the policy at s, and log pi(b|s) (B,).
    """
    policy = gaussian(actor, batch["obs"])
    taken, logprobs = squashed_sample(*policy, noise, actions)
    if cloning:
        gain = logprobs_of(batch["actions"], policy, actions)
    else:
        gain = q_values(agent["critics"], batch["obs"], taken).amin(0)
    assert gain.shape == logprobs.shape
    return (agent["temperature"]["log_alpha"].exp() * logprobs - gain).mean(), (policy, logprobs)


def temperature_loss(temperature: Params, logprobs: Tensor, actions: Actions) -> Tensor:
    """() mean of -log(alpha) * (log pi(b|s) + target entropy); logprobs (B,)."""
    return -temperature["log_alpha"] * (logprobs - actions.num_outputs).mean()


def targets(
    agent: Agent, target: Params, batch: Batch, there: Gaussian, noise: Tensor, actions: Actions, args: Args
) -> Tensor:
    """(B,) what Q(s, a) is to be: r + gamma * min Q_target(s', a') where the episode goes on, a' ~ pi."""
    next_actions, next_logprobs = squashed_sample(*there, noise, actions)
    next_q = q_values(target, batch["next_obs"], next_actions).amin(0)
    if args.backup_entropy:
        next_q = next_q - agent["temperature"]["log_alpha"].exp() * next_logprobs
    return batch["rewards"] + batch["discounts"] * next_q


def critic_loss(
    critics: Params, wanted: Tensor, taken: Tensor, logprobs: Tensor, batch: Batch, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared Bellman residual of both critics, and `weight` times the gap, [Eq. 4].

    Args:
        wanted: (B,) as `targets` gives it.
        taken, logprobs: (3N, B, *shape) and (3N, B) as `proposals` gives them.
        batch: obs (B, *obs), actions (B, *shape).
    Returns:
        () loss, and () tensors to log.
    """
    q = q_values_of_each(critics, batch["obs"], torch.cat([batch["actions"].unsqueeze(0), taken]))
    data, others = q[:, 0], q[:, 1:]
    assert data.shape[1:] == wanted.shape and others.shape[1:] == logprobs.shape
    residual = (data - wanted.detach()).square().mean(1)
    gap = ((others - logprobs).logsumexp(1) - data).mean(1)
    metrics = {"qf_loss": residual.sum(), "gap": gap.mean(), "q": data.mean()}
    return (residual + weight * gap).sum(), {name: x.detach() for name, x in metrics.items()}


def critic_grads(
    critics: Params, wanted: Tensor, taken: Tensor, logprobs: Tensor, batch: Batch, weight: Tensor
) -> tuple[Params, dict[str, Tensor]]:
    """Gradients of `critic_loss`, whose arguments these are, and its () tensors to log.

    On a CPU the mean of a few states' at a time, whose 3N + 1 actions each have activations that stay in its cache.
    """
    states = len(wanted) if wanted.is_cuda else math.gcd(len(wanted), 8)
    loss = grad_and_value(partial(critic_loss, weight=weight), has_aux=True)

    def step(sums: Params, part: Any) -> tuple[Params, dict[str, Tensor]]:
        grads, (_, logged) = loss(critics, *part)
        return {name: sums[name] + g for name, g in grads.items()}, logged

    given = (wanted, taken.movedim(1, 0), logprobs.movedim(1, 0), batch["obs"], batch["actions"])
    wanted, taken, logprobs, obs, acted = (x.unflatten(0, (-1, states)) for x in given)
    parts = (wanted, taken.movedim(2, 1), logprobs.movedim(2, 1), {"obs": obs, "actions": acted})
    sums, logged = scan(step, {name: torch.zeros_like(p) for name, p in critics.items()}, parts)
    share = states / len(given[0])
    return {name: x * share for name, x in sums.items()}, {name: x.mean(0) for name, x in logged.items()}


def weight_loss(multiplier: Params, gap: Tensor, args: Args) -> Tensor:
    """() minus the weight's part of the critics' loss, () gap less its target [appendix F]."""
    return -gap_weight(multiplier, args) * (gap - args.target_action_gap)


def update(
    agent: Agent,
    target: Params,
    opts: dict[str, AdamState],
    batch: Batch,
    noise: Tensor,
    actions: Actions,
    args: Args,
    cloning: bool,
) -> tuple[Agent, Params, dict[str, AdamState], dict[str, Tensor]]:
    """One gradient step of everything, in which each network learns from the others as they were before it.

    Args:
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (2 + 3N, B, A) standard normal: of the actor's action, of the next action, of the proposals.
    """
    grads, metrics = dict[str, Params](), dict[str, Tensor]()
    loss = partial(actor_loss, agent=agent, batch=batch, noise=noise[0], actions=actions, cloning=cloning)
    grads["actor"], (metrics["actor_loss"], (here, logprobs)) = grad_and_value(loss, has_aux=True)(agent["actor"])
    there = gaussian(agent["actor"], batch["next_obs"])
    wanted = targets(agent, target, batch, there, noise[1], actions, args)
    weight = gap_weight(agent["multiplier"], args)
    given = (wanted, *proposals(here, there, noise[2:], actions), batch, weight)
    grads["critics"], logged = critic_grads(agent["critics"], *given)
    if args.autotune:
        by_entropy = partial(temperature_loss, logprobs=logprobs, actions=actions)
        grads["temperature"], metrics["alpha_loss"] = grad_and_value(by_entropy)(agent["temperature"])
    if args.lagrange:
        by_gap = partial(weight_loss, gap=logged["gap"], args=args)
        grads["multiplier"], metrics["weight_loss"] = grad_and_value(by_gap)(agent["multiplier"])
    rates = {"actor": args.policy_lr, "critics": args.q_lr, "temperature": args.policy_lr, "multiplier": args.q_lr}
    new, opts = dict(agent), dict(opts)
    for name in grads:
        new[name], opts[name] = adam(agent[name], grads[name], opts[name], rates[name], eps=1e-8)
    metrics |= {**logged, "alpha": agent["temperature"]["log_alpha"].exp(), "weight": weight}
    return new, polyak(target, new["critics"], args.tau), opts, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    actions, obs_size, generators = bounded_actions(args, env), flat_size(env.observation_space), args.generators(0)
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    agents = [init_params(obs_size, actions, args.alpha, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent["critics"]), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    learners = []
    for cloning in (False, True):
        step = partial(update, actions=actions, args=args, cloning=cloning)
        learners.append(CompiledEach(step, ("cql", cloning, args.key, actions), args.compile, donate=(0, 1, 2)))

    def state() -> dict[str, Any]:
        return {"params": agent, "target": target, "opts": opts, "normalizer": normalizer}

    run = OfflineRun(args, "cql", data, env, generators, state)
    if run.saved:
        agent, target, opts = on_device([run.saved[name] for name in ("params", "target", "opts")], env.device)

    shape = (2 + 3 * args.num_samples, args.batch_size)
    for gradient_steps in run.intervals():
        for i, batch in gradient_steps:
            noise = torch.stack([draw_noise(actions, shape, g) for g in generators])
            agent, target, opts, metrics = learners[i < args.bc_steps](agent, target, opts, batch, noise)
        # At the minimum of the critics' loss Q is above its target by half the weight at most; entropy has no bound.
        run.log_losses(metrics, math.inf if args.lagrange or args.backup_entropy else args.cql_alpha / 2)
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), agent, normalizer, test_env)
    run.finish(agent, normalizer)
    return run


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` None for the mean before squashing."""
    mean, logstd = gaussian(params["actor"], standardize(normalizer, inputs["obs"]))
    return scaled(mean.tanh(), actions) if noise is None else squashed_sample(mean, logstd, noise, actions)[0]


def defaults(env_id: str) -> Args:
    """The authors' hyper-parameters for locomotion, for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
