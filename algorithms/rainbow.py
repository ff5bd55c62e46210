"""Rainbow: deep Q-learning that is double, dueling, prioritized, n-step, distributional, and explores by noisy weights.

Papers: Hessel et al. 2018, Rainbow: combining improvements in deep reinforcement learning, arXiv:1710.02298; Bellemare
et al. 2017, A distributional perspective on reinforcement learning, arXiv:1707.06887; Fortunato et al. 2018, Noisy
networks for exploration, arXiv:1706.10295. Dueling and prioritized replay as in rl_lab.dqn.

    R = sum_{k < n} gamma^k r_{t+k},   a* = argmax_a sum_i z_i * p_i(s_{t+n}, a)     [online network: double Q-learning]
    m = projection of R + gamma^n * z on the atoms, with p(s_{t+n}, a*) of the target network      [Bellemare, Eq. 7]
    L = E[-w * sum_i m_i * log p_i(s_t, a_t)],   w the importance weights of sampling by the last such cross-entropy
    p(s, a) = softmax(v(s) + a(s, a) - mean_a a(s, .))                                           [Hessel, section 3]
    y = (w + sigma_w * f(e_out) f(e_in)^T) x + b + sigma_b * f(e_out),   f(e) = sgn(e) sqrt(|e|)   [Fortunato, Eq. 9-11]

Noise is drawn as in Fortunato et al., Algorithm 1: for every step of every environment; and for every gradient step
three times, for the network that learns, the one that chooses a*, and the target. Evaluation uses w and b alone.

Differs from the paper in priorities by the cross-entropy instead of the Kullback-Leibler divergence, as CleanRL has it;
in learning that starts later on images, as there; and, for vectors, in the network and the settings that go with it.
Differs from CleanRL's rainbow_atari.py in:
  - noise is factorised, with sigma_b by inputs; theirs is independent for each weight, with sigma_b by outputs, and
    drawn only before gradient steps: acting keeps one noise for 4 env steps, and for the 80,000 before the first;
  - an n-step return ends with a truncated episode; theirs runs on into the next one;
  - the last n - 1 steps of an episode are learned from, too, with the shorter returns that are left;
  - the convolutions compute in bfloat16 where that is faster;
  - gradient steps come after env steps 4, 8, ..., one env step earlier.

    python -m rl_lab.rainbow --env CartPole-v1        expected results: docs/rainbow.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions, of_action, project
from rl_lab.envs import make
from rl_lab.networks import Params, convolutions, flat_size, init_nature_cnn, init_uniform, is_image, mlp, stack
from rl_lab.offpolicy import DiscreteArgs
from rl_lab.optim import AdamState, adam, fast_bf16, in_bf16, init_adam
from rl_lab.replay import Batch, draw_uniform
from rl_lab.rollout import Collector, Inputs, concatenate, contiguous, on_device, over_seeds
from rl_lab.run import Run


@dataclass(frozen=True)
class Args(DiscreteArgs):
    """What Rainbow adds is as in CleanRL's rainbow_atari.py; for vectors sizes, rates and atoms are its c51.py's."""

    env: str = "CartPole-v1"  # environment id of Gymnasium
    total_timesteps: int = 500_000  # env steps of one seed, over all its environments
    learning_rate: float = 2.5e-4  # of Adam
    n_atoms: int = 101  # returns that have a probability, evenly spaced
    v_min: float = -100.0  # the lowest of them
    v_max: float = 100.0  # the highest
    n_step: int = 3  # steps of a transition
    noise_std: float = 0.5  # sigma at the start, times sqrt(inputs)
    priority_alpha: float = 0.5  # exponent of priorities
    priority_beta: float = 0.4  # exponent of importance weights at the start; 1 at the end

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("n_atoms", self.n_atoms > 1, "at least 2")
        self.require("v_min", math.isfinite(self.v_min), "finite")
        self.require("v_max", self.v_min < self.v_max < math.inf, f"finite and above --v-min {self.v_min}")
        self.require("noise_std", 0 < self.noise_std < math.inf, "finite and above 0: nothing else explores")
        self.require("priority_alpha", 0 < self.priority_alpha <= 1, "above 0 and at most 1")


IMAGES = Args(
    env="BreakoutNoFrameskip-v4", total_timesteps=10_000_000, learning_rate=6.25e-5, n_atoms=51, v_min=-10, v_max=10,
    buffer_size=1_000_000, target_network_frequency=8_000, batch_size=32, learning_starts=80_000, train_frequency=4,
    checkpoint_every=1_000_000,
)  # fmt: skip


# --- network ----------------------------------------------------------------------------------------------------------

NOISY = ("value.0", "value.1", "advantage.0", "advantage.1")  # layers


def init_params(space: gym.Space[Any], actions: Actions, args: Args, generator: torch.Generator) -> Params:
    """A layer of 120 units, or convolutions, and for each stream a hidden layer of 84, or 512, noisy like its outputs.

    Weights and biases w, b uniform within 1 / sqrt(inputs), sigma = noise_std / sqrt(inputs) [Fortunato, section 3.2].
    The atoms are constants: no gradient reaches them. They are kept here so that a saved network tells its returns.
    """
    if is_image(space):
        params, sizes = init_nature_cnn("trunk", space.shape[0], generator, orthogonal=False, linear=False), (3136, 512)
    else:
        params, sizes = init_uniform("trunk", (flat_size(space), 120), generator), (120, 84)
    params |= init_uniform("value", (*sizes, args.n_atoms), generator)
    params |= init_uniform("advantage", (*sizes, actions.num_outputs * args.n_atoms), generator)
    for layer in NOISY:
        sigma = args.noise_std * params[f"{layer}.weight"].shape[1] ** -0.5
        for part in ("weight", "bias"):
            params[f"{layer}.{part}_sigma"] = torch.full_like(params[f"{layer}.{part}"], sigma)
    return params | {"atoms": torch.linspace(args.v_min, args.v_max, args.n_atoms, device=generator.device)}


def features(params: Params, obs: Tensor) -> Tensor:
    """What both streams see: (B, *obs) -> (B, 120), or (B, 3136) where observations are images."""
    if params["trunk.0.weight"].ndim == 4:  # convolutions
        return convolutions(params, "trunk", obs).float()
    return mlp(params, "trunk", obs.flatten(1).float(), 1).relu()


def noisy(params: Params, layer: str, x: Tensor, noise: dict[str, Tensor]) -> Tensor:
    """(B, in) -> (B, out) by a linear layer with factorised noise, or without any where `noise` is empty."""
    y = F.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])
    if noise:
        perturbed = F.linear(x * noise[f"{layer}.in"], params[f"{layer}.weight_sigma"], params[f"{layer}.bias_sigma"])
        y = y + noise[f"{layer}.out"] * perturbed
    return y


def noise_sizes(params: Params) -> dict[str, int]:
    """How many numbers f(e) each layer's inputs and outputs take, in the order in which they are drawn."""
    sizes: dict[str, int] = {}
    for layer in NOISY:
        outputs, inputs = params[f"{layer}.weight"].shape[-2:]
        sizes |= {f"{layer}.in": inputs, f"{layer}.out": outputs}
    return sizes


