"""Fitted-Q evaluation: what a policy is worth, estimated from a fixed data set without playing it.

Papers: Le, Voloshin and Yue 2019, Batch policy learning under constraints, arXiv:1903.08738, Algorithm 3; how well it
does: Voloshin et al. 2019, arXiv:1911.06854; to choose policies by: Paine et al. 2020, arXiv:2007.09055.

    critic:    L = E[(r + gamma * Q_target(s', pi(s')) - Q(s, a))^2]
    estimate:  the mean of Q(s, pi(s)) over the first states of the data's episodes

The policy takes its likeliest actions. At the data's s' these never change, so they are computed once, as a column of
the data. The paper fits a new Q to fixed targets, again and again; here, as in d3rlpy (github.com/takuseno/d3rlpy), a
fit is 100 gradient steps on from the last one, and then the target network becomes a copy of Q.

Differs from d3rlpy in:
  - the loss of Discrete actions, which is squared like Box's; theirs is Huber's, whose minimum is not the mean;
  - copies to the target network after gradient steps 100, 200, ...; theirs come after 1, 101, ...

    python -m rl_lab.fqe --policy RUN --dataset lab/halfcheetah/medium-replay-v0        what it tells: docs/fqe.md
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from rl_lab.checkpoint import replace_file
from rl_lab.cli import run
from rl_lab.compiler import Compiled
from rl_lab.distributions import Actions
from rl_lab.envs import make
from rl_lab.networks import Params, flat_size, init_uniform, mlp, stack
from rl_lab.offline import Dataset, checksum
from rl_lab.offline_training import OfflineArgs, OfflineRun, open_dataset
from rl_lab.optim import AdamState, adam, init_adam
from rl_lab.replay import Batch
from rl_lab.rollout import contiguous, on_device
from rl_lab.run import flatten
from rl_lab.vector import VectorEnv

HIDDEN = (256, 256)  # widths of the network
SHOWN = ("estimate", "data", "played", "undiscounted", "normalized")  # of fqe.json, at the end of a run


@dataclass(frozen=True)
class Args(OfflineArgs):
    """Defaults are d3rlpy's, but for batch_size (100) and the number of steps, which is left to its user."""

    policy: Path | None = None  # run folder whose policy is evaluated, by its likeliest actions
    total_timesteps: int = 200_000  # gradient steps
    learning_rate: float = 1e-4  # of Adam
    target_network_frequency: int = 100  # gradient steps between copies to the target network
    eval_every: int = 1_000
    """gradient steps between estimates; 0 for the last only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("policy", self.policy is not None, "a run folder")


def init_params(obs_size: int, actions: Actions, generator: torch.Generator) -> Params:
    """Torch's default initialisation. A Box's actions are inputs beside the observation, Discrete ones are outputs."""
    inputs, outputs = (actions.num_outputs, 1) if actions.low else (0, actions.num_outputs)
    return init_uniform("critic", (obs_size + inputs, *HIDDEN, outputs), generator)


def q_values(critic: Params, obs: Tensor, taken: Tensor, actions: Actions) -> Tensor:
    """Q(s, a): (B, *obs) and (B, *shape) -> (B,)."""
    inputs = obs.flatten(1).float()
    if actions.low:
        return mlp(critic, "critic", torch.cat([inputs, taken.flatten(1)], 1), activation=torch.relu).squeeze(1)
    return mlp(critic, "critic", inputs, activation=torch.relu).gather(1, taken.unsqueeze(1)).squeeze(1)


def loss(critic: Params, target: Params, batch: Batch, actions: Actions) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared residual against r + gamma * Q_target(s', pi(s')); where the task ended, against r.

    Args:
        target: of the target network.
        batch: obs, next_obs (B, *obs), actions and the policy's next_actions (B, *shape), rewards, discounts (B,).
    Returns:
        () loss, and () tensors to log.
    """
    next_q = q_values(target, batch["next_obs"], batch["next_actions"], actions)
    wanted = batch["rewards"] + batch["discounts"] * next_q
    q = q_values(critic, batch["obs"], batch["actions"], actions)
    assert q.shape == wanted.shape == batch["rewards"].shape
    value = (q - wanted).square().mean()
    return value, {"qf_loss": value.detach(), "q": q.mean().detach()}


