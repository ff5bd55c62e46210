"""One process's training run: its folders, logs, checkpoints, signals, and the order in which they happen."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import vmap

from rl_lab import checkpoint
from rl_lab.cli import BaseArgs, RunArgs, Stopped
from rl_lab.distributed import ranks
from rl_lab.episodes import evaluate
from rl_lab.log import Progress, RunLog, rate
from rl_lab.rollout import merge_seeds, split_seeds
from rl_lab.vector import VectorEnv

try:
    import fcntl
except ImportError:  # on Windows nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

FLUSH_EVERY = 10.0  # seconds, for whoever watches TensorBoard
SMALLER = "a smaller learning rate is the usual cure"
_held: dict[Path, int] = {}  # folders of this process's runs, and the open files that keep other processes off


def hold(folder: Path) -> None:
    """Keep other processes from training a run until `let_go`, or the end of this one.

    Raises:
        ValueError: if another process trains it.
    """
    if fcntl is None or folder in _held:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is training {folder}: wait for it, or stop it") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _held[folder] = descriptor


def let_go(folder: Path) -> None:
    """Undo `hold`."""
    if folder in _held:
        os.close(_held.pop(folder))


class BaseRun:
    """A training run of `len(args.seeds)` agents, in steps of whatever kind.

    Args:
        args: all flags; `args.resume` names a run to continue.
        algo: name of the algorithm.
        state: gives the training state as nested dicts of tensors and JSON values.
        about: what a new run's config.json says besides the flags, by name.

    `saved` is the state to continue from, None for a new run. A new run's folders and first checkpoint exist when the
    constructor returns.

    Raises:
        ValueError: if `args.runs_dir` cannot be written, `args.resume` has no good checkpoint of its own, is trained by
            another process, or is to be prolonged though it has reached --until-return.
    """

    def __init__(
        self, args: BaseArgs, algo: str, state: Callable[[], dict[str, Any]], about: dict[str, Any] | None = None
    ) -> None:
        self.args, self.state = args, state
        self.iteration, self.elapsed, self.reached = 0, 0.0, False  # --until-return, in the last evaluation
        self.recent: list[list[float]] = [[] for _ in args.seeds]
        self.saved: dict[str, Any] | None = None
        if args.resume is None:
            flags = args.to_json() | {"device": args.torch_device.type}  # not "auto": generators differ by device
            config = {"total_timesteps": args.total_steps, "args": flags, **(about or {})}
            try:
                self.logs = RunLog.create(args.runs_dir, args.name, algo, args.seeds, config)
                hold(self.logs.checkpoint_folder)
                for index in range(len(args.seeds)):
                    rows = "\n".join(f"|{name}|{value}|" for name, value in flags.items())
                    self.logs.text(index, "hyperparameters", f"|param|value|\n|-|-|\n{rows}")
                self.checkpoint()
            except OSError as error:
                raise ValueError(f"--runs-dir {args.runs_dir}: {error}; name a folder with room to write") from None
        else:
            self.logs = RunLog.open(args.resume)
            hold(self.logs.checkpoint_folder)
            loaded = checkpoint.load(self.logs.checkpoint_folder, to_go_on=True)
            progress = loaded.get("run", {})
            if progress.get("group") != self.logs.config["group"]:
                raise ValueError(f"--resume {args.resume}: its checkpoint is of another run; put its own back")
            prolonged = args.total_steps != self.logs.config["total_timesteps"]
            if prolonged and progress["reached"]:
                told = "has reached its --until-return, which ended it; leave the flag out"
                raise ValueError(f"--total-timesteps {args.total_steps}: the run in {args.resume} {told}")
            self.saved = loaded["state"]
            self.iteration, self.elapsed, self.recent = progress["iteration"], progress["elapsed"], progress["recent"]
            self.reached = progress["reached"]
            self.checkpointed = self.iteration
            self.logs.rewind(progress["logs"])

    def iterations(self, num_iterations: int, steps: int) -> Iterator[int]:
        """Indices of the iterations to do, each of `steps` steps a seed; checkpoints between them.

        The one in which `reached` becomes true is the last.

        Raises:
            Stopped: at --stop-at; after SIGINT or SIGTERM, once the running iteration is finished and checkpointed; at
                once for a second signal, and in the first iteration, which may be compiling for long and has little to
                lose.
        """
        self.saved = None  # whose replay may take most of the memory
        self.steps_per_iteration = steps
        first, caught = self.iteration, []

        def ended() -> bool:
            return self.reached or self.iteration >= num_iterations

        if ended():
            print(f"{self.logs.folders[0]} is finished: {first * steps} steps")
        else:
            for folder in self.logs.folders:
                for name in ("model.safetensors", "verdict.json"):  # of a run that is prolonged
                    (folder / name).unlink(missing_ok=True)
        if self.args.total_steps != self.logs.config["total_timesteps"]:  # here, as a subclass may refuse to go on
            self.logs.prolong(self.args.total_steps)

        def stop(number: int, _: object) -> None:
            caught.append(number)
            if len(caught) > 1 or self.iteration == first:
                raise self._stopped(signal.Signals(number).name, 128 + number)

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.progress = Progress(num_iterations * steps, len(self.args.seeds))
        self.started, self.flushed = time.monotonic() - self.elapsed, time.monotonic()
        try:
            while not ended():
                if self._stops_here:
                    raise self._stopped(f"--stop-at {self.args.stop_at}", 0)
                yield self.iteration
                self.iteration += 1
                self.elapsed = time.monotonic() - self.started
                if caught or ended() or self._stops_here or self._due(self.args.checkpoint_every):
                    self.checkpoint()
                if caught:
                    raise self._stopped(signal.Signals(caught[0]).name, 128 + caught[0])
        except OSError as error:
            raise self._refused(error) from None
        finally:
            self.progress.close()
            let_go(self.logs.checkpoint_folder)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @property
    def end(self) -> int:
        """Steps of one seed at the end of the iteration now running."""
        return (self.iteration + 1) * self.steps_per_iteration

    @property
    def evaluation_due(self) -> bool:
        """Whether the iteration now running ends at or past a multiple of --eval-every."""
        return _crosses(self.iteration, self.steps_per_iteration, self.args.eval_every)

    def require_finite(self, metrics: dict[str, list[float]], cause: Callable[[], str] = lambda: SMALLER) -> None:
        """Raise a FloatingPointError unless every loss is finite. `metrics`: tag -> a number a seed."""
        for name, row in metrics.items():
            if name.endswith("loss") and not all(map(math.isfinite, row)):
                seed = self.args.seeds[[math.isfinite(x) for x in row].index(False)]
                raise self.diverged(f"{name} of seed {seed} is not finite", cause())

    def log_metrics(self, metrics: dict[str, list[float]], extra: str = "") -> None:
        """Log numbers of the iteration now running, tag -> a number a seed, and show how the run goes."""
        sps = self.end / (time.monotonic() - self.started)
        for index in range(len(self.args.seeds)):
            row = {name: x[index] for name, x in metrics.items()}
            self.logs.scalars(index, self.end, {**row, "charts/SPS": rate(sps)})
        if time.monotonic() - self.flushed > FLUSH_EVERY:
            try:
                self.logs.flush()
            except OSError as error:
                raise self._refused(error) from None
            self.flushed = time.monotonic()
        returns = [sum(r) / len(r) if r else math.nan for r in self.recent]
        self.progress.update(self.end, sps * len(self.args.seeds), returns, extra)

    def checkpoint(self) -> None:
        """Save the training state, and where the logs stood.

        Raises:
            FloatingPointError: if a parameter is not finite; the last checkpoint stays.
            OSError: if the disk refuses; the last checkpoint and the logs until then stay.
        """
        state = self.state()
        if not all(torch.isfinite(x).all() for x in flatten(state["params"]).values()):
            raise self.diverged("a parameter is not finite", SMALLER)
        progress = {
            "group": self.logs.config["group"],
            "iteration": self.iteration,
            "elapsed": self.elapsed,
            "recent": self.recent,
            "reached": self.reached,
            "logs": self.logs.state_dict(),
        }
        if not ranks()[0]:  # the other ranks' folders do not last
            checkpoint.save(self.logs.checkpoint_folder, {"state": state, "run": progress})
        self.checkpointed = self.iteration

    def diverged(self, what: str, cause: str) -> FloatingPointError:
        """What to raise where training has come to nothing: the logs until now are kept, and the last checkpoint."""
        self.logs.flush()  # the way there
        begin, saved = (i * self.steps_per_iteration for i in (self.iteration, self.checkpointed))
        where = f"{self.logs.checkpoint_folder} keeps the checkpoint of step {saved}"
        return FloatingPointError(f"{what} after step {begin}; {cause}; {where}")

    def _due(self, every: int) -> bool:
        return _crosses(self.iteration - 1, self.steps_per_iteration, every)

    @property
    def _stops_here(self) -> bool:
        return 0 < self.args.stop_at <= self.iteration * self.steps_per_iteration

    def _stopped(self, cause: str, status: int) -> Stopped:
        step = self.checkpointed * self.steps_per_iteration
        return Stopped(f"{cause}: stopped, checkpointed at step {step}; {self.how_to_go_on}", status)

    def _refused(self, error: OSError) -> OSError:
        return OSError(f"{error}; make room, then {self.how_to_go_on}")

    @property
    def how_to_go_on(self) -> str:
        """What to do after an end before its time, as the end of a sentence."""
        if ranks()[1] > 1:
            return "begin anew: a run under torchrun cannot be continued"
        return f"continue with --resume {self.logs.folders[0]}"


class Run(BaseRun):
    """A training run of `len(args.seeds)` agents in an environment; its steps are env steps.

    Args:
        args, algo, state, about: as `BaseRun` takes them.
        env: whose rows are seeds by environments.
    """

    args: RunArgs

    def __init__(
        self,
        args: RunArgs,
        algo: str,
        env: VectorEnv,
        state: Callable[[], dict[str, Any]],
        about: dict[str, Any] | None = None,
    ) -> None:
        self.env = env
        known = {"action_space": type(env.action_space).__name__, "semantics": getattr(args, "semantics", "")}
        super().__init__(args, algo, state, known | (about or {}))

    def iterations(self, num_iterations: int, steps: int) -> Iterator[int]:
        """As `BaseRun.iterations`; the one in which an evaluation reaches --until-return is the last."""
        yield from super().iterations(num_iterations, steps)
        if self.reached:
            print(f"--until-return {self.args.until_return}: reached at step {self.iteration * steps}")

    def log(self, rollout: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
        """Log one iteration: the episodes that ended in it, and the metrics.

        Args:
            rollout: (T, B, ...) terminated, truncated, episode_returns, episode_lengths, and `game_over` where the
                environment has it.
            metrics: tag -> (S,).
        Raises:
            FloatingPointError: if a loss is not finite; this iteration is neither logged nor checkpointed.
        """
        num_seeds = len(self.args.seeds)
        num_envs = rollout["terminated"].shape[1] // num_seeds
        ended = rollout.get("game_over", rollout["terminated"] | rollout["truncated"])
        columns = (ended, rollout["episode_returns"], rollout["episode_lengths"], *metrics.values())
        done, returns, lengths, *values = on_host(columns)  # the one wait of an iteration
        table: dict[str, list[float]] = {name: x.tolist() for name, x in zip(metrics, values, strict=True)}

        def cause() -> str:
            given = [x for column, x in rollout.items() if column in ("obs", "next_obs", "rewards")]
            sound = all(torch.isfinite(x).all() for x in given)
            return SMALLER if sound else f"nor is what --env {self.args.env} gave"

        self.require_finite(table, cause)
        begin = self.iteration * self.steps_per_iteration
        times, rows = done.nonzero()
        returns, lengths = returns[times, rows], lengths[times, rows]
        for index in range(num_seeds):
            mine = rows // num_envs == index
            if mine.any():
                self.logs.episodes(index, begin + (times[mine] + 1) * num_envs, returns[mine], lengths[mine])
                self.recent[index] = [*self.recent[index], *returns[mine].tolist()][-100:]
        self.log_metrics(table)

    def evaluate(
        self,
        policy: Callable[..., Any],
        params: Any,
        normalizer: Any,
        env: VectorEnv,
        memory: dict[str, Tensor] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Log the mean of one episode in each row of `env`, at the end of the iteration now running.

        Args:
            policy: (params, normalizer, inputs) of one agent to actions for its environments.
            params, normalizer: trees with a leading seed axis S.
            env: new, seeded by `args.evaluation_seeds`, and closed here: each evaluation starts from the same states,
                so a resumed run need not know of earlier ones.
            memory: a recurrent policy's before its first step, {name: (B, H)}; it then returns the new one too.
        Returns:
            (S, N) the returns, and the lengths.
        """

        def act(inputs: dict[str, Tensor]) -> Any:
            inputs = split_seeds(inputs, len(self.args.seeds))
            return merge_seeds(vmap(policy)(params, normalizer, inputs))

        returns, lengths = evaluate(act, env, episodes=1, memory=memory)
        env.close()
        returns, lengths = (x.reshape(len(self.args.seeds), -1) for x in (returns, lengths))
        for index, (value, length) in enumerate(zip(returns.mean(1).tolist(), lengths.mean(1).tolist(), strict=True)):
            self.logs.scalars(index, self.end, {"eval/episodic_return": value, "eval/episodic_length": length})
        wanted = self.args.until_return
        self.reached = wanted is not None and bool((returns.mean(1) >= wanted).all())
        return returns, lengths

    def finish(self, params: dict[str, Any], normalizer: Any) -> None:
        """Write each seed's parameters and statistics as model.safetensors, say where all is, and close `env`."""
        for index, folder in enumerate(self.logs.folders):
            tensors = flatten({"params": params, "normalizer": normalizer})
            model = {name: x[index] for name, x in tensors.items()}
            checkpoint.save_tensors(folder / "model.safetensors", model, {"algo": self.logs.config["algo"]})
            print(f"{folder}: {self.score(index)}")
        self.logs.close()
        self.env.close()

    def score(self, index: int) -> str:
        """How well the agent of seed number `index` did, in words."""
        recent = self.recent[index]
        return f"{sum(recent) / len(recent):.1f} over the last {len(recent)} episodes" if recent else "no episode ended"


def on_host(tensors: Sequence[Tensor]) -> list[NDArray[Any]]:
    """Copies as arrays, after at most one wait for the device."""
    copies = [x.to("cpu", non_blocking=True) for x in tensors]
    if tensors[0].is_cuda:
        torch.cuda.synchronize()
    return [x.numpy() for x in copies]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts of tensors to one dict with names like "params/actor.0.weight"."""
    flat: dict[str, Tensor] = {}
    for name, node in tree.items():
        flat |= flatten(node, f"{prefix}{name}/") if isinstance(node, dict) else {prefix + name: node}
    return flat


def _crosses(iteration: int, steps: int, every: int) -> bool:
    """Whether iteration number `iteration`, of `steps` steps, reaches a multiple of `every`."""
    return every > 0 and (iteration + 1) * steps // every > iteration * steps // every
