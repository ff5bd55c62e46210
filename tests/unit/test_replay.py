"""The replay against the plain list of everything that was ever added; each test names the bug it guards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.envs import make
from rl_lab.replay import Batch, Replay, Spec, SumTree, draw_uniform, find, transitions

GAMMA = 0.5
FRAME = (2, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spec(stack: int = 0) -> Spec:
    obs = ((stack, *FRAME), torch.uint8) if stack else ((3,), torch.float32)
    columns: Spec = {"obs": obs, "actions": ((), torch.int64), "rewards": ((), torch.float32), "next_obs": obs}
    return {**columns, "terminated": ((), torch.bool), "truncated": ((), torch.bool)}


def stream(num_steps: int, width: int, stack: int = 0, seed: int = 0) -> Batch:
    """(T, B, ...) steps of random content; actions number the transitions, t * B + place.

    Episodes end often and in all ways. With `stack` the environment stacks its frames itself: at a reset the first one
    is repeated.
    """
    random = np.random.default_rng(seed)
    ended = random.random((2, num_steps, width)) < 0.2
    shape = FRAME if stack else (3,)
    frames = random.integers(0, 256, (num_steps, width, 2, *shape))  # what a step led to, and a next episode's first
    obs = np.repeat(random.integers(0, 256, (width, 1, *shape)), max(stack, 1), axis=1)
    rows = []
    for t in range(num_steps):
        next_obs = np.concatenate([obs[:, 1:], frames[t, :, :1]], axis=1)
        rows.append((obs, next_obs))
        fresh = np.repeat(frames[t, :, 1:], max(stack, 1), axis=1)
        obs = np.where(
            ended[:, t].any(0)[:, None, None, None] if stack else ended[:, t].any(0)[:, None, None], fresh, next_obs
        )
    columns = [torch.as_tensor(np.stack(x)) for x in zip(*rows, strict=True)]
    columns = [x.to(torch.uint8) if stack else x.squeeze(2).float() for x in columns]
    return {
        **dict(zip(("obs", "next_obs"), columns, strict=True)),
        "actions": torch.arange(num_steps * width).reshape(num_steps, width),
        "rewards": torch.as_tensor(random.normal(size=(num_steps, width)), dtype=torch.float32),
        **dict(zip(("terminated", "truncated"), map(torch.as_tensor, ended), strict=True)),
    }


def rolled(steps: Batch, t: int, place: int, n_step: int) -> dict[str, Any]:
    """The n-step transition from step t of one environment, gone through step by step."""
    reward, discount, last = 0.0, 1.0, t
    for last in range(t, t + n_step):
        reward += discount * steps["rewards"][last, place].item()
        discount *= GAMMA
        if steps["terminated"][last, place] or steps["truncated"][last, place]:
            break
    over = bool(steps["terminated"][last, place])
    return {
        "obs": steps["obs"][t, place],
        "next_obs": steps["next_obs"][last, place],
        "rewards": pytest.approx(reward, rel=1e-5, abs=1e-6),
        "discounts": 0.0 if over else discount,
        "terminated": over,
        "truncated": bool(steps["truncated"][last, place]),
    }


def everything(replay: Replay) -> Batch:
    """A batch in which each transition that can be sampled comes once: a point in the middle of each one's share."""
    count, num_seeds = len(replay), replay.shape[0]
    points = torch.full((count,), 0.5) if replay.tree else (torch.arange(count) + 0.5) / count
    return replay.sample(points.double().expand(num_seeds, -1))


def assert_equal(batch: Batch, seed: int, i: int, expected: dict[str, Any]) -> None:
    for name, x in expected.items():
        found = batch[name][seed, i]
        assert torch.equal(found, x) if isinstance(x, Tensor) else found.item() == x, name


