"""Twin delayed deep deterministic policy gradient, for vector observations and bounded actions.

Paper: Fujimoto et al. 2018, Addressing function approximation error in actor-critic methods, arXiv:1802.09477,
Algorithm 1; its actor-critic is that of Lillicrap et al. 2016, Continuous control with deep reinforcement learning,
arXiv:1509.02971.

    critics:  L = E[(Q(s, a) - r - gamma * min Q_target(s', a'))^2],   a' = mu_target(s') + clip(noise, -c, c)
    actor:    L = E[-Q_1(s, mu(s))], every second gradient step, and all target networks follow then

Differs from the paper in the sizes and the rate of its networks, as CleanRL does: 256 units, 3e-4, batches of 256.
Differs from CleanRL's td3_continuous_action.py in:
  - the next action is clipped to the bounds of each of its components; theirs uses the first one's for all;
  - gradient steps begin one env step earlier, after env step `--learning-starts` + 1;
  - with several environments there is a gradient step for every `--train-frequency` env steps over all of them; theirs
    takes one for each step of all environments together.

    python -m rl_lab.td3 --env HalfCheetah-v4        its page: docs/td3.md
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
from rl_lab.distributions import Actions, draw_noise, scaled
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, q_values, stack
from rl_lab.offpolicy import OffPolicyArgs
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch, draw_uniform
from rl_lab.rollout import Collector, Inputs, concatenate, contiguous, on_device
from rl_lab.run import Run

HIDDEN = (256, 256)  # widths of every network

Agent = dict[str, Params]  # actor, critics (all with a leading axis E = 2)


@dataclass(frozen=True)
class Args(OffPolicyArgs):
    """Defaults are CleanRL's td3_continuous_action.py's."""

    env: str = "HalfCheetah-v4"  # environment id of Gymnasium
    total_timesteps: int = 1_000_000  # env steps of one seed, over all its environments
    buffer_size: int = 1_000_000  # transitions of one seed that the replay holds
    batch_size: int = 256  # transitions of a gradient step
    learning_starts: int = 25_000  # env steps of uniformly random actions before the first gradient step
    train_frequency: int = 1  # env steps for each gradient step
    learning_rate: float = 3e-4  # of Adam, actor and critics alike
    tau: float = 0.005  # share of the parameters that the target networks take over
    policy_frequency: int = 2  # gradient steps between updates of the actor and of all target networks
    exploration_noise: float = 0.1  # standard deviation of the noise on actions, in half the width of their bounds
    policy_noise: float = 0.2  # the same of the noise on target actions
    noise_clip: float = 0.5  # bound of the noise on target actions, in the same unit

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("exploration_noise", "policy_noise", "noise_clip"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "finite and 0 or more")

    @property
    def annealed(self) -> bool:
        return False


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Agent:
    """Networks of two hidden layers, torch's default initialisation; two critics side by side."""
    actor = init_uniform("actor", (obs_size, *HIDDEN, actions.num_outputs), generator)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    return {"actor": actor, "critics": stack([init_uniform("critic", sizes, generator) for _ in range(2)])}


def mu(actor: Params, obs: Tensor) -> Tensor:
    """The deterministic policy before scaling: (B, *obs) -> (B, A) in [-1, 1]."""
    return mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu).tanh()


def act(explorer: dict[str, Any], inputs: Inputs, noise: Tensor, actions: Actions, std: float) -> tuple[Tensor, Tensor]:
    """Actions to store and for the environment, which are the same.

    Args:
        explorer: the actor's parameters, and `random`, () bool: act uniformly at random instead.
        noise: (B, A) standard normal; its distribution function makes it uniform.
        std: exploration noise.
    """
    chosen = mu(explorer["actor"], inputs["obs"]) + std * noise
    taken = scaled(torch.where(explorer["random"], torch.erf(noise / 2**0.5), chosen), actions)
    return taken, taken