def update(
    critic: Params, opt: AdamState, target: Params, batch: Batch, actions: Actions, learning_rate: float
) -> tuple[Params, AdamState, dict[str, Tensor]]:
    """One gradient step of the critic."""
    grads, (_, metrics) = grad_and_value(loss, has_aux=True)(critic, target, batch, actions)
    return *adam(critic, grads, opt, learning_rate, eps=1e-8), metrics


def acted(policy: Any, obs: Tensor) -> Tensor:
    """The policy's likeliest actions (n, *shape) at observations (n, *obs)."""
    return torch.cat([policy(rows) for rows in obs.split(10_000)])  # pieces, for the memory


def play(policy: Any, env: VectorEnv, gamma: float) -> Tensor:
    """Play an episode in each of B rows: (2, B) float64, the discounted returns and the undiscounted ones."""
    obs, discount = env.reset(), 1.0
    returns = torch.zeros(2, len(obs), dtype=torch.float64, device=env.device)
    going = torch.ones(len(obs), dtype=torch.bool, device=env.device)
    while going.any():
        step = env.step(policy(obs))
        returns += going * torch.stack([discount * step.rewards, step.rewards])
        going, discount, obs = going & ~(step.terminated | step.truncated), gamma * discount, step.obs
    env.close()
    return returns


def discounted_returns(data: Dataset, gamma: float) -> Tensor:
    """(E,) float64, of the data's episodes."""
    lengths = data.episode_lengths
    steps = torch.arange(len(data)) - first_steps(data).repeat_interleave(lengths)
    rewards = gamma ** steps.double() * data.columns["rewards"]
    return replace(data, columns=data.columns | {"rewards": rewards}).episode_returns


def first_steps(data: Dataset) -> Tensor:
    """(E,) rows in which the data's episodes begin."""
    return data.episode_lengths.cumsum(0) - data.episode_lengths


def summary(x: Tensor) -> dict[str, Any]:
    """Mean and its standard error (None of a single number), and how many numbers these are of."""
    error = float(x.std()) / len(x) ** 0.5 if len(x) > 1 else None
    return {"mean": float(x.mean()), "standard_error": error, "count": len(x)}


def require_fit(args: Args, policy: Any, data: Dataset, env: VectorEnv) -> None:
    """Raise a ValueError unless the policy acts in the data's environment, and on the observation alone."""
    if policy.env_id != args.env:
        way = f"a run of {args.env} works, or --env {policy.env_id} where the difference does not matter"
        raise ValueError(f"--policy {args.policy} learned {policy.env_id}, not {args.env}; {way}")
    data.require_env(args.env, policy.observation_space, policy.action_space)
    env.reset()
    if policy.memory or env.action_mask is not None:
        heeded = "what it saw before" if policy.memory else "masks of actions"
        raise ValueError(f"--policy {args.policy} heeds {heeded}; one that acts on the observation alone works")


