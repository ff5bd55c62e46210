"""Proximal policy optimization with the clipped surrogate objective, for vectors and for Atari's images.

Papers: Schulman et al. 2017, Proximal policy optimization algorithms, arXiv:1707.06347; Schulman et al. 2016,
High-dimensional continuous control using generalized advantage estimation, arXiv:1506.02438. The details that the paper
leaves out are numbered after Huang et al. 2022, The 37 implementation details of proximal policy optimization; each
number stands where the detail happens; 14-20 are in envs/atari.py, 32-36 (LSTM) not here.

    L = E[min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)] - c1 * L_VF + c2 * H        [2017, Eqs. 7 and 9]

Differs from CleanRL's ppo.py, ppo_atari.py and ppo_continuous_action.py in:
  - a truncated episode bootstraps from its true successor, and the return that scales rewards starts anew after it;
    `--semantics cleanrl` treats truncation as termination, as they do;
  - `--target-kl` compares the epoch's mean divergence; `--semantics cleanrl` the last minibatch's;
  - observations and rewards are normalised by statistics per seed, not per environment (the same with one environment);
  - values and log-probabilities of a rollout are computed after it in one batch: the same numbers to rounding;
  - what reads images computes in bfloat16, as Atari's `--bf16` has it; parameters, gradients and Adam are float32.

    python -m rl_lab.ppo --env HalfCheetah-v4        expected results: docs/ppo.md
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import RunArgs, run
from rl_lab.compiler import Compiled, scan
from rl_lab.distributed import averaged, gathered, ranks, share
from rl_lab.distributions import Actions, Outputs, draw_noise, logprob_and_entropy, sample
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_mlp, init_nature_cnn, is_image, mlp, nature_cnn, pack, stack, unpack
from rl_lab.normalize import observe, standardize
from rl_lab.optim import AdamState, adam, clip_gradients, fast_bf16, in_bf16, init_adam
from rl_lab.returns import explained_variance, gae
from rl_lab.rollout import Collector, Inputs, Rollout, contiguous, draw_shuffles, on_device, over_seeds, split_seeds
from rl_lab.run import Run


@dataclass(frozen=True)
class Args(RunArgs):
    """CleanRL's defaults: ppo.py's, for Box actions ppo_continuous_action.py's, for images ppo_atari.py's."""

    env: str = "CartPole-v1"  # environment id of Gymnasium
    total_timesteps: int = 500_000  # env steps of one seed, over all its environments
    learning_rate: float = 2.5e-4  # of Adam
    num_envs: int = 4  # environments of one seed
    num_steps: int = 128  # steps of each environment in a rollout
    anneal_lr: bool = True  # let the learning rate fall linearly to zero
    gamma: float = 0.99  # discount per env step
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches of an epoch; must divide num_envs * num_steps
    update_epochs: int = 4  # passes over a rollout
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: float = 0.2  # epsilon of the clipped surrogate, and of the clipped value loss
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the norm of the gradient
    target_kl: float | None = None  # stop a rollout's updates after an epoch that diverged further than this
    normalize: bool = False  # normalise and clip observations and rewards by running statistics
    bf16: bool = False  # compute the network of images in bfloat16, but for its last layer
    semantics: Literal["correct", "cleanrl"] = "correct"  # of truncation and target_kl, see the head of this file

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        self.require_rollouts(batch)
        divides = batch % self.num_minibatches == 0
        self.require("num_minibatches", divides, f"a divisor of num_envs * num_steps = {batch}")
        pairs = not self.norm_adv or 2 * self.num_minibatches <= batch
        self.require("num_minibatches", pairs, f"at most {batch // 2}: --norm-adv needs two samples in each minibatch")

    @property
    def annealed(self) -> bool:
        return self.anneal_lr

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)


IMAGES = Args(env="BreakoutNoFrameskip-v4", total_timesteps=10_000_000, num_envs=8, clip_coef=0.1)
BOX = Args(
    env="HalfCheetah-v4", total_timesteps=1_000_000, learning_rate=3e-4, num_envs=1, num_steps=2048,
    num_minibatches=32, update_epochs=10, ent_coef=0.0, normalize=True,
)  # fmt: skip


def init_params(space: gym.Space[Any], actions: Actions, generator: torch.Generator) -> Params:
    """Orthogonal (detail 2): separate networks of two 64-unit tanh layers (13, 26), or heads on one Nature CNN (21)."""
    params = init_nature_cnn("trunk", space.shape[0], generator) if is_image(space) else {}
    sizes = [512] if is_image(space) else [flat_size(space), 64, 64]
    params |= init_mlp("critic", (*sizes, 1), 1.0, generator)
    params |= init_mlp("actor", (*sizes, actions.num_outputs), 0.01, generator)
    if actions.low:  # detail 24: does not depend on the state
        params["logstd"] = torch.zeros(actions.num_outputs, device=generator.device)
    return params


def network(params: Params, inputs: Inputs, actions: Actions) -> tuple[Outputs, Tensor]:
    """The policy's numbers, and V(s) (B,), at `inputs`: obs (B, *obs), and mask (B, A) where there is one."""
    images = "trunk.0.weight" in params
    x = nature_cnn(params, "trunk", inputs["obs"]) if images else inputs["obs"].flatten(1).float()
    outputs, values = (mlp(params, name, x, num_layers=1 if images else 3) for name in ("actor", "critic"))
    if actions.low:
        return {"mean": outputs, "logstd": params["logstd"]}, values.squeeze(1)  # detail 23
    if "mask" in inputs:
        outputs = torch.where(inputs["mask"], outputs, torch.finfo(outputs.dtype).min)
    return {"logits": outputs}, values.squeeze(1)