def draw_layers(params: Params, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(*shape, W) noise f(e) for all noisy layers [Fortunato, Eq. 10-11]."""
    e = torch.randn(*shape, sum(noise_sizes(params).values()), generator=generator, device=generator.device)
    return e.sign() * e.abs().sqrt()


def distribution(params: Params, obs: Tensor, noise: Tensor | None) -> Tensor:
    """Probabilities of the atoms under each action: (B, *obs) -> (B, A, n_atoms).

    Args:
        noise: (W,) for all rows or (B, W) for each, as `draw_layers` gives it; None for none.
    """
    sizes = noise_sizes(params)
    parts = {} if noise is None else dict(zip(sizes, noise.split(list(sizes.values()), -1), strict=True))
    hidden, streams = features(params, obs), []
    for stream in ("value", "advantage"):
        x = noisy(params, f"{stream}.0", hidden, parts).relu()
        streams.append(noisy(params, f"{stream}.1", x, parts).view(len(obs), -1, len(params["atoms"])))
    value, advantage = streams  # (B, 1, n_atoms), (B, A, n_atoms)
    return (value + advantage - advantage.mean(1, keepdim=True)).softmax(2)


# --- policy, loss and update ------------------------------------------------------------------------------------------


def act(params: Params, inputs: Inputs, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Actions of the highest mean under `noise`, which is `distribution`'s; to store and for the environment."""
    actions = (distribution(params, inputs["obs"], noise) @ params["atoms"]).argmax(1)
    return actions, actions


def targets(params: Params, target: Params, batch: Batch, noise: Tensor) -> Tensor:
    """(B, n_atoms) what the distribution at (s, a) is to be; the online network chooses, the target network values."""
    best, _ = act(params, {"obs": batch["next_obs"]}, noise[1])
    following = of_action(distribution(target, batch["next_obs"], noise[2]), best)
    return project(following, target["atoms"], batch["rewards"], batch["discounts"])


def loss(params: Params, target: Params, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of the weighted cross-entropies of the distributions at (s, a) with the projected ones.

    Args:
        params, target: of the online and of the target network.
        batch: obs, next_obs (B, *obs), actions (B,), rewards, discounts (B,) of n steps, weights (B,).
        noise: (3, W) of the online network at s, of the one that chooses at s', of the target network.
    Returns:
        () loss, and td_loss (), q_values () to log under CleanRL's names, priorities (B,).
    """
    params, target = (in_bf16(p, "trunk", args.bf16) for p in (params, target))
    wanted = targets(params, target, batch, noise).detach()
    taken = of_action(distribution(params, batch["obs"], noise[0]), batch["actions"])
    assert taken.shape == wanted.shape
    cross_entropies = -(wanted * taken.clamp(1e-5, 1 - 1e-5).log()).sum(1)
    total = (batch["weights"] * cross_entropies).mean()
    metrics = {"td_loss": total, "q_values": (taken @ params["atoms"]).mean(), "priorities": cross_entropies + 1e-6}
    return total, {name: x.detach() for name, x in metrics.items()}


def update(
    params: Params, target: Params, opt: AdamState, batch: Batch, noise: Tensor, args: Args
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """A step of Adam with the epsilon of Hessel et al., Table 1."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(params, target, batch, noise, args)
    params, opt = adam(params, grads, opt, args.learning_rate, eps=1.5e-4)
    return params, opt, metrics


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    env = make(args.env, args.seeds, args.num_envs, *args.make_options)
    actions, images, generators = args.actions(env), is_image(env.observation_space), args.generators(0)
    params = stack([init_params(env.observation_space, actions, args, g) for g in generators])
    target, opt = contiguous(params), contiguous(vmap(init_adam)(params))
    key = ("rainbow", args.key, actions)
    collector = Collector(env, act, None, generators, key, args.compile)
    replay = args.replay(env, args.n_step, args.priority_alpha)
    learn = over_seeds(partial(update, args=args), images)
    learner = Compiled(learn, ("learn", *key), args.compile, donate=(0, 2))

    def state() -> dict[str, Any]:
        agents = {"params": params, "target": target, "opt": opt}
        return {**agents, "collector": collector.state_dict(), "replay": replay.state_dict()}

    run = Run(args, "rainbow", env, state)
    if run.saved:
        params, target, opt = on_device([run.saved[name] for name in ("params", "target", "opt")], env.device)
        collector.load_state_dict(run.saved["collector"])
        replay.load_state_dict(run.saved["replay"], collector.cut)

    for iteration in run.iterations(args.num_iterations, args.log_every):
        env_step, rollouts, metrics = iteration * args.log_every, [], {}
        num_updates, shape = args.log_every // args.train_frequency, (args.log_every // args.num_envs, args.num_envs)
        acting = torch.cat([draw_layers(params, shape, g) for g in generators], dim=1)
        points = iter(draw_uniform((num_updates, args.batch_size), generators))
        learning = iter(torch.stack([draw_layers(params, (num_updates, 3), g) for g in generators], dim=1))
        for noise in acting.split(args.rows_per_cycle):
            rollout = collector.collect(in_bf16(params, "trunk", args.bf16), noise)
            replay.add(rollout)
            rollouts.append({name: x for name, x in rollout.items() if x.dtype != torch.uint8})  # images are large
            env_step += args.steps_per_cycle
            for _ in range(args.updates_per_cycle if env_step > args.learning_starts else 0):
                beta = args.priority_beta + (1 - args.priority_beta) * env_step / args.total_timesteps
                batch = replay.sample(next(points), beta)
                params, opt, metrics = learner(params, target, opt, batch, next(learning))
                replay.prioritize(batch["leaves"], metrics.pop("priorities"))
            if env_step % args.target_network_frequency == 0:
                target = contiguous(params)
        run.log(concatenate(rollouts), {f"losses/{name}": x for name, x in metrics.items()})
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *args.make_options)
            run.evaluate(partial(policy, noise=None, actions=actions), params, {}, test_env)
    run.finish(params, {})
    return run


# --- a trained agent --------------------------------------------------------------------------------------------------


def draw_noise(actions: Actions, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """() int64 seed for `policy`, which draws the noise: only it knows the network's size."""
    return torch.randint(2**62, (), generator=generator, device=generator.device)


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment; `noise` None for those of the weights without noise."""
    if noise is not None:
        generator = torch.Generator(inputs["obs"].device).manual_seed(int(noise))
        noise = draw_layers(params, inputs["obs"].shape[:1], generator)
    return act(params, inputs, noise)[1]


def defaults(env_id: str) -> Args:
    """The settings above for `env_id`."""
    images = is_image(make(env_id, seeds=(0,), num_envs=1).observation_space)
    return replace(IMAGES, env=env_id, bf16=fast_bf16()) if images else Args(env=env_id)


def main() -> None:
    run(train, Args, defaults)