class Evaluation(OfflineRun):
    """A run that comes to an estimate; `results` are what each seed's fqe.json holds."""

    args: Args
    results: list[dict[str, Any]]

    def score(self, index: int) -> str:
        found = {name: x for name, x in self.results[index].items() if name in SHOWN}
        errors = {name: f" ± {x['standard_error']:,.2f}" if x["count"] > 1 else "" for name, x in found.items()}
        told = ", ".join(f"{name} {x['mean']:,.2f}{errors[name]}" for name, x in found.items())
        left = self.args.gamma ** (self.args.total_timesteps // self.args.target_network_frequency)
        unsettled = f"; not settled, {left:.0%} of it hangs on the initial network" if left > 0.01 else ""
        return f"{told} (± standard error over episodes{unsettled})"


def train(args: Args, policy: Any) -> Evaluation:
    """Evaluate `policy`, as rl_lab.load gives it, by `args.num_seeds` critics; all is in the run folders afterwards."""
    args, data = open_dataset(args, scored=False)
    env = make(args.env, args.seeds, 1, *args.make_options)
    require_fit(args, policy, data, env)
    actions, obs_size, generators = Actions.of(env.action_space), flat_size(env.observation_space), args.generators(0)
    first_obs = data.columns["obs"][first_steps(data)]
    digest = checksum(flatten({"params": policy.params, "normalizer": policy.normalizer}))
    first = on_device((first_obs, acted(policy, first_obs)), env.device)
    data = replace(data, columns=data.columns | {"next_actions": acted(policy, data.columns["next_obs"])})

    critic = stack([init_params(obs_size, actions, g) for g in generators])
    target, opt = contiguous(critic), contiguous(vmap(init_adam)(critic))
    step = vmap(partial(update, actions=actions, learning_rate=args.learning_rate))
    key = ("fqe", args.key[0], args.learning_rate, actions)  # without the names of policy and data, which are many
    learner = Compiled(step, key, args.compile, donate=(0, 1))

    def state() -> dict[str, Any]:
        return {"params": critic, "target": target, "opt": opt, "policy": digest}

    def estimates() -> list[dict[str, Any]]:
        with torch.no_grad():
            values = vmap(partial(q_values, actions=actions), (0, None, None))(critic, *first)
        return [summary(x) for x in values.double()]

    run = Evaluation(args, "fqe", data, env, generators, state)
    if run.saved:
        if run.saved["policy"] != digest:
            raise ValueError(f"--policy {args.policy} is not what the run has evaluated: put that back")
        critic, target, opt = on_device([run.saved[name] for name in ("params", "target", "opt")], env.device)

    for gradient_steps in run.intervals():
        for i, batch in gradient_steps:
            critic, opt, metrics = learner(critic, opt, target, batch)
            if (i + 1) % args.target_network_frequency == 0:
                target = contiguous(critic)
        run.log_losses(metrics)
        if run.evaluation_due or run.end == args.total_timesteps:
            for index, x in enumerate(estimates()):
                run.recent[index] = [x["mean"]]  # what the console shows
                named = {"eval/value": x["mean"], "eval/standard_error": x["standard_error"]}
                run.logs.scalars(index, run.end, {name: y for name, y in named.items() if y is not None})

    about: dict[str, Any] = {"data": summary(discounted_returns(data, args.gamma))}
    if args.eval_episodes:
        test_env = make(args.env, args.evaluation_seeds[:1], args.eval_episodes, *args.make_options)
        returns = play(policy, test_env, args.gamma)
        about |= {"played": summary(returns[0]), "undiscounted": summary(returns[1])}
        if data.scores:
            about["normalized"] = summary(data.normalized(returns[1]))
    about["policy"] = {"run": str(args.policy), "algo": policy.algo, "parameters": policy.source, "sha256": digest}
    about |= {"dataset": {"name": data.name, "sha256": data.checksum}, "gamma": args.gamma}
    found = dict(zip(args.seeds, estimates(), strict=True))
    about["seeds"] = {seed: x["mean"] for seed, x in found.items()}
    run.results = [{"estimate": x, **about, "seed": seed} for seed, x in found.items()]
    for folder, result in zip(run.logs.folders, run.results, strict=True):
        replace_file(folder / "fqe.json", json.dumps(result, indent=2).encode())
    run.finish(critic, {})
    return run


def policy(*_: Any) -> Tensor:
    """What other algorithms act by: here it raises a ValueError."""
    raise ValueError("a run of fqe has values and no policy; the run that it evaluated has one")


def defaults(env_id: str) -> Any:
    """None: the flags' own, for every environment."""


def main(load: Callable[[Path], Any]) -> None:
    """The command; `load` gives a run folder's policy, which the launcher knows how to make and this file does not."""
    run(lambda args: train(args, load(args.policy)), Args, defaults)