# --- what can be sampled ----------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_window_and_nothing_else(data: st.DataObject) -> None:
    """Guards wrap-around, samples across the write head or an episode's end, from before the first row, or of rows
    that left: the newest `capacity` transitions that are complete come once each, with the content they had."""
    draw = data.draw
    num_seeds, num_envs = draw(st.integers(1, 2), "seeds"), draw(st.sampled_from([1, 3]), "envs")
    rows, n_step = draw(st.integers(2, 7), "rows"), draw(st.sampled_from([1, 3]), "n_step")
    stack, spare = draw(st.sampled_from([0, 2, 4]), "stack"), draw(st.integers(0, 3), "spare")
    chunks = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6), "chunks")
    alpha = draw(st.sampled_from([0.0, 1.0]), "alpha")
    width = num_seeds * num_envs
    steps = stream(sum(chunks), width, stack, draw(st.integers(0, 99), "content"))
    replay = Replay(spec(stack), num_seeds, num_envs, rows * num_envs, GAMMA, n_step, alpha, stack, spare=spare)
    written = 0
    for length in chunks:
        replay.add({name: x[written : written + length] for name, x in steps.items()})
        written += length
        oldest, complete = max(written - rows, 0), written - (n_step - 1) - (stack > 0)
        window = range(oldest, max(complete, oldest))
        assert len(replay) == len(window) * num_envs
        if not window:
            with pytest.raises(ValueError, match="nothing to sample"):
                replay.sample(torch.zeros(num_seeds, 1).double())
            continue
        batch = everything(replay)
        for seed in range(num_seeds):
            places = range(seed * num_envs, (seed + 1) * num_envs)
            found = {int(number): i for i, number in enumerate(batch["actions"][seed])}
            assert sorted(found) == [t * width + place for t in window for place in places]
            for number, i in found.items():
                t, place = divmod(number, width)
                assert_equal(batch, seed, i, rolled(steps, t, place, n_step))


def test_n_step_by_hand() -> None:
    """Guards the power of gamma, and a return that runs on beyond an episode's end or bootstraps beyond a terminal.

    Rewards 1, 2, 4, ...; gamma 1/2; three steps. The first environment terminates at step 1: 1 + 2/2 = 2, and 2. The
    second is truncated at step 2: 1 + 2/2 + 4/4 = 3 with 1/8, 2 + 4/2 = 4 with 1/4, 4 with 1/2. The third does both at
    step 0: 1 and nothing; 2 + 4/2 + 8/4 = 6 follows. Where an episode goes on, step 3 gives 8 + 16/2 + 32/4 = 24.
    """
    steps = {name: torch.zeros(6, 3, *shape, dtype=dtype) for name, (shape, dtype) in spec().items()}
    steps["rewards"][:] = 2.0 ** torch.arange(6).unsqueeze(1)
    steps["next_obs"][:] = torch.arange(6.0).reshape(6, 1, 1)
    steps["terminated"][1, 0] = steps["truncated"][2, 1] = steps["terminated"][0, 2] = steps["truncated"][0, 2] = True
    replay = Replay(spec(), 1, 3, 18, GAMMA, n_step=3)
    replay.add(steps)
    batch = {name: x[0].reshape(4, 3, -1)[..., 0] for name, x in everything(replay).items()}
    assert batch["rewards"].tolist() == [[2, 3, 1], [2, 4, 6], [12, 4, 12], [24, 24, 24]]
    eighth = 0.125
    assert batch["discounts"].tolist() == [[0, eighth, 0], [0, 0.25, eighth], [eighth, 0.5, eighth], [eighth] * 3]
    assert batch["next_obs"].tolist() == [[1, 2, 0], [1, 2, 3], [4, 2, 4], [5, 5, 5]]
    assert batch["terminated"].tolist() == [[True, False, True], [True, False, False], [False] * 3, [False] * 3]


