"""On-policy collection: T steps of every environment under fixed parameters, as (T, B, ...) tensors on one device.

The functions handed in are pure and written for one agent: its N environments, no seed axis.

    act(params, inputs, noise) -> (actions, env_actions)
        inputs: {"obs": (N, *obs)} and, where the environment has one, {"mask": (N, A)}; `actions` are stored,
        `env_actions` are what the environment sees. A recurrent policy's memory, {name: (N, H)}, is among its inputs
        and comes back as a third output.
    observe(normalizer, step) -> (normalizer, step)
        `normalize.observe` with its settings; None where observations and rewards are taken as they are.

A `TensorEnv` is stepped inside one compiled loop together with them; any other environment from Python, one compiled
call of each a step. Values and log-probabilities are not computed here: while a rollout is collected the parameters do
not change, so the learner computes them for the whole rollout in one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.func import vmap

from rl_lab.compiler import Compiled, leaves_of, scan
from rl_lab.networks import is_image
from rl_lab.normalize import begin
from rl_lab.vector import Step, TensorEnv, VectorEnv

Inputs = dict[str, Tensor]
Rollout = dict[str, Tensor]
Act = Callable[[Any, Inputs, Tensor], tuple[Any, ...]]
Observe = Callable[[Any, Step], tuple[Any, Step]]


def split_seeds(tree: Any, num_seeds: int, dim: int = 0) -> Any:
    """Every tensor of a tree from B = S * N rows in axis `dim` to (S, N)."""
    return pytree.tree_map(lambda x: x.unflatten(dim, (num_seeds, -1)), tree)


def over_seeds(function: Callable[..., Any], images: bool) -> Callable[..., Any]:
    """`function` of one agent over the leading seed axis of its arguments: by `vmap`, or for images one by one.

    `vmap` makes one convolution of many seeds a grouped one, which takes up to twice the time; and a convolution is
    large enough not to gain by being batched. On a GPU it is not, so that seeds have streams of their own there.
    """
    if not images:
        return vmap(function)

    def one_by_one(*args: Any) -> Any:
        leaf = pytree.tree_leaves(args)[0]
        agents = [pytree.tree_map(lambda x, s=s: x[s], args) for s in range(len(leaf))]
        if leaf.is_cuda and len(agents) > 1:
            results = _side_by_side(function, agents)
        else:
            results = [function(*agent) for agent in agents]
        return pytree.tree_map(_stacked, *results)

    return one_by_one


def _side_by_side(function: Callable[..., Any], calls: Sequence[Any]) -> list[Any]:
    """The results of `calls`, each on a CUDA stream that begins here and is waited for."""
    here, streams, results = torch.cuda.current_stream(), [torch.cuda.Stream() for _ in calls], []
    for stream, args in zip(streams, calls, strict=True):
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            results.append(function(*args))
    for stream in streams:
        here.wait_stream(stream)
    return results


def _stacked(*xs: Tensor) -> Tensor:
    """In dense memory: torch 2.13 traces a loop's body twice, and gives a stack of transposed gradients two layouts."""
    return torch.stack([x.clone(memory_format=torch.contiguous_format) for x in xs])


def merge_seeds(tree: Any) -> Any:
    """Every tensor of a tree from (S, N, ...) to (S * N, ...)."""
    return pytree.tree_map(lambda x: x.flatten(0, 1), tree)


