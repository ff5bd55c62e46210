"""MuJoCo's tasks by MuJoCo Warp on the CPU, against the CPU backend; Warp compiles for a minute the first time."""

from __future__ import annotations

import gzip
import re
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from scipy.stats import ks_1samp, ks_2samp, norm
from torch import Tensor

from rl_lab import memory
from rl_lab.algorithms import ppo
from rl_lab.cli import Stopped
from rl_lab.envs import make
from rl_lab.envs.mujoco import MujocoEnv
from rl_lab.envs.mujoco_tasks import TASKS
from rl_lab.vector import VectorEnv

wp = pytest.importorskip("warp", reason='needs pip install -c constraints.txt -e ".[gpu]"')
pytest.importorskip("mujoco_warp", reason='needs pip install -c constraints.txt -e ".[gpu]"')

from rl_lab.envs import mujoco_warp  # noqa: E402 (without the packages, this fails)
from rl_lab.envs.mujoco_warp import Draws, MujocoWarpEnv  # noqa: E402

slow = pytest.mark.slow  # what simulates, hence compiles
all_ids = pytest.mark.parametrize("env_id", list(TASKS))
WITHOUT_CONTACTS = ("Swimmer", "Reacher", "InvertedPendulum", "InvertedDoublePendulum")


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it runs


