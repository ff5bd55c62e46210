"""Proximal policy optimization with a long short-term memory, for tasks where one observation does not tell the state.

Paper: Schulman et al. 2017, Proximal policy optimization algorithms, arXiv:1707.06347. The details of the recurrent
variant, numbered after Huang et al. 2022, The 37 implementation details of proximal policy optimization, are 32-36;
each number stands where the detail happens. Those of algorithms/ppo.py hold too.

    h_t, c_t = LSTM(body(o_t), k_t * h_{t-1}, k_t * c_{t-1})      k_t = 0 where the step before ended an episode
    pi(a | o_1 ... o_t) = actor(h_t),  V(o_1 ... o_t) = critic(h_t)

Differs from CleanRL's ppo_atari_lstm.py in:
  - observations may also be vectors, which go through two tanh layers of 64 units (`body`);
  - a truncated episode bootstraps from its true successor under its memory, but with `--semantics cleanrl`;
  - there is no `--target-kl`, and what reads images computes in bfloat16, as Atari's `--bf16` has it;
  - values and log-probabilities of a rollout are computed after it in one replay: the same numbers to rounding.

    python -m rl_lab.ppo_lstm --env Recall-v0        expected results: docs/ppo_lstm.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab import networks
from rl_lab.cli import RunArgs, run
from rl_lab.compiler import Compiled, scan
from rl_lab.distributions import Actions, Outputs, draw_noise, logprob_and_entropy, sample
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_lstm, init_mlp, is_image, lstm, lstm_step, mlp, pack, stack, unpack
from rl_lab.optim import AdamState, adam, clip_gradients, fast_bf16, in_bf16, init_adam
from rl_lab.returns import explained_variance, gae
from rl_lab.rollout import Collector, Inputs, Rollout, contiguous, draw_shuffles, on_device, over_seeds, split_seeds
from rl_lab.run import Run

Memory = dict[str, Tensor]  # hidden, cell: (N, H) each
Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Args(RunArgs):
    """Defaults for Recall-v0 are ours, those for other environments CleanRL's ppo_atari_lstm.py's."""

    env: str = "Recall-v0"  # environment id: this package's memory task, or Gymnasium's
    total_timesteps: int = 100_000  # env steps of one seed, over all its environments
    learning_rate: float = 2e-3  # of Adam
    num_envs: int = 32  # environments of one seed
    num_steps: int = 20  # steps of each environment in a rollout: gradients reach no further back
    anneal_lr: bool = True  # let the learning rate fall linearly to zero
    gamma: float = 0.99  # discount per env step
    gae_lambda: float = 0.95  # lambda of generalized advantage estimation
    num_minibatches: int = 4  # minibatches of an epoch, of whole environments; must divide num_envs
    update_epochs: int = 4  # passes over a rollout
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: float = 0.2  # epsilon of the clipped surrogate, and of the clipped value loss
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.01  # weight of the entropy bonus
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # bound on the norm of the gradient
    lstm_size: int = 64  # units of the memory, H
    bf16: bool = False  # compute the network of images in bfloat16, up to the memory
    semantics: Literal["correct", "cleanrl"] = "correct"  # of truncation, see the head of this file

    def __post_init__(self) -> None:
        super().__post_init__()
        batch = self.num_envs * self.num_steps
        self.require_rollouts(batch)
        divides = self.num_envs % self.num_minibatches == 0
        self.require("num_minibatches", divides, f"a divisor of num_envs = {self.num_envs}: sequences stay whole")
        pairs = not self.norm_adv or 2 * self.num_minibatches <= batch
        self.require("num_minibatches", pairs, f"at most {batch // 2}: --norm-adv needs two samples in each minibatch")

    @property
    def annealed(self) -> bool:
        return self.anneal_lr

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // (self.num_envs * self.num_steps)


CLEANRL = Args(total_timesteps=10**7, learning_rate=2.5e-4, num_envs=8, num_steps=128, clip_coef=0.1, lstm_size=128)


def init_params(space: gym.Space[Any], actions: Actions, args: Args, generator: torch.Generator, seen: int) -> Params:
    """Body, memory (32) and heads, orthogonal (detail 2); of an image the body sees the last `seen` channels."""
    if is_image(space):
        params, size = networks.init_nature_cnn("trunk", seen, generator), 512
    else:
        params, size = init_mlp("body", (flat_size(space), 64, 64), 2**0.5, generator), 64
    params |= init_lstm("lstm", size, args.lstm_size, generator)
    params |= init_mlp("actor", (args.lstm_size, actions.num_outputs), 0.01, generator)
    params |= init_mlp("critic", (args.lstm_size, 1), 1.0, generator)
    if actions.low:
        params["logstd"] = torch.zeros(actions.num_outputs, device=generator.device)
    return params


def init_memory(params: Params, rows: int) -> Memory:
    """Memory before the first step, zero (detail 33): (rows, H)."""
    weight = params["lstm.weight_hh"]
    return {name: torch.zeros(rows, weight.shape[-1], device=weight.device) for name in ("hidden", "cell")}


def body(params: Params, obs: Tensor) -> Tensor:
    """What the memory sees of observations (B, *obs): of vectors (B, 64), of an image's last channels (B, 512)."""
    if "trunk.0.weight" in params:
        return networks.nature_cnn(params, "trunk", obs[:, -params["trunk.0.weight"].shape[1] :])
    return torch.tanh(mlp(params, "body", obs.flatten(1).float(), num_layers=2))


