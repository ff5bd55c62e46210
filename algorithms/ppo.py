"""Proximal policy optimization with the clipped surrogate objective, for vector observations.

Papers: Schulman et al. 2017, Proximal policy optimization algorithms, arXiv:1707.06347; Schulman et al. 2016,
High-dimensional continuous control using generalized advantage estimation, arXiv:1506.02438. The details that the paper
leaves out are numbered after Huang et al. 2022, The 37 implementation details of proximal policy optimization; each
number stands where the detail happens. Details 14-22 (Atari) and 32-36 (LSTM) are not in this file.

    L = E[min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A)] - c1 * L_VF + c2 * H        [2017, Eqs. 7 and 9]

Differs from CleanRL's ppo.py and ppo_continuous_action.py in:
  - a truncated episode bootstraps from its true successor, and the return that scales rewards starts anew after it;
    `--semantics cleanrl` treats truncation as termination, as they do;
  - `--target-kl` compares the epoch's mean divergence; `--semantics cleanrl` the last minibatch's;
  - observations and rewards are normalised by statistics per seed, not per environment (the same with one environment);
  - values and log-probabilities of a rollout are computed after it in one batch: the same numbers to rounding;
  - seeds reproduce this file's runs, not CleanRL's.

    python -m rl_lab.ppo --env HalfCheetah-v4

Expected results, with seeds and intervals: docs/ppo.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.cli import Run, RunArgs, run
from rl_lab.compiler import Compiled, scan
from rl_lab.envs import make
from rl_lab.networks import Params, init_mlp, mlp, pack, unpack
from rl_lab.normalize import init_moments, standardize, update_moments
from rl_lab.optim import AdamState, adam, clip_gradients, init_adam
from rl_lab.returns import gae
from rl_lab.rollout import Collector, Inputs, Rollout, contiguous, merge_seeds, split_seeds
from rl_lab.vector import Step


@dataclass(frozen=True)
class Args(RunArgs):
    """Defaults for discrete actions are CleanRL's ppo.py's, for Box actions its ppo_continuous_action.py's."""

    env: str = "CartPole-v1"
    """environment id of Gymnasium"""
    total_timesteps: int = 500_000
    """env steps of one seed, over all its environments"""
    learning_rate: float = 2.5e-4
    """of Adam"""
    num_envs: int = 4
    """environments of one seed"""
    num_steps: int = 128
    """steps of each environment in a rollout"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 0.99
    """discount per env step"""
    gae_lambda: float = 0.95
    """lambda of generalized advantage estimation"""
    num_minibatches: int = 4
    """minibatches of an epoch; must divide num_envs * num_steps"""
    update_epochs: int = 4
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """epsilon of the clipped surrogate, and of the clipped value loss"""
    clip_vloss: bool = True
    """clip the value loss"""
    ent_coef: float = 0.01
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """bound on the norm of the gradient"""
    target_kl: float | None = None
    """stop a rollout's updates after an epoch that diverged further than this"""
    normalize: bool = False
    """normalise and clip observations and rewards by running statistics"""
    semantics: Literal["correct", "cleanrl"] = "correct"
    """what truncation and target_kl mean, see the head of this file"""

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        self.require("total_timesteps", self.num_iterations > 0, f"num_envs * num_steps = {batch} or more")
        divides = batch % self.num_minibatches == 0
        self.require("num_minibatches", divides, f"a divisor of num_envs * num_steps = {batch}")
        pairs = not self.norm_adv or 2 * self.num_minibatches <= batch
        self.require("num_minibatches", pairs, f"at most {batch // 2}: --norm-adv needs two samples in each minibatch")
        for name in ("gamma", "gae_lambda"):
            self.require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("ent_coef", "vf_coef"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "finite and 0 or more")
        for name in ("learning_rate", "clip_coef", "max_grad_norm"):
            self.require(name, 0 < getattr(self, name) < math.inf, "finite and above 0")
        self.require("target_kl", self.target_kl is None or self.target_kl > 0, "above 0")

    @property
    def annealed(self) -> bool:
        return self.anneal_lr

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)


BOX = Args(
    env="HalfCheetah-v4",
    total_timesteps=1_000_000,
    learning_rate=3e-4,
    num_envs=1,
    num_steps=2048,
    num_minibatches=32,
    update_epochs=10,
    ent_coef=0.0,
    normalize=True,
)


@dataclass(frozen=True)
class Actions:
    """The action space as the policy needs it: Box if `low` is set, else one categorical for each entry of `sizes`."""

    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @classmethod
    def of(cls, space: gym.Space[Any]) -> Actions:
        match space:
            case gym.spaces.Discrete(start=0):
                return cls((int(space.n),), ())
            case gym.spaces.MultiDiscrete() if space.nvec.ndim == 1 and not space.start.any():
                return cls(tuple(int(n) for n in space.nvec), space.shape)
            case gym.spaces.Box():
                low, high = (tuple(float(x) for x in bound.flatten()) for bound in (space.low, space.high))
                return cls((len(low),), space.shape, low, high)
        raise ValueError(f"PPO acts in Discrete, MultiDiscrete (both starting at 0) and Box spaces, not in {space}")


