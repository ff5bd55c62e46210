"""Implicit Q-learning from a fixed data set, for vector observations and bounded actions.

Paper: Kostrikov, Nair and Levine 2022, Offline reinforcement learning with implicit Q-learning, arXiv:2110.06169.

    value:    L = E[|tau - 1(u < 0)| * u^2],   u = min Q_target(s, a) - V(s)                                  [Eq. 5]
    critics:  L = E[(r + gamma * V(s') - Q(s, a))^2]                                                          [Eq. 6]
    actor:    L = -E[min(exp(beta * u), 100) * log pi(a|s)],   u as above with the new V                      [Eq. 7]

Each gradient step takes the value, then the actor, then the critics, then the target critics, as the authors' code does
(github.com/ikostrikov/implicit_q_learning). The actor is a Gaussian around scale * tanh(...), not squashed, whose
deviation does not depend on the state. Rewards of HalfCheetah, Hopper and Walker2d are scaled by 1000 / (best - worst
return of an episode), as in that code, others are left (`--reward-scale`). Observations are left as they are; CORL
standardises them (`--normalize-obs`).

    python -m rl_lab.iql --dataset lab/halfcheetah/medium-replay-v0        expected results: docs/iql.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, Outputs, logprob_and_entropy, sample, scaled
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_mlp, mlp, polyak, q_values, stack
from rl_lab.offline import Dataset
from rl_lab.offline_training import OfflineArgs, OfflineRun, bounded_actions, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of every network
LOGSTD_MIN, LOGSTD_MAX = -5.0, 2.0
MOST = 100.0  # bound on the actor's weights

Agent = dict[str, Params]  # actor, critics (all with a leading axis E = 2), value


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are the authors' for locomotion."""

    learning_rate: float = 3e-4  # of every network's Adam; the actor's falls to zero as a cosine
    tau: float = 0.005  # share of the critics that the target critics take over
    expectile: float = 0.7  # tau of [Eq. 5]
    beta: float = 3.0  # inverse temperature of [Eq. 7]
    reward_scale: float | None = None  # factor of rewards; None: 1000 / range of returns in locomotion, else 1
    normalize_obs: bool = False  # standardise observations by the data's mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("expectile", 0 < self.expectile < 1, "between 0 and 1")
        self.require("beta", 0 <= self.beta < math.inf, "finite and 0 or more")
        scale = 1.0 if self.reward_scale is None else self.reward_scale
        self.require("reward_scale", 0 < scale < math.inf, "finite and above 0")

    @property
    def annealed(self) -> bool:
        return True


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Agent:
    """Orthogonal, gain sqrt(2) in every layer; standard deviation 1."""
    gain = 2**0.5
    actor = init_mlp("actor", (obs_size, *HIDDEN, actions.num_outputs), gain, generator)
    actor["logstd"] = torch.zeros(actions.num_outputs, device=generator.device)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    critics = stack([init_mlp("critic", sizes, gain, generator) for _ in range(2)])
    return {"actor": actor, "critics": critics, "value": init_mlp("value", (obs_size, *HIDDEN, 1), gain, generator)}


def gaussian(actor: Params, obs: Tensor, actions: Actions) -> Outputs:
    """Mean (B, A), within the actions' bounds, and logstd (A,)."""
    mean = mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu).tanh()
    return {"mean": scaled(mean, actions).flatten(1), "logstd": actor["logstd"].clamp(LOGSTD_MIN, LOGSTD_MAX)}


def values(value: Params, obs: Tensor) -> Tensor:
    """V(s): (B, *obs) -> (B,)."""
    return mlp(value, "value", obs.flatten(1).float(), activation=torch.relu).squeeze(1)


def value_loss(value: Params, q: Tensor, obs: Tensor, expectile: float) -> tuple[Tensor, Tensor]:
    """Expectile regression of V(s) (B,) to q = min Q_target(s, a) (B,), [Eq. 5]; also the mean of V."""
    v = values(value, obs)
    assert v.shape == q.shape
    u = q - v
    weights = torch.where(u < 0, 1 - expectile, expectile)
    return (weights * u.square()).mean(), v.mean().detach()


def actor_loss(actor: Params, advantages: Tensor, batch: Batch, actions: Actions, beta: float) -> Tensor:
    """Minus the mean log-likelihood of the data's actions, weighted by min(exp(beta * advantages), 100) [Eq. 7]."""
    logprobs, _ = logprob_and_entropy(gaussian(actor, batch["obs"], actions), batch["actions"], actions)
    assert logprobs.shape == advantages.shape
    return -((beta * advantages).exp().clamp(max=MOST).detach() * logprobs).mean()


