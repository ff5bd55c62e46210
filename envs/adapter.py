"""Any Gymnasium environment, or ready-made Gymnasium vector environment, in the form of `rl_lab.vector`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.random import SeedSequence
from torch import Tensor

from rl_lab.vector import Step, VectorEnv

AnyVectorEnv = gym.vector.VectorEnv[Any, Any, Any]


class Replayable(gym.Wrapper[Any, Any, Any, Any]):
    """Keeps the generator's state at the episode's start and the actions since: enough to replay the episode."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        generator = self.env.np_random if seed is None else seeding.np_random(seed)[0]  # as Env.reset makes it
        self.start: Any = generator.bit_generator.state
        self.actions: list[Any] = []
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.actions.append(np.array(action))
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs = obs.copy() if isinstance(obs, np.ndarray) else obs  # a reset may write into the same array
        return obs, float(reward), terminated, truncated, info

    def replay(self, start: Any, actions: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """Return the observation and info that the episode had reached."""
        self.env.np_random.bit_generator.state = start
        obs, info = self.reset()
        for action in actions:
            obs, _, _, _, info = self.step(action)
        return obs, info


class GymnasiumEnv(VectorEnv):
    """B Gymnasium environments stepped on the CPU: one after the other, or as the vector environment handed in does.

    Rewards are float64, observations have the space's dtype. An "action_mask" in the infos becomes `action_mask`.
    Row 0 of a seed is seeded with the seed itself, row i > 0 from (seed, i).
    """

    def __init__(
        self, envs: str | AnyVectorEnv, seeds: Sequence[int], num_envs: int, device: torch.device | str = "cpu"
    ) -> None:
        """Build or wrap the environments; `reset` starts them.

        Args:
            envs: a Gymnasium id, or a vector environment of len(seeds) * num_envs rows with SAME_STEP or DISABLED
                autoreset, the rows of one seed next to each other.
            seeds, num_envs: S non-negative integers, and N environments for each.
            device: where the tensors live.
        Raises:
            ValueError: if the autoreset mode, the number of rows or a space is not supported.
        """
        self.seeds, self.num_envs, self.device = tuple(seeds), num_envs, torch.device(device)
        rows = len(self.seeds) * num_envs
        self.recorded: list[Replayable] = []
        if isinstance(envs, str):
            build = partial(gym.make, envs, disable_env_checker=True)
            sync = SyncVectorEnv([lambda: Replayable(build())] * rows, copy=False, autoreset_mode="SameStep")
            self.recorded, envs = cast("list[Replayable]", sync.envs), sync
        self.envs, self.autoreset_mode = envs, envs.metadata.get("autoreset_mode")
        self.observation_space = space = envs.single_observation_space
        self.action_space = actions = envs.single_action_space
        if self.autoreset_mode not in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
            raise ValueError(
                f"autoreset mode {self.autoreset_mode} is refused, make it SAME_STEP or DISABLED: under NEXT_STEP each "
                "reset comes back as a transition with reward 0 whose action was ignored"
            )
        if envs.num_envs != rows:
            raise ValueError(f"the vector environment has {envs.num_envs} rows; len(seeds) * num_envs is {rows}")
        if not isinstance(space, Box):
            raise ValueError(
                f"observation space {space} is refused, it must be a Box: gymnasium.wrappers.FlattenObservation makes "
                "it one, with Discrete parts one-hot; apply it yourself and hand in a vector of the result"
            )
        if space.dtype.kind == "u" and space.dtype != np.uint8:
            raise ValueError(f"observation space {space} is refused: unsigned numbers must be uint8")
        if not isinstance(actions, Discrete | MultiDiscrete | Box) or np.any(getattr(actions, "start", 0)):
            raise ValueError(f"action space {actions} is refused: use Discrete or MultiDiscrete from 0, or Box")
        pairs = [(seed, i) for seed in self.seeds for i in range(num_envs)]
        self.row_seeds: Any = [int(SeedSequence(p).generate_state(1, np.uint64)[0]) if p[1] else p[0] for p in pairs]
        self.mask: np.ndarray | None = None

    def _tensor(self, array: Any) -> Tensor:
        return torch.tensor(array, device=self.device)  # a copy: the vector environment may reuse its buffers

    def reset(self) -> Tensor:
        obs, infos = self.envs.reset(seed=self.row_seeds)
        self.row_seeds = None  # a second reset goes on with the generators, as an episode's end does
        self.mask, self.obs = infos.get("action_mask"), self._tensor(obs)
        self.done = torch.zeros(len(obs), dtype=torch.bool, device=self.device)
        self.episode_returns, self.episode_lengths = self.done.double(), self.done.long()
        return self.obs

    def step(self, actions: Tensor) -> Step:
        *results, infos = self.envs.step(actions.cpu().numpy().astype(self.action_space.dtype, copy=False))
        obs, rewards, terminated, truncated = map(self._tensor, results)
        self.episode_returns = torch.where(self.done, 0.0, self.episode_returns) + rewards
        self.episode_lengths = torch.where(self.done, 0, self.episode_lengths) + 1
        next_obs, mask, self.done = obs, infos.get("action_mask"), terminated | truncated
        ended = self.done.cpu().numpy()
        if ended.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            next_obs = obs.clone()
            for row in ended.nonzero()[0]:
                next_obs[row] = self._tensor(infos["final_obs"][row])
        elif ended.any():
            fresh, infos = self.envs.reset(options={"reset_mask": ended})
            obs = self._tensor(fresh)
            mask = None if mask is None else np.where(ended[:, None], infos["action_mask"], mask)
        self.mask, self.obs = mask, obs
        return Step(next_obs, rewards, terminated, truncated, obs)

    @property
    def action_mask(self) -> Tensor | None:
        return None if self.mask is None else self._tensor(self.mask).bool()

    def state_dict(self) -> dict[str, Any]:
        if not self.recorded:
            raise ValueError("a vector environment handed in cannot be saved: only one made from an id is recorded")
        episodes, shape = {}, (-1, *(self.action_space.shape or ()))
        for row, env in enumerate(self.recorded):
            actions = torch.from_numpy(np.array(env.actions, self.action_space.dtype).reshape(shape))
            episodes[str(row)] = {"start": env.start, "actions": actions}
        totals = {"episode_returns": self.episode_returns, "episode_lengths": self.episode_lengths}
        return {"episodes": episodes, "obs": self.obs, "done": self.done, **totals}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Exact where all randomness is in np_random; most exceptions show in the observation, an emulator's may not.
        masks: list[Any] = []
        for row, env in enumerate(self.recorded):
            episode = state["episodes"][str(row)]
            obs, info = env.replay(episode["start"], episode["actions"].cpu().numpy())
            if not np.array_equal(obs, state["obs"][row].cpu().numpy()):
                raise ValueError(f"{env} cannot be resumed: the episode does not follow from its np_random and actions")
            masks.append(info.get("action_mask"))
        self.mask, self.row_seeds = None if masks[0] is None else np.stack(masks), None
        for name in ("obs", "done", "episode_returns", "episode_lengths"):
            setattr(self, name, state[name].to(self.device))

    def close(self) -> None:
        self.envs.close()