def test_points_at_the_ends() -> None:
    """Guards against an index past the newest transition, or before the oldest."""
    replay = Replay(spec(), 1, 1, 7, GAMMA)
    replay.add(stream(10, 1))
    points = torch.tensor([[0.0, math.nextafter(1.0, 0.0)]], dtype=torch.float64)
    assert replay.sample(points)["actions"].tolist() == [[3, 9]]


def test_uniform_frequencies() -> None:
    """Guards against a favoured seed, environment or end of the window: chi-square over 40,000 draws of each seed."""
    replay = Replay(spec(), 2, 3, 12, GAMMA)
    replay.add(stream(7, 6))
    actions = replay.sample(draw_uniform((40_000,), [generator(1), generator(2)]))["actions"]
    for seed, numbers in enumerate(actions):
        counts = numbers.bincount(minlength=42).reshape(7, 2, 3)[3:, seed].flatten()
        assert counts.sum() == 40_000
        assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_draws_of_a_seed_are_its_own() -> None:
    """Guards against draws that depend on which other seeds there are."""
    draws = draw_uniform((5, 4), [generator(1), generator(2)])
    assert draws.shape == (5, 2, 4) and draws.dtype == torch.float64
    assert torch.equal(draws[:, 1], draw_uniform((5, 4), [generator(2)])[:, 0])


# --- priorities -------------------------------------------------------------------------------------------------------


def prioritized(num_seeds: int = 1, **flags: Any) -> Replay:
    """Three transitions with priorities 1, 2 and 5 (another seed's 5, 2 and 1), and room for one more."""
    replay = Replay(spec(), num_seeds, 1, 4, GAMMA, **{"alpha": 1.0, **flags})
    replay.add(stream(3, num_seeds))
    leaves = torch.arange(3).expand(num_seeds, -1)
    replay.prioritize(leaves, torch.tensor([[1.0, 2.0, 5.0], [5.0, 2.0, 1.0]])[:num_seeds])
    return replay


def test_prioritized_frequencies() -> None:
    """Guards Schaul et al.'s Eq. 1 and the equal ranges: of 8,000 samples 1,000, 2,000 and 5,000 with alpha 1; with
    1/2 in proportion to 1, 1.41421 and 2.23607. Each range's end may move one sample."""
    for alpha, expected in ((1.0, [1000, 2000, 5000]), (0.5, [1720.50, 2433.15, 3847.15])):
        batch = prioritized(alpha=alpha).sample(draw_uniform((8_000,), [generator()]))
        counts = batch["actions"][0].bincount(minlength=3)
        assert counts.tolist() == pytest.approx(expected, abs=1.01)