def critic_loss(critics: Params, next_values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Squared residual of both critics against r + gamma * V(s'), next_values (B,) [Eq. 6]; also the mean of Q."""
    wanted = batch["rewards"] + batch["discounts"] * next_values
    q = q_values(critics, batch["obs"], batch["actions"])
    assert q.shape[1:] == wanted.shape
    return (q - wanted.detach()).square().mean(1).sum(), q.mean().detach()


def update(
    agent: Agent,
    target: Params,
    opts: dict[str, AdamState],
    batch: Batch,
    actor_lr: Tensor,
    actions: Actions,
    args: Args,
) -> tuple[Agent, Params, dict[str, AdamState], dict[str, Tensor]]:
    """One gradient step of everything.

    Args:
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
    """
    obs, rate, metrics = batch["obs"], args.learning_rate, dict[str, Tensor]()
    new, opts = dict(agent), dict(opts)
    q = q_values(target, obs, batch["actions"]).amin(0)
    loss = grad_and_value(value_loss, has_aux=True)
    grads, (metrics["value_loss"], metrics["v"]) = loss(agent["value"], q, obs, args.expectile)
    new["value"], opts["value"] = adam(agent["value"], grads, opts["value"], rate, eps=1e-8)
    advantages = q - values(new["value"], obs)
    grads, metrics["actor_loss"] = grad_and_value(actor_loss)(agent["actor"], advantages, batch, actions, args.beta)
    new["actor"], opts["actor"] = adam(agent["actor"], grads, opts["actor"], actor_lr, eps=1e-8)
    next_values = values(new["value"], batch["next_obs"])
    grads, (metrics["qf_loss"], metrics["q"]) = grad_and_value(critic_loss, has_aux=True)(
        agent["critics"], next_values, batch
    )
    new["critics"], opts["critics"] = adam(agent["critics"], grads, opts["critics"], rate, eps=1e-8)
    metrics["advantages"] = advantages.mean()
    return new, polyak(target, new["critics"], args.tau), opts, {name: x.detach() for name, x in metrics.items()}


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    actions, obs_size, generators = bounded_actions(args, env), flat_size(env.observation_space), args.generators(0)
    scale = authors_scale(data, args.env) if args.reward_scale is None else args.reward_scale
    print(f"Rewards are scaled by {scale:g}.")
    args = replace(args, reward_scale=scale)
    data = replace(data, columns=data.columns | {"rewards": data.columns["rewards"] * scale})
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    agents = [init_params(obs_size, actions, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent["critics"]), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    step = vmap(partial(update, actions=actions, args=args), in_dims=(0, 0, 0, 0, None))
    key = ("iql", replace(args, reward_scale=None).key, actions)  # nothing compiled scales rewards
    learner = Compiled(step, key, args.compile, donate=(0, 1, 2))

    def learned() -> dict[str, Any]:
        return {"params": agent, "target": target, "opts": opts, "normalizer": normalizer}

    run = OfflineRun(args, "iql", data, env, generators, learned)
    if run.saved:
        agent, target, opts = on_device([run.saved[name] for name in ("params", "target", "opts")], env.device)

    for gradient_steps in run.intervals():
        for i, batch in gradient_steps:
            actor_lr = torch.tensor(args.learning_rate * cosine(i / args.total_timesteps), device=env.device)
            agent, target, opts, metrics = learner(agent, target, opts, batch, actor_lr)
        run.log_losses(metrics)
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), agent, normalizer, test_env)
    run.finish(agent, normalizer)
    return run


def cosine(share: float) -> float:
    """From 1 to 0 with the share of the gradient steps that are done."""
    return 0.5 * (1 + math.cos(math.pi * share))


def authors_scale(data: Dataset, env_id: str) -> float:
    """1000 over the range of episode returns in D4RL's locomotion tasks, 1 in others."""
    if env_id.partition("-")[0] not in ("HalfCheetah", "Hopper", "Walker2d"):
        return 1.0
    returns = data.episode_returns
    spread = float(returns.max() - returns.min())
    if not spread:
        raise ValueError("all episodes have the same return, by whose range rewards are scaled; --reward-scale 1 works")
    return 1000.0 / spread


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment, the mean where `noise` is None."""
    obs = standardize(normalizer, inputs["obs"])
    return sample(gaussian(params["actor"], obs, actions), noise, actions)[1]


def defaults(env_id: str) -> Args:
    """The authors' hyper-parameters for locomotion, for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
