"""Off-policy storage: a ring of columns on a device, sampled uniformly or by priority.

A ring keeps the newest transitions of S seeds with N environments each. Every column is (R, S * N, ...): rows as those
of a rollout (`rl_lab.rollout`), which are added as they are. A transition's index is row * S * N + place in the row.

    replay = Replay(transitions(env), num_seeds=S, num_envs=N, capacity=10_000, gamma=0.99)
    replay.add(rollout)                                     # {"obs": (T, S * N, *obs), "rewards": (T, S * N), ...}
    batch = replay.sample(draw_uniform((128,), generators)) # {"obs": (S, 128, *obs), "discounts": (S, 128), ...}

Stacked images, such as Atari's four frames, are kept as single frames: the stack of a row is put together from the rows
before it, its episode's first frame repeated where the episode is younger than the stack.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lab.compiler import Compiled
from rl_lab.memory import free_memory
from rl_lab.vector import VectorEnv

Batch = dict[str, Tensor]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def transitions(env: VectorEnv) -> Spec:
    """Shape and dtype of the columns of a transition; floating observations and actions are kept as float32."""

    def kept(space: Any) -> tuple[tuple[int, ...], torch.dtype]:
        dtype = torch.from_numpy(np.empty(0, space.dtype)).dtype
        return space.shape, torch.float32 if dtype.is_floating_point else dtype

    obs, flag = kept(env.observation_space), ((), torch.bool)
    columns = {"obs": obs, "actions": kept(env.action_space), "rewards": ((), torch.float32)}
    return {**columns, "next_obs": obs, "terminated": flag, "truncated": flag}


def draw_uniform(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """(*shape[:-1], S, shape[-1]) float64 in [0, 1) for `Replay.sample`, each seed's from its own generator."""
    draws = [torch.rand(shape, dtype=torch.float64, generator=g, device=g.device) for g in generators]
    return torch.stack(draws, dim=-2)


class SumTree:
    """Weights of `size` leaves for each of S seeds, kept with the sums of their blocks, to draw leaves by weight.

    Three levels with the cube root of `size` children each: a few calls on whole batches, where a binary tree takes
    log2(size) of them.
    """

    def __init__(self, num_seeds: int, size: int, device: torch.device) -> None:
        width = next(width for width in itertools.count(1) if width**3 >= size)
        self.levels = [torch.zeros(num_seeds, width**k, width, dtype=torch.float64, device=device) for k in range(3)]

    def set(self, indices: Tensor, weights: Tensor) -> None:
        """Set leaves (S, k); of an index given twice, the weights must be equal."""
        for level in reversed(self.levels):
            level.flatten(1).scatter_(1, indices, weights)
            indices = indices // level.shape[2]
            weights = _rows(level, indices).sum(2)


def find(levels: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Leaves (S, k) of a SumTree on which `points` (S, k) fall when all weights lie side by side on [0, 1).

    A leaf of weight 0 is never found, also not by rounding; all weights must not be 0. Also returns each leaf's share
    of all weights.
    """
    total = levels[0].sum((1, 2)).unsqueeze(1)
    found, rest = torch.zeros_like(points, dtype=torch.int64), points * total
    for level in levels:
        weights = _rows(level, found)
        ends = weights.cumsum(2)
        # What rounding, here or above, puts beyond the last weight belongs to it.
        rest = torch.minimum(rest.unsqueeze(2), torch.nextafter(ends[..., -1:], torch.zeros_like(ends[..., -1:])))
        child = torch.searchsorted(ends, rest, right=True)
        start = torch.where(child > 0, ends.gather(2, (child - 1).clamp(min=0)), 0.0)
        found, rest = found * level.shape[2] + child.squeeze(2), (rest - start).squeeze(2)
    return found, weights.gather(2, child).squeeze(2) / total


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows (S, k, ...) of each seed's own (S, n, ...)."""
    seeds = torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]
    return _take(x, seeds + indices)


def _take(x: Tensor, indices: Tensor) -> Tensor:
    """x.flatten(0, 1)[indices], which copies whole rows."""
    return x.flatten(0, 1).index_select(0, indices.flatten()).view(*indices.shape, *x.shape[2:])


