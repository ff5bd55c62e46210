"""Categorical deep Q-learning: the distribution of returns on fixed atoms, 51 in the paper, instead of its mean.

Paper: Bellemare, Dabney and Munos 2017, A distributional perspective on reinforcement learning, arXiv:1707.06887.

    Q(s, a) = sum_i z_i * p_i(s, a),   a* = argmax_a Q_target(s', a)
    m_i = sum_j clip(1 - |clip(r + gamma * z_j, V_min, V_max) - z_i| / dz, 0, 1) * p_j(s', a*)             [Eq. 7]
    L = E[-sum_i m_i * log p_i(s, a)]                                                                 [Algorithm 1]

Differs from the paper in probabilities that are held within 1e-5 of 0 and 1 before their logarithm, as CleanRL has it.
Differs from CleanRL's c51.py and c51_atari.py in:
  - gradient steps come after env steps 10, 20, ... of `--train-frequency 10`; theirs come one env step later;
  - between two gradient steps the parameters stand still, so these env steps are taken in one compiled call;
  - `--num-envs` may be above 1;
  - on images, all but the head in bfloat16 where that is faster, and the true successor of a truncated step.

    python -m rl_lab.c51 --env CartPole-v1        expected results: docs/c51.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, of_action, project
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_nature_cnn, init_uniform, is_image, mlp, nature_cnn, stack
from rl_lab.offpolicy import DiscreteArgs, draw_noise
from rl_lab.optim import AdamState, adam, fast_bf16, in_bf16, init_adam
from rl_lab.replay import Batch, draw_uniform
from rl_lab.rollout import Collector, Inputs, concatenate, contiguous, on_device, over_seeds
from rl_lab.run import Run


@dataclass(frozen=True)
class Args(DiscreteArgs):
    """Defaults are CleanRL's c51.py's, for images c51_atari.py's."""

    env: str = "CartPole-v1"  # environment id of Gymnasium
    total_timesteps: int = 500_000  # env steps of one seed, over all its environments
    learning_rate: float = 2.5e-4  # of Adam
    n_atoms: int = 101  # returns that have a probability, evenly spaced
    v_min: float = -100.0  # the lowest of them
    v_max: float = 100.0  # the highest
    start_e: float = 1.0  # epsilon at the start, the probability of a random action
    end_e: float = 0.05  # epsilon at the end
    exploration_fraction: float = 0.5  # share of total_timesteps in which epsilon falls linearly

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("end_e", self.end_e <= self.start_e, f"at most --start-e {self.start_e}")
        self.require("n_atoms", self.n_atoms > 1, "at least 2")
        self.require("v_min", math.isfinite(self.v_min), "finite")
        self.require("v_max", self.v_min < self.v_max < math.inf, f"finite and above --v-min {self.v_min}")


IMAGES = Args(
    env="BreakoutNoFrameskip-v4", total_timesteps=10_000_000, n_atoms=51, v_min=-10, v_max=10, buffer_size=1_000_000,
    target_network_frequency=10_000, batch_size=32, end_e=0.01, exploration_fraction=0.1, learning_starts=80_000,
    train_frequency=4, checkpoint_every=1_000_000,
)  # fmt: skip


def init_params(space: gym.Space[Any], actions: Actions, args: Args, generator: torch.Generator) -> Params:
    """Layers of 120 and 84 units, or the Nature CNN, and a linear head; torch's default initialisation, as CleanRL.

    The atoms are constants: no gradient reaches them. They are kept here so that a saved network tells its returns.
    """
    if is_image(space):
        params, features = init_nature_cnn("trunk", space.shape[0], generator, orthogonal=False), 512
    else:
        params, features = init_uniform("trunk", (flat_size(space), 120, 84), generator), 84
    params |= init_uniform("q", (features, actions.num_outputs * args.n_atoms), generator)
    return params | {"atoms": torch.linspace(args.v_min, args.v_max, args.n_atoms, device=generator.device)}


def distribution(params: Params, obs: Tensor) -> Tensor:
    """Probabilities of the atoms under each action: (B, *obs) -> (B, A, n_atoms)."""
    if params["trunk.0.weight"].ndim == 4:  # convolutions
        hidden = nature_cnn(params, "trunk", obs)
    else:
        hidden = mlp(params, "trunk", obs.flatten(1).float(), 2, torch.relu).relu()
    return mlp(params, "q", hidden, 1).view(len(obs), -1, len(params["atoms"])).softmax(2)


def act(params: Params, inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """The actions that `noise` names, those of the highest mean where it says -1 or is None; to store and to take."""
    actions = (distribution(params, inputs["obs"]) @ params["atoms"]).argmax(1)
    if noise is not None:
        actions = torch.where(noise < 0, actions, noise)
    return actions, actions


def targets(target: Params, batch: Batch) -> Tensor:
    """(B, n_atoms) what the distribution at (s, a) is to be: that of r + gamma * Z(s', a*), of r at the end."""
    following = distribution(target, batch["next_obs"])
    best = (following @ target["atoms"]).argmax(1)
    return project(of_action(following, best), target["atoms"], batch["rewards"], batch["discounts"])


def loss(params: Params, target: Params, batch: Batch, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the distribution at (s, a) with the projected one.

    Args:
        params, target: of the online and of the target network.
        batch: obs, next_obs (B, *obs), actions (B,), rewards, discounts (B,).
    Returns:
        () loss, and loss (), q_values () to log under CleanRL's names.
    """
    params, target = (in_bf16(p, "trunk", args.bf16) for p in (params, target))
    wanted = targets(target, batch).detach()
    taken = of_action(distribution(params, batch["obs"]), batch["actions"])
    assert taken.shape == wanted.shape
    total = -(wanted * taken.clamp(1e-5, 1 - 1e-5).log()).sum(1).mean()
    metrics = {"loss": total, "q_values": (taken @ params["atoms"]).mean()}
    return total, {name: x.detach() for name, x in metrics.items()}


def update(
    params: Params, target: Params, opt: AdamState, batch: Batch, args: Args
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """A step of Adam."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(params, target, batch, args)
    params, opt = adam(params, grads, opt, args.learning_rate, eps=0.01 / args.batch_size)
    return params, opt, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    env = make(args.env, args.seeds, args.num_envs, *args.make_options)
    actions, images, generators = args.actions(env), is_image(env.observation_space), args.generators(0)
    params = stack([init_params(env.observation_space, actions, args, g) for g in generators])
    target, opt = contiguous(params), contiguous(vmap(init_adam)(params))
    key = ("c51", args.key, actions)
    collector = Collector(env, act, None, generators, key, args.compile)
    replay = args.replay(env)
    learn = over_seeds(partial(update, args=args), images)
    learner = Compiled(learn, ("learn", *key), args.compile, donate=(0, 2))

    def state() -> dict[str, Any]:
        agents = {"params": params, "target": target, "opt": opt}
        return {**agents, "collector": collector.state_dict(), "replay": replay.state_dict()}

    run = Run(args, "c51", env, state)
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
            for _ in range(args.updates_per_cycle if env_step > args.learning_starts else 0):
                params, opt, metrics = learner(params, target, opt, replay.sample(next(points)))
            if env_step % args.target_network_frequency == 0:
                target = contiguous(params)
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