def test_each_seed_has_its_priorities() -> None:
    """Guards against one seed's tree that is read or written for another's."""
    batch = prioritized(2).sample(torch.full((2, 8), 0.5).double())
    assert (batch["actions"] // 2).tolist() == [[0, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 0, 1, 1, 2]]
    assert (batch["actions"] % 2).tolist() == [[0] * 8, [1] * 8]


@pytest.mark.parametrize(("beta", "expected"), [(0.0, [1, 1, 1]), (0.5, [1, 0.7071068, 0.4472136]), (1, [1, 0.5, 0.2])])
def test_importance_weights(beta: float, expected: list[float]) -> None:
    """Guards Schaul et al.'s section 3.4: (1 / P)^beta over the largest, that of the rarest transition."""
    batch = prioritized().sample(torch.full((1, 8), 0.5).double(), beta)
    assert batch["weights"].dtype == torch.float32
    assert batch["weights"][0, [0, 1, 3]].tolist() == pytest.approx(expected, rel=1e-6)


def test_new_transitions_have_the_largest_priority_so_far() -> None:
    """Guards against new ones that start at 1 or at the largest now; also where that was another seed's."""
    replay = prioritized(2, alpha=0.5)
    replay.prioritize(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1.0], [9.0]]))
    replay.prioritize(torch.tensor([[2], [0]]), torch.tensor([[1.0], [1.0]]))  # the largest ones no more
    replay.add(stream(1, 2))
    assert replay.tree and replay.tree.levels[2].flatten(1)[:, 3].tolist() == pytest.approx([math.sqrt(5), 3.0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.1, 1 / 3, 1.0, 1e9]), min_size=1, max_size=70),
    seed=st.integers(0, 99),
)
def test_a_leaf_of_weight_zero_is_never_found(weights: list[float], seed: int) -> None:
    """Guards the tree's rounding, at its ends too: 0, the last number below 1, and the very edges of leaves."""
    weights = [*weights, 0.7] if not any(weights) else weights
    tree, values = SumTree(1, len(weights), torch.device("cpu")), torch.tensor([weights], dtype=torch.float64)
    for part in torch.randperm(len(weights), generator=generator(seed)).split(5):  # some again
        tree.set(part.unsqueeze(0), torch.rand(1, len(part), generator=generator(seed)).double())
        tree.set(part.unsqueeze(0), values[:, part])
    edges = values.cumsum(1) / values.sum()
    some = torch.rand(1, 50, generator=generator(seed), dtype=torch.float64)
    below = torch.nextafter(edges, torch.zeros(()).double())
    points = torch.cat([torch.zeros(1, 1), edges, below, some], 1).clamp(max=math.nextafter(1.0, 0.0))
    found, shares = find(tree.levels, points)
    assert (values[0, found[0]] > 0).all()
    torch.testing.assert_close(shares[0], values[0, found[0]] / values.sum(), rtol=1e-12, atol=0)
    for upper, lower in zip(tree.levels, tree.levels[1:], strict=False):
        assert torch.equal(upper.flatten(1), lower.sum(2))


def test_tree_frequencies() -> None:
    """Guards against leaves found out of proportion: chi-square over 40,000 independent points on 300 leaves."""
    weights = torch.arange(300, dtype=torch.float64) % 7
    tree = SumTree(2, 300, torch.device("cpu"))
    tree.set(torch.arange(300).expand(2, -1), torch.stack([weights, weights.flip(0)]))
    found, _ = find(tree.levels, draw_uniform((40_000,), [generator(1), generator(2)]))
    for indices, expected in zip(found, (weights, weights.flip(0)), strict=True):
        counts, live = indices.bincount(minlength=300), expected > 0
        assert not counts[~live].any()
        frequencies = 40_000 * expected[live] / expected.sum()
        assert stats.chisquare(counts[live].numpy(), frequencies.numpy()).pvalue > 0.001


def test_infinite_priorities_find_something() -> None:
    """Guards against an index out of range before the loss, which is not finite either, can be reported."""
    for value in (math.inf, math.nan):
        replay = prioritized()
        replay.prioritize(torch.tensor([[1]]), torch.tensor([[value]]))
        assert replay.sample(torch.full((1, 4), 0.5).double())["actions"].shape == (1, 4)


# --- memory, state, compilation ---------------------------------------------------------------------------------------

ATARI: Spec = {**spec(), "obs": ((4, 84, 84), torch.uint8), "next_obs": ((4, 84, 84), torch.uint8)}


