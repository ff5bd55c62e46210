"""Data-parallel training: two processes that average their gradients are one process with all the data."""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch

from rl_lab import distributed
from rl_lab.algorithms import ppo
from rl_lab.algorithms.ppo import Args
from rl_lab.distributions import Actions
from rl_lab.rollout import Rollout

ACTIONS, ARGS = Actions((3,), ()), Args(norm_adv=False)  # with it each rank normalises its own advantages
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def batch(rows: slice) -> Rollout:
    random = torch.Generator().manual_seed(0)
    columns = {name: torch.randn(32, generator=random) for name in ("logprobs", "values", "advantages", "returns")}
    columns["logprobs"] -= 1.5
    columns |= {"obs": torch.randn(32, 4, generator=random), "actions": torch.randint(3, (32,), generator=random)}
    return {name: column[rows] for name, column in columns.items()}


def gradients_of(rows: slice) -> ppo.Params:
    params = ppo.init_params(gym.spaces.Box(-1, 1, (4,)), ACTIONS, torch.Generator().manual_seed(1))
    function, one_graph = ppo.averaged(lambda p, b: ppo.gradient(p, b, ACTIONS, ARGS), "test", compile=False)
    assert one_graph is False
    return function(params, batch(rows))[0]


def test_ranks_average_to_the_whole_batch(tmp_path: Path) -> None:
    """Guards against gradients summed, not averaged, or averaged over parameters in another order."""
    here = Path(__file__)
    code = (
        f"import sys, torch; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]\n"
        "import test_distributed as t\n"
        "rank, size = t.ppo.ranks(); grads = t.gradients_of(slice(rank * 16, rank * 16 + 16))\n"
        f"torch.save(grads, {str(tmp_path)!r} + f'/{{rank}}.pt')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    subprocess.run([*TORCHRUN, str(script)], check=True, capture_output=True, cwd=here.parents[2], timeout=120)
    whole = gradients_of(slice(0, 32))
    for rank in range(2):
        part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-7)


def train_small(folder: str) -> None:
    """What each rank ends with, and what it learned from first."""
    rollouts: list[Rollout] = []
    collect = ppo.Collector.collect
    ppo.Collector.collect = lambda self, *args: (rollouts.append(collect(self, *args)), rollouts[-1])[1]  # type: ignore[assignment, method-assign]
    args = Args(total_timesteps=256, num_steps=32, compile=False, device="cpu", runs_dir=Path(folder) / "runs")
    params = ppo.train(args).state()["params"]
    columns = {name: rollouts[0][name] for name in ("obs", "actions")}
    torch.save(params | columns, f"{folder}/{ppo.ranks()[0]}.pt")


def test_ranks_learn_the_same_from_data_of_their_own(tmp_path: Path) -> None:
    """Guards against ranks that never average, that start apart, or that play the same episodes."""
    here = Path(__file__)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parents[2])!r}]\n"
        f"import test_distributed\ntest_distributed.train_small({str(tmp_path)!r})\n"
    )
    subprocess.run([*TORCHRUN, str(script)], check=True, capture_output=True, cwd=here.parents[2], timeout=240)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert not torch.equal(first.pop("obs"), second.pop("obs"))
    assert not torch.equal(first.pop("actions"), second.pop("actions"))
    assert all(torch.equal(p, second[name]) for name, p in first.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with two environments each."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--env", "CartPole-v1", "--total-timesteps", "1024", "--no-compile", "--runs-dir", str(folder)]
    subprocess.run([*TORCHRUN, "-m", "rl_lab.ppo", *flags], check=True, capture_output=True, timeout=240)
    (made,) = folder.iterdir()  # rank 0's alone
    return made


def test_steps_and_episodes_of_all_ranks_are_logged(run: Path) -> None:
    """Guards against logs of one rank's environments only, and against counting its steps as all."""
    with gzip.open(run / "episodes.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    steps, lengths = ([int(row[name]) for row in rows] for name in ("global_step", "episodic_length"))
    assert 1000 < steps[-1] <= 1024 and steps == sorted(steps)
    assert 1024 - 4 * 100 < sum(lengths) <= 1024  # but for four unfinished episodes, every step belongs to one


def test_rows_of_a_seed_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against episodes in another seed's folder: two seeds of two environments, on two ranks."""
    column = torch.arange(4.0).unsqueeze(0)

    def both(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        for i, part in enumerate(parts):
            part.copy_(mine + 100 * i)

    monkeypatch.setattr(distributed, "ranks", lambda: (0, 2))
    monkeypatch.setattr(distributed.dist, "all_gather", both)
    assert distributed.gathered({"x": column}, 2)["x"].tolist() == [[0, 1, 100, 101, 2, 3, 102, 103]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-envs", "3"], "--num-envs 3 must be a multiple of torchrun's 2 ranks"),
        (["--until-return", "9", "--eval-every", "64"], "--until-return 9.0 must be left out: torchrun's ranks"),
        (["--resume", "{run}"], "must be left out: a run under torchrun cannot be continued"),
    ],
)
def test_what_ranks_cannot_do_is_refused(flags: list[str], message: str, run: Path, tmp_path: Path) -> None:
    flags = [flag.format(run=run) for flag in flags]
    if "--resume" not in flags:
        flags += ["--env", "CartPole-v1", "--no-compile", "--runs-dir", str(tmp_path)]
    else:
        (run / "model.safetensors").unlink()  # as if it had not finished
    done = subprocess.run([*TORCHRUN, "-m", "rl_lab.ppo", *flags], capture_output=True, text=True, timeout=240)
    assert done.returncode != 0 and message in done.stderr
