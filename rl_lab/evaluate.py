"""Evaluate trained policies over whole episodes, and film them.

Each run plays its likeliest and sampled actions, its normaliser's statistics frozen, in environments training never
saw; RUN/evaluation.json gets every episode's return and length. `load` gives a run's policy to Python.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.curves.statistics import iqm
from rl_lab.distributions import draw_noise
from rl_lab.envs import make
from rl_lab.episodes import evaluate, evaluation_seeds
from rl_lab.vector import VectorEnv
from rl_lab.video import Shots, check_format, episode, film

MODES = ("deterministic", "sampled")
STATISTICS = ("mean", "std", "iqm", "min", "max", "mean_length")


@dataclass(frozen=True)
class Args:
    """Play episodes with trained policies; prints a table and writes RUN/evaluation.json."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders; several give a line each and the mean over them"""
    episodes: int = 100
    """of each run and kind of action"""
    deterministic: bool = False
    """play the likeliest actions only"""
    sampled: bool = False
    """play sampled actions only"""
    seed: int = 0
    """another number draws other episodes; 0 draws those of the run's own evaluations"""
    video: Path | None = None
    """film one deterministic episode of the run, as .gif or .mp4"""


class Policy:
    """What a run has learned; `load` makes it.

    Attributes:
        env_id, algo, seed: of the run.
        config: the run's config.json.
        source: where the parameters come from.
        observation_space, action_space: of one environment.
        generator: which sampled actions are drawn with; seed it to repeat them.
        memory: of a recurrent policy, {name: (B, H)}, from call to call; else empty. `reset` where episodes begin.
    """

    def __init__(self, config: dict[str, Any], params: dict[str, Tensor], normalizer: Any, source: str) -> None:
        self.config, self.params, self.normalizer, self.source = config, params, normalizer, source
        self.env_id, self.algo, self.seed = config["env"], config["algo"], config["seed"]
        self._algorithm = importlib.import_module(f"rl_lab.algorithms.{self.algo}")
        env = make(self.env_id, (0,), 1, backend=config["args"]["backend"])
        self.observation_space, self.action_space = env.observation_space, env.action_space
        env.close()
        self._actions = self._algorithm.Actions.of(self.action_space)
        self.generator = torch.Generator().manual_seed(evaluation_seeds([self.seed], (0, 1))[0])
        self.reset()

    def environments(self, seed: int, num_envs: int) -> VectorEnv:
        """What the run learned in, but episodes that it never saw; another `seed` draws others."""
        flags = self.config["args"]
        options = {"backend": flags["backend"], "sticky_actions": flags.get("sticky_actions", 0.0)}
        return make(self.env_id, evaluation_seeds([self.seed], (seed,)), num_envs, **options)

    def reset(self, rows: int = 1) -> None:
        """Forget what a recurrent policy remembers: its next calls play new episodes, `rows` side by side."""
        recurrent = hasattr(self._algorithm, "init_memory")
        self.memory: dict[str, Tensor] = self._algorithm.init_memory(self.params, rows) if recurrent else {}

    def __call__(self, obs: Any, deterministic: bool = True, mask: Any = None) -> Any:
        """Act.

        Args:
            obs: array or tensor, (*obs) or (B, *obs), as the environment gives it: normalised here, where the run did.
            deterministic: take the likeliest actions, else sample.
            mask: (A,) or (B, A) bool, the allowed actions.
        Returns:
            actions for the environment, (*shape) or (B, *shape): a tensor on its device for a tensor, else an array.
        Raises:
            ValueError: if the observations do not have the environment's shape, or a recurrent policy was reset for
                another number of them.
        """
        x, shape = torch.as_tensor(obs).cpu(), self.observation_space.shape or ()
        if x.ndim > len(shape) + 1 or x.shape[x.ndim - len(shape) :] != shape:
            raise ValueError(f"obs of shape {tuple(x.shape)} must be {shape} of {self.env_id}, or (B, ...) of them")
        inputs = {"obs": x} | ({} if mask is None else {"mask": torch.as_tensor(mask, dtype=torch.bool).cpu()})
        if single := x.ndim == len(shape):
            inputs = {name: x.unsqueeze(0) for name, x in inputs.items()}
        rows = (len(inputs["obs"]),)
        draw = getattr(self._algorithm, "draw_noise", draw_noise)
        noise = None if deterministic else draw(self._actions, rows, self.generator)
        if {len(x) for x in self.memory.values()} - {*rows}:
            raise ValueError(f"{rows[0]} observations do not fit the memory: call reset({rows[0]}) before an episode")
        actions = self._algorithm.policy(self.params, self.normalizer, inputs | self.memory, noise, self._actions)
        if self.memory:
            actions, self.memory = actions
        actions = actions[0] if single else actions
        return actions.to(obs.device) if isinstance(obs, Tensor) else actions.numpy()[()]