def act(params: Params, inputs: Inputs, noise: Tensor | None, actions: Actions) -> tuple[Tensor, Tensor]:
    """Actions to store and, clipped for Box, for the environment (detail 27); the likeliest where `noise` is None."""
    return sample(network(params, inputs, actions)[0], noise, actions)


def loss(params: Params, batch: Rollout, actions: Actions, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, value and entropy loss of a minibatch.

    Args:
        batch: obs (B, *obs), actions (B, *shape), and logprobs, values, advantages, returns (B,) as of the rollout.
    Returns:
        () loss, and () tensors to log under CleanRL's names.
    """
    outputs, values = network(in_bf16(params, "trunk", args.bf16), batch, actions)
    logprobs, entropy = logprob_and_entropy(outputs, batch["actions"], actions)  # details 25, 37
    assert logprobs.shape == batch["logprobs"].shape == batch["advantages"].shape
    logratio = logprobs - batch["logprobs"]
    ratio = logratio.exp()
    advantages = batch["advantages"]
    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()  # detail 8, [2017, Eq. 7]

    old_values, returns = batch["values"], batch["returns"]
    squares = (values - returns).square()
    if args.clip_vloss:  # detail 9
        near = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        squares = torch.maximum(squares, (near - returns).square())
    value_loss = 0.5 * squares.mean()
    entropy = entropy.mean()
    total = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss  # detail 10, [2017, Eq. 9]
    metrics = {  # detail 12; approx_kl is the k3 estimator of Schulman's blog, "Approximating KL divergence"
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": (-logratio).mean(),
        "approx_kl": ((ratio - 1) - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return total, {name: x.detach() for name, x in metrics.items()}


def gradient(params: Params, batch: Rollout, actions: Actions, args: Args) -> tuple[Params, dict[str, Tensor]]:
    """Gradient of the loss by parameter, and the metrics."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(params, batch, actions, args)
    return grads, metrics


def step(params: Params, opt: AdamState, grads: Params, learning_rate: Tensor, args: Args) -> tuple[Params, AdamState]:
    """Clip the gradient's norm (detail 11) and step Adam with epsilon 1e-5 (detail 3)."""
    grads, _ = clip_gradients(grads, args.max_grad_norm)
    return adam(params, grads, opt, learning_rate, eps=1e-5)


def targets(params: Params, rollout: Rollout, actions: Actions, args: Args) -> Rollout:
    """What the minibatches are drawn from: (T, N, ...) of a rollout to (T * N, ...), with values and advantages."""
    flat = {name: x.flatten(0, 1) for name, x in rollout.items()}
    params, rewards = in_bf16(params, "trunk", args.bf16), rollout["rewards"].float()
    outputs, values = network(params, flat, actions)
    _, next_values = network(params, {"obs": flat["next_obs"]}, actions)
    logprobs, _ = logprob_and_entropy(outputs, flat["actions"], actions)
    values, next_values = values.reshape(rewards.shape), next_values.reshape(rewards.shape)
    terminated, truncated = rollout["terminated"], rollout["truncated"]
    if args.semantics == "cleanrl":
        terminated = terminated | truncated
    advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)  # detail 5
    batch: Rollout = {name: flat[name] for name in ("obs", "mask", "actions") if name in flat}
    batch |= {"logprobs": logprobs, "values": values.flatten(), "advantages": advantages.flatten()}
    return {**batch, "returns": (advantages + values).flatten()}