def critic_loss(
    critics: Params, target: Agent, batch: Batch, noise: Tensor, actions: Actions, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared Bellman residual of both critics, [Algorithm 1].

    Args:
        target: of the target networks.
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (B, A) standard normal for the next action.
    Returns:
        () loss, and () tensors to log under CleanRL's names.
    """
    noise = (args.policy_noise * noise).clamp(-args.noise_clip, args.noise_clip)
    next_actions = scaled(mu(target["actor"], batch["next_obs"]) + noise, actions)
    next_q, _ = q_values(target["critics"], batch["next_obs"], next_actions).min(0)
    wanted = batch["rewards"] + batch["discounts"] * next_q
    q = q_values(critics, batch["obs"], batch["actions"])
    assert q.shape[1:] == wanted.shape == batch["rewards"].shape
    losses = (q - wanted.detach()).square().mean(1)
    metrics = {"qf1_values": q[0].mean(), "qf2_values": q[1].mean(), "qf1_loss": losses[0], "qf2_loss": losses[1]}
    metrics["qf_loss"] = losses.mean()
    return losses.sum(), {name: x.detach() for name, x in metrics.items()}


def actor_loss(actor: Params, critics: Params, obs: Tensor, actions: Actions) -> Tensor:
    """() mean of -Q_1(s, mu(s)); obs (B, *obs)."""
    first = {name: p[:1] for name, p in critics.items()}
    return -q_values(first, obs, scaled(mu(actor, obs), actions)).mean()


def update_critics(
    agent: Agent,
    target: Agent,
    opt: AdamState,
    batch: Batch,
    noise: Tensor,
    learning_rate: Tensor | float,
    actions: Actions,
    args: Args,
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """A step of Adam on both critics."""
    loss = grad_and_value(critic_loss, has_aux=True)
    grads, (_, metrics) = loss(agent["critics"], target, batch, noise, actions, args)
    return *adam(agent["critics"], grads, opt, learning_rate, eps=1e-8), metrics


def update_policy(
    agent: Agent,
    target: Agent,
    opt: AdamState,
    obs: Tensor,
    learning_rate: Tensor | float,
    actions: Actions,
    tau: float,
) -> tuple[Params, Agent, AdamState, dict[str, Tensor]]:
    """A step of Adam on the actor; then all target networks move by `tau` towards the new ones."""
    grads, loss = grad_and_value(actor_loss)(agent["actor"], agent["critics"], obs, actions)
    actor, opt = adam(agent["actor"], grads, opt, learning_rate, eps=1e-8)
    agent = {**agent, "actor": actor}
    target = {net: polyak(x, agent[net], tau) for net, x in target.items()}
    return actor, target, opt, {"actor_loss": loss}


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
    """A gradient step of the critics; then, unless it is `delayed`, one of the actor, after which the targets move."""
    lr = args.learning_rate
    critics, opt, metrics = update_critics(agent, target, opts["critics"], batch, noise, lr, actions, args)
    agent, opts = agent | {"critics": critics}, opts | {"critics": opt}
    if not delayed:
        actor, target, opt, logged = update_policy(agent, target, opts["actor"], batch["obs"], lr, actions, args.tau)
        agent, opts, metrics = agent | {"actor": actor}, opts | {"actor": opt}, metrics | logged
    return agent, target, opts, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    where = args.make_options
    env = make(args.env, args.seeds, args.num_envs, *where)
    actions, obs_size, generators = Actions.of(env.action_space), flat_size(env.observation_space), args.generators(0)
    if not actions.bounded:
        space = f"--env {args.env}: TD3 needs actions in a bounded Box, not {env.action_space}"
        raise ValueError(f"{space}; rl_lab.dqn takes Discrete ones, and a wrapper can bound a Box")
    agents = [init_params(obs_size, actions, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    key = ("td3", args.key, actions)
    choose = partial(act, actions=actions, std=args.exploration_noise)
    collector = Collector(env, choose, None, generators, key, args.compile)
    replay = args.replay(env)
    learners = []
    for delayed in (False, True):
        step = vmap(partial(update, actions=actions, args=args, delayed=delayed))
        learners.append(Compiled(step, ("learn", delayed, *key), args.compile, donate=(0, 1, 2)))

    def state() -> dict[str, Any]:
        learned = {"params": agent, "target": target, "opts": opts}
        return {**learned, "collector": collector.state_dict(), "replay": replay.state_dict()}

    run = Run(args, "td3", env, state)
    if run.saved:
        agent, target, opts = on_device([run.saved[name] for name in ("params", "target", "opts")], env.device)
        collector.load_state_dict(run.saved["collector"])
        replay.load_state_dict(run.saved["replay"], collector.cut)

    def draw(*shape: int) -> Tensor:  # (S, *shape, A)
        return torch.stack([draw_noise(actions, shape, g) for g in generators])

    for iteration in run.iterations(args.num_iterations, args.log_every):
        env_step, rollouts, metrics = iteration * args.log_every, [], dict[str, Tensor]()
        exploration = draw(args.log_every // args.num_envs, args.num_envs).transpose(0, 1).flatten(1, 2).contiguous()
        points = iter(draw_uniform((args.log_every // args.train_frequency, args.batch_size), generators))
        for noise in exploration.split(args.rows_per_cycle):
            random = torch.full((args.num_seeds,), env_step < args.learning_starts, device=env.device)
            rollouts.append(collector.collect({"actor": agent["actor"], "random": random}, noise))
            replay.add(rollouts[-1])
            env_step += args.steps_per_cycle
            if env_step <= args.learning_starts:
                continue
            first = env_step // args.train_frequency - args.updates_per_cycle
            for gradient_step in range(first, first + args.updates_per_cycle):
                batch, normal = replay.sample(next(points)), draw(args.batch_size)
                learner = learners[gradient_step % args.policy_frequency > 0]
                agent, target, opts, logged = learner(agent, target, opts, batch, normal)
                metrics |= logged
        run.log(concatenate(rollouts), {f"losses/{name}": x for name, x in metrics.items()})
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *where)
            run.evaluate(partial(policy, noise=None, actions=actions), agent, {}, test_env)
    run.finish(agent, {})
    return run


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` is scaled by 0.1, as CleanRL evaluates; None for none."""
    chosen = mu(params["actor"], inputs["obs"])
    return scaled(chosen if noise is None else chosen + 0.1 * noise, actions)


def defaults(env_id: str) -> Args:
    """CleanRL's hyper-parameters for `env_id`."""
    return replace(Args(), env=env_id)


def main() -> None:
    run(train, Args, defaults)
