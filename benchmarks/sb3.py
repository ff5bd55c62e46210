"""Stable-Baselines3's algorithms with the hyper-parameters of rl_lab's, which are CleanRL's.

    python -m benchmarks.sb3 ppo '{"env": "CartPole-v1", "runs_dir": "runs", ...}'

takes the fields of our `Args` as JSON, so that nothing of rl_lab is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize


class PrintSPS(BaseCallback):
    """A line "SPS: ..." after every `every` env steps, and after the learning that comes before the next one."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.due = every, every

    def _on_training_start(self) -> None:
        self.begin = time.time()

    def _on_rollout_start(self) -> None:  # a rollout starts where the update before has ended
        while self.num_timesteps >= self.due:
            print("SPS:", int(self.num_timesteps / (time.time() - self.begin)), flush=True)
            self.due += self.every

    def _on_training_end(self) -> None:
        self._on_rollout_start()

    def _on_step(self) -> bool:
        return True


def ppo(args: dict[str, Any]) -> None:
    """Train one seed; TensorBoard logs go to args["runs_dir"]."""
    torch.set_num_threads(args["torch_threads"])
    env = make_vec_env(args["env"], n_envs=args["num_envs"], seed=args["seed"])
    if args["normalize"]:
        env = VecNormalize(env, gamma=args["gamma"])  # clips both at 10
    PPO(
        "MlpPolicy",
        env,
        learning_rate=lambda remaining: remaining * args["learning_rate"],
        n_steps=args["num_steps"],
        batch_size=args["num_envs"] * args["num_steps"] // args["num_minibatches"],
        n_epochs=args["update_epochs"],
        gamma=args["gamma"],
        gae_lambda=args["gae_lambda"],
        clip_range=args["clip_coef"],
        clip_range_vf=args["clip_coef"] if args["clip_vloss"] else None,
        normalize_advantage=args["norm_adv"],
        ent_coef=args["ent_coef"],
        vf_coef=args["vf_coef"],
        max_grad_norm=args["max_grad_norm"],
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}, "activation_fn": torch.nn.Tanh},
        tensorboard_log=args["runs_dir"],
        seed=args["seed"],
        device="cpu",
    ).learn(args["total_timesteps"], callback=PrintSPS(args["mark_every"]))


def off_policy(args: dict[str, Any]) -> dict[str, Any]:
    """What DQN and SAC have in common."""
    same = ("buffer_size", "learning_starts", "batch_size", "tau", "gamma", "seed")
    return {name: args[name] for name in same} | {
        "train_freq": args["train_frequency"],
        "gradient_steps": 1,
        "target_update_interval": args["target_network_frequency"],
        "tensorboard_log": args["runs_dir"],
        "device": "cpu",
    }


def dqn(args: dict[str, Any]) -> None:
    """Train one seed; TensorBoard logs go to args["runs_dir"]."""
    torch.set_num_threads(args["torch_threads"])
    DQN(
        "MlpPolicy",
        make_vec_env(args["env"], n_envs=args["num_envs"], seed=args["seed"]),
        learning_rate=args["learning_rate"],
        exploration_fraction=args["exploration_fraction"],
        exploration_initial_eps=args["start_e"],
        exploration_final_eps=args["end_e"],
        policy_kwargs={"net_arch": [120, 84]},
        **off_policy(args),
    ).learn(args["total_timesteps"], callback=PrintSPS(args["mark_every"]))


def sac(args: dict[str, Any]) -> None:
    """Train one seed; TensorBoard logs go to args["runs_dir"]. One learning rate is for all of it."""
    torch.set_num_threads(args["torch_threads"])
    SAC(
        "MlpPolicy",
        make_vec_env(args["env"], n_envs=args["num_envs"], seed=args["seed"]),
        learning_rate=args["policy_lr"],
        policy_kwargs={"net_arch": [256, 256]},
        **off_policy(args),
    ).learn(args["total_timesteps"], callback=PrintSPS(args["mark_every"]))


if __name__ == "__main__":
    {"ppo": ppo, "dqn": dqn, "sac": sac}[sys.argv[1]](json.loads(sys.argv[2]))