# --- networks and policy, for one agent -------------------------------------------------------------------------------


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Params:
    """Separate networks of two 64-unit tanh layers (details 13, 26), orthogonally initialised (detail 2)."""
    outputs = sum(actions.sizes)
    params = init_mlp("critic", (obs_size, 64, 64, 1), 1.0, generator)
    params |= init_mlp("actor", (obs_size, 64, 64, outputs), 0.01, generator)
    if actions.low:
        params["logstd"] = torch.zeros(outputs, device=generator.device)  # detail 24: does not depend on the state
    return params


def value(params: Params, obs: Tensor) -> Tensor:
    """V(s): (B, *obs) -> (B,)."""
    return mlp(params, "critic", obs.flatten(1).float()).squeeze(1)


def log_probabilities(params: Params, inputs: Inputs, actions: Actions) -> list[Tensor]:
    """Log-probabilities of every choice, one (B, size) tensor for each component; masked choices get the lowest float."""
    logits = mlp(params, "actor", inputs["obs"].flatten(1).float())
    if "mask" in inputs:
        logits = torch.where(inputs["mask"], logits, torch.finfo(logits.dtype).min)
    return [F.log_softmax(x, dim=1) for x in logits.split(list(actions.sizes), dim=1)]


def act(params: Params, inputs: Inputs, noise: Tensor | None, actions: Actions) -> tuple[Tensor, Tensor]:
    """Sample actions, or take the likeliest.

    Args:
        inputs: obs (B, *obs), and mask (B, A) where the environment has one.
        noise: (B, A) standard normal for Box, standard exponential otherwise; None for the likeliest action.
    Returns:
        the actions to store and those the environment sees, each (B, *shape). They differ for Box, where the
        environment's are clipped to its bounds and the stored ones are not (detail 27).
    """
    if actions.low:
        mean = mlp(params, "actor", inputs["obs"].flatten(1).float())
        sample = mean if noise is None else mean + params["logstd"].exp() * noise  # detail 23
        clipped = sample.clamp(sample.new_tensor(actions.low), sample.new_tensor(actions.high))
        return sample.unflatten(1, actions.shape), clipped.unflatten(1, actions.shape)
    scores = log_probabilities(params, inputs, actions)
    if noise is not None:  # -log of an exponential is a Gumbel variable: the maximum is a sample
        scores = [s - n.log() for s, n in zip(scores, noise.split(list(actions.sizes), dim=1), strict=True)]
    choice = torch.stack([s.argmax(1) for s in scores], dim=1).reshape(-1, *actions.shape)
    return choice, choice


def evaluate_actions(params: Params, inputs: Inputs, taken: Tensor, actions: Actions) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the policy at `taken`, (B, *shape): two (B,) tensors.

    Components are independent: both are sums over them (detail 25 for Box, 37 for MultiDiscrete).
    """
    if actions.low:
        mean, logstd = mlp(params, "actor", inputs["obs"].flatten(1).float()), params["logstd"]
        z = (taken.flatten(1) - mean) / logstd.exp()
        logprobs = -0.5 * z.square() - logstd - 0.5 * math.log(2 * math.pi)
        return logprobs.sum(1), (logstd + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(mean))
    components = log_probabilities(params, inputs, actions)
    choices = taken.reshape(-1, len(components), 1).unbind(1)
    logprobs = [p.gather(1, choice).squeeze(1) for p, choice in zip(components, choices, strict=True)]
    return torch.stack(logprobs).sum(0), torch.stack([-(p.exp() * p).sum(1) for p in components]).sum(0)


# --- loss and update, for one agent -----------------------------------------------------------------------------------


def loss(params: Params, batch: Rollout, actions: Actions, args: Args) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate, value and entropy loss of a minibatch.

    Args:
        batch: obs (B, *obs), actions (B, *shape), and logprobs, values, advantages, returns (B,) as of the rollout.
    Returns:
        () loss, and () tensors to log under CleanRL's names.
    """
    logprobs, entropy = evaluate_actions(params, batch, batch["actions"], actions)
    assert logprobs.shape == batch["logprobs"].shape == batch["advantages"].shape
    logratio = logprobs - batch["logprobs"]
    ratio = logratio.exp()

    advantages = batch["advantages"]
    if args.norm_adv:  # detail 7
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()  # detail 8, [2017, Eq. 7]

    values, old_values, returns = value(params, batch["obs"]), batch["values"], batch["returns"]
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


