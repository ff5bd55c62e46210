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
    """Weights (S, n) whose sums over blocks are kept, so that a leaf is found or changed in O(sqrt(n)) arithmetic.

    A tree of two levels with sqrt(n) children each: a few calls on vectors, where a binary tree takes log2(n) of them.
    """

    def __init__(self, num_seeds: int, size: int, device: torch.device) -> None:
        self.width = math.isqrt(size - 1) + 1
        shape = (num_seeds, -(-size // self.width), self.width)
        self.leaves = torch.zeros(shape, dtype=torch.float64, device=device)
        self.sums = torch.zeros(shape[:2], dtype=torch.float64, device=device)
        self._seeds = torch.arange(num_seeds, device=device).unsqueeze(1)

    def set(self, indices: Tensor, weights: Tensor) -> None:
        """Set leaves (S, k); of an index given twice, the weights must be equal."""
        self.leaves.flatten(1).scatter_(1, indices, weights)
        blocks = indices // self.width
        self.sums.scatter_(1, blocks, self.leaves[self._seeds, blocks].sum(2))

    def get(self, indices: Tensor) -> Tensor:
        """(S, k) weights."""
        return self.leaves.flatten(1).gather(1, indices)

    def find(self, points: Tensor) -> Tensor:
        """(S, k) leaves on which `points`, uniform in [0, 1), fall when all weights lie side by side on that interval.

        A leaf of weight 0 is never found, also not by rounding.
        """
        block, rest = self._fall(self.sums.cumsum(1), points * self.sums.sum(1, keepdim=True))
        inner = self.leaves[self._seeds, block].cumsum(2)
        leaf, _ = self._fall(inner, rest.unsqueeze(2))
        return block * self.width + leaf.squeeze(2)

    @staticmethod
    def _fall(cumulated: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """The interval each point falls into, and how far."""
        total = cumulated[..., -1:]
        points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # rounding may reach the total
        found = torch.searchsorted(cumulated, points, right=True)
        before = torch.where(found > 0, cumulated.gather(-1, (found - 1).clamp(min=0)), 0.0)
        return found, points - before


class Replay:
    """A ring of transitions with the newest `capacity` of them to sample from.

    n-step transitions are put together when sampled [Sutton 1988; Mnih et al. 2016, Eq. 1 of the n-step return]:

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
            come between two checkpoints, a run that is killed has overwritten nothing that its checkpoint can sample.
        compile: put batches together in one compiled call.
    Raises:
        ValueError: if the columns are larger than the free memory (or disk), before they are allocated.
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
        self._width, self._seeds = num_seeds * num_envs, torch.arange(num_seeds, device=device).unsqueeze(1)
        self.gamma, self.n_step, self.alpha, self.stack = gamma, n_step, alpha, stack
        self.capacity = capacity // num_envs  # in rows
        self.rows = self.capacity + max(stack - 1, 0) + spare
        if stack:  # next_obs is the next row's, but at the ends of episodes
            spec = {name: ((x[0][1:], x[1]) if name == "obs" else x) for name, x in spec.items() if name != "next_obs"}
        self.spec, self.folder = spec, folder
        self._check_room(capacity)
        self._files: list[np.memmap[Any, Any]] = []
        self.columns = {name: self._allocate(name, shape, dtype) for name, (shape, dtype) in spec.items()}
        self.ends: dict[int, dict[int, Tensor]] = {}  # row -> place in it -> last frame of an episode that ended
        self.written = 0  # rows
        self.tree = SumTree(num_seeds, self.rows * num_envs, self.device) if alpha else None
        self.max_priority = torch.ones(num_seeds, 1, dtype=torch.float64, device=self.device)
        self._gather = Compiled(self._whole, ("replay", gamma, n_step), compile and not stack)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(self.rows * self._width * math.prod(shape) * dtype.itemsize for shape, dtype in self.spec.values())

    def _check_room(self, capacity: int) -> None:
        if self.folder:
            room, where, way = shutil.disk_usage(self.folder).free, "on disk", ""
        elif self.device.type == "cuda":
            room, where, way = torch.cuda.mem_get_info(self.device)[0], "on the device", ", --device cpu"
        else:
            room, where, way = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), "", " or --replay-on-disk"
            if (info := Path("/proc/meminfo")).exists():  # which counts what caches would give back
                room = 1024 * int(info.read_text().partition("MemAvailable:")[2].split()[0])
        if self.nbytes > room:
            need, free = (f"{x / 1e9:.1f} GB" for x in (self.nbytes, room))
            raise ValueError(
                f"--buffer-size {capacity} needs {need}, and {free} are free {where}; a smaller one{way} works"
            )

    def _allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape, fresh = (self.rows, self._width, *shape), True
        if self.folder is None:
            column = torch.zeros(shape, dtype=dtype, device=self.device)
        else:
            path, kind = self.folder / f"replay.{name}", torch.empty(0, dtype=dtype).numpy().dtype
            if fresh := not path.exists():
                with open(path, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, math.prod(shape) * dtype.itemsize)  # a full disk shows here
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
        if self.tree:  # rows that leave, rows that are complete now, rows that wait
            zero = torch.zeros_like(self.max_priority)
            self._set_rows(self.written - self.capacity - num_steps, self.written - self.capacity, zero)
            waiting = max(self.written - self._pending, 0)
            self._set_rows(max(waiting - num_steps, 0), waiting, self.max_priority**self.alpha)
            self._set_rows(waiting, self.written, zero)

    def _keep_ends(self, rollout: Batch, first: int, count: int, head: int) -> None:
        for row in range(head, head + count):
            self.ends.pop(row, None)
        ended = (rollout["terminated"] | rollout["truncated"])[first : first + count]
        for t, place in ended.nonzero().tolist():
            self.ends.setdefault(head + t, {})[place] = rollout["next_obs"][first + t, place, -1].clone()

    def _set_rows(self, first: int, last: int, weight: Tensor) -> None:
        """Set the weights (S, 1) of all transitions in rows `first` to `last`, counted since the start."""
        assert self.tree
        num_seeds, num_envs = self.shape
        rows = torch.arange(first, last, device=self.device) % self.rows
        leaves = (rows.unsqueeze(1) * num_envs + torch.arange(num_envs, device=self.device)).flatten()
        self.tree.set(leaves.expand(num_seeds, -1), weight.expand(-1, len(leaves)))

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
        num_seeds, num_envs = self.shape
        if self.tree:
            batch_size = points.shape[1]
            leaves = self.tree.find((torch.arange(batch_size, device=self.device) + points) / batch_size)
            probabilities = self.tree.get(leaves) / self.tree.sums.sum(1, keepdim=True)
            weights = (len(self) * probabilities) ** -beta
            more = {"leaves": leaves, "weights": (weights / weights.amax(1, keepdim=True)).float()}
        else:
            oldest = (self.written - self.size) * num_envs
            leaves, more = ((points * len(self)).long() + oldest) % (self.rows * num_envs), {}
        if num_seeds > 1:  # from one seed's transitions to all of them
            leaves = (leaves // num_envs * num_seeds + self._seeds) * num_envs + leaves % num_envs
        return {**self.gather(leaves), **more}

    def prioritize(self, leaves: Tensor, priorities: Tensor) -> None:
        """Set the priorities (S, batch), positive, of the `leaves` that were sampled just before."""
        assert self.tree
        priorities = priorities.double()
        self.max_priority = torch.maximum(self.max_priority, priorities.amax(1, keepdim=True))
        self.tree.set(leaves, priorities**self.alpha)

    def gather(self, indices: Tensor) -> Batch:
        """The transitions at `indices` (S, batch)."""
        if not self.stack:
            batch, _ = self._gather(self.columns, indices)
            return batch  # type: ignore[no-any-return]
        rest = {name: column for name, column in self.columns.items() if name != "obs"}
        batch, last = self._whole(rest, indices)
        return {**batch, "obs": self._stacked(indices), "next_obs": self._successors(last)}

    def _whole(self, columns: Batch, indices: Tensor) -> tuple[Batch, Tensor]:
        """Transitions of n steps, and the index of the last step of each."""
        width = columns["rewards"].shape[1]
        flat = {name: column.flatten(0, 1) for name, column in columns.items()}
        batch = {name: x[indices] for name, x in flat.items()}
        last, discounts = indices, torch.full_like(batch["rewards"], self.gamma)
        for _ in range(self.n_step - 1):
            going = ~(batch["terminated"] | batch["truncated"])
            last = torch.where(going, (last + width) % len(flat["rewards"]), last)
            batch["rewards"] = batch["rewards"] + torch.where(going, discounts * flat["rewards"][last], 0.0)
            discounts = torch.where(going, discounts * self.gamma, discounts)
            batch |= {name: flat[name][last] for name in ("terminated", "truncated")}
        if "next_obs" in flat:
            batch["next_obs"] = flat["next_obs"][last]
        return {**batch, "discounts": discounts * ~batch["terminated"]}, last

    def _stacked(self, indices: Tensor) -> Tensor:
        """(S, batch, stack, ...) frames up to a step, none from before its episode."""
        frames = self.columns["obs"].flatten(0, 1)
        stack = [frames[indices]]
        for _ in range(self.stack - 1):
            before = (indices - self._width) % len(frames)
            indices = torch.where(self._ended(before), indices, before)
            stack.append(frames[indices])
        return torch.stack(stack[::-1], dim=2)

    def _successors(self, indices: Tensor) -> Tensor:
        """(S, batch, stack, ...) frames up to what a step led to."""
        frames = self.columns["obs"].flatten(0, 1)
        newest = frames[(indices + self._width) % len(frames)]
        for seed, i in self._ended(indices).nonzero().tolist():
            row, place = divmod(int(indices[seed, i]), self._width)
            newest[seed, i] = self.ends[row][place]
        return torch.cat([self._stacked(indices)[:, :, 1:], newest.unsqueeze(2)], dim=2)

    def _ended(self, indices: Tensor) -> Tensor:
        """(S, batch) bool, whether an episode ended with a step."""
        terminated, truncated = (self.columns[name].flatten()[indices] for name in ("terminated", "truncated"))
        return terminated | truncated

    def state_dict(self) -> dict[str, Any]:
        """Everything but the columns that files keep, which are on disk when this returns."""
        for file in self._files:
            file.flush()
        filled = min(self.written, self.rows)
        columns = {} if self.folder else {name: x[:filled] for name, x in self.columns.items()}
        state = {"written": self.written, "columns": columns, "max_priority": self.max_priority}
        keys = [(row, place) for row, frames in self.ends.items() for place in frames]
        if keys:
            last = [frame for frames in self.ends.values() for frame in frames.values()]
            state["ends"] = {"keys": torch.tensor(keys), "frames": torch.stack(last)}
        return state | ({"leaves": self.tree.leaves, "sums": self.tree.sums} if self.tree else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()` of a replay made with the same arguments, in the same folder."""
        self.written, self.max_priority = state["written"], state["max_priority"].to(self.device)
        for name, column in state["columns"].items():
            self.columns[name][: len(column)] = column.to(self.device)
        self.ends = {}
        if ends := state.get("ends"):
            for (row, place), frame in zip(ends["keys"].tolist(), ends["frames"].to(self.device), strict=True):
                self.ends.setdefault(row, {})[place] = frame
        if self.tree:
            self.tree.leaves, self.tree.sums = state["leaves"].to(self.device), state["sums"].to(self.device)
