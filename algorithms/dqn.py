"""Deep Q-learning with a target network, and its double, dueling, prioritized and n-step variants.

Papers: Mnih et al. 2015, Human-level control through deep reinforcement learning, Nature 518; van Hasselt et al. 2016,
Deep reinforcement learning with double Q-learning, arXiv:1509.06461; Wang et al. 2016, Dueling network architectures,
arXiv:1511.06581; Schaul et al. 2016, Prioritized experience replay, arXiv:1511.05952. n-step returns as in Hessel et
al. 2018, Rainbow, arXiv:1710.02298.

    L = E[(r + gamma * max_a' Q_target(s', a') - Q(s, a))^2]                            [Mnih et al. 2015, Eq. 2]

Differs from the 2015 paper in: Adam for RMSProp, squared error without clipping of its gradient: as CleanRL has it.
Differs from CleanRL's dqn.py and dqn_atari.py in:
  - gradient steps come after env steps 10, 20, ... of `--train-frequency 10`; theirs come one env step later;
  - between two gradient steps the parameters stand still, so these env steps are taken in one compiled call;
  - a truncated episode's successor is the true one; so is theirs under Gymnasium 0.29, but for images;
  - what reads images computes in bfloat16, as `--bf16` has it; parameters, gradients and Adam are float32.

    python -m rl_lab.dqn --env CartPole-v1        expected results: docs/dqn.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_nature_cnn, init_uniform, is_image, mlp, nature_cnn, polyak, stack
from rl_lab.offpolicy import DiscreteArgs, draw_noise
from rl_lab.optim import AdamState, adam, fast_bf16, in_bf16, init_adam
from rl_lab.replay import Batch, draw_uniform
from rl_lab.rollout import Collector, Inputs, concatenate, contiguous, on_device, over_seeds
from rl_lab.run import Run


@dataclass(frozen=True)
class Args(DiscreteArgs):
    """Defaults are CleanRL's dqn.py's; those of the variants are their papers'."""

    env: str = "CartPole-v1"  # environment id of Gymnasium
    total_timesteps: int = 500_000  # env steps of one seed, over all its environments
    learning_rate: float = 2.5e-4  # of Adam
    tau: float = 1.0  # share of the parameters that the target network takes over, 1 for all
    start_e: float = 1.0  # epsilon at the start, the probability of a random action
    end_e: float = 0.05  # epsilon at the end
    exploration_fraction: float = 0.5  # share of total_timesteps in which epsilon falls linearly
    double: bool = False  # the online network chooses the action that the target network values
    dueling: bool = False  # Q = V + A - mean A
    n_step: int = 1  # steps of a transition
    prioritized: bool = False  # sample by the size of the last TD error
    priority_alpha: float = 0.6  # exponent of priorities
    priority_beta: float = 0.4  # exponent of importance weights at the start; 1 at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("end_e", self.end_e <= self.start_e, f"at most --start-e {self.start_e}")
        valid = not self.prioritized or 0 < self.priority_alpha <= 1
        self.require("priority_alpha", valid, "above 0 and at most 1 with --prioritized")
        for name in ("priority_alpha", "priority_beta"):
            used = self.prioritized or getattr(self, name) == getattr(Args, name)
            self.require(name, used, "left out, or with --prioritized")


IMAGES = Args(
    env="BreakoutNoFrameskip-v4", total_timesteps=10_000_000, learning_rate=1e-4, buffer_size=1_000_000,
    target_network_frequency=1_000, batch_size=32, end_e=0.01, exploration_fraction=0.1, learning_starts=80_000,
    train_frequency=4, checkpoint_every=1_000_000,
)  # fmt: skip


def init_params(space: gym.Space[Any], actions: Actions, dueling: bool, generator: torch.Generator) -> Params:
    """Layers of 120 and 84 units, or the Nature CNN, and linear heads; torch's default initialisation, as CleanRL."""
    if is_image(space):
        params, features = init_nature_cnn("trunk", space.shape[0], generator, orthogonal=False), 512
    else:
        params, features = init_uniform("trunk", (flat_size(space), 120, 84), generator), 84
    params |= init_uniform("q", (features, actions.num_outputs), generator)
    return params | (init_uniform("value", (features, 1), generator) if dueling else {})


def q_values(params: Params, obs: Tensor) -> Tensor:
    """Q(s, .): (B, *obs) -> (B, A)."""
    if params["trunk.0.weight"].ndim == 4:  # convolutions
        hidden = nature_cnn(params, "trunk", obs)
    else:
        hidden = mlp(params, "trunk", obs.flatten(1).float(), 2, torch.relu).relu()
    q = mlp(params, "q", hidden, 1)
    if "value.0.weight" in params:  # dueling [Wang et al. 2016, Eq. 9]
        q = mlp(params, "value", hidden, 1) + q - q.mean(1, keepdim=True)
    return q


