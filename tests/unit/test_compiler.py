"""The loop that compiles, and the cache of compiled graphs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from rl_lab import compiler
from rl_lab.compiler import Compiled, CompiledEach, scan
from rl_lab.replay import Replay


def running(carry: dict[str, Tensor], xs: tuple[Tensor, Tensor]) -> Any:
    """Sums and products from the start; returns an argument and one tensor twice, as a graph may not."""

    def step(carry: dict[str, Tensor], x: tuple[Tensor, Tensor]) -> Any:
        total = carry["total"] + x[0]
        return {"total": total, "product": carry["product"] * x[1]}, {"total": total, "again": total, "x": x[1]}

    last, ys = scan(step, carry, xs)
    return last, ys, xs[0]


def arguments(length: int = 3) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    carry = {"total": torch.tensor([10.0, 20.0]), "product": torch.tensor([1.0, 1.0])}
    xs = torch.arange(2.0 * length).reshape(length, 2)
    return carry, (xs, xs + 1)


def assert_by_hand(result: Any) -> None:
    """xs are (0, 1), (2, 3), (4, 5), and one more each."""
    last, ys, first = result
    assert last["total"].tolist() == [16.0, 29.0]
    assert last["product"].tolist() == [15.0, 48.0]  # 1 * 3 * 5 and 2 * 4 * 6
    assert ys["total"].tolist() == [[10.0, 21.0], [12.0, 24.0], [16.0, 29.0]]
    assert torch.equal(ys["again"], ys["total"])
    assert ys["x"].tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    assert first.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this module's own, holding the one graph that it compiles."""
    folder = tmp_path_factory.mktemp("graphs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RL_LAB_CACHE", str(folder))
        assert_by_hand(Compiled(running, "running")(*arguments()))
    return folder


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """An empty cache, and the folders that would be compiled."""
    folders: list[Path] = []

    def record(function: object, leaves: object, treespec: object, donate: object, folder: Path) -> None:
        folders.append(folder)
        raise NotImplementedError

    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_compile", record)
    yield folders


def unreachable(*_: object) -> Any:
    raise AssertionError("traced again")


def test_eager_loop_by_hand() -> None:
    """Guards against a loop that runs backwards, drops a step, or stacks along the wrong axis."""
    assert_by_hand(running(*arguments()))
    assert_by_hand(Compiled(running, "running", enabled=False)(*arguments()))


