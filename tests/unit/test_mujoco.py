"""The batched MuJoCo environments: contract, tasks on hand-made states, state round trip, threads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rl_lab.envs.mujoco import MujocoEnv
from rl_lab.envs.mujoco_tasks import TASKS

all_ids = pytest.mark.parametrize("env_id", list(TASKS))


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it runs


def random_actions(env: MujocoEnv, steps: int, seed: int = 0) -> Tensor:
    """(steps, B, nu) up to twice the bounds, so that legs fall."""
    space, shape = env.action_space, (steps, len(env.seeds) * env.num_envs, *env.action_space.shape)
    return torch.from_numpy(
        np.random.default_rng(seed).uniform(2 * space.low, 2 * space.high, shape).astype(np.float32)
    )


def at_rest(env_id: str, rows: int = 1) -> dict[str, np.ndarray]:
    """Fields as the task reads them, all zero."""
    task = TASKS[env_id]()
    model = task.model
    tail = {"qpos": (model.nq,), "qvel": (model.nv,), "xpos": (model.nbody, 3), "cfrc_ext": (model.nbody, 6)}
    tail |= {"xipos": (model.nbody, 3), "ctrl": (model.nu,), "site_xpos": (1, 3)}
    return {name: np.zeros((rows, *tail[name])) for name in task.fields if name in tail}


def test_shapes_and_types() -> None:
    env = MujocoEnv("HalfCheetah-v4", [1, 2], 3)
    assert env.reset().shape == (6, 17)
    step = env.step(torch.zeros(6, 6))
    assert [tuple(x.shape) for x in step] == [(6, 17), (6,), (6,), (6,), (6, 17)]
    assert [x.dtype for x in step] == [torch.float64, torch.float64, torch.bool, torch.bool, torch.float64]
    assert step.next_obs.is_contiguous()
    assert env.episode_returns.dtype == torch.float64
    assert env.episode_lengths.tolist() == [1] * 6


def test_time_limit_starts_a_new_episode_in_the_same_step() -> None:
    env = MujocoEnv("Reacher-v4", [0], 2)
    first = env.reset()
    rewards = []
    for t in range(50):
        step = env.step(torch.full((2, 2), 0.1))
        rewards.append(step.rewards)
        assert step.truncated.tolist() == [t == 49] * 2
        assert not step.terminated.any()
    assert env.episode_lengths.tolist() == [50, 50]
    torch.testing.assert_close(env.episode_returns, torch.stack(rewards).sum(0), rtol=1e-12, atol=0)
    # The successor is still near its goal of 50 steps; the new episode has another goal, which obs[4:6] shows.
    assert torch.equal(step.next_obs[:, 4:6], first[:, 4:6])
    assert not torch.isclose(step.obs[:, 4:6], first[:, 4:6]).any()
    step = env.step(torch.zeros(2, 2))
    assert env.episode_lengths.tolist() == [1, 1]
    assert torch.equal(env.episode_returns, step.rewards)


def test_one_row_ends_without_the_others() -> None:
    env = MujocoEnv("InvertedPendulum-v5", [0], 3)
    env.reset()
    env.data[1].qpos[1] = 0.3  # beyond the 0.2 rad that end the task
    step = env.step(torch.zeros(3, 1))
    assert step.terminated.tolist() == [False, True, False]
    assert step.rewards.tolist() == [1.0, 0.0, 1.0]
    assert not step.truncated.any()
    assert torch.equal(step.obs[[0, 2]], step.next_obs[[0, 2]])
    assert abs(step.obs[1]).max() <= 0.01 < abs(step.next_obs[1, 1])
    step = env.step(torch.zeros(3, 1))
    assert env.episode_lengths.tolist() == [2, 1, 2]
    assert env.episode_returns.tolist() == [2.0, 1.0, 2.0]


def test_later_steps_leave_what_was_returned_alone() -> None:
    env = MujocoEnv("InvertedPendulum-v4", [0], 2)
    env.reset()
    actions = random_actions(env, 60)
    steps, copies = [], []
    for action in actions:
        steps.append(env.step(action))
        copies.append([x.clone() for x in steps[-1]])
    assert any(step.terminated.any() for step in steps)
    assert all(
        torch.equal(a, b) for step, copy in zip(steps, copies, strict=True) for a, b in zip(step, copy, strict=True)
    )


def test_rows_of_a_seed_do_not_depend_on_other_seeds() -> None:
    both, alone = MujocoEnv("Hopper-v4", [3, 7], 2), MujocoEnv("Hopper-v4", [7], 2)
    assert torch.equal(both.reset()[2:], alone.reset())
    actions = random_actions(both, 150)
    ends = 0
    for action in actions:
        a, b = both.step(action), alone.step(action[2:])
        assert all(torch.equal(x[2:], y) for x, y in zip(a, b, strict=True))
        ends += int(b.terminated.sum())
    assert ends > 0


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v5", "InvertedDoublePendulum-v4"])
@pytest.mark.parametrize("num_threads", [2, 3, 9])
def test_threads_change_nothing(env_id: str, num_threads: int) -> None:
    one, many = MujocoEnv(env_id, [0, 1], 4), MujocoEnv(env_id, [0, 1], 4, num_threads=num_threads)
    assert torch.equal(one.reset(), many.reset())
    for action in random_actions(one, 60):
        assert all(torch.equal(a, b) for a, b in zip(one.step(action), many.step(action), strict=True))
    many.close()


@all_ids
def test_continues_bit_for_bit_from_a_saved_state(env_id: str) -> None:
    env = MujocoEnv(env_id, [0, 9], 1)
    env.reset()
    limit = env.task.max_episode_steps
    actions = random_actions(env, 320)
    for action in actions[:20]:
        env.step(action)
    env._starts -= limit - 150 if limit > 150 else 0  # as if the episodes were old, so that every task meets its limit
    env._deadline = int(env._starts.min()) + limit
    state = env.state_dict()
    state["arrays"] = {name: tensor.clone() for name, tensor in state["arrays"].items()}
    values = json.dumps({name: value for name, value in state.items() if name != "arrays"})
    other = MujocoEnv(env_id, [0, 9], 1)
    other.load_state_dict({"arrays": state["arrays"], **json.loads(values)})
    assert torch.equal(env.episode_lengths, other.episode_lengths)
    ends = 0
    for action in actions[20:]:
        a, b = env.step(action), other.step(action)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(env.episode_returns, other.episode_returns)
        assert torch.equal(env.episode_lengths, other.episode_lengths)
        ends += int((a.terminated | a.truncated).sum())
    assert ends >= 2


def test_a_state_saved_as_an_episode_ends_counts_the_next_from_zero() -> None:
    env = MujocoEnv("Reacher-v5", [0], 1)
    env.reset()
    for action in random_actions(env, 50):
        env.step(action)
    other = MujocoEnv("Reacher-v5", [0], 1)
    other.load_state_dict(env.state_dict())
    assert other.episode_lengths.tolist() == [50]
    step = other.step(torch.zeros(1, 2))
    assert torch.equal(step.next_obs, env.step(torch.zeros(1, 2)).next_obs)
    assert other.episode_lengths.tolist() == [1]
    assert torch.equal(other.episode_returns, step.rewards)


def test_a_saved_state_is_a_copy() -> None:
    env = MujocoEnv("Swimmer-v5", [0], 1)
    env.reset()
    state = env.state_dict()
    before = {name: tensor.clone() for name, tensor in state["arrays"].items()}
    env.step(torch.ones(1, 2))
    other = MujocoEnv("Swimmer-v5", [0], 1)
    other.load_state_dict(state)
    other.step(torch.ones(1, 2))
    assert all(torch.equal(state["arrays"][name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        # x from 0.1 to 0.2 m in 5 x 0.01 s is 2 m/s; six actions of 0.5 cost 0.1 x 1.5
        ("HalfCheetah-v4", 1.85),
        ("HalfCheetah-v5", 1.85),
        # 4 x 0.01 s: 2.5 m/s; two actions cost 1e-4 x 0.5
        ("Swimmer-v4", 2.49995),
        # 4 x 0.002 s: 12.5 m/s; three actions cost 1e-3 x 0.75; z = 0 is fallen, and -v4 pays 1 all the same
        ("Hopper-v4", 13.49925),
        ("Hopper-v5", 12.49925),
        # six actions cost 1e-3 x 1.5
        ("Walker2d-v4", 13.4985),
        ("Walker2d-v5", 12.4985),
    ],
)
def test_reward_of_a_hand_made_step(env_id: str, expected: float) -> None:
    task, before, after = TASKS[env_id](), at_rest(env_id), at_rest(env_id)
    before["qpos"][:, 0], after["qpos"][:, 0] = 0.1, 0.2
    actions = np.full((1, task.model.nu), 0.5, np.float32)
    assert task.reward(before, after, actions, np.array([True])) == pytest.approx([expected], abs=1e-6)


def test_contact_forces_cost_in_version_5() -> None:
    """Two bodies pushed beyond the clip of +-1 on one axis each: 5e-4 x 2, at rest, upright and without action."""
    before, after = at_rest("Ant-v5"), at_rest("Ant-v5")
    after["cfrc_ext"][0, 3, 5], after["cfrc_ext"][0, 7, 0] = 30.0, -4.0
    task = TASKS["Ant-v5"]()
    reward = task.reward(before, after, np.zeros((1, 8), np.float32), np.array([False]))
    assert reward == pytest.approx([1.0 - 1e-3], abs=1e-12)
    obs = task.observe(after)[0]
    assert obs.shape == (105,)
    assert obs[27:].nonzero()[0].tolist() == [17, 36]  # (3 - 1) * 6 + 5 and (7 - 1) * 6 + 0: the world is left out
    assert obs[[44, 63]].tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("env_id", "index", "values", "expected"),
    [
        ("Hopper-v4", 1, [0.7, 0.71, 1.25], [True, False, False]),
        ("Walker2d-v5", 1, [0.8, 1.2, 2.0, 2.5], [True, False, True, True]),
        ("Ant-v4", 2, [0.19, 0.2, 1.0, 1.01, np.nan], [True, False, False, True, True]),
        ("Humanoid-v4", 2, [1.0, 1.4, 2.0], [True, False, True]),
        ("InvertedPendulum-v4", 1, [-0.3, -0.1, 0.2, np.inf], [True, False, False, True]),
    ],
)
def test_heights_and_angles_that_end_a_task(env_id: str, index: int, values: list[float], expected: list[bool]) -> None:
    fields = at_rest(env_id, len(values))
    fields["qpos"][:, index] = values
    assert TASKS[env_id]().terminated(fields).tolist() == expected


@all_ids
def test_tasks_read_torch_tensors_too(env_id: str) -> None:
    env = MujocoEnv(env_id, [0], 4)
    env.reset()
    actions = random_actions(env, 6)
    for action in actions:
        env.step(action)
    before, after = ({k: torch.tensor(v) for k, v in f.items()} for f in (env._fields_before, env._fields))
    task, peer = TASKS[env_id](xp=torch), env.task
    ends = peer.terminated(env._fields)
    ours = task.terminated(after)
    assert (ours is None) if ends is None else (ours.tolist() == ends.tolist())
    flags: Any = np.array([True, False, True, False])
    expected = peer.reward(env._fields_before, env._fields, actions[-1].numpy(), flags)
    reward = task.reward(before, after, actions[-1], torch.from_numpy(flags))
    np.testing.assert_allclose(reward, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(task.observe(after), peer.observe(env._fields), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("HalfCheetah-v2", [0], 1), "env_id='HalfCheetah-v2'.*HalfCheetah-v4"),
        (("Hopper-v4", [0], 0), "num_envs=0 .* at least 1"),
        (("Hopper-v4", [0], 1, "cpu", 0), "num_threads=0 .*at least 1"),
        (("Hopper-v4", [-1], 1), "non-negative"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MujocoEnv(*arguments)


def test_bad_actions_and_foreign_states_are_refused() -> None:
    env = MujocoEnv("Hopper-v4", [0], 2)
    env.reset()
    with pytest.raises(ValueError, match=r"\(2, 1\) must be \(2, 3\)"):  # would broadcast
        env.step(torch.zeros(2, 1))
    other = MujocoEnv("Hopper-v4", [0], 3)
    other.reset()
    with pytest.raises(ValueError, match="does not fit"):
        env.load_state_dict(other.state_dict())


@pytest.mark.cuda
def test_tensors_live_on_the_device() -> None:
    env = MujocoEnv("Hopper-v4", [0], 2, device="cuda")
    assert env.reset().is_cuda
    step = env.step(torch.zeros(2, 3, device="cuda"))
    assert all(x.is_cuda for x in (*step, env.episode_returns, env.episode_lengths))