def random_actions(env: VectorEnv, steps: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    """(steps, B, nu) uniform within `scale` times the bounds."""
    space: Any = env.action_space
    shape = (steps, len(env.seeds) * env.num_envs, *space.shape)
    actions = np.random.default_rng(seed).uniform(scale * space.low, scale * space.high, shape)
    return torch.from_numpy(actions.astype(np.float32))


def cpu_twin(env_id: str, env: MujocoWarpEnv) -> tuple[MujocoEnv, Tensor]:
    """The CPU backend at the start of episodes where `env` is now, and its observations."""
    twin = MujocoEnv(env_id, env.seeds, env.num_envs)
    twin.reset()
    for data, qpos, qvel in zip(twin.data, env._qpos.double().numpy(), env._qvel.double().numpy(), strict=True):
        mujoco.mj_resetData(twin.task.model, data)
        data.qpos[:], data.qvel[:] = qpos, qvel
        mujoco.mj_forward(twin.task.model, data)
    return twin, torch.from_numpy(twin.task.observe(twin._read()))


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to 1 + the magnitude."""
    return float(((ours.double() - theirs).abs() / (1 + theirs.abs())).max())


@slow
@all_ids
def test_first_steps_agree_with_mujoco(env_id: str) -> None:
    """From the same states, in float32: 1e-5 over 20 steps without contacts, 5e-4 over 5 with them.

    Measured: 4e-6 and 9e-5 at most. Contacts make rounding grow tenfold in two steps, HalfCheetah's fastest. What is
    derived from positions, where the observation has it, would be off by 1e-2 if it were not one physics step old.
    """
    smooth = env_id.startswith(WITHOUT_CONTACTS)
    steps, tolerance = (20, 1e-5) if smooth else (5, 5e-4)
    env = MujocoWarpEnv(env_id, [0], 16)
    obs = env.reset()
    twin, expected = cpu_twin(env_id, env)
    assert error(obs, expected) < 1e-5
    running = torch.ones(16, dtype=torch.bool)
    for action in random_actions(env, steps):
        ours, theirs = env.step(action), twin.step(action)
        assert error(ours.next_obs[running], theirs.next_obs[running]) < tolerance
        assert error(ours.rewards[running], theirs.rewards[running]) < tolerance
        assert torch.equal(ours.terminated[running], theirs.terminated[running])
        running &= ~theirs.terminated
        if running.sum() < 8:
            break
    assert smooth or running.sum() >= 8


@slow
@pytest.mark.parametrize("env_id", ["InvertedDoublePendulum-v4", "Reacher-v4", "Ant-v5", "Humanoid-v4"])
def test_an_episode_begins_as_a_new_one_would(env_id: str) -> None:
    """What the tasks derive is that of the first state, and the solver starts afresh; other rows are not disturbed."""
    env = MujocoWarpEnv(env_id, [0], 8)
    env.reset()
    actions = random_actions(env, 4, scale=0.3)
    for action in actions[:2]:
        env.step(action)
    env.episode_lengths[::2] = env.task.max_episode_steps - 1
    step = env.step(actions[2])
    assert step.truncated.tolist() == [True, False] * 4
    assert not step.terminated.any()
    assert torch.equal(step.obs[1::2], step.next_obs[1::2])
    assert error(step.obs[::2], step.next_obs[::2].double()) > 1e-3
    twin, expected = cpu_twin(env_id, env)
    assert error(step.obs[::2], expected[::2]) < 1e-5
    ours, theirs = env.step(actions[3]), twin.step(actions[3])
    assert error(ours.next_obs[::2], theirs.next_obs[::2]) < 1e-4
    assert error(ours.rewards[::2], theirs.rewards[::2]) < 1e-5
    assert env.episode_lengths.tolist() == [1, 4] * 4


@slow
def test_the_second_episode_does_not_depend_on_the_first() -> None:
    """Its first state follows from the row's stream, which the others' resets leave alone; the solver starts afresh."""
    brief, long = (MujocoWarpEnv("Hopper-v4", [0], 16) for _ in range(2))
    actions = random_actions(brief, 8)
    for env, steps in (brief, 2), (long, 8):
        env.reset()
        for t, action in enumerate(actions[:steps]):
            env.episode_lengths[1::2] += 999 * (t == 1)  # of every other row, already then
            env.episode_lengths[::2] += 1000 * (t == steps - 1)
            env.step(action)
    start, again = (env._fields["qpos"][::2] for env in (brief, long))
    assert torch.equal(start, again)
    for action in actions[:4]:
        a, b = brief.step(action), long.step(action)
        assert all(torch.equal(x[::2], y[::2]) for x, y in zip(a, b, strict=True))


@slow
def test_shapes_types_and_time_limit() -> None:
    env = MujocoWarpEnv("Reacher-v5", [1, 2], 2)
    first = env.reset()
    assert (env.observation_space.shape, env.observation_space.dtype) == ((10,), np.float32)
    assert env.action_space == MujocoEnv("Reacher-v5", [0], 1).action_space
    assert env.episode_lengths.tolist() == [0] * 4
    rewards, copies = [], []
    for t, action in enumerate(random_actions(env, 50)):
        step = env.step(action)
        rewards.append(step.rewards)
        copies.append((step, [x.clone() for x in step]))
        assert step.truncated.tolist() == [t == 49] * 4
    assert [tuple(x.shape) for x in step] == [(4, 10), (4,), (4,), (4,), (4, 10)]
    assert [x.dtype for x in step] == [torch.float32, torch.float32, torch.bool, torch.bool, torch.float32]
    assert not step.terminated.any()
    assert env.episode_lengths.tolist() == [50] * 4
    torch.testing.assert_close(env.episode_returns, torch.stack(rewards).double().sum(0), rtol=1e-12, atol=0)
    # The successor is near its goal of 50 steps; the new episode has another, which obs[4:6] shows.
    assert torch.equal(step.next_obs[:, 4:6], first[:, 4:6])
    assert not torch.isclose(step.obs[:, 4:6], first[:, 4:6]).any()
    step = env.step(torch.zeros(4, 2))
    assert env.episode_lengths.tolist() == [1] * 4
    assert torch.equal(env.episode_returns, step.rewards.double())
    # Tensors handed out are new: later steps have left them alone.
    assert all(torch.equal(a, b) for step, copy in copies for a, b in zip(step, copy, strict=True))


@slow
def test_rows_of_a_seed_do_not_depend_on_other_seeds() -> None:
    both, alone = MujocoWarpEnv("Hopper-v4", [3, 7], 2), MujocoWarpEnv("Hopper-v4", [7], 2)
    assert torch.equal(both.reset()[2:], alone.reset())
    ends = 0
    for action in random_actions(both, 100, scale=2.0):
        a, b = both.step(action), alone.step(action[2:])
        assert all(torch.equal(x[2:], y) for x, y in zip(a, b, strict=True))
        ends += int(b.terminated.sum())
    assert ends > 0


@slow
@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "Ant-v5", "InvertedDoublePendulum-v4"])
def test_continues_bit_for_bit_from_a_saved_state(env_id: str) -> None:
    env = MujocoWarpEnv(env_id, [0, 9], 2)
    env.reset()
    actions = random_actions(env, 60)
    for action in actions[:20]:
        env.step(action)
    env.episode_lengths += env.task.max_episode_steps - 40  # so that every task meets its limit
    state = env.state_dict()
    other = MujocoWarpEnv(env_id, [0, 9], 2)
    for action in actions[:3]:
        env.step(action)  # which the state, a copy, does not notice
    other.load_state_dict(state)
    env.load_state_dict(state)
    ends = 0
    for action in actions[20:]:
        a, b = env.step(action), other.step(action)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(env.episode_returns, other.episode_returns)
        assert torch.equal(env.episode_lengths, other.episode_lengths)
        ends += int((a.terminated | a.truncated).sum())
    assert ends >= 4


@slow
def test_a_simulation_that_becomes_unstable_is_truncated() -> None:
    env, other = (MujocoWarpEnv("HalfCheetah-v4", [0], 3) for _ in range(2))
    env.reset(), other.reset()
    env._qvel[1, 0] = 1e12
    last = env._fields["qvel"][1]
    step, undisturbed = env.step(torch.zeros(3, 6)), other.step(torch.zeros(3, 6))
    assert step.truncated.tolist() == [False, True, False]
    assert all(torch.isfinite(x).all() for x in step)
    assert torch.equal(step.next_obs[1, 8:], last)
    assert all(torch.equal(x[[0, 2]], y[[0, 2]]) for x, y in zip(step, undisturbed, strict=True))
    assert torch.isfinite(env.step(torch.zeros(3, 6)).next_obs).all()


@slow
def test_dropped_contacts_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one contact a row, where two feet stand on the floor."""
    monkeypatch.setattr(mujoco_warp, "most_contacts", lambda model, pairs: (1, 70))
    env = MujocoWarpEnv("HalfCheetah-v4", [0], 2)
    env.reset()
    env.state_dict()
    for _ in range(20):
        env.step(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="dropped contacts or constraints"):
        env.state_dict()


@slow
def test_memory_is_what_was_predicted_or_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Ant-v5, whose graphs need most beside the state itself."""
    env_id = "Ant-v5"
    MujocoWarpEnv(env_id, [0], 1)  # compiles
    report: list[str] = []
    with wp.ScopedMemoryTracker(report_func=report.append):
        env = MujocoWarpEnv(env_id, [0], 512)
        env.reset()
        env.step(random_actions(env, 1)[0])
    amount, unit = re.findall(r"Peak usage:\s+cpu\s+([\d.]+) (\w+)", report[0])[0]
    used = float(amount) * {"KB": 2**10, "MB": 2**20}[unit]
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with pytest.raises(ValueError, match="0 would fit") as caught:
        MujocoWarpEnv(env_id, [0], 10**6)
    predicted = 512 / 1e6 * 1e9 * float(re.findall(r"takes ([\d.]+) GB", str(caught.value))[0])
    assert used < predicted < 2 * used
    alive = weakref.ref(env.data.qpos)
    del env
    assert alive() is None  # at once, without the garbage collector: evaluation makes an environment each time


@slow
@pytest.mark.parametrize(("env_id", "rows", "steps"), [("Hopper-v4", 64, 150), ("HalfCheetah-v4", 64, 1000)])
def test_returns_of_whole_episodes_are_distributed_as_on_the_cpu(env_id: str, rows: int, steps: int) -> None:
    """Under random actions; that half of them gives another distribution, the same test sees."""

    def returns(env: VectorEnv, seed: int, scale: float = 1.0) -> list[float]:
        env.reset()
        ended = []
        for action in random_actions(env, steps, scale, seed):
            step = env.step(action)
            done = step.terminated | step.truncated
            ended += env.episode_returns[done].tolist()
        return ended

    ours, theirs = returns(MujocoWarpEnv(env_id, [0], rows), 1), returns(MujocoEnv(env_id, [5], rows), 2)
    assert min(len(ours), len(theirs)) >= 64
    assert ks_2samp(ours, theirs).pvalue > 0.01
    assert ks_2samp(ours, returns(MujocoEnv(env_id, [5], rows), 2, scale=0.5)).pvalue < 1e-4


@all_ids
def test_first_states_are_distributed_as_on_the_cpu(env_id: str) -> None:
    draws, rng = Draws(torch.arange(4000) * 7919), np.random.default_rng(0)
    task = TASKS[env_id]()
    theirs = [np.stack(x) for x in zip(*(task.initial(rng) for _ in range(4000)), strict=True)]
    ours = TASKS[env_id](xp=torch, dtype=torch.float32).initial(draws)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == torch.float32
        for i in range(y.shape[1]):
            assert ks_2samp(x[:, i].numpy(), y[:, i]).pvalue > 1e-4


def test_normal_numbers() -> None:
    numbers = Draws(torch.arange(50_000)).standard_normal(2)
    assert ks_1samp(numbers.flatten().numpy(), norm.cdf).pvalue > 0.01
    assert abs(torch.corrcoef(numbers.T)[0, 1]) < 0.02
    assert torch.isfinite(Draws(torch.zeros(1, dtype=torch.int64)).standard_normal(10_000)).all()


@pytest.mark.parametrize(
    ("env_id", "contacts", "rows"),
    [
        # 8 capsules on the floor, 2 points each, 4 rows a point; 6 limited joints
        ("HalfCheetah-v4", 16, 70),
        # 4 capsules on the floor, and 3 pairs of capsules without friction; 3 limited joints
        ("Hopper-v4", 14, 41),
        # 12 capsules and the torso's sphere; 8 limited joints
        ("Ant-v5", 25, 108),
        # floor: 12 capsules, 5 spheres; without friction: 52 pairs of capsules, 57 with a sphere; 17 limited joints
        ("Humanoid-v4", 190, 294),
        ("Reacher-v4", 0, 3),
    ],
)
def test_room_for_every_contact_there_can_be(env_id: str, contacts: int, rows: int) -> None:
    import mujoco_warp as mjw

    model = TASKS[env_id]().model
    model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
    pairs = mjw.put_model(model).nxn_geom_pair_filtered.numpy()
    assert mujoco_warp.most_contacts(model, pairs) == (contacts, rows)


@all_ids
def test_only_shapes_collide_whose_contacts_are_counted(env_id: str) -> None:
    model = TASKS[env_id]().model
    shapes = {mujoco.mjtGeom(x).name for x in model.geom_type[(model.geom_contype | model.geom_conaffinity) > 0]}
    assert shapes <= {"mjGEOM_PLANE", "mjGEOM_SPHERE", "mjGEOM_CAPSULE"}
    assert (model.neq, model.nflex, model.opt.cone) == (0, 0, mujoco.mjtCone.mjCONE_PYRAMIDAL)
    assert not model.dof_frictionloss.any()
    assert not model.tendon_limited.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("CartPole-v1", [0], 1), "backend='mujoco-warp' has no CartPole-v1; it has HalfCheetah-v4"),
        (("Pusher-v5", [0], 1), "backend='mujoco-warp' has no Pusher-v5"),
        (("Hopper-v4", [0], 0), "num_envs=0 must be at least 1"),
        (("Hopper-v4", [0, 1], 10**9), r"num_envs=1000000000 takes \d+\.\d GB \(seeds: 2\), .* \d+ would fit"),
        (("Hopper-v4", [0], 1, 2), r"num_threads=2 \(--env-threads\): only native MuJoCo and Atari environments"),
    ],
)
def test_refusals_say_what_would_work(arguments: tuple[Any, ...], message: str) -> None:
    env_id, seeds, num_envs, *threads = arguments
    with pytest.raises(ValueError, match=message) as caught:
        make(env_id, seeds, num_envs, "cpu", "mujoco-warp", *threads)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["warp", "mujoco_warp"])
def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # importing it now fails as if it were not installed
    monkeypatch.delitem(sys.modules, "rl_lab.envs.mujoco_warp")
    with pytest.raises(ValueError) as caught:
        make("Hopper-v4", [0], 1, backend="mujoco-warp")
    assert f'it needs {package}: pip install -c constraints.txt -e ".[gpu]"' in str(caught.value)
    make("Hopper-v4", [0], 1).reset()  # the CPU backend does without


@slow
def test_bad_actions_and_foreign_states_are_refused() -> None:
    env, other = (MujocoWarpEnv("InvertedPendulum-v4", [0], n) for n in (2, 3))
    env.reset(), other.reset()
    with pytest.raises(ValueError, match=r"\(1, 1\) must be \(2, 1\)"):  # would broadcast
        env.step(torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"shape \(3, 2\) does not fit an environment of \(2, 2\)"):
        env.load_state_dict(other.state_dict())


@slow
def test_ppo_trains_on_it_and_resumes(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"backend": "mujoco-warp", "device": "cpu", "compile": False, "runs_dir": tmp_path}
    sizes = {"num_envs": 16, "num_steps": 32, "num_minibatches": 4, "total_timesteps": 1536}
    args = replace(ppo.BOX, env="InvertedPendulum-v4", **sizes, **flags)
    whole = ppo.train(args).logs.folders[0]
    with pytest.raises(Stopped):
        ppo.train(replace(args, seed=1, stop_at=512, runs_dir=tmp_path / "stopped"))
    (stopped,) = (tmp_path / "stopped").iterdir()
    ppo.train(replace(args, resume=stopped))
    for name in ("model.safetensors", "episodes.csv.gz"):
        read = gzip.decompress if name.endswith("gz") else bytes
        assert read((whole / name).read_bytes()) == read((stopped / name).read_bytes())


@pytest.mark.cuda
@slow
@all_ids
def test_the_device_agrees_with_the_cpu_and_is_not_waited_for(env_id: str) -> None:
    env, cpu = (MujocoWarpEnv(env_id, [0], 16, device) for device in ("cuda", "cpu"))
    assert error(env.reset().cpu(), cpu.reset().double()) < 1e-5
    actions = random_actions(env, 3)
    env.step(torch.zeros_like(actions[0], device="cuda")), cpu.step(torch.zeros_like(actions[0]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps = [env.step(action) for action in actions.cuda().unbind()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for step, action in zip(steps, actions, strict=True):
        expected = cpu.step(action)
        assert all(x.is_cuda for x in (*step, env.episode_returns, env.episode_lengths))
        assert error(step.next_obs.cpu(), expected.next_obs.double()) < 5e-4
        assert error(step.rewards.cpu(), expected.rewards.double()) < 5e-4
