"""Everything between simulator and gradient stays on its device, and asks nothing of it on the way.

The meta device has no values: reading one, or mixing in a tensor of the CPU, raises. So this also holds on machines
without a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import vmap

from rl_lab.algorithms import ppo
from rl_lab.distributions import Actions, draw_noise
from rl_lab.envs import make
from rl_lab.networks import pack, stack
from rl_lab.normalize import begin, observe
from rl_lab.optim import init_adam
from rl_lab.rollout import over_seeds, split_seeds
from rl_lab.vector import TensorEnv

SEEDS, NUM_ENVS, NUM_STEPS = 2, 3, 4


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "MiniGrid-DoorKey-5x5-v0", "MinAtar/Breakout-v1"])
def test_ppo_stays_on_its_device(env_id: str) -> None:
    env = make(env_id, range(SEEDS), NUM_ENVS)
    assert isinstance(env, TensorEnv)
    env.reset()
    actions = Actions.of(env.action_space)
    box = bool(actions.low)
    args = replace(ppo.BOX if box else ppo.Args(), num_envs=NUM_ENVS, num_steps=NUM_STEPS, num_minibatches=2)
    generator = torch.Generator().manual_seed(0)
    params = stack([ppo.init_params(env.observation_space, actions, generator) for _ in range(SEEDS)])
    opt = vmap(init_adam)({"all": vmap(pack)(params)})
    normalizer, _ = vmap(begin)(split_seeds(env.observe(env.state["physics"]), SEEDS))
    noise = draw_noise(actions, (NUM_STEPS, SEEDS * NUM_ENVS), generator)
    shuffles = torch.zeros(2, SEEDS, NUM_ENVS * NUM_STEPS // 2, dtype=torch.int64)
    given = (params, opt, normalizer, env.state, noise, shuffles, torch.tensor(1e-3))
    params, opt, normalizer, state, noise, shuffles, learning_rate = pytree.tree_map(lambda x: x.to("meta"), given)

    rows = []
    for noise_t in noise:
        obs = env.observe(state["physics"])
        choose = vmap(partial(ppo.act, actions=actions))
        chosen, env_actions = choose(params, split_seeds({"obs": obs}, SEEDS), split_seeds(noise_t, SEEDS))
        state, step = env.dynamics(state, env_actions.flatten(0, 1))
        if box:
            normalize = vmap(partial(observe, gamma=args.gamma, cleanrl=False))
            normalizer, step = normalize(normalizer, split_seeds(step, SEEDS))
            step = pytree.tree_map(lambda x: x.flatten(0, 1), step)
        rows.append({"obs": obs, "actions": chosen.flatten(0, 1), **step._asdict()})
    rollout = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    gradients = over_seeds(partial(ppo.gradient, actions=actions, args=args), images=False)
    results = ppo.learn(params, opt, rollout, shuffles, learning_rate, gradients, actions, args)
    assert {x.device.type for x in pytree.tree_leaves(results)} == {"meta"}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "MiniGrid-DoorKey-5x5-v0"])
def test_the_room_is_judged_on_its_device(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the sample of a step that comes before the first rollout."""
    needed: list[int] = []
    monkeypatch.setattr("rl_lab.cli.require_memory", lambda num_envs, num_seeds, size, device: needed.append(size))
    for device in ("cpu", "meta"):
        env = make(env_id, (1,), 1)
        env.reset()
        env.device = torch.device(device)
        assert isinstance(env, TensorEnv)
        env.state = pytree.tree_map(partial(torch.Tensor.to, device=device), env.state)
        monkeypatch.setattr(env, "reset", partial(env.observe, env.state["physics"]))
        ppo.Args().require_room(env, NUM_ENVS, NUM_STEPS, 64)
    assert len(needed) == 2 and needed[0] == needed[1] > 0


@pytest.mark.cuda
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_captured_training_equals_eager(env_id: str, tmp_path: Path) -> None:
    """Five iterations of four agents, as CUDA graphs and step by step."""
    results = []
    for compile in (True, False):
        args = replace(
            ppo.BOX if env_id == "Pendulum-v1" else ppo.Args(), env=env_id, num_seeds=4, num_envs=16, num_steps=16,
            num_minibatches=4, update_epochs=2, total_timesteps=5 * 256, device="cuda", compile=compile,
            runs_dir=tmp_path / str(compile),
        )  # fmt: skip
        results.append(ppo.train(args).state()["params"])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
