"""Memory is predicted before it is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from rl_lab import memory
from rl_lab.algorithms import ppo
from rl_lab.envs import make
from rl_lab.envs.memory import Recall
from rl_lab.memory import free_memory, require_memory

CPU = torch.device("cpu")


def test_free_memory_is_below_what_the_machine_has() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < free_memory(CPU) <= whole


def test_a_control_group_s_limit_counts(tmp_path: Path) -> None:
    """By hand: of the inner group 1000 - 700 + 200 are left, the outer has no limit, the root one of 5000 - 4000."""
    own = tmp_path / "own"
    own.write_text("1:cpu:/elsewhere\n0::/outer/inner\n")
    (inner := tmp_path / "root/outer/inner").mkdir(parents=True)
    for folder, limit, taken, caches in (
        (inner, "1000", "700", "200"), (inner.parent, "max", "9", "9"), (inner.parents[1], "5000", "4000", "0"),
    ):  # fmt: skip
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{taken}\n")
        (folder / "memory.stat").write_text(f"anon 5\nactive_file 3\ninactive_file {caches}\nslab 1\n")
    assert memory._group_room(own, tmp_path / "root") == [500, 1000]
    own.write_text("1:memory:/of/version/1\n")
    assert memory._group_room(own, tmp_path / "root") == []
    assert memory._group_room(tmp_path / "none", tmp_path / "root") == []


def test_says_how_many_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**9)
    require_memory(1000, 10, 10**5, CPU)
    with pytest.raises(
        ValueError, match=r"num_envs=1001 takes 1.0 GB \(seeds: 10\), 1.0 GB are free on cpu; 1000 would"
    ):
        require_memory(1001, 10, 10**5, CPU)


def test_too_many_environments_leave_no_run(tmp_path: Path) -> None:
    """A rollout of CartPole takes 1.2 kB a step, a simulation of MuJoCo 0.5 MB."""
    args = replace(ppo.Args(), num_envs=10**9, total_timesteps=128 * 10**10, runs_dir=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"num_envs=1000000000 takes 15\d+.\d GB .* would fit"):
        ppo.train(args)
    with pytest.raises(ValueError, match=r"num_envs=1000000 takes 550.0 GB .* would fit"):
        make("HalfCheetah-v4", (0,), 10**6)
    assert not list(tmp_path.iterdir())


class Picky(Recall):
    """Allows one action of its fifty, and raises on any other."""

    action_space = gym.spaces.Discrete(50)

    def mask(self, physics: torch.Tensor) -> torch.Tensor:
        return torch.arange(50).expand(len(physics), -1) == 37

    def transition(self, physics: torch.Tensor, actions: torch.Tensor, draws: torch.Tensor) -> Any:
        assert (actions == 37).all()
        return super().transition(physics, torch.zeros_like(actions), draws)


def test_the_step_that_is_measured_is_an_allowed_one() -> None:
    for _ in range(5):
        ppo.Args(num_envs=2).require_room(Picky((0,), 1), 2, 16, hidden=4 * 64)


# Of this program alone: getrusage's maximum starts from what the process that began it has taken.
PEAK = """
from pathlib import Path
from rl_lab.algorithms import ppo
ppo.main()
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


def peak(num_envs: int, folder: Path) -> int:
    """Most bytes that one iteration of 16 steps takes, without the compiler's."""
    sizes = ["--num-envs", str(num_envs), "--num-steps", "16", "--total-timesteps", str(16 * num_envs)]
    flags = ["--env", "CartPole-v1", "--device", "cpu", "--no-compile", "--runs-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *flags, *sizes, "--update-epochs", "1"], capture_output=True, text=True, check=True
    )
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_prediction_against_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 32,768 more environments take is what was predicted, or down to half of it."""
    predicted: list[int] = []
    monkeypatch.setattr("rl_lab.cli.require_memory", lambda n, seeds, each, device: predicted.append(n * each))
    args = replace(ppo.Args(), device="cpu")
    args.require_room(make("CartPole-v1", (0,), 1), 32768, 16, hidden=4 * 64)
    measured = peak(36864, tmp_path) - peak(4096, tmp_path)
    assert measured < predicted[0] < 2 * measured