def learn(
    params: Params,
    opt: AdamState,
    rollout: Rollout,
    shuffles: Tensor,
    learning_rate: Tensor,
    gradients: Callable[[Params, Rollout], tuple[Params, dict[str, Tensor]]],
    actions: Actions,
    args: Args,
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """All epochs of minibatch updates on one rollout.

    Args:
        params: with leading seed axis S.
        opt: likewise, of the packed parameters {"all": (S, P)}: one vector is cheaper to update than a dozen tensors.
        rollout: (T, B, ...) as collected.
        shuffles: (E * M, S, minibatch) int64; each epoch's M rows cover every index once (detail 6).
        gradients: `gradient` over all seeds; data-parallel training hands in one that averages over ranks.
    Returns:
        the new params and opt, and metrics (S,).
    """
    rollout = split_seeds(rollout, shuffles.shape[1], dim=1)
    data = vmap(partial(targets, actions=actions, args=args), in_dims=(0, 1))(params, rollout)
    as_dict = vmap(partial(unpack, layout={name: p.shape[1:] for name, p in params.items()}))
    epoch_ends = torch.arange(1, len(shuffles) + 1, device=shuffles.device) % args.num_minibatches == 0
    target_kl = math.inf if args.target_kl is None else args.target_kl

    def minibatch(carry: Any, x: tuple[Tensor, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        packed, opt, kl, active = carry  # a seed is active until an epoch diverges
        indices, epoch_ends = x
        batch = vmap(lambda data, i: {name: column[i] for name, column in data.items()})(data, indices)
        grads, metrics = gradients(as_dict(packed["all"]), batch)
        grads = {"all": vmap(pack)(grads)}
        new = vmap(partial(step, args=args), in_dims=(0, 0, 0, None))(packed, opt, grads, learning_rate)
        new = vmap(lambda a, *x: pytree.tree_map(partial(torch.where, a), *x))(active, new, (packed, opt))
        kl = metrics["approx_kl"] if args.semantics == "cleanrl" else kl + metrics["approx_kl"] / args.num_minibatches
        still = active & ~(epoch_ends & (kl > target_kl))
        return (*new, torch.where(epoch_ends, 0.0, kl), still), {**metrics, "active": active}

    active = torch.ones_like(shuffles[0, :, 0], dtype=torch.bool)
    carry = ({"all": vmap(pack)(params)}, opt, torch.zeros_like(active, dtype=torch.float32), active)
    (packed, opt, *_), metrics = scan(minibatch, carry, (shuffles, epoch_ends))
    active = metrics.pop("active")
    last = active.sum(0, keepdim=True) - 1  # as CleanRL logs: the last minibatch taken, clipfrac over all taken
    logged = {f"losses/{name}": x.gather(0, last).squeeze(0) for name, x in metrics.items()}
    logged["losses/clipfrac"] = (metrics["clipfrac"] * active).sum(0) / active.sum(0)
    logged["losses/explained_variance"] = explained_variance(data["values"], data["returns"])
    logged["charts/learning_rate"] = learning_rate.expand(len(active[0]))
    return as_dict(packed["all"]), opt, logged


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    (rank, num_ranks), (whole, args) = ranks(), share(args)  # `whole` is of all ranks under torchrun, `args` this one's
    args.require_room(make(args.env, (0,), 1, *args.make_options), args.num_envs, args.num_steps, hidden=4 * 64)
    env = make(args.env, args.env_seeds(rank), args.num_envs, *args.make_options)
    actions, images = Actions.of(env.action_space), is_image(env.observation_space)
    args.require("normalize", not (images and args.normalize), "off for images")
    args.require("bf16", images or not args.bf16, "off for vectors, whose small networks are faster in float32")
    generators = args.generators(0)
    params = stack([init_params(env.observation_space, actions, g) for g in generators])
    opt = contiguous(vmap(init_adam)({"all": vmap(pack)(params)}))
    generators = args.generators(rank) if rank else generators
    key, choose = ("ppo", args.key, actions), partial(act, actions=actions)
    normalize = partial(observe, gamma=args.gamma, cleanrl=args.semantics == "cleanrl") if args.normalize else None
    collector = Collector(env, choose, normalize, generators, key, args.compile)
    by_seed = over_seeds(partial(gradient, actions=actions, args=args), images)
    gradients, one_graph = averaged(by_seed, key, args.compile)
    learner = Compiled(partial(learn, gradients=gradients, actions=actions, args=args), ("learn", *key), one_graph)

    run = Run(whole, "ppo", env, lambda: {"params": params, "opt": opt, "collector": collector.state_dict()})
    if run.saved:
        params, opt = on_device((run.saved["params"], run.saved["opt"]), env.device)
        collector.load_state_dict(run.saved["collector"])

    batch = args.num_envs * args.num_steps
    for iteration in run.iterations(whole.num_iterations, batch * num_ranks):
        remaining = 1.0 - iteration / whole.num_iterations if args.anneal_lr else 1.0  # detail 4
        learning_rate = torch.tensor(args.learning_rate * remaining, device=env.device)
        noise = torch.cat([draw_noise(actions, (args.num_steps, args.num_envs), g) for g in generators], dim=1)
        rollout = collector.collect(in_bf16(params, "trunk", args.bf16), noise)  # detail 1: across episodes' ends
        shuffles = [draw_shuffles(batch, args.update_epochs, args.num_minibatches, g) for g in generators]
        params, opt, metrics = learner(params, opt, rollout, torch.stack(shuffles, dim=1), learning_rate)
        run.log(gathered(rollout, args.num_seeds), metrics)
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *args.make_options)
            run.evaluate(partial(policy, noise=None, actions=actions), params, collector.normalizer, test_env)
    run.finish(params, collector.normalizer)
    return run


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment, its statistics frozen; `noise` None for the likeliest ones."""
    obs = inputs["obs"]
    if normalizer:
        obs = standardize(normalizer["obs"], obs, clip=10.0)
    return act(params, {**inputs, "obs": obs}, noise, actions)[1]


def defaults(env_id: str) -> Args:
    """CleanRL's hyper-parameters for the spaces of `env_id`."""
    env = make(env_id, seeds=(0,), num_envs=1)
    images, box = is_image(env.observation_space), bool(Actions.of(env.action_space).low)
    return replace(replace(IMAGES, bf16=fast_bf16()) if images else BOX if box else Args(), env=env_id)


def main() -> None:
    run(train, Args, defaults, data_parallel=True)