def advantages(params: Params, rollout: Rollout, actions: Actions, args: Args) -> Rollout:
    """What the minibatches are drawn from: (T, N, ...) of a rollout to (T * N, ...), with values and targets."""
    flat = {name: x.flatten(0, 1) for name, x in rollout.items()}
    logprobs, _ = evaluate_actions(params, flat, flat["actions"], actions)
    shape = rollout["rewards"].shape
    values = value(params, flat["obs"]).reshape(shape)
    next_values = value(params, flat["next_obs"]).reshape(shape)
    terminated, truncated = rollout["terminated"], rollout["truncated"]
    if args.semantics == "cleanrl":
        terminated = terminated | truncated
    adv = gae(
        rollout["rewards"].float(), values, next_values, terminated, truncated, args.gamma, args.gae_lambda
    )  # detail 5
    inputs = {name: flat[name] for name in ("obs", "mask") if name in flat}
    targets = {"logprobs": logprobs, "values": values, "advantages": adv, "returns": adv + values}
    return {**inputs, "actions": flat["actions"], **{name: x.flatten() for name, x in targets.items()}}


def observe(normalizer: Any, step: Step, args: Args) -> tuple[Any, Step]:
    """Normalise observations (details 28, 29) and scale rewards (details 30, 31) by running statistics.

    The true successor enters the statistics, then the first observation of a new episode where one begins.
    """
    done = step.terminated | step.truncated
    seen = update_moments(normalizer["obs"], step.next_obs)
    next_obs = standardize(seen, step.next_obs, clip=10.0)
    seen = update_moments(seen, step.obs, mask=done)
    fresh = standardize(seen, step.obs, clip=10.0)
    obs = torch.where(done.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, next_obs)

    cleanrl = args.semantics == "cleanrl"  # Gymnasium 0.29's NormalizeReward drops the past at a terminal step itself
    past = normalizer["discounted"] * args.gamma
    discounted = torch.where(step.terminated, 0.0, past) + step.rewards if cleanrl else past + step.rewards
    scale = update_moments(normalizer["returns"], discounted)
    rewards = (step.rewards / (scale["var"] + 1e-8).sqrt()).clamp(-10.0, 10.0).float()  # no mean is subtracted
    discounted = discounted if cleanrl else torch.where(done, 0.0, discounted)
    return {"obs": seen, "returns": scale, "discounted": discounted}, Step(
        next_obs, rewards, step.terminated, step.truncated, obs
    )


def begin(obs: Tensor, args: Args) -> tuple[Any, Tensor]:
    """Statistics of one agent that have seen its first observations (N, *obs), and these normalised."""
    if not args.normalize:
        return {}, obs
    seen = update_moments(init_moments(obs.shape[1:], obs.device), obs)
    discounted = torch.zeros(len(obs), dtype=torch.float64, device=obs.device)
    normalizer = {"obs": seen, "returns": init_moments((), obs.device), "discounted": discounted}
    return normalizer, standardize(seen, obs, clip=10.0)