def test_second_instance_loads_the_graph(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against half a minute of compiling at each start: the function of a cached graph is not even called."""
    monkeypatch.setenv("RL_LAB_CACHE", str(cache))
    again = Compiled(unreachable, "running")
    assert_by_hand(again(*arguments()))
    carry, xs = arguments()
    outputs = again.on_leaves(carry, xs)([carry["total"], carry["product"], *xs])
    assert outputs[0].tolist() == [16.0, 29.0]


def test_outputs_are_new_tensors(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against results that change at the next call, or when an argument is written to."""
    monkeypatch.setenv("RL_LAB_CACHE", str(cache))
    graph, (carry, xs) = Compiled(unreachable, "running"), arguments()
    result = graph(carry, xs)
    xs[0].fill_(-1.0)
    carry["total"].fill_(-1.0)
    graph(carry, xs)
    assert_by_hand(result)


def test_what_a_graph_depends_on_is_in_its_key(recorded: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a graph that is used where another is meant."""
    carry, xs = arguments()
    longer = arguments(length=4)
    wider = {name: x.double() for name, x in carry.items()}
    calls = [
        ("running", (carry, xs)),
        ("another", (carry, xs)),
        ("running", longer),
        ("running", (wider, xs)),
        ("running", (carry, list(xs))),
        ("running", (carry, (xs[0], xs[1].T.contiguous().T))),  # other strides
    ]
    for key, call in calls:
        with pytest.raises(NotImplementedError):
            Compiled(running, key)(*call)
    assert len(set(recorded)) == len(calls)
    with pytest.raises(NotImplementedError):
        Compiled(running, "running")(*arguments())
    assert recorded[-1] == recorded[0]
    monkeypatch.setattr(compiler, "_toolchain", lambda: ("other sources",))
    with pytest.raises(NotImplementedError):
        Compiled(running, "running")(*arguments())
    assert recorded[-1] not in recorded[:-1]


@pytest.mark.parametrize("name", ["graph.pt2", "tree.json"])
def test_torn_file_is_compiled_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Guards against a cache that a crash, or a full disk, spoils for good."""
    torn = tmp_path / "cache"
    shutil.copytree(cache, torn)
    (file,) = torn.glob(f"*/{name}")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    compiled = []

    def compile_again(function: object, leaves: object, treespec: object, donate: object, folder: Path) -> None:
        compiled.append(folder)
        shutil.copytree(cache / folder.name, folder)  # what compiling gives

    monkeypatch.setenv("RL_LAB_CACHE", str(torn))
    monkeypatch.setattr(compiler, "_compile", compile_again)
    with pytest.warns(UserWarning, match=f"{file.parent.name} does not load .*; compiling again"):
        assert_by_hand(Compiled(running, "running")(*arguments()))
    assert compiled == [file.parent]


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a stack trace of the compiler's driver where a line says what to do."""
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler .* install one or pass --no-compile"):
        Compiled(running, "running")(*arguments())
    assert not list(tmp_path.rglob("*.pt2"))


@pytest.mark.parametrize("enabled", [True, False])
def test_donated_arguments_hold_the_results(enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a result in memory of its own, and against one written before all have been computed."""

    def swap(first: Any, factor: Tensor, second: Any) -> Any:
        return {"x": second["x"] * factor, "same": first["same"]}, {"x": first["x"] + 0.5}, first["x"] + 1

    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    first, second = {"x": torch.tensor([1.0, 2.0]), "same": torch.ones(1)}, {"x": torch.tensor([3.0, 4.0])}
    graph = Compiled(swap, "swap", enabled, donate=(0, 2))
    for expected in ([[6.0, 8.0], [1.5, 2.5], [2.0, 3.0]], [[3.0, 5.0], [6.5, 8.5], [7.0, 9.0]]):
        one, two, rest = graph(first, torch.tensor(2.0), second)
        assert one is first and two is second
        assert [one["x"].tolist(), two["x"].tolist(), rest.tolist()] == expected
        assert one["same"].tolist() == [1.0]


def test_a_donated_argument_gets_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a copy of what may have been overwritten before."""
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="overwritten with another argument"):
        Compiled(lambda x, y: (y.clone(), x + y), "clone", donate=(0,))(torch.ones(2), torch.zeros(2))


def test_agents_one_by_one_are_as_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop for each of two agents, which `vmap` alone could not trace."""

    def sums(state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        last, ys = scan(lambda s, x: (s + x, s * x), state["x"], x)
        return {"x": last}, {"ys": ys}

    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    xs = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    for enabled in (True, False):
        state = {"x": torch.tensor([1.0, 2.0])}
        graph = CompiledEach(sums, "sums", enabled, donate=(0,))
        for last, ys in (
            ([7.0, 62.0], [[1.0, 4.0, 12.0], [20.0, 240.0, 960.0]]),
            ([13.0, 122.0], [[7.0, 16.0, 30.0], [620.0, 1440.0, 2760.0]]),
        ):
            new, results = graph(state, xs)
            assert new is state and state["x"].tolist() == last
            assert results["ys"].tolist() == ys
    assert len(list(tmp_path.glob("*"))) == 1


def drift(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Five steps, of which the first result is the state after them."""
    return scan(lambda s, x: (0.9 * s + x.sin(), s * x), state, x)


def test_a_donated_argument_gets_a_result_of_the_same_form() -> None:
    swap = Compiled(lambda x: ({"b": x["b"] + 1, "a": x["a"] + 1},), "swap", enabled=False, donate=(0,))
    with pytest.raises(ValueError, match="same keys in the same order"):
        swap({"a": torch.zeros(2), "b": torch.ones(2)})


@pytest.mark.cuda
@pytest.mark.parametrize("donate", [(), (0,)])
def test_captured_equals_eager(donate: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call is one launch: three calls in a row, the last with other memory for the state."""
    monkeypatch.setenv("RL_LAB_CACHE", str(tmp_path))
    captured, eager = Compiled(drift, "drift", donate=donate), Compiled(drift, "drift", enabled=False, donate=donate)
    generator = torch.Generator("cuda").manual_seed(0)
    state, xs = (torch.randn(*shape, 100, generator=generator, device="cuda") for shape in ((), (5,)))
    ours, theirs, kept = state.clone(), state.clone(), []
    for call in range(3):
        ours = ours.clone() if call == 2 else ours
        given = ours
        (ours, ys), (theirs, expected) = captured(ours, xs + call), eager(theirs, xs + call)
        assert (ours is given) == bool(donate)
        torch.testing.assert_close((ours, ys), (theirs, expected))
        kept.append((ys, expected.clone()))
    for ys, expected in kept:  # outputs are new tensors: later calls leave them alone
        torch.testing.assert_close(ys, expected)


class Recorder:
    """Stands in for CUDA's capture: what runs while it records is run again, on the same memory, by `replay`."""

    def __init__(self, run: Any) -> None:
        self.run, self.recording = run, False

    def __call__(self, leaves: list[Tensor]) -> list[Tensor]:
        if not self.recording:
            return self.run(leaves)
        self.leaves, self.results = (
            leaves,
            [torch.full_like(x, torch.nan) for x in self.run([x.clone() for x in leaves])],
        )
        return self.results

    def replay(self) -> None:
        for x, new in zip(self.results, self.run(self.leaves), strict=True):
            x.copy_(new)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Captures, without a GPU, a function that overwrites its first argument with twice itself plus the second."""

    def double(leaves: list[Tensor]) -> list[Tensor]:
        a, b = leaves
        product = a * b
        a.mul_(2).add_(b)
        return [product]

    recorder = Recorder(double)

    @contextlib.contextmanager
    def recording(_: object) -> Iterator[None]:
        recorder.recording = True
        yield
        recorder.recording = False

    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    return recorder


def test_a_capture_keeps_the_caller_s_memory(recorder: Recorder) -> None:
    """The bookkeeping around a capture."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    captured, _ = compiler._captured(recorder, [a, b], {0}, set())
    assert a.tolist() == [1.0, 2.0]  # the warm-up left nothing behind
    (first,) = captured([a, b])
    assert (a.tolist(), b.tolist(), first.tolist()) == ([12.0, 24.0], [10.0, 20.0], [10.0, 40.0])
    (second,) = captured([a, torch.tensor([1.0, 1.0])])
    assert (a.tolist(), second.tolist(), first.tolist()) == ([25.0, 49.0], [12.0, 24.0], [10.0, 40.0])
    other = torch.tensor([3.0, 4.0])
    (third,) = captured([other, b])
    assert (other.tolist(), third.tolist()) == ([16.0, 28.0], [30.0, 80.0])


def test_a_capture_reads_in_place(recorder: Recorder) -> None:
    """Guards against a replay that is held twice and copied at each sample, and against one that is read no more."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    captured, _ = compiler._captured(recorder, [a, b], {0}, {1})
    assert recorder.leaves[1] is b
    b.fill_(3.0)  # written to between two calls
    (result,) = captured([a, b])
    assert (a.tolist(), b.tolist(), result.tolist()) == ([5.0, 7.0], [3.0, 3.0], [3.0, 6.0])
    with pytest.raises(AssertionError, match="another tensor than at first"):
        captured([a, torch.tensor([3.0, 3.0])])


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_a_replay_is_read_in_place(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against columns, or weights of the tree, that are other tensors at a later sample."""
    given: list[list[Tensor]] = []

    class Watched(Compiled):
        def __call__(self, *args: Any) -> Any:
            given.append(compiler.leaves_of([args[i] for i in self.in_place]))
            return super().__call__(*args)

    monkeypatch.setattr("rl_lab.replay.Compiled", Watched)
    flag = torch.zeros(5, 2, dtype=torch.bool)
    columns = {"obs": torch.rand(5, 2, 3), "rewards": torch.rand(5, 2), "terminated": flag, "truncated": flag}
    spec = {name: (tuple(x.shape[2:]), x.dtype) for name, x in columns.items()}
    replay = Replay(spec, 1, 2, 8, 0.99, alpha=alpha)
    for _ in range(2):
        replay.add(columns)
        replay.sample(torch.full((1, 3), 0.5).double())
    held = [*replay.columns.values(), *(replay.tree.levels if replay.tree else [])]
    assert len(given[0]) == len(given[1]) == len(held)
    assert all(x is y is z for x, y, z in zip(*given, held, strict=True))