def remember(params: Params, obs: Tensor, memory: Memory) -> Memory:
    """One step of the memory: observations (N, *obs), and memory before to after them."""
    hidden, cell = lstm_step(params, "lstm", body(params, obs), (memory["hidden"], memory["cell"]))
    return {"hidden": hidden, "cell": cell}


def replay(params: Params, rollout: Rollout, memory: Memory) -> Memory:
    """(T, N, H) after each step of obs (T, N, *obs): from `memory` (detail 36), anew where keep (T, N) is 0 (34)."""
    obs = rollout["obs"]
    x = body(params, obs.flatten(0, 1)).unflatten(0, obs.shape[:2])
    hidden, cell = lstm(params, "lstm", x, (memory["hidden"], memory["cell"]), rollout["keep"])
    return {"hidden": hidden, "cell": cell}


def heads(params: Params, hidden: Tensor, inputs: Inputs, actions: Actions) -> tuple[Outputs, Tensor]:
    """The policy's numbers and V (B,) at hidden states (B, H), under the mask (B, A) of `inputs` if it has one."""
    outputs, values = (mlp(params, name, hidden, num_layers=1) for name in ("actor", "critic"))
    if actions.low:
        return {"mean": outputs, "logstd": params["logstd"]}, values.squeeze(1)
    if "mask" in inputs:
        outputs = torch.where(inputs["mask"], outputs, torch.finfo(outputs.dtype).min)
    return {"logits": outputs}, values.squeeze(1)


def act(params: Params, inputs: Inputs, noise: Tensor | None, actions: Actions) -> tuple[Tensor, Tensor, Memory]:
    """Actions to store and, clipped for Box, for the environment, and the memory; the likeliest without `noise`."""
    memory = remember(params, inputs["obs"], inputs)
    return *sample(heads(params, memory["hidden"], inputs, actions)[0], noise, actions), memory


def loss(params: Params, batch: Rollout, memory: Memory, actions: Actions, args: Args) -> tuple[Tensor, Metrics]:
    """The clipped surrogate, value and entropy loss () of a minibatch of whole sequences, and () tensors to log.

    Args:
        batch: obs (T, M, *obs), actions (T, M, *shape), and keep, logprobs, values, advantages, returns (T, M).
        memory: before the first step, hidden and cell (M, H).
    """
    params = in_bf16(params, "trunk", args.bf16)
    hidden = replay(params, batch, memory)["hidden"].flatten(0, 1)
    batch = {name: x.flatten(0, 1) for name, x in batch.items()}  # (T * M, ...)
    outputs, values = heads(params, hidden, batch, actions)
    logprobs, entropy = logprob_and_entropy(outputs, batch["actions"], actions)
    assert logprobs.shape == batch["logprobs"].shape == batch["advantages"].shape
    logratio = logprobs - batch["logprobs"]
    ratio = logratio.exp()

    advantages, old_values, returns = (batch[name] for name in ("advantages", "values", "returns"))
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(advantages * ratio, advantages * clipped).mean()  # [2017, Eq. 7]

    squares = (values - returns).square()
    if args.clip_vloss:
        near = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        squares = torch.maximum(squares, (near - returns).square())
    value_loss = 0.5 * squares.mean()
    total = policy_loss - args.ent_coef * entropy.mean() + args.vf_coef * value_loss  # [2017, Eq. 9]
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy.mean(),
        "old_approx_kl": (-logratio).mean(),
        "approx_kl": ((ratio - 1) - logratio).mean(),
        "clipfrac": ((ratio - 1).abs() > args.clip_coef).float().mean(),
    }
    return total, {name: x.detach() for name, x in metrics.items()}


