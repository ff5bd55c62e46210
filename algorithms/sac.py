"""Soft actor-critic with twin critics and automatic temperature, for vector observations and bounded actions.

Paper: Haarnoja et al. 2018, Soft actor-critic algorithms and applications, arXiv:1812.05905.

    critics:      L = E[(Q(s, a) - r - gamma * (min Q_target(s', a') - alpha * log pi(a'|s')))^2]            [Eq. 5]
    actor:        L = E[alpha * log pi(a|s) - min Q(s, a)],   a = tanh(mean + std * noise), scaled          [Eq. 9]
    temperature:  L = E[-alpha * (log pi(a|s) + target entropy)],   target entropy = -dim(A)                [Eq. 18]

Differs from the paper, as CleanRL does, in: the actor learns every second gradient step, two steps of Adam at a time on
the same batch; the critics learn faster than the actor.
Differs from CleanRL's sac_continuous_action.py in:
  - log(1 - tanh(x)^2) is computed from x in a stable form; theirs adds 1e-6 inside the logarithm;
  - gradient steps begin one env step earlier, after env step `--learning-starts` + 1;
  - with several environments there is a gradient step for every `--train-frequency` env steps over all of them; theirs
    takes one for each step of all environments together.

    python -m rl_lab.sac --env HalfCheetah-v4        expected results: docs/sac.md
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
from rl_lab.distributions import Actions, draw_noise, scaled, squashed_sample
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, polyak, q_values, stack
from rl_lab.offpolicy import OffPolicyArgs
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch, draw_uniform
from rl_lab.rollout import Collector, Inputs, concatenate, contiguous, on_device
from rl_lab.run import Run

LOGSTD_MIN, LOGSTD_MAX = -5.0, 2.0  # CleanRL's; the authors' code clips to [-20, 2]
HIDDEN = (256, 256)  # widths of every network [Table 1]

Agent = dict[str, Params]  # actor, critics (all with a leading axis E = 2), temperature (log_alpha)


@dataclass(frozen=True)
class Args(OffPolicyArgs):
    """Defaults are CleanRL's sac_continuous_action.py's."""

    env: str = "HalfCheetah-v4"  # environment id of Gymnasium
    total_timesteps: int = 1_000_000  # env steps of one seed, over all its environments
    buffer_size: int = 1_000_000  # transitions of one seed that the replay holds
    batch_size: int = 256  # transitions of a gradient step
    learning_starts: int = 5_000  # env steps of uniformly random actions before the first gradient step
    train_frequency: int = 1  # env steps for each gradient step
    tau: float = 0.005  # share of the critics that the target critics take over
    policy_lr: float = 3e-4  # learning rate of the actor's Adam
    q_lr: float = 1e-3  # learning rate of the critics' and of the temperature's Adam
    policy_frequency: int = 2  # gradient steps between updates of the actor, which makes up for them by as many steps
    target_network_frequency: int = 1  # gradient steps between updates of the target critics
    autotune: bool = True  # learn the temperature
    alpha: float = 0.2  # the temperature where it is not learned

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("policy_lr", "q_lr", "alpha"):
            self.require(name, 0 < getattr(self, name) < math.inf, "finite and above 0")
        used = not self.autotune or self.alpha == Args.alpha
        self.require("alpha", used, "left out, or with --no-autotune")

    @property
    def annealed(self) -> bool:
        return False


def init_params(obs_size: int, actions: Actions, alpha: float, generator: torch.Generator) -> Agent:
    """Networks of two hidden layers, torch's default initialisation; two critics side by side."""
    actor = init_uniform("actor", (obs_size, *HIDDEN, 2 * actions.num_outputs), generator)
    sizes = (obs_size + actions.num_outputs, *HIDDEN, 1)
    critics = stack([init_uniform("critic", sizes, generator) for _ in range(2)])
    temperature = {"log_alpha": torch.tensor(math.log(alpha), device=generator.device)}
    return {"actor": actor, "critics": critics, "temperature": temperature}


