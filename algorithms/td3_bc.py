"""TD3 with behaviour cloning from a fixed data set, for vector observations and bounded actions.

Paper: Fujimoto and Gu 2021, A minimalist approach to offline reinforcement learning, arXiv:2106.06860. All but the
actor's loss is TD3: Fujimoto et al. 2018, arXiv:1802.09477, Algorithm 1.

    critics:  L = E[(Q(s, a) - r - gamma * min Q_target(s', a'))^2],   a' = mu_target(s') + clip(noise, -c, c)
    actor:    L = E[-lambda * Q_1(s, mu(s)) + |mu(s) - a|^2],   lambda = alpha / mean |Q_1|                 [Eqs. 3, 5]

The actor learns every second gradient step, and all target networks follow then. As in the authors' code
(github.com/sfujim/TD3_BC), lambda takes Q_1 of the policy's actions, those of the loss itself, where the paper's Eq. 5
takes the data's; the square is a mean over the components of the actions; observations are standardised
[Eq. 4] (`--no-normalize-obs` leaves them). Actions are measured in half the width of their bounds.

    python -m rl_lab.td3_bc --dataset lab/halfcheetah/medium-replay-v0        expected results: docs/td3_bc.md
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
from rl_lab.distributions import Actions, draw_noise, scaled, unscaled
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, q_values, stack
from rl_lab.offline_training import OfflineArgs, OfflineRun, bounded_actions, open_dataset, standardize, standardized
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import Inputs, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of every network

Agent = dict[str, Params]  # actor, critics (all with a leading axis E = 2)


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are the authors'."""

    learning_rate: float = 3e-4  # of Adam, actor and critics alike
    tau: float = 0.005  # share of the parameters that the target networks take over
    alpha: float = 2.5  # weight of the critic against the data's actions [Eq. 5]; 0 is behaviour cloning
    policy_frequency: int = 2  # gradient steps between updates of the actor and of all target networks
    policy_noise: float = 0.2  # standard deviation of the noise on target actions, in half the width of their bounds
    noise_clip: float = 0.5  # bound of that noise, in the same unit
    normalize_obs: bool = True  # standardise observations by the data's mean and deviation

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "policy_noise", "noise_clip"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "finite and 0 or more")


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Agent:
    """Networks of two hidden layers, torch's default initialisation; two critics side by side."""
    actor = init_uniform("actor", (obs_size, *HIDDEN, actions.num_outputs), generator)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    return {"actor": actor, "critics": stack([init_uniform("critic", sizes, generator) for _ in range(2)])}


def mu(actor: Params, obs: Tensor) -> Tensor:
    """The deterministic policy before scaling: (B, *obs) -> (B, A) in [-1, 1]."""
    return mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu).tanh()


def critic_loss(
    critics: Params, target: Agent, batch: Batch, noise: Tensor, actions: Actions, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared Bellman residual of both critics, TD3's.

    Args:
        target: of the target networks.
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (B, A) standard normal for the next action.
    Returns:
        () loss, and () tensors to log.
    """
    noise = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
    next_actions = scaled(mu(target["actor"], batch["next_obs"]) + noise, actions)
    next_q = q_values(target["critics"], batch["next_obs"], next_actions).amin(0)
    wanted = batch["rewards"] + batch["discounts"] * next_q
    q = q_values(critics, batch["obs"], batch["actions"])
    assert q.shape[1:] == wanted.shape == batch["rewards"].shape
    loss = (q - wanted.detach()).square().mean(1).sum()
    return loss, {"qf_loss": loss.detach(), "q": q.mean().detach()}


def actor_loss(actor: Params, critics: Params, batch: Batch, actions: Actions, alpha: float) -> Tensor:
    """() loss of the actor, [Eqs. 3, 5]; batch: obs (B, *obs), actions (B, *shape)."""
    chosen = mu(actor, batch["obs"])
    q = q_values({name: p[:1] for name, p in critics.items()}, batch["obs"], scaled(chosen, actions))
    weight = alpha / q.abs().mean().detach()
    return (chosen - unscaled(batch["actions"], actions)).square().mean() - weight * q.mean()


def update(
    agent: Agent,
    target: Agent,
    opts: dict[str, AdamState],
    batch: Batch,
    noise: Tensor,
    actions: Actions,
    args: Args,
    delayed: bool,
) -> tuple[Agent, Agent, dict[str, AdamState], dict[str, Tensor]]:
    """A gradient step of the critics; then, unless it is `delayed`, one of the actor, after which the targets move.

    Args:
        batch, noise: as `critic_loss` takes them.
    """
    loss = grad_and_value(critic_loss, has_aux=True)
    grads, (_, metrics) = loss(agent["critics"], target, batch, noise, actions, args)
    critics, opt = adam(agent["critics"], grads, opts["critics"], args.learning_rate, eps=1e-8)
    agent, opts = agent | {"critics": critics}, opts | {"critics": opt}
    if not delayed:
        grads, metrics["actor_loss"] = grad_and_value(actor_loss)(agent["actor"], critics, batch, actions, args.alpha)
        actor, opt = adam(agent["actor"], grads, opts["actor"], args.learning_rate, eps=1e-8)
        agent, opts = agent | {"actor": actor}, opts | {"actor": opt}
        target = {net: polyak(x, agent[net], args.tau) for net, x in target.items()}
    return agent, target, opts, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    args, data = open_dataset(args)
    env = make(args.env, args.seeds, 1, *args.make_options)
    actions, obs_size, generators = bounded_actions(args, env), flat_size(env.observation_space), args.generators(0)
    data, normalizer = standardized(data, args.num_seeds) if args.normalize_obs else (data, {})
    agents = [init_params(obs_size, actions, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    learners = []
    for delayed in (False, True):
        step = vmap(partial(update, actions=actions, args=args, delayed=delayed))
        learners.append(Compiled(step, ("td3_bc", delayed, args.key, actions), args.compile, donate=(0, 1, 2)))

    def state() -> dict[str, Any]:
        return {"params": agent, "target": target, "opts": opts, "normalizer": normalizer}

    run = OfflineRun(args, "td3_bc", data, env, generators, state)
    if run.saved:
        agent, target, opts = on_device([run.saved[name] for name in ("params", "target", "opts")], env.device)

    for gradient_steps in run.intervals():
        metrics: dict[str, Tensor] = {}
        for i, batch in gradient_steps:
            noise = torch.stack([draw_noise(actions, (args.batch_size,), g) for g in generators])
            learner = learners[(i + 1) % args.policy_frequency > 0]
            agent, target, opts, logged = learner(agent, target, opts, batch, noise)
            metrics |= logged
        run.log_losses(metrics)
        if run.episodes_due:
            test_env = make(args.env, args.evaluation_seeds, run.episodes_due, *args.make_options)
            run.judge(partial(policy, noise=None, actions=actions), agent, normalizer, test_env)
    run.finish(agent, normalizer)
    return run


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` is scaled by 0.1, as TD3 explores; None for none."""
    chosen = mu(params["actor"], standardize(normalizer, inputs["obs"]))
    return scaled(chosen if noise is None else chosen + 0.1 * noise, actions)


def defaults(env_id: str) -> Args:
    """The authors' hyper-parameters, for every environment."""
    return Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