def step(params: Params, opt: AdamState, grads: Params, learning_rate: Tensor, args: Args) -> tuple[Params, AdamState]:
    """Clip the gradient's norm and step Adam with epsilon 1e-5."""
    grads, _ = clip_gradients(grads, args.max_grad_norm)
    return adam(params, grads, opt, learning_rate, eps=1e-5)


def targets(params: Params, rollout: Rollout, memory: Memory, actions: Actions, args: Args) -> Rollout:
    """What the minibatches are drawn from, (T, N, ...): a rollout as collected with values and advantages."""
    params, rewards = in_bf16(params, "trunk", args.bf16), rollout["rewards"].float()
    terminated, truncated = rollout["terminated"], rollout["truncated"]
    done = (terminated | truncated).float()
    keep = torch.cat([torch.ones_like(done[:1]), 1 - done[:-1]])  # the collector has cleared the first step's memory
    batch = {name: rollout[name] for name in ("obs", "mask", "actions") if name in rollout} | {"keep": keep}
    after = {name: x.flatten(0, 1) for name, x in replay(params, batch, memory).items()}
    flat = {name: x.flatten(0, 1) for name, x in batch.items()}
    outputs, values = heads(params, after["hidden"], flat, actions)
    logprobs, _ = logprob_and_entropy(outputs, flat["actions"], actions)
    successors = remember(params, rollout["next_obs"].flatten(0, 1), after)  # under the memory of their own episode
    _, next_values = heads(params, successors["hidden"], {}, actions)
    logprobs, values, next_values = (x.view_as(rewards) for x in (logprobs, values, next_values))
    if args.semantics == "cleanrl":
        terminated = terminated | truncated
    advantages = gae(rewards, values, next_values, terminated, truncated, args.gamma, args.gae_lambda)
    return {**batch, "logprobs": logprobs, "values": values, "advantages": advantages, "returns": advantages + values}


def learn(
    params: Params,
    opt: AdamState,
    rollout: Rollout,
    memory: Memory,
    shuffles: Tensor,
    learning_rate: Tensor,
    actions: Actions,
    args: Args,
) -> tuple[Params, AdamState, Metrics]:
    """All epochs of minibatch updates on one rollout: the new params and opt, and metrics (S,).

    Args:
        params, opt: with leading seed axis S; opt is of the packed parameters {"all": (S, P)}.
        rollout, memory: (T, B, ...) as collected, and (B, H) before its first step.
        shuffles: (E * M, S, minibatch) int64; each epoch's M rows cover every environment once (detail 35).
    """
    rollout, memory = split_seeds(rollout, shuffles.shape[1], dim=1), split_seeds(memory, shuffles.shape[1])
    data = vmap(partial(targets, actions=actions, args=args), in_dims=(0, 1, 0))(params, rollout, memory)
    as_dict = vmap(partial(unpack, layout={name: p.shape[1:] for name, p in params.items()}))
    gradient = grad_and_value(partial(loss, actions=actions, args=args), has_aux=True)
    gradients = over_seeds(gradient, "trunk.0.weight" in params)
    steps = vmap(partial(step, args=args), in_dims=(0, 0, 0, None))

    def minibatch(carry: Any, envs: Tensor, data: Rollout, memory: Memory, rate: Tensor) -> tuple[Any, Metrics]:
        packed, opt = carry
        batch = vmap(lambda data, envs: {name: x[:, envs] for name, x in data.items()})(data, envs)
        begin = vmap(lambda memory, envs: {name: x[envs] for name, x in memory.items()})(memory, envs)
        grads, (_, metrics) = gradients(as_dict(packed["all"]), batch, begin)
        grads = {"all": vmap(pack)(contiguous(grads))}  # dense: torch 2.13 gives a lone seed's two layouts
        return steps(packed, opt, grads, rate), metrics

    carry = ({"all": vmap(pack)(params)}, opt)
    (packed, opt), metrics = scan(minibatch, carry, shuffles, (data, memory, learning_rate))
    logged = {f"losses/{name}": x[-1] for name, x in metrics.items()}  # as CleanRL logs: the last minibatch's
    logged["losses/clipfrac"] = metrics["clipfrac"].mean(0)  # but for this
    logged["losses/explained_variance"] = explained_variance(data["values"].flatten(1), data["returns"].flatten(1))
    logged["charts/learning_rate"] = learning_rate.expand(shuffles.shape[1])
    return as_dict(packed["all"]), opt, logged