# --- training, for all seeds ------------------------------------------------------------------------------------------


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
        learning_rate: ()
        gradients: `gradient` over all seeds; data-parallel training hands in one that averages over ranks.
    Returns:
        the new params and opt, and metrics (S,).
    """
    num_seeds = shuffles.shape[1]
    rollout = split_seeds(rollout, num_seeds, dim=1)
    data = vmap(partial(advantages, actions=actions, args=args), in_dims=(0, 1))(params, rollout)
    as_dict = vmap(partial(unpack, layout={name: p.shape[1:] for name, p in params.items()}))
    epoch_ends = torch.arange(1, len(shuffles) + 1, device=shuffles.device) % args.num_minibatches == 0
    active = torch.ones(num_seeds, dtype=torch.bool, device=shuffles.device)  # until --target-kl stops a seed

    def minibatch(carry: Any, x: tuple[Tensor, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        (packed, opt), *stop = carry
        indices, epoch_ends = x
        batch = vmap(lambda data, i: {name: column[i] for name, column in data.items()})(data, indices)
        grads, metrics = gradients(as_dict(packed["all"]), batch)
        new = vmap(partial(step, args=args), in_dims=(0, 0, 0, None))(
            packed, opt, {"all": vmap(pack)(grads)}, learning_rate
        )
        if args.target_kl is None:
            return (new,), metrics
        kl, active = stop
        new = pytree.tree_map(
            lambda n, o: torch.where(active.reshape(-1, *[1] * (n.ndim - 1)), n, o), new, (packed, opt)
        )
        metrics["active"] = active
        kl = metrics["approx_kl"] if args.semantics == "cleanrl" else kl + metrics["approx_kl"] / args.num_minibatches
        active = active & ~(epoch_ends & (kl > args.target_kl))
        return (new, torch.where(epoch_ends, 0.0, kl), active), metrics

    carry = (({"all": vmap(pack)(params)}, opt), *(() if args.target_kl is None else (active.float() - 1, active)))
    ((packed, opt), *_), metrics = scan(minibatch, carry, (shuffles, epoch_ends))
    params = as_dict(packed["all"])
    active = metrics.pop("active", active.expand(len(shuffles), -1))
    last = active.sum(0, keepdim=True) - 1  # as CleanRL logs: the last minibatch taken, clipfrac over all taken
    logged = {f"losses/{name}": x.gather(0, last).squeeze(0) for name, x in metrics.items()}
    logged["losses/clipfrac"] = (metrics["clipfrac"] * active).sum(0) / active.sum(0)
    unexplained = (data["returns"] - data["values"]).var(1, correction=0) / data["returns"].var(1, correction=0)
    logged["losses/explained_variance"] = 1 - unexplained
    return params, opt, logged


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    env = make(args.env, args.seeds, args.num_envs, args.torch_device, args.backend)
    actions = Actions.of(env.action_space)
    if not isinstance(env.observation_space, gym.spaces.Box):
        raise ValueError(f"--env {args.env}: PPO needs Box observations, not {env.observation_space}")
    generators = args.generators()
    agents = [init_params(math.prod(env.observation_space.shape), actions, g) for g in generators]
    params = {name: torch.stack([agent[name] for agent in agents]) for name in agents[0]}
    opt = contiguous(vmap(init_adam)({"all": vmap(pack)(params)}))
    normalizer, obs = contiguous(vmap(partial(begin, args=args))(split_seeds(env.reset(), args.num_seeds)))
    key = ("ppo", args.algorithm_fields(), actions)
    act_one, observe_one = partial(act, actions=actions), partial(observe, args=args) if args.normalize else None
    collector = Collector(env, act_one, observe_one, normalizer, merge_seeds(obs), key, args.compile)
    gradients = vmap(partial(gradient, actions=actions, args=args))
    learner = Compiled(partial(learn, gradients=gradients, actions=actions, args=args), ("learn", *key), args.compile)

    def state() -> dict[str, Any]:
        states = {str(seed): g.get_state() for seed, g in zip(args.seeds, generators, strict=True)}
        return {"params": params, "opt": opt, "collector": collector.state_dict(), "generators": states}

    run = Run(args, "ppo", env, state)
    if run.saved:
        params, opt = run.saved["params"], run.saved["opt"]
        collector.load_state_dict(run.saved["collector"])
        for seed, generator in zip(args.seeds, generators, strict=True):
            generator.set_state(run.saved["generators"][str(seed)].cpu())

    for iteration in run.iterations(args.num_iterations, args.num_envs * args.num_steps):
        remaining = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0  # detail 4
        learning_rate = torch.tensor(args.learning_rate * remaining, device=env.device)
        noise = torch.cat([draw_noise(actions, (args.num_steps, args.num_envs), g) for g in generators], dim=1)
        rollout = collector.collect(params, noise)  # detail 1: rollouts run across the ends of episodes
        shuffles = torch.stack([draw_shuffles(args, g) for g in generators], dim=1)
        params, opt, metrics = learner(params, opt, rollout, shuffles, learning_rate)
        run.log(rollout, {"charts/learning_rate": learning_rate.expand(args.num_seeds), **metrics})
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, args.torch_device, args.backend)
            run.evaluate(partial(policy, noise=None, actions=actions), params, collector.normalizer, test_env)
    run.finish(params, collector.normalizer)
    return run


def draw_noise(actions: Actions, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(*shape, A) noise for `act`."""
    noise = torch.empty(*shape, sum(actions.sizes), device=generator.device)
    return noise.normal_(generator=generator) if actions.low else noise.exponential_(generator=generator)


def draw_shuffles(args: Args, generator: torch.Generator) -> Tensor:
    """(E * M, minibatch) indices, a fresh permutation for each epoch."""
    batch = args.num_envs * args.num_steps
    epochs = [torch.randperm(batch, generator=generator, device=generator.device) for _ in range(args.update_epochs)]
    return torch.cat(epochs).reshape(args.update_epochs * args.num_minibatches, -1)


def policy(params: Params, normalizer: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> Tensor:
    """Actions of a trained agent for the environment, its statistics frozen; `noise` None for the likeliest ones."""
    obs = inputs["obs"]
    if normalizer:
        obs = standardize(normalizer["obs"], obs, clip=10.0)
    return act(params, {**inputs, "obs": obs}, noise, actions)[1]


def defaults(env_id: str) -> Args:
    """CleanRL's hyper-parameters for the action space of `env_id`."""
    env = make(env_id, seeds=(0,), num_envs=1)
    return replace(BOX if isinstance(env.action_space, gym.spaces.Box) else Args(), env=env_id)


def main() -> None:
    run(train, Args, defaults)


if __name__ == "__main__":
    main()