class Replay:
    """A ring of transitions with the newest `capacity` of them to sample from.

    n-step transitions are put together when sampled [Sutton 1988; Hessel et al. 2018, section 2]:

        rewards = sum_{k < m} gamma^k r_{t+k},   next_obs = s_{t+m},   discounts = gamma^m * (1 - terminated)

    with m = n_step, or less where the episode ends before. Prioritized sampling [Schaul et al. 2016, Eq. 1]:
    P(i) = p_i^alpha / sum_k p_k^alpha, one sample from each of `batch_size` equal ranges; new transitions get the
    largest priority so far.

    Args:
        spec: shape and dtype of each column; `transitions(env)`.
        num_seeds, num_envs: S and N.
        capacity: transitions of one seed; N must divide it.
        gamma, n_step: discount per env step, and steps of a transition.
        alpha: exponent of the priorities; 0 samples uniformly.
        stack: frames of a stacked observation (stack, ...) to keep once each; 0 keeps observations as they are.
        folder: where columns are kept as memory-mapped files; None keeps them in memory.
        spare: rows kept beyond the capacity. A file holds also what came after a checkpoint; with as many spare rows as
            come after it at most, a run that is killed has overwritten nothing that its checkpoint can sample.
        compile: put batches together in one compiled call.
    Raises:
        ValueError: if the columns are larger than the free memory (or disk), before they are allocated, or some of the
            folder's files are missing.
    """

    def __init__(
        self,
        spec: Spec,
        num_seeds: int,
        num_envs: int,
        capacity: int,
        gamma: float,
        n_step: int = 1,
        alpha: float = 0.0,
        stack: int = 0,
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        spare: int = 0,
        compile: bool = False,
    ) -> None:
        self.shape, self.device = (num_seeds, num_envs), torch.device(device)
        self._width = num_seeds * num_envs
        self.gamma, self.n_step, self.alpha, self.stack = gamma, n_step, alpha, stack
        self.capacity = capacity // num_envs  # in rows
        self.rows = self.capacity + max(stack - 1, 0) + spare
        if stack:  # next_obs is the next row's, but at the ends of episodes
            spec = {name: ((x[0][1:], x[1]) if name == "obs" else x) for name, x in spec.items() if name != "next_obs"}
        self.spec, self.folder = spec, folder
        self.ends: dict[int, dict[int, Tensor]] = {}  # row -> place in it -> last frame of an episode that ended
        paths = [folder / f"replay.{name}" for name in spec] if folder else []
        lost = [path for path in paths if not path.exists()]
        if 0 < len(lost) < len(paths):
            raise ValueError(f"{lost[0]} is missing beside the others: put it back")
        self._check_room(capacity)
        self._files: list[np.memmap[Any, Any]] = []
        self.columns = {name: self._allocate(name, shape, dtype) for name, (shape, dtype) in spec.items()}
        self.written = 0  # rows
        self.tree = SumTree(num_seeds, self.rows * num_envs, self.device) if alpha else None
        self.max_priority = torch.ones(num_seeds, 1, dtype=torch.float64, device=self.device)
        self._draw = Compiled(self._drawn, ("replay", self.shape, gamma, n_step, stack), compile, in_place=(0, 1))

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, and of the frames kept beside them."""
        frames = sum(frame.nbytes for frames in self.ends.values() for frame in frames.values())
        sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())
        return self.rows * self._width * sum(sizes) + frames

    def _check_room(self, capacity: int) -> None:
        need = self.nbytes
        if self.folder:
            room, where, way = shutil.disk_usage(self.folder).free, "on disk", " or --checkpoint-every"
            need -= sum(path.stat().st_size for path in self.folder.glob("replay.*"))  # of the run that is resumed
        else:
            cuda, room = self.device.type == "cuda", free_memory(self.device)
            where, way = ("on the device", ", --device cpu") if cuda else ("in memory", " or --replay-folder")
        if need > room:
            needed, free = (f"{x / 1e9:.1f} GB" for x in (need, room))
            raise ValueError(
                f"--buffer-size {capacity} needs {needed}, {free} are free {where}; a smaller one{way} works"
            )

    def _require_room(self, saved: Batch) -> None:
        need, room = sum(column.nbytes for column in saved.values()), free_memory(self.device)
        if self.device.type == "cpu" and need > room:  # elsewhere all columns were allocated as they were made
            needed, free = (f"{x / 1e9:.1f} GB" for x in (need, room))
            raise ValueError(
                f"--resume needs {needed} more to put back the replay beside its checkpoint, {free} are free; "
                "free as much, or resume where there is more"
            )

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape, fresh = (self.rows, self._width, *shape), True
        if self.folder is None:
            column = torch.zeros(shape, dtype=dtype, device=self.device)
        else:
            path, kind = self.folder / f"replay.{name}", torch.empty(0, dtype=dtype).numpy().dtype
            size = math.prod(shape) * dtype.itemsize
            if fresh := not path.exists():
                with open(path, "wb") as file:
                    if hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here
                    else:
                        file.truncate(size)
            if path.stat().st_size != size:
                raise ValueError(f"{path} has another size: keep --buffer-size and --checkpoint-every as they were")
            self._files.append(np.memmap(path, kind, "r+", shape=shape))
            column = torch.from_numpy(self._files[-1])
        if fresh and name == "terminated":
            column.fill_(True)  # what is before the first row is over
        return column

    def __len__(self) -> int:
        """Transitions of one seed that can be sampled."""
        return max(self.size - self._pending, 0) * self.shape[1]

    @property
    def size(self) -> int:
        """Rows written of the newest `capacity`."""
        return min(self.written, self.capacity)

    @property
    def _pending(self) -> int:
        """Newest rows that wait for later ones: for their n steps, or for the next frame."""
        return self.n_step - 1 + bool(self.stack)

    def add(self, rollout: Batch) -> None:
        """Add T steps of all environments, (T, S * N, ...); columns that the spec does not name are left out."""
        num_steps, first = len(rollout["rewards"]), 0
        while first < num_steps:  # in two parts where the ring's end comes between
            head = self.written % self.rows
            count = min(num_steps - first, self.rows - head)
            for name, column in self.columns.items():
                x = rollout[name][first : first + count]
                column[head : head + count] = x[:, :, -1] if self.stack and name == "obs" else x
            if self.stack:
                self._keep_ends(rollout, first, count, head)
            self.written += count
            first += count
        if self.tree:
            self._weigh(num_steps)

    def _weigh(self, num_steps: int) -> None:
        """Set what `num_steps` new rows change: the weights of those that leave, that wait, and that are complete."""
        assert self.tree
        num_seeds, num_envs = self.shape
        oldest, complete = self.written - self.size, self.written - self._pending
        left = max(oldest - num_steps, self.written - self.rows, 0)  # not those that are overwritten
        changed = [*range(left, oldest), *range(max(complete - num_steps, oldest), self.written)]
        rows = torch.tensor(changed, device=self.device)
        leaves = (rows % self.rows).unsqueeze(1) * num_envs + torch.arange(num_envs, device=self.device)
        live = ((rows >= oldest) & (rows < complete)).repeat_interleave(num_envs)
        weights = live * self.max_priority**self.alpha
        self.tree.set(leaves.flatten().expand(num_seeds, -1), weights)

    def _keep_ends(self, rollout: Batch, first: int, count: int, head: int) -> None:
        for row in range(head, head + count):
            self.ends.pop(row, None)
        ended = (rollout["terminated"] | rollout["truncated"])[first : first + count]
        frames = rollout["next_obs"][first : first + count, :, -1][ended]  # all at once: a GPU is waited for only here
        for (t, place), frame in zip(ended.nonzero().tolist(), frames, strict=True):
            self.ends.setdefault(head + t, {})[place] = frame.clone()

    def sample(self, points: Tensor, beta: float = 1.0) -> Batch:
        """Put together a batch.

        Args:
            points: (S, batch) as `draw_uniform` gives them.
            beta: exponent of the importance weights, prioritized sampling only [Schaul et al. 2016, section 3.4].
        Returns:
            every column (S, batch, ...), `next_obs` and `discounts`; with priorities also `leaves`, for `prioritize`,
            and `weights`: (len * P(i))^-beta over their largest in the batch.
        Raises:
            ValueError: if nothing can be sampled yet.
        """
        if not len(self):
            raise ValueError(f"nothing to sample: {self.size} steps were added, {self._pending + 1} are needed")
        columns = {name: x for name, x in self.columns.items() if not (self.stack and name == "obs")}
        window = torch.tensor([self.written - self.size, len(self)], device=self.device)
        levels = self.tree.levels if self.tree else []
        exponent = torch.tensor(-beta, dtype=torch.float64, device=self.device)
        return self._with_frames(self._draw(columns, levels, points, window, exponent))

    def _drawn(self, columns: Batch, levels: list[Tensor], points: Tensor, window: Tensor, exponent: Tensor) -> Batch:
        (num_seeds, num_envs), batch_size = self.shape, points.shape[1]
        (oldest, count), size = window, self.rows * num_envs
        if levels:
            ranges = (torch.arange(batch_size, device=points.device) + points) / batch_size
            leaves, probabilities = find(levels, ranges)
            weights = (count * probabilities) ** exponent
            more = {"leaves": leaves, "weights": (weights / weights.amax(1, keepdim=True)).float()}
        else:
            leaves, more = ((points * count).long() + oldest * num_envs) % size, {}
        # From one seed's transitions to all of them.
        seeds = torch.arange(num_seeds, device=points.device).unsqueeze(1)
        indices = (leaves // num_envs * num_seeds + seeds) * num_envs + leaves % num_envs
        return {**self._whole(columns, indices), **more}

    def prioritize(self, leaves: Tensor, priorities: Tensor) -> None:
        """Set the priorities (S, batch), positive, of the `leaves` that were sampled just before."""
        assert self.tree
        # A run that diverges is stopped by its loss, when that is logged; until then there is something to sample.
        priorities = priorities.double().nan_to_num(1.0, posinf=1e30)
        self.max_priority = torch.maximum(self.max_priority, priorities.amax(1, keepdim=True))
        self.tree.set(leaves, priorities**self.alpha)

    def _whole(self, columns: Batch, indices: Tensor) -> Batch:
        """Transitions of n steps; of stacked observations the frames' indices, and the `last` step's."""
        size = self.rows * self._width
        batch = {name: _take(x, indices) for name, x in columns.items() if not (self.stack and name == "obs")}
        last, discounts = indices, torch.full_like(batch["rewards"], self.gamma)
        for _ in range(self.n_step - 1):
            going = ~(batch["terminated"] | batch["truncated"])
            last = torch.where(going, (last + self._width) % size, last)
            batch["rewards"] = batch["rewards"] + torch.where(going, discounts * _take(columns["rewards"], last), 0.0)
            discounts = torch.where(going, discounts * self.gamma, discounts)
            batch |= {name: _take(columns[name], last) for name in ("terminated", "truncated")}
        batch["discounts"] = discounts * ~batch["terminated"]
        if self.stack:
            newest = ((last + self._width) % size).unsqueeze(2)
            successor = torch.cat([self._stack(columns, last)[..., 1:], newest], dim=2)
            batch |= {"obs": self._stack(columns, indices), "next_obs": successor, "last": last}
        elif self.n_step > 1:
            batch["next_obs"] = _take(columns["next_obs"], last)
        return batch

    def _stack(self, columns: Batch, indices: Tensor) -> Tensor:
        """(S, batch, stack) indices of the frames up to a step, none from before its episode."""
        steps = [indices]
        for _ in range(self.stack - 1):
            before = (steps[-1] - self._width) % (self.rows * self._width)
            ended = _take(columns["terminated"], before) | _take(columns["truncated"], before)
            steps.append(torch.where(ended, steps[-1], before))
        return torch.stack(steps[::-1], dim=2)

    def _with_frames(self, batch: Batch) -> Batch:
        """The frames for their indices; the last one of an episode's end is kept beside the columns."""
        if not self.stack:
            return batch
        last, ended = batch.pop("last"), batch["terminated"] | batch["truncated"]
        batch |= {name: _take(self.columns["obs"], batch[name]) for name in ("obs", "next_obs")}
        if steps := last[ended].tolist():
            frames = [self.ends[step // self._width][step % self._width] for step in steps]
            batch["next_obs"][:, :, -1][ended] = torch.stack(frames)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Everything but the columns that files keep, which are on disk when this returns.

        Columns are those of a full ring once it can be sampled whole, so that they can be taken over as they are.
        """
        for file in self._files:
            file.flush()
        filled = self.written if self.written < self.capacity else self.rows
        columns = {} if self.folder else {name: x[:filled] for name, x in self.columns.items()}
        state = {"written": self.written, "columns": columns, "max_priority": self.max_priority}
        keys = [(row, place) for row, frames in self.ends.items() for place in frames]
        if keys:
            last = [frame for frames in self.ends.values() for frame in frames.values()]
            state["ends"] = {"keys": torch.tensor(keys), "frames": torch.stack(last)}
        return state | ({"tree": {str(k): level for k, level in enumerate(self.tree.levels)}} if self.tree else {})

    def load_state_dict(self, state: dict[str, Any], cut: Tensor | None = None) -> None:
        """Continue from `state_dict()` of a replay made with the same arguments, in the same folder.

        Columns of a full ring on this device are taken over as they are, so that no memory need hold them twice.

        Args:
            cut: (S * N, *obs) the newest row's successors, where new episodes follow it; None where these go on.
        Raises:
            ValueError: if the others are larger than the free memory.
        """
        self.written, self.max_priority = state["written"], state["max_priority"].to(self.device)
        saved: Batch = state["columns"]
        if self.device.type == "cpu" and {len(column) for column in saved.values()} == {self.rows}:
            self.columns |= saved
        else:
            self._require_room(saved)
            for name, column in saved.items():
                self.columns[name][: len(column)].copy_(column)
        self.ends = {}
        if ends := state.get("ends"):
            for (row, place), frame in zip(ends["keys"].tolist(), ends["frames"].to(self.device), strict=True):
                self.ends.setdefault(row, {})[place] = frame
        if self.tree:
            for k, level in enumerate(self.tree.levels):
                level.copy_(state["tree"][str(k)])
        if cut is not None:
            row = (self.written - 1) % self.rows
            self.columns["truncated"][row] |= ~self.columns["terminated"][row]
            for place in range(len(cut)) if self.stack else ():  # whose episode had ended has a frame already
                self.ends.setdefault(row, {}).setdefault(place, cut[place, -1].clone())