def train(args: Args) -> Run:
    """Train `args.num_seeds` agents; everything is in the run folders afterwards."""
    sizes = args.num_envs, args.num_steps, 2 * 64 + 8 * args.lstm_size
    args.require_room(make(args.env, (0,), 1, *args.make_options), *sizes)
    env = make(args.env, args.seeds, args.num_envs, *args.make_options)
    space, actions, generators = env.observation_space, Actions.of(env.action_space), args.generators(0)
    args.require("bf16", is_image(space) or not args.bf16, "off for vectors, whose networks are small")
    seen = space.shape[0] if is_image(space) and not env.frame_stack else 1  # of stacked frames the newest
    params = stack([init_params(space, actions, args, g, seen) for g in generators])
    opt = contiguous(vmap(init_adam)({"all": vmap(pack)(params)}))
    key, memory = ("ppo_lstm", args.key, actions), init_memory(params, args.num_seeds * args.num_envs)
    collector = Collector(env, partial(act, actions=actions), None, generators, key, args.compile, memory)
    learner = Compiled(partial(learn, actions=actions, args=args), ("learn", *key), args.compile)

    run = Run(args, "ppo_lstm", env, lambda: {"params": params, "opt": opt, "collector": collector.state_dict()})
    if run.saved:
        params, opt = on_device((run.saved["params"], run.saved["opt"]), env.device)
        collector.load_state_dict(run.saved["collector"])

    for iteration in run.iterations(args.num_iterations, args.num_envs * args.num_steps):
        remaining = 1.0 - iteration / args.num_iterations if args.anneal_lr else 1.0
        learning_rate = torch.tensor(args.learning_rate * remaining, device=env.device)
        noise = torch.cat([draw_noise(actions, (args.num_steps, args.num_envs), g) for g in generators], dim=1)
        memory, rollout = collector.memory, collector.collect(in_bf16(params, "trunk", args.bf16), noise)
        shuffles = [draw_shuffles(args.num_envs, args.update_epochs, args.num_minibatches, g) for g in generators]
        params, opt, metrics = learner(params, opt, rollout, memory, torch.stack(shuffles, dim=1), learning_rate)
        run.log(rollout, metrics)
        if run.evaluation_due:
            test_env = make(args.env, args.evaluation_seeds, 10, *args.make_options)
            start = init_memory(params, args.num_seeds * 10)
            run.evaluate(partial(policy, noise=None, actions=actions), params, collector.normalizer, test_env, start)
    run.finish(params, collector.normalizer)
    return run


def policy(params: Params, _: Any, inputs: Inputs, noise: Tensor | None, actions: Actions) -> tuple[Tensor, Memory]:
    """Actions of a trained agent for the environment, and its memory; `noise` None for the likeliest ones."""
    return act(params, inputs, noise, actions)[1:]


def defaults(env_id: str) -> Args:
    """The hyper-parameters for `env_id`."""
    space = make(env_id, seeds=(0,), num_envs=1).observation_space
    return Args() if env_id == Args.env else replace(CLEANRL, env=env_id, bf16=is_image(space) and fast_bf16())


def main() -> None:
    run(train, Args, defaults)