def act(params: Params, inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The actions that `noise` names, the best ones where it says -1 or is None; to store and for the environment."""
    actions = q_values(params, inputs["obs"]).argmax(1)
    if noise is not None:
        actions = torch.where(noise < 0, actions, noise)
    return actions, actions


def targets(params: Params, target: Params, batch: Batch, double: bool) -> Tensor:
    """(B,) what Q(s, a) is to be: r + gamma * Q_target(s', a*) where the episode goes on."""
    next_q = q_values(target, batch["next_obs"])
    chooser = q_values(params, batch["next_obs"]) if double else next_q  # [van Hasselt et al. 2016, Eq. 4]
    best = chooser.argmax(1, keepdim=True)
    return batch["rewards"] + batch["discounts"] * next_q.gather(1, best).squeeze(1)


def loss(params: Params, target: Params, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared TD error, weighted where the replay is prioritized.

    Args:
        params, target: of the online and of the target network.
        batch: obs, next_obs (B, *obs), actions (B,), rewards, discounts (B,), and weights (B,) with priorities.
    Returns:
        () loss, and td_loss (), q_values () to log under CleanRL's names, td_errors (B,).
    """
    params, target = (in_bf16(p, "trunk", args.bf16) for p in (params, target))
    wanted = targets(params, target, batch, args.double).detach()
    taken = q_values(params, batch["obs"]).gather(1, batch["actions"].unsqueeze(1)).squeeze(1)
    assert taken.shape == wanted.shape == batch["rewards"].shape
    td_errors = wanted - taken
    weights = batch.get("weights", torch.ones_like(taken))
    total = (weights * td_errors.square()).mean()
    metrics = {"td_loss": total, "q_values": taken.mean(), "td_errors": td_errors}
    return total, {name: x.detach() for name, x in metrics.items()}


def update(
    params: Params, target: Params, opt: AdamState, batch: Batch, args: Args
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """A step of Adam."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(params, target, batch, args)
    params, opt = adam(params, grads, opt, args.learning_rate, eps=1e-8)
    return params, opt, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    env = make(args.env, args.seeds, args.num_envs, *args.make_options)
    actions, images, generators = args.actions(env), is_image(env.observation_space), args.generators(0)
    params = stack([init_params(env.observation_space, actions, args.dueling, g) for g in generators])
    target, opt = contiguous(params), contiguous(vmap(init_adam)(params))
    key = ("dqn", args.key, actions)
    collector = Collector(env, act, None, generators, key, args.compile)
    replay = args.replay(env, args.n_step, args.priority_alpha if args.prioritized else 0.0)
    learn = over_seeds(partial(update, args=args), images)
    learner = Compiled(learn, ("learn", *key), args.compile, donate=(0, 2))

    def state() -> dict[str, Any]:
        agents = {"params": params, "target": target, "opt": opt}
        return {**agents, "collector": collector.state_dict(), "replay": replay.state_dict()}

    run = Run(args, "dqn", env, state)
    if run.saved:
        params, target, opt = on_device([run.saved[name] for name in ("params", "target", "opt")], env.device)
        collector.load_state_dict(run.saved["collector"])
        replay.load_state_dict(run.saved["replay"], collector.cut)

    for iteration in run.iterations(args.num_iterations, args.log_every):
        env_step, rollouts, metrics = iteration * args.log_every, [], {}
        rows = torch.arange(args.log_every // args.num_envs, device=env.device).unsqueeze(1)
        progress = (env_step + rows * args.num_envs) / (args.exploration_fraction * args.total_timesteps)
        epsilon = (args.start_e + (args.end_e - args.start_e) * progress).clamp(min=args.end_e)
        shape = (len(rows), args.num_envs)
        noise = torch.cat([draw_noise(actions, shape, g, epsilon) for g in generators], dim=1)
        points = iter(draw_uniform((args.log_every // args.train_frequency, args.batch_size), generators))
        for choices in noise.split(args.rows_per_cycle):
            rollout = collector.collect(in_bf16(params, "trunk", args.bf16), choices)
            replay.add(rollout)
            rollouts.append({name: x for name, x in rollout.items() if x.dtype != torch.uint8})  # images are large
            env_step += args.steps_per_cycle
            if env_step <= args.learning_starts:
                continue
            for _ in range(args.updates_per_cycle):
                beta = args.priority_beta + (1 - args.priority_beta) * env_step / args.total_timesteps
                batch = replay.sample(next(points), beta)
                params, opt, metrics = learner(params, target, opt, batch)
                td_errors = metrics.pop("td_errors")
                if args.prioritized:
                    replay.prioritize(batch["leaves"], td_errors.abs() + 1e-6)
            if env_step % args.target_network_frequency == 0:
                target = polyak(target, params, args.tau)
        run.log(concatenate(rollouts), {f"losses/{name}": x for name, x in metrics.items()})
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *args.make_options)
            run.evaluate(partial(policy, noise=None, actions=actions), params, {}, test_env)
    run.finish(params, {})
    return run


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` None for the best ones."""
    return act(params, inputs, noise)[1]


def defaults(env_id: str) -> Args:
    """CleanRL's hyper-parameters for `env_id`."""
    images = is_image(make(env_id, seeds=(0,), num_envs=1).observation_space)
    return replace(IMAGES, env=env_id, bf16=fast_bf16()) if images else Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