def load(run: str | Path) -> Policy:
    """The policy of a run folder, normaliser included. Nothing in the folder is run.

    An unfinished run gives its last checkpoint's, with a warning.

    Raises:
        ValueError: if `run` is no run folder, a file is damaged, or its algorithm or environment is not there.
    """
    run = Path(run)
    try:
        config = json.loads((run / "config.json").read_text())
        algo, first, *_ = config["algo"], config["group"][0], config["env"], config["args"]["backend"]
        index = config["seeds"].index(config["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is no run folder of rl_lab: {type(error).__name__}: {error}") from None
    known = sorted(path.stem for path in (Path(__file__).parent / "algorithms").glob("[!_]*.py"))
    if algo not in known:
        raise ValueError(f"{run} was trained by {algo!r}; rl_lab has {', '.join(known)}")
    if (path := run / "model.safetensors").exists():
        tensors, metadata = checkpoint.load_tensors(path)
        if metadata.get("algo") != algo:
            raise ValueError(f"{path} holds no parameters of {algo}")
        return Policy(config, **_unflatten(tensors), source=path.name)
    saved = checkpoint.load(run.resolve().parent / first)
    source = f"checkpoint after iteration {saved['run']['iteration']}"
    warnings.warn(f"{run} is not finished: this is its {source}", stacklevel=2)
    state = saved["state"]
    normalizer = state.get("collector", state).get("normalizer", {})  # what learns from a data set collects nothing
    agents = {"params": state["params"], "normalizer": normalizer}
    return Policy(config, **pytree.tree_map(lambda x: x[index], agents), source=source)


def _unflatten(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The params and normaliser that `Run.finish` flattened; one without tensors left no name."""
    tree: dict[str, Any] = {"params": {}, "normalizer": {}}
    for name, tensor in tensors.items():
        *path, leaf = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = tensor
    return tree


def play(policy: Policy, episodes: int, deterministic: bool, seed: int) -> dict[str, Any]:
    """Statistics over episodes, and the episodes' returns and lengths; std is that of the sample (ddof 0)."""
    num_envs = max(n for n in range(1, 101) if episodes % n == 0)  # side by side, each the same number of episodes
    env = policy.environments(seed, num_envs)
    policy.generator.manual_seed(evaluation_seeds([policy.seed], (seed, 1))[0])
    policy.reset(num_envs)

    def act(inputs: dict[str, Tensor]) -> Any:
        policy.memory = {name: inputs.pop(name) for name in policy.memory}
        actions = policy(deterministic=deterministic, **inputs)
        return (actions, policy.memory) if policy.memory else actions

    table = evaluate(act, env, episodes // num_envs, policy.memory)
    env.close()
    returns, lengths = (x.flatten() for x in table)
    numbers = (returns.mean(), returns.std(), iqm(returns), returns.min(), returns.max(), lengths.mean())
    statistics = {name: float(x) for name, x in zip(STATISTICS, numbers, strict=True)}
    return {**statistics, "returns": returns.tolist(), "lengths": lengths.tolist()}


def shots(policy: Policy, seed: int) -> tuple[Shots, float]:
    """A deterministic episode, drawn, and its frames a second: what `film` takes."""
    env: Any = policy.environments(seed, 1)
    policy.reset()
    if not hasattr(env, "render"):  # only Atari's games draw themselves, and as they are played: lives are episodes
        return episode(policy, policy.env_id, env.seeds[0])

    def game() -> Shots:
        obs, picture, over = env.reset(), env.render(), False
        yield picture.copy, 0.0
        while not over:
            step = env.step(policy(obs))
            obs, over = step.obs, bool(env.game_over)
            if step.terminated or step.truncated:
                policy.reset()
            picture = picture if over else env.render()  # the next game has begun
            yield picture.copy, float(env.episode_returns)

    return game(), env.render_fps


def main(argv: Sequence[str] | None = None) -> None:
    """The command; every expected fault ends in one line and exit status 1 (2 for flags)."""
    args = tyro.cli(Args, prog="python -m rl_lab.evaluate", args=argv)
    modes = [mode for mode in MODES if getattr(args, mode)] or MODES
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    table = Table("run", "actions", box=box.SIMPLE_HEAD, title=f"{args.episodes} episodes of each")
    for name in STATISTICS:
        table.add_column(name.replace("_", " "), justify="right")
    try:
        if not args.runs or args.episodes < 1:
            raise ValueError("name one or more run folders, and at least 1 of --episodes")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed} must be 0 or more")
        if args.video:
            check_format(args.video, len(args.runs))
        torch.set_num_threads(1)  # fastest for small networks
        game = shots(load(args.runs[0]), args.seed) if args.video else None  # first, as it may be what cannot be had
        found: dict[tuple[str, str], list[list[float]]] = {}
        try:
            for run in args.runs:
                policy = load(run)
                results = {mode: play(policy, args.episodes, mode == "deterministic", args.seed) for mode in modes}
                about = {"env": policy.env_id, "source": policy.source, "episodes": args.episodes, "seed": args.seed}
                for mode, result in results.items():
                    row = [result[name] for name in STATISTICS]
                    table.add_row(run.resolve().name, mode, *(f"{x:.1f}" for x in row))
                    found.setdefault((policy.env_id, mode), []).append(row)
                checkpoint.replace_file(run / "evaluation.json", json.dumps(about | results, indent=2).encode())
        finally:  # what was played is shown, though a later run cannot be
            for (env_id, mode), rows in found.items():
                if len(rows) > 1:
                    means = [f"{sum(column) / len(rows):.1f}" for column in zip(*rows, strict=True)]
                    table.add_row(f"mean of {len(rows)} runs, {env_id}", mode, *means, style="bold")
            if found:
                console.print(table)
        if args.video and game:
            print(film(*game, args.video))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