def gaussian(actor: Params, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log of the standard deviation before squashing: (B, *obs) -> (B, A) each."""
    mean, logstd = mlp(actor, "actor", obs.flatten(1).float(), activation=torch.relu).chunk(2, 1)
    return mean, LOGSTD_MIN + 0.5 * (LOGSTD_MAX - LOGSTD_MIN) * (logstd.tanh() + 1)


def sample(actor: Params, obs: Tensor, noise: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Actions (B, *shape) by the policy and their log-probabilities (B,) [appendix C]; noise (B, A) standard normal."""
    return squashed_sample(*gaussian(actor, obs), noise, actions)


def act(explorer: dict[str, Any], inputs: Inputs, noise: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Actions to store and for the environment, which are the same.

    Args:
        explorer: the actor's parameters, and `random`, () bool: act uniformly at random instead.
        noise: (B, A) standard normal; its distribution function makes it uniform.
    """
    chosen, _ = sample(explorer["actor"], inputs["obs"], noise, actions)
    taken = torch.where(explorer["random"], scaled(torch.erf(noise / 2**0.5), actions), chosen)
    return taken, taken


def critic_loss(
    critics: Params, target: Params, agent: Agent, batch: Batch, noise: Tensor, actions: Actions
) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared soft Bellman residual of both critics, [Eq. 5].

    Args:
        target: of the target critics.
        agent: whose actor and temperature value the next state.
        batch: obs, next_obs (B, *obs), actions (B, *shape), rewards, discounts (B,).
        noise: (B, A) standard normal for the next action.
    Returns:
        () loss, and () tensors to log under CleanRL's names.
    """
    next_actions, next_logprobs = sample(agent["actor"], batch["next_obs"], noise, actions)
    next_q, _ = q_values(target, batch["next_obs"], next_actions).min(0)
    wanted = batch["rewards"] + batch["discounts"] * (next_q - agent["temperature"]["log_alpha"].exp() * next_logprobs)
    q = q_values(critics, batch["obs"], batch["actions"])
    assert q.shape[1:] == wanted.shape == batch["rewards"].shape
    losses = (q - wanted.detach()).square().mean(1)
    metrics = {"qf1_values": q[0].mean(), "qf2_values": q[1].mean(), "qf1_loss": losses[0], "qf2_loss": losses[1]}
    metrics["qf_loss"] = losses.mean()
    return losses.sum(), {name: x.detach() for name, x in metrics.items()}


def actor_loss(actor: Params, agent: Agent, obs: Tensor, noise: Tensor, actions: Actions) -> Tensor:
    """() mean of alpha * log pi(a|s) - min Q(s, a) over a ~ pi, [Eq. 9]; obs (B, *obs), noise (B, A)."""
    taken, logprobs = sample(actor, obs, noise, actions)
    q, _ = q_values(agent["critics"], obs, taken).min(0)
    return (agent["temperature"]["log_alpha"].exp() * logprobs - q).mean()


def temperature_loss(temperature: Params, logprobs: Tensor, actions: Actions) -> Tensor:
    """() mean of -alpha * (log pi(a|s) + target entropy), [Eq. 18]; logprobs (B,)."""
    return (-temperature["log_alpha"].exp() * (logprobs - actions.num_outputs)).mean()


def update_critics(
    agent: Agent,
    target: Params,
    opt: AdamState,
    batch: Batch,
    noise: Tensor,
    learning_rate: Tensor | float,
    share: Tensor,
    actions: Actions,
) -> tuple[Params, Params, AdamState, dict[str, Tensor]]:
    """A step of Adam on both critics; the target critics move by `share` towards them: 0, or tau when it is due."""
    loss = grad_and_value(critic_loss, has_aux=True)
    grads, (_, metrics) = loss(agent["critics"], target, agent, batch, noise, actions)
    critics, opt = adam(agent["critics"], grads, opt, learning_rate, eps=1e-8)
    return critics, polyak(target, critics, share), opt, metrics


def update_policy(
    agent: Agent,
    opts: dict[str, AdamState],
    obs: Tensor,
    noise: Tensor,
    policy_lr: Tensor | float,
    q_lr: Tensor | float,
    actions: Actions,
    autotune: bool,
) -> tuple[Agent, dict[str, AdamState], dict[str, Tensor]]:
    """A step of Adam on the actor, then one on the temperature by the new actor's entropy.

    Args:
        opts: of the actor and of the temperature, as what is returned.
        obs: (B, *obs)
        noise: (2, B, A) standard normal, for either step.
        policy_lr, q_lr: learning rates, of the actor and of the temperature.
    """
    metrics, temperature, temperature_opt = {}, agent["temperature"], opts["temperature"]
    grads, metrics["actor_loss"] = grad_and_value(actor_loss)(agent["actor"], agent, obs, noise[0], actions)
    actor, actor_opt = adam(agent["actor"], grads, opts["actor"], policy_lr, eps=1e-8)
    if autotune:
        _, logprobs = sample(actor, obs, noise[1], actions)
        grads, metrics["alpha_loss"] = grad_and_value(temperature_loss)(temperature, logprobs, actions)
        temperature, temperature_opt = adam(temperature, grads, temperature_opt, q_lr, eps=1e-8)
    new, opts = {"actor": actor, "temperature": temperature}, {"actor": actor_opt, "temperature": temperature_opt}
    return new, opts, {**metrics, "alpha": temperature["log_alpha"].exp()}


def update(
    agent: Agent,
    target: Params,
    opts: dict[str, AdamState],
    batch: Batch,
    noise: Tensor,
    share: Tensor,
    actions: Actions,
    args: Args,
) -> tuple[Agent, Params, dict[str, AdamState], dict[str, Tensor]]:
    """A gradient step of the critics, then those of the policy that `noise`, (1 + 2 * steps, B, A), is for."""
    critics, target, opt, metrics = update_critics(
        agent, target, opts["critics"], batch, noise[0], args.q_lr, share, actions
    )
    agent, opts = agent | {"critics": critics}, opts | {"critics": opt}
    for i in range(1, len(noise), 2):
        pair, rates = noise[i : i + 2], (args.policy_lr, args.q_lr)
        new, opt, logged = update_policy(agent, opts, batch["obs"], pair, *rates, actions, args.autotune)
        agent, opts, metrics = agent | new, opts | opt, metrics | logged
    return agent, target, opts, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    where = args.make_options
    env = make(args.env, args.seeds, args.num_envs, *where)
    actions, obs_size, generators = Actions.of(env.action_space), flat_size(env.observation_space), args.generators(0)
    if not actions.bounded:
        space = f"--env {args.env}: SAC needs actions in a bounded Box, not {env.action_space}"
        raise ValueError(f"{space}; rl_lab.dqn takes Discrete ones, and a wrapper can bound a Box")
    agents = [init_params(obs_size, actions, 1.0 if args.autotune else args.alpha, g) for g in generators]
    agent = {name: stack([agent[name] for agent in agents]) for name in agents[0]}
    target, opts = contiguous(agent["critics"]), {name: contiguous(vmap(init_adam)(x)) for name, x in agent.items()}
    key = ("sac", args.key, actions)
    collector = Collector(env, partial(act, actions=actions), None, generators, key, args.compile)
    replay = args.replay(env)
    step = vmap(partial(update, actions=actions, args=args), in_dims=(0, 0, 0, 0, 0, None))
    learners = [Compiled(step, ("learn", *key), args.compile, donate=(0, 1, 2)) for _ in range(2)]
    keep, move = torch.tensor([0.0, args.tau], device=env.device)

    def state() -> dict[str, Any]:
        learned = {"params": agent, "target": target, "opts": opts}
        return {**learned, "collector": collector.state_dict(), "replay": replay.state_dict()}

    run = Run(args, "sac", env, state)
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
                share = keep if gradient_step % args.target_network_frequency else move
                steps = 0 if gradient_step % args.policy_frequency else args.policy_frequency
                batch, normal = replay.sample(next(points)), draw(1 + 2 * steps, args.batch_size)
                agent, target, opts, logged = learners[steps > 0](agent, target, opts, batch, normal, share)
                metrics |= logged
        run.log(concatenate(rollouts), {f"losses/{name}": x for name, x in metrics.items()})
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *where)
            run.evaluate(partial(policy, noise=None, actions=actions), agent, {}, test_env)
    run.finish(agent, {})
    return run


def policy(params: Agent, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` None for the mean before squashing."""
    if noise is None:
        return scaled(gaussian(params["actor"], inputs["obs"])[0].tanh(), actions)
    return sample(params["actor"], inputs["obs"], noise, actions)[0]


def defaults(env_id: str) -> Args:
    """CleanRL's hyper-parameters for `env_id`."""
    return replace(Args(), env=env_id)


def main() -> None:
    run(train, Args, defaults)
