"""Atari 2600 games in batches, on ale_py's emulator, preprocessed exactly as CleanRL does."""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.utils._pytree as pytree
from ale_py import roms
from torch import Tensor

from rl_lab.vector import Step, VectorEnv

SUFFIX = "NoFrameskip-v4"  # of the ids that CleanRL trains on
MAX_FRAMES = 108_000  # of a game: half an hour, as Gymnasium cuts these ids
MAX_NOOPS = 30
SIZE = 84  # of an observation, in pixels


class Game:
    """One emulator under the wrappers of CleanRL's ppo_atari.py and dqn_atari.py, in their order.

    An episode is a life (detail 16 of PPO, numbered after Huang et al. 2022): where one is lost the game goes on, and
    only a game that is over starts anew. The wrappers' oddities are kept: a game that ends within a step shows frames
    of the step before, and one that ends while a life begins is not counted.

    Its state is complete where ale_py's is: up to 0.12.1 that lacks a flag which Qbert's frames depend on (pull request
    732 of the Arcade Learning Environment), so a Qbert that is resumed may go another way.

    Attributes:
        score, steps: unclipped reward of the running game, and the agent's steps in it.
        over: whether the last step ended the game.
    """

    def __init__(self, rom: Path, rng: np.random.Generator, sticky_actions: float) -> None:
        self.rng, self.sticky_actions = rng, sticky_actions
        self.ale = ale_py.ALEInterface()
        self.ale.setInt("random_seed", int(rng.integers(2**31)))  # Adventure begins by it
        self.ale.setInt("max_num_frames_per_episode", MAX_FRAMES)
        self.ale.setFloat("repeat_action_probability", 0.0)  # the binding does not save what its own would repeat
        self.ale.loadROM(rom)
        actions = self.ale.getMinimalActionSet()
        self.actions, self.has_fire = [action.value for action in actions], ale_py.Action.FIRE in actions
        self.screens = np.zeros((2, *self.ale.getScreenDims(), 3), np.uint8)  # of the third and fourth frame of a step
        self.seen = np.zeros_like(self.screens[0])
        self.score = self.steps = self.lives = self.held = 0
        self.over = True

    def begin(self) -> np.ndarray:
        """Start the next life, or a new game where the last one is over; its first frame, (SIZE, SIZE) uint8."""
        self._next_life()
        frame = self._frame()
        for action in (1, 2) if self.has_fire else ():  # detail 17
            _, terminated, truncated = self._play(action)
            frame = self._frame()
            if terminated or truncated:
                self._next_life()
        return frame

    def step(self, action: int) -> tuple[int, bool, bool, np.ndarray]:
        """Unclipped reward, terminated (by the life lost, too), truncated, and the frame, (SIZE, SIZE) uint8."""
        self.steps += 1
        return *self._play(action), self._frame()

    def _frame(self) -> np.ndarray:
        """What was seen, resized in colour and then made grey (detail 18)."""
        small = cv2.resize(self.seen, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        return np.asarray(cv2.cvtColor(small, cv2.COLOR_RGB2GRAY))

    def _next_life(self) -> None:
        if not self.over:
            self._skip(0)
        if self.over or self.ale.game_over():
            self._restart()
            for _ in range(self.rng.integers(1, MAX_NOOPS + 1)):  # detail 14
                self._act(0)
                if self.ale.game_over():
                    self._restart()
            self.ale.getScreenRGB(self.seen)
        self.lives = self.ale.lives()

    def _play(self, action: int) -> tuple[int, bool, bool]:
        reward = self._skip(action)
        self.over, lives = self.ale.game_over(), self.ale.lives()
        lost = 0 < lives < self.lives  # Qbert stays at 0 for some frames before it is over
        self.lives = lives
        return reward, lost or self.ale.game_over(with_truncation=False), self.ale.game_truncated()

    def _skip(self, action: int) -> int:
        """The same action for four frames, of which the brighter of the last two is seen (detail 15); the reward."""
        before = self.score
        for screen in (None, None, *self.screens):
            self._act(action)
            if screen is not None:
                self.ale.getScreenRGB(screen)
            if self.ale.game_over():
                break
        np.maximum(self.screens[0], self.screens[1], out=self.seen)
        return self.score - before

    def _act(self, action: int) -> None:
        if not self.sticky_actions or self.rng.random() >= self.sticky_actions:
            self.held = action
        self.score += self.ale.act(self.actions[self.held])

    def _restart(self) -> None:
        self.ale.reset_game()
        self.score = self.steps = self.held = 0

    def state_dict(self) -> dict[str, Any]:
        emulator = self.ale.cloneState(include_rng=True).serialize()
        return {
            "emulator": np.frombuffer(emulator, np.uint8).copy(),
            "screens": self.screens.copy(),
            "totals": [self.score, self.steps],
            "held": self.held,
            "generator": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ale.restoreState(ale_py.ALEState(state["emulator"].tobytes()))
        self.screens[:] = state["screens"]
        (self.score, self.steps), self.held = state["totals"], state["held"]
        self.rng.bit_generator.state = state["generator"]
        self.lives, self.over = self.ale.lives(), self.ale.game_over()


class Games:
    """Some games, one after the other; its methods return one entry for each."""

    def __init__(self, rom: Path, rows: Sequence[tuple[int, int]], sticky_actions: float) -> None:
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.games = [Game(rom, np.random.default_rng(row), sticky_actions) for row in rows]

    def num_actions(self) -> int:
        """Actions that the game knows."""
        return len(self.games[0].actions)

    def reset(self) -> np.ndarray:
        """The first frames of new games."""
        for game in self.games:
            game.over = True
        return np.stack([game.begin() for game in self.games])

    def step(self, actions: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Unclipped rewards, terminated, truncated, frames; the running games' scores, steps and whether they are over;
        and the next life's first frames where one has ended, the same frames elsewhere."""
        rows = []
        for game, action in zip(self.games, actions, strict=True):
            reward, terminated, truncated, frame = game.step(action)
            totals = game.score, game.steps, game.over
            first = game.begin() if terminated or truncated else frame
            rows.append((reward, terminated, truncated, frame, *totals, first))
        return tuple(np.array(column) for column in zip(*rows, strict=True))

    def render(self) -> list[np.ndarray]:
        """What the games show, in their own colours."""
        return [game.seen for game in self.games]

    def state_dicts(self) -> list[dict[str, Any]]:
        return [game.state_dict() for game in self.games]

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        for game, state in zip(self.games, states, strict=True):
            game.load_state_dict(state)


def _start(*arguments: Any) -> Connection:
    """The line to a new process with `Games(*arguments)`."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process would inherit its threads' locks
    context.set_forkserver_preload([__name__])
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there, *arguments), daemon=True).start()
    there.close()  # or its end would not be seen
    return here


def _close(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.close()


def _serve(connection: Connection, *arguments: Any) -> None:
    """Answer calls of `Games` until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group, for the trainer to save and end by
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)  # or each of these processes had a pool as large as the machine
    games = Games(*arguments)
    with suppress(EOFError, ConnectionError):
        while True:
            method, args = connection.recv()
            connection.send(getattr(games, method)(*args))


class AtariEnv(VectorEnv):
    """B games, one after the other, or shared out to processes: ale_py holds Python's lock while it emulates.

    Observations are the last four frames, the newest last, all the first one where a life begins (detail 20); rewards
    are signs (detail 19). A lost life terminates, the time limit truncates. `episode_returns` and `episode_lengths`
    are those of whole games, unclipped and in the agent's steps; `game_over` says where one ended. Row i of a seed
    draws its no-ops and sticky actions from a generator seeded by (seed, i).
    """

    frame_stack = 4
    render_fps = 15  # an emulator shows sixty frames a second, and a step skips four

    def __init__(
        self,
        env_id: str,
        seeds: Sequence[int],
        num_envs: int,
        device: torch.device | str = "cpu",
        sticky_actions: float = 0.0,
        num_processes: int = 1,
    ) -> None:
        """Build the games; `reset` starts them.

        Args:
            env_id: Gymnasium's id of a game, ending in SUFFIX.
            seeds, num_envs: S non-negative integers, and N games for each.
            device: where the tensors live; the games run on the CPU.
            sticky_actions: probability in [0, 1) that a frame repeats the frame before's action whatever the agent
                chose [Machado et al. 2018, section 5].
            num_processes: that share the games, what they play is the same; 1 for none but this one.
        Raises:
            ValueError: if env_id is no such game, or a number is out of range.
        """
        known = env_id.endswith(SUFFIX) and env_id in gym.registry
        rom = roms.get_rom_path(gym.spec(env_id).kwargs["game"]) if known else None
        if rom is None:
            raise ValueError(f"env_id={env_id!r} is no Atari game: they are called as in Breakout{SUFFIX}")
        if not 0 <= sticky_actions < 1:
            raise ValueError(f"sticky_actions={sticky_actions} must be a probability in [0, 1)")
        if num_processes < 1:
            raise ValueError(f"num_processes={num_processes} must be at least 1")
        self.seeds, self.num_envs, self.device = tuple(seeds), num_envs, torch.device(device)
        rows = [(seed, row) for seed in self.seeds for row in range(num_envs)]
        parts = min(num_processes, len(rows))
        ends = [len(rows) * (part + 1) // parts for part in range(parts)]
        self._parts = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
        if parts == 1:
            self._connections, self._games = [], Games(rom, rows, sticky_actions)
        else:
            self._connections = [_start(rom, rows[part], sticky_actions) for part in self._parts]
            # Before multiprocessing's own handler, which waits for them: the last one registered is called first.
            atexit.register(weakref.finalize(self, _close, self._connections))
        (actions, *_) = self._each("num_actions")
        self.observation_space = gym.spaces.Box(0, 255, (self.frame_stack, SIZE, SIZE), np.uint8)
        self.action_space = gym.spaces.Discrete(actions)
        self._tensor: Callable[[np.ndarray], Tensor] = torch.from_numpy
        if self.device.type != "cpu":
            self._tensor = lambda array: torch.from_numpy(array).to(self.device)

    def _each(self, method: str, *args: Sequence[Any]) -> list[Any]:
        """What a method of `Games` returns, of each part, called with the part's share of every argument."""
        shares = [[x[part] for x in args] for part in self._parts]
        if not self._connections:
            return [getattr(self._games, method)(*shares[0])]
        try:
            for connection, share in zip(self._connections, shares, strict=True):
                connection.send((method, share))
            return [connection.recv() for connection in self._connections]
        except (EOFError, ConnectionError):
            raise RuntimeError("a process of --env-threads has ended; what it printed says why") from None

    def reset(self) -> Tensor:
        frames = np.concatenate(self._each("reset"))
        rows = len(frames)
        self._returns, self._lengths, self._over = np.zeros(rows), np.zeros(rows, np.int64), np.zeros(rows, bool)
        self._obs = self._tensor(frames).unsqueeze(1).repeat(1, self.frame_stack, 1, 1)
        return self._obs

    def step(self, actions: Tensor) -> Step:
        rows = self._parts[-1].stop
        if actions.shape != (rows,):
            raise ValueError(f"actions of shape {tuple(actions.shape)} must be ({rows},)")
        columns = map(np.concatenate, zip(*self._each("step", actions.tolist()), strict=True))
        rewards, terminated, truncated, frames, scores, self._lengths, self._over, firsts = columns
        self._returns = scores.astype(np.float64)
        # Stacked on the device: to send the whole stack would be four times as much.
        next_obs = obs = torch.cat((self._obs[:, 1:], self._tensor(frames).unsqueeze(1)), dim=1)
        if (done := terminated | truncated).any():
            obs = next_obs.clone()
            obs[self._tensor(np.flatnonzero(done))] = self._tensor(firsts[done]).unsqueeze(1)
        self._obs, signs = obs, np.sign(rewards).astype(np.float32)
        return Step(next_obs, self._tensor(signs), self._tensor(terminated), self._tensor(truncated), obs)

    def render(self) -> np.ndarray:
        """What the first game shows, in its own colours, (210, 160, 3) uint8."""
        return np.array(self._each("render")[0][0])

    def close(self) -> None:
        _close(self._connections)

    @property
    def game_over(self) -> Tensor:
        return self._tensor(self._over)

    @property
    def episode_returns(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._returns)

    @property
    def episode_lengths(self) -> Tensor:  # type: ignore[override]
        return self._tensor(self._lengths)

    def state_dict(self) -> dict[str, Any]:
        arrays = {"obs": self._obs, "returns": self._returns, "lengths": self._lengths, "over": self._over}
        games = itertools.chain.from_iterable(self._each("state_dicts"))
        state = {"games": {str(row): game for row, game in enumerate(games)}, "arrays": arrays}
        return pytree.tree_map_only(np.ndarray, torch.tensor, state)  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = pytree.tree_map_only(Tensor, lambda x: x.cpu().numpy().copy(), state)
        arrays, rows = state["arrays"], self._parts[-1].stop
        if len(arrays["obs"]) != rows:
            raise ValueError(f"a state of {len(arrays['obs'])} games does not fit an environment of {rows}")
        self._obs, self._returns = self._tensor(arrays["obs"]), arrays["returns"]
        self._lengths, self._over = arrays["lengths"], arrays["over"]
        self._each("load_state_dicts", [state["games"][str(row)] for row in range(rows)])