def test_memory_of_atari(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards single frames: a million transitions and, at an end every 40 steps, as many last frames in 7.5 GB."""
    monkeypatch.setattr(Replay, "_check_room", lambda *_: None)
    replay = Replay(ATARI, 1, 1, 1_000_000, 0.99, stack=4, device="meta")  # allocates nothing
    assert replay.nbytes == 1_000_003 * (84 * 84 + 14)
    assert replay.nbytes + 25_000 * 84 * 84 < 7.5e9


def test_an_end_costs_a_frame() -> None:
    """Guards against last frames that stay when their rows are overwritten."""
    replay, steps = Replay(spec(2), 1, 2, 10, GAMMA, stack=2), stream(50, 2, stack=2)
    empty = replay.nbytes
    replay.add(steps)
    kept = (steps["terminated"] | steps["truncated"])[-replay.rows :].sum()
    assert kept > 1 and replay.nbytes == empty + 6 * kept


def test_too_large(tmp_path: Path) -> None:
    """Guards against a refusal that comes after the allocation, or without the flag and the numbers."""
    message = r"--buffer-size 1000000000 needs 7070.0 GB, [\d.]+ GB are free {}; a smaller one.* works"
    with pytest.raises(ValueError, match=message.format("in memory")):
        Replay(ATARI, 1, 1, 10**9, 0.99, stack=4)
    with pytest.raises(ValueError, match=message.format("on disk")):
        Replay(ATARI, 1, 1, 10**9, 0.99, stack=4, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_own_files_need_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that cannot be resumed because its own replay fills the disk."""
    Replay(spec(), 1, 1, 100, GAMMA, folder=tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    Replay(spec(), 1, 1, 100, GAMMA, folder=tmp_path)
    with pytest.raises(ValueError, match="--buffer-size 300 needs"):
        Replay(spec(), 1, 1, 300, GAMMA, folder=tmp_path)


KINDS = pytest.mark.parametrize(
    ("alpha", "stack", "n_step"), [(0.0, 0, 1), (0.6, 0, 3), (0.0, 2, 3), (0.6, 4, 1)], ids=str
)


@KINDS
@pytest.mark.parametrize("before", [4, 9, 23], ids=lambda x: f"{x} rows")
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_continues_bit_for_bit(tmp_path: Path, disk: bool, before: int, alpha: float, stack: int, n_step: int) -> None:
    """Guards the checkpoint: killed after five more rows than it knows of, read back, it goes on as if never killed."""
    steps, points = stream(40, 4, stack), draw_uniform((6, 16), [generator(), generator(1)])
    folder = tmp_path / "columns"
    folder.mkdir()

    def make_replay(on_disk: bool) -> Replay:
        where = folder if on_disk else None
        return Replay(spec(stack), 2, 2, 20, GAMMA, n_step, alpha, stack, folder=where, spare=5)

    def advance(replay: Replay, first: int, count: int) -> list[Batch]:
        batches = []
        for t in range(first, first + count):
            replay.add({name: x[t : t + 1] for name, x in steps.items()})
            if len(replay):
                batches.append(replay.sample(points[t % 6], beta=0.5))
                if alpha:
                    replay.prioritize(batches[-1]["leaves"], batches[-1]["rewards"].abs() + 0.1)
        return batches

    whole, killed = make_replay(False), make_replay(disk)
    for replay in (whole, killed):
        advance(replay, 0, before)
    checkpoint.save(tmp_path, killed.state_dict())
    saved = checkpoint.load(tmp_path)
    advance(killed, before, 5)
    assert ("obs" in saved["columns"]) != disk
    resumed = make_replay(disk)
    resumed.load_state_dict(saved)
    assert len(resumed) == len(whole)
    for found, expected in zip(advance(resumed, before, 12), advance(whole, before, 12), strict=True):
        assert_equal_batches(found, expected)


@pytest.mark.parametrize("stack", [0, 2])
def test_a_large_replay_is_read_back(stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a replay that fits once, and is held twice when its run is resumed; else it says what it takes."""
    steps = stream(30, 2, stack)
    for length in (4, 10, 30):  # a row or three less than the ring holds is whole
        first, second = (Replay(spec(stack), 1, 2, 20, GAMMA, stack=stack) for _ in range(2))
        first.add({name: x[:length] for name, x in steps.items()})
        state = first.state_dict()
        monkeypatch.setattr("rl_lab.replay.free_memory", lambda _: 100)
        if length == 4:
            with pytest.raises(ValueError, match=r"--resume needs 0.0 GB more to put back the replay .* 0.0 GB are"):
                second.load_state_dict(state)
        else:
            second.load_state_dict(state)
            assert all(second.columns[name].data_ptr() == x.data_ptr() for name, x in state["columns"].items())
            assert_equal_batches(everything(first), everything(second))
        monkeypatch.undo()


@KINDS
def test_a_cut_ends_an_episode(alpha: float, stack: int, n_step: int) -> None:
    """Guards against a return, a successor or a stack that goes on into episodes begun after the checkpoint."""
    before, after = (stream(6, 4, stack, seed) for seed in (0, 1))
    after["actions"] += before["actions"].numel()
    steps = {name: torch.cat([x, after[name]]) for name, x in before.items()}
    going = ~(before["terminated"] | before["truncated"])[-1]
    assert going.any() and not going.all()
    steps["truncated"][5] |= going
    first, second = (Replay(spec(stack), 2, 2, 40, GAMMA, n_step, alpha, stack) for _ in range(2))
    first.add(before)
    second.load_state_dict(first.state_dict(), cut=before["next_obs"][-1])
    second.add(after)
    batch = everything(second)
    for seed in range(2):
        for i, number in enumerate(batch["actions"][seed].tolist()):
            assert_equal(batch, seed, i, rolled(steps, *divmod(number, 4), n_step))


def test_a_cut_is_the_same_however_often_it_is_resumed(tmp_path: Path) -> None:
    """A replay on disk keeps the flag of the first resume, the checkpoint has no frame for it."""
    before = stream(6, 4, 4, 0)
    first = Replay(spec(4), 2, 2, 40, GAMMA, stack=4, folder=tmp_path)
    first.add(before)
    state = first.state_dict()
    ends = []
    for _ in range(2):
        resumed = Replay(spec(4), 2, 2, 40, GAMMA, stack=4, folder=tmp_path)
        resumed.load_state_dict(state, cut=before["next_obs"][-1])
        ends.append(resumed.ends)
        everything(resumed)
    assert ends[0].keys() == ends[1].keys() and ends[0][5].keys() == ends[1][5].keys() == set(range(4))


def assert_equal_batches(found: Batch, expected: Batch) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_state_is_copied() -> None:
    """Guards against two replays that share a tree after one has loaded the other's state."""
    first, second = prioritized(), prioritized()
    second.load_state_dict(first.state_dict())
    first.prioritize(torch.tensor([[0]]), torch.tensor([[100.0]]))
    assert second.tree and second.tree.levels[2].flatten().tolist()[:3] == [1.0, 2.0, 5.0]


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Guards the one graph that draws and puts together a batch: across the ring's end, for two seeds.

    Of vectors it is compiled with DQN.
    """
    steps, points = stream(33, 4, stack=4), draw_uniform((16,), [generator(), generator(1)])
    batches = []
    for compile in (False, True):
        replay = Replay(spec(4), 2, 2, 20, GAMMA, n_step=3, alpha=0.6, stack=4, compile=compile)
        for t in (0, 11, 22):
            replay.add({name: x[t : t + 11] for name, x in steps.items()})
            replay.prioritize(torch.arange(4).expand(2, -1), torch.ones(2, 4) + t)
            batches.append(replay.sample(points, beta=0.5))
    for eager, compiled in zip(batches[:3], batches[3:], strict=True):
        assert eager.keys() == compiled.keys()
        for name, x in eager.items():
            torch.testing.assert_close(compiled[name], x, rtol=1e-6, atol=0, msg=name)


def test_columns_of_an_environment() -> None:
    """Guards double precision that would take twice the room, and actions that would lose their type."""
    env = make("Pendulum-v1", (0,), 1)
    assert transitions(env)["actions"] == ((1,), torch.float32)
    assert transitions(env)["obs"] == transitions(env)["next_obs"] == ((3,), torch.float32)
    assert isinstance(env.action_space, gym.spaces.Box)
    assert transitions(make("CartPole-v1", (0,), 1))["actions"] == ((), torch.int64)