def on_device(tree: Any, device: torch.device) -> Any:
    """Every tensor of a tree on `device`, as a checkpoint's are not."""
    return pytree.tree_map(lambda x: x.to(device), tree)


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Rollouts one after the other, (T1, B, ...), (T2, B, ...), ... to (T1 + T2 + ..., B, ...)."""
    if len(rollouts) == 1:
        return rollouts[0]
    return {name: torch.cat([rollout[name] for rollout in rollouts]) for name in rollouts[0]}


def contiguous(tree: Any) -> Any:
    """Every tensor of a tree with its own, dense memory, as compiled functions need them."""
    return pytree.tree_map(lambda x: x.clone(memory_format=torch.contiguous_format), tree)


def draw_shuffles(batch: int, epochs: int, minibatches: int, generator: torch.Generator) -> Tensor:
    """(epochs * minibatches, batch // minibatches) indices: each epoch's a fresh permutation (PPO's detail 6)."""
    shuffles = [torch.randperm(batch, generator=generator, device=generator.device) for _ in range(epochs)]
    return torch.cat(shuffles).reshape(epochs * minibatches, -1)


class Collector:
    """Steps the environments, and holds what lies between two rollouts: normaliser, observation to act on, and memory.

    Args:
        env: B = S * N rows; is reset here.
        act, observe: see above.
        generators: the agents', one a seed; not used here, but saved with the rest.
        key: what `act` and `observe` close over, for the compiler's cache.
        compile: False runs everything eagerly.
        memory: a recurrent policy's before its first step, {name: (B, H)}; set to zero where an episode ends.
    Attributes:
        cut: (B, *obs) where the episodes of a checkpoint stood that could not go on after it, or None.
    """

    def __init__(
        self,
        env: VectorEnv,
        act: Act,
        observe: Observe | None,
        generators: list[torch.Generator],
        key: object,
        compile: bool = True,
        memory: Inputs | None = None,
    ) -> None:
        num_seeds = len(env.seeds)
        act_seeds = over_seeds(act, is_image(env.observation_space))

        def act_rows(params: Any, inputs: Inputs, noise: Tensor) -> tuple[Any, ...]:
            return merge_seeds(act_seeds(params, *split_seeds((inputs, noise), num_seeds)))  # type: ignore[no-any-return]

        def observe_rows(normalizer: Any, step: Step) -> tuple[Any, tuple[Tensor, ...]]:
            assert observe is not None
            normalizer, step = vmap(observe)(normalizer, split_seeds(step, num_seeds))
            return normalizer, merge_seeds(tuple(step))

        def rollout(params: Any, carry: Any, noise: Tensor) -> tuple[Any, Rollout]:
            assert isinstance(env, TensorEnv)

            def body(carry: Any, noise_t: Tensor) -> tuple[Any, Rollout]:
                state, normalizer, memory, *obs = carry
                inputs = _inputs(obs[0] if obs else env.observe(state["physics"]), env.mask(state["physics"]))
                actions, env_actions, *new = act_rows(params, inputs | memory, noise_t)
                state, step = env.dynamics(state, env_actions)
                memory = _forget(new[0], step) if new else memory
                if observe:
                    normalizer, seen = observe_rows(normalizer, step)
                    step, obs = Step(*seen), seen[-1:]
                row = _row(inputs, actions, step, state["episode_returns"], state["episode_lengths"])
                return (state, normalizer, memory, *obs), row

            return scan(body, carry, noise)

        self.env, self.generators = env, generators
        self.normalizer: Any = {}  # of tensors with a leading seed axis S
        self.memory = memory or {}
        self.cut: Tensor | None = None
        self.obs = env.reset()  # (B, *obs) to act on next, as `observe` gives it
        if observe:
            self.normalizer, obs = contiguous(vmap(begin)(split_seeds(self.obs, num_seeds)))
            self.obs = merge_seeds(obs)
        self._act = Compiled(act_rows, ("act", num_seeds, key), compile)
        self._observe = Compiled(observe_rows, ("observe", num_seeds, key), compile) if observe else None
        if isinstance(env, TensorEnv):
            self._rollout = Compiled(rollout, ("rollout", num_seeds, key, env.key), compile)

    def state_dict(self) -> dict[str, Any]:
        """The environments' state with what is held here."""
        random = {str(seed): g.get_state() for seed, g in zip(self.env.seeds, self.generators, strict=True)}
        held = {"normalizer": self.normalizer, "obs": self.obs, "memory": self.memory}
        return {"env": self.env.state_dict(), **held, "generators": random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        fresh = self.env.load_state_dict(state["env"])
        self.normalizer, self.obs = on_device((state["normalizer"], state["obs"]), self.env.device)
        self.memory = on_device(state.get("memory", {}), self.env.device)
        if fresh is not None:
            self.cut, self.obs = self.obs, fresh
            self.memory = {name: torch.zeros_like(x) for name, x in self.memory.items()}
            if self._observe:
                self.normalizer, obs = contiguous(vmap(begin)(split_seeds(fresh, len(self.env.seeds)), self.normalizer))
                self.obs = merge_seeds(obs)
        for seed, generator in zip(self.env.seeds, self.generators, strict=True):
            generator.set_state(state["generators"][str(seed)].cpu())

    def collect(self, params: Any, noise: Tensor) -> Rollout:
        """Step every environment T times.

        Args:
            params: agents' parameters with a leading seed axis S.
            noise: (T, B, ...), each seed's from its own generator.
        Returns:
            obs, actions, rewards, next_obs, terminated, truncated as `act` and `observe` give them, (T, B, ...); `mask`
            and `game_over` where the environment has them; and its own episode_returns and episode_lengths.
        """
        return self._fused(params, noise) if isinstance(self.env, TensorEnv) else self._stepped(params, noise)

    def _fused(self, params: Any, noise: Tensor) -> Rollout:
        assert isinstance(self.env, TensorEnv)
        # Raw observations follow from the state. Carrying both breaks the compiler where they are the same numbers.
        carry = (self.env.state, self.normalizer, self.memory, *([self.obs] if self._observe else []))
        (self.env.state, self.normalizer, self.memory, *obs), rollout = self._rollout(params, carry, noise)
        self.obs = obs[0] if obs else self.env.observe(self.env.state["physics"])
        return rollout  # type: ignore[no-any-return]

    def _stepped(self, params: Any, noise: Tensor) -> Rollout:
        # In pieces: thousands of small tensors alive at once keep Python's garbage collector busy, a tenth of the time.
        return concatenate([self._steps(params, piece) for piece in noise.split(64)])

    def _steps(self, params: Any, noise: Tensor) -> Rollout:
        env, obs, memory, rows = self.env, self.obs, self.memory, []
        weights, (normalizer, treespec) = leaves_of(params), pytree.tree_flatten(self.normalizer)
        act = observe = None
        for noise_t in noise.unbind():
            inputs = _inputs(obs, env.action_mask)
            act = act or self._act.on_leaves(params, inputs | memory, noise_t)
            actions, env_actions, *new = act([*weights, *inputs.values(), *memory.values(), noise_t])
            step = env.step(env_actions)
            memory = _forget(dict(zip(memory, new, strict=True)), step) if new else memory
            if self._observe:
                observe = observe or self._observe.on_leaves(self.normalizer, step)
                *normalizer, next_obs, rewards, terminated, truncated, obs = observe([*normalizer, *step])
                step = Step(next_obs, rewards, terminated, truncated, obs)
            obs = step.obs
            row = _row(inputs, actions, step, env.episode_returns, env.episode_lengths)
            game_over = env.game_over
            rows.append(row if game_over is None else {**row, "game_over": game_over})
        self.normalizer, self.obs, self.memory = pytree.tree_unflatten(normalizer, treespec), obs, memory
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _inputs(obs: Tensor, mask: Tensor | None) -> Inputs:
    return {"obs": obs} if mask is None else {"obs": obs, "mask": mask}


def _forget(memory: Inputs, step: Step) -> Inputs:
    """Memory for the next step: zero where an episode ended (PPO's detail 34)."""
    done = (step.terminated | step.truncated).unsqueeze(1)
    return {name: x.masked_fill(done, 0.0) for name, x in memory.items()}


def _row(inputs: Inputs, actions: Tensor, step: Step, episode_returns: Tensor, episode_lengths: Tensor) -> Rollout:
    return {
        **inputs,
        "actions": actions,
        "rewards": step.rewards,
        "next_obs": step.next_obs,
        "terminated": step.terminated,
        "truncated": step.truncated,
        "episode_returns": episode_returns,
        "episode_lengths": episode_lengths,
    }
