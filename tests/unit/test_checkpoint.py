"""rl_lab/checkpoint.py: the round trip, and every way a file can be cut short, damaged or replaced."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.checkpoint import NAME, PREVIOUS

KEYS = st.text(max_size=6).filter(lambda key: "/" not in key and key != "__metadata__")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.lists(st.integers(0, 3), max_size=3).map(tuple),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
STATES = st.dictionaries(
    KEYS,
    st.recursive(TENSORS | JSON, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6),
    max_size=4,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and value; NaN equals NaN, and -0.0 does not equal 0.0."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return repr(a) == repr(b)


@given(state=STATES)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("run")
    checkpoint.save(folder, state)
    assert same(checkpoint.load(folder), state)


def test_special_tensors_and_floats(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    state = {
        "transposed": base.view(2, 3).T,
        "shared": base,
        "again": base,
        "expanded": torch.tensor(5).expand(1),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "generator": torch.Generator().manual_seed(3).get_state(),
        "nan": torch.tensor([math.nan, -0.0]),
        "floats": [math.inf, -math.inf, math.nan, 0.1, 5e-324],
    }
    checkpoint.save(tmp_path, state)
    loaded = checkpoint.load(tmp_path)
    assert loaded["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["shared"].tolist() == loaded["again"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded["expanded"].tolist() == [5]
    assert loaded["parameter"].tolist() == [1, 1] and not loaded["parameter"].requires_grad
    assert torch.equal(loaded["generator"], state["generator"])
    assert math.isnan(loaded["nan"][0]) and math.copysign(1, loaded["nan"][1]) == -1
    assert repr(loaded["floats"]) == "[inf, -inf, nan, 0.1, 5e-324]"
    loaded["shared"][0] = 9.0  # tensors are writable and separate
    assert loaded["again"][0] == 0


def test_tensors_are_named_by_their_path_for_any_reader(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"a": {"b": {"c": torch.ones(2)}}})
    assert safetensors.torch.load_file(tmp_path / NAME).keys() == {"a/b/c"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b/c": 1}}, "'b/c' in 'a'"),
        ({"a": {1: 2}}, "key 1"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
        ({"a": {"b": (1, 2)}}, "a/b is a tuple"),
        ({"a": [torch.ones(1)]}, "a is a list"),
        ({"a": object()}, "a is a object"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, state)
    assert list(tmp_path.iterdir()) == []


def test_the_previous_one_is_kept(tmp_path: Path) -> None:
    for step in range(3):
        checkpoint.save(tmp_path, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NAME]
    assert checkpoint.load(tmp_path) == {"step": 2}
    (tmp_path / NAME).unlink()  # as a kill between the two renames leaves it
    with pytest.warns(UserWarning, match=f"{NAME} is missing; going on from .*{PREVIOUS}"):
        assert checkpoint.load(tmp_path) == {"step": 1}


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 1})
    checkpoint.save(tmp_path, {"step": 2, "w": torch.arange(5)})
    good = (tmp_path / NAME).read_bytes()
    damaged = [good[:length] for length in range(0, len(good), 7)]
    for position in range(len(good)):
        flipped = bytearray(good)
        flipped[position] ^= 1 << (position % 8)
        damaged.append(bytes(flipped))
    for blob in damaged:
        (tmp_path / NAME).write_bytes(blob)
        with pytest.warns(UserWarning, match="going on from .*previous"):
            assert checkpoint.load(tmp_path) == {"step": 1}
    (tmp_path / PREVIOUS).write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"(?s)checkpoint\.safetensors.*previous\.safetensors is damaged"):
        checkpoint.load(tmp_path)


def test_a_damaged_one_never_takes_the_place_of_the_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a kill in the first save after a fallback, which would leave none. Who only reads keeps all."""
    for number in (1, 2):
        checkpoint.save(tmp_path, {"number": number})
    (tmp_path / NAME).write_bytes((tmp_path / NAME).read_bytes()[:-1])
    for to_go_on in (False, True):
        with pytest.warns(UserWarning, match=f"going on from .*{PREVIOUS}"):
            assert checkpoint.load(tmp_path, to_go_on) == {"number": 1}
        assert (tmp_path / NAME).exists() is not to_go_on
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        checkpoint.save(tmp_path, {"number": 3})
    with pytest.warns(UserWarning, match=f"{NAME} is missing; going on from .*{PREVIOUS}"):
        assert checkpoint.load(tmp_path) == {"number": 1}
    checkpoint.save(tmp_path, {"number": 3})
    assert checkpoint.load(tmp_path) == {"number": 3} and (tmp_path / PREVIOUS).exists()


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{NAME} is missing; .*{PREVIOUS} is missing; name a run folder"):
        checkpoint.load(tmp_path)
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="another program wrote it"):
        checkpoint.load(tmp_path)
    checkpoint.save_tensors(tmp_path / NAME, {"w": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load(tmp_path)


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / NAME)
    with pytest.raises(ValueError, match="another program wrote it"):
        checkpoint.load(tmp_path)


def test_refused_writes_leave_the_former_files(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, {"step": 1})
    checkpoint.save(tmp_path, {"step": 2})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # the kernel takes 4 KiB, then refuses
    try:
        with pytest.raises(OSError, match=NAME):
            checkpoint.save(tmp_path, {"step": 3, "w": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PREVIOUS, NAME]
    assert checkpoint.load(tmp_path) == {"step": 2}


@pytest.mark.parametrize(("calls", "step"), [(0, 2), (1, 2), (2, 2), (3, 3), (4, 3)])
def test_stop_between_any_two_system_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, step: int
) -> None:
    """fsync of the file, the old one moved, the new one moved, fsync of the folder: a state is there after each."""
    checkpoint.save(tmp_path, {"step": 2})
    left = [calls]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            if left[0] == 0:
                raise SystemExit
            left[0] -= 1
            return call(*arguments)

        return wrapper

    with monkeypatch.context() as patched, contextlib.suppress(SystemExit):
        for name in ("fsync", "replace"):
            patched.setattr(os, name, counted(getattr(os, name)))
        checkpoint.save(tmp_path, {"step": 3})
    assert left == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.load(tmp_path) == {"step": step}


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """kill -9 at twenty random moments; what loads is at least the last save that returned."""
    moments = random.Random(0)
    for _ in range(20):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(1):
                    checkpoint.save(tmp_path, {"step": step, "w": torch.full((20_000,), step)})
                    os.write(write, b".")
            finally:
                os._exit(1)
        os.close(write)
        with open(read, "rb") as pipe:
            finished = len(pipe.read(1))
            time.sleep(moments.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            finished += len(pipe.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kill between the renames leaves only the previous one
            state = checkpoint.load(tmp_path)
        assert 1 <= finished <= state["step"] <= finished + 1 and (state["w"] == state["step"]).all()


def test_parameter_files(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint.save_tensors(path, {"w": torch.tensor([1.5, 2.5])}, {"env": 'a "quoted" id'})
    tensors, metadata = checkpoint.load_tensors(path)
    assert tensors["w"].tolist() == [1.5, 2.5] and metadata == {"env": 'a "quoted" id'}
    assert safetensors.torch.load_file(path)["w"].tolist() == [1.5, 2.5]
    assert [child.name for child in tmp_path.iterdir()] == ["model.safetensors"]


COPIES = """
import resource, sys
from pathlib import Path
import torch
from rl_lab import checkpoint

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

state, start = {"replay": torch.ones(300, 2**20, dtype=torch.uint8)}, peak()
checkpoint.save(Path(sys.argv[1]), state)
saved = peak()
del state
checkpoint.load(Path(sys.argv[1]))
print(saved - start, peak() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory in Linux's unit")
def test_a_large_replay_is_not_copied(tmp_path: Path) -> None:
    """Guards against memory for several replays where there is room for one: MiB beyond 300 to save, and to load."""
    ended = subprocess.run([sys.executable, "-c", COPIES, tmp_path], capture_output=True, text=True, check=True)
    saving, loading = map(int, ended.stdout.split())
    assert saving < 100 and loading < 400  # the file is mapped while its tensors are copied out of it
