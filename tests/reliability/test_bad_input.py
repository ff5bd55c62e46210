"""Whatever is wrong ends in one line that names the flag, what was given and what would work; no file is harmed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import safetensors.torch
import torch

from rl_lab import checkpoint

if TYPE_CHECKING:
    from tests.reliability.conftest import Ended, Lab


def assert_one_line(ended: Ended, message: str, status: int) -> None:
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", ended.err), ended.err
    assert ended.status == status


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--env CartPoole-v1", "--env CartPoole-v1: .* nearest ids are CartPole-v1"),
        ("--env FrozenLake-v1", r"--env FrozenLake-v1: observation space Discrete\(16\) is refused, it must be a Box"),
        ("--num-envs 0", "--num-envs 0 must be at least 1"),
        ("--num-minibatches 3", r"--num-minibatches 3 must be a divisor of num_envs \* num_steps = 32"),
        ("--num-minibatches 32", "--num-minibatches 32 must be at most 16: --norm-adv needs two samples"),
        ("--total-timesteps 31", r"--total-timesteps 31 must be a multiple of num_envs \* num_steps = 32, or at"),
        ("--num-seeds 0", "--num-seeds 0 must be at least 1"),
        ("--seed -1", "--seed -1 must be at least 0"),
        ("--seed 9223372036854775807 --num-seeds 2", "--seed 9223372036854775807 must be below 2[*][*]63"),
        ("--num-steps 0", "--num-steps 0 must be at least 1"),
        ("--update-epochs 0", "--update-epochs 0 must be at least 1"),
        ("--torch-threads 0", "--torch-threads 0 must be at least 1"),
        ("--eval-every -1", "--eval-every -1 must be at least 0"),
        ("--until-return 400", "--until-return 400.0 must be finite, with --eval-every above 0"),
        ("--until-return nan --eval-every 64", "--until-return nan must be finite, with --eval-every above 0"),
        ("--checkpoint-every -1", "--checkpoint-every -1 must be at least 0"),
        ("--gamma 1.01", r"--gamma 1.01 must be in \[0, 1\]"),
        ("--gae-lambda -0.1", r"--gae-lambda -0.1 must be in \[0, 1\]"),
        ("--learning-rate 0", "--learning-rate 0.0 must be finite and above 0"),
        ("--learning-rate nan", "--learning-rate nan must be finite and above 0"),
        ("--clip-coef 0", "--clip-coef 0.0 must be finite and above 0"),
        ("--max-grad-norm inf", "--max-grad-norm inf must be finite and above 0"),
        ("--ent-coef -0.1", "--ent-coef -0.1 must be finite and 0 or more"),
        ("--vf-coef inf", "--vf-coef inf must be finite and 0 or more"),
        ("--target-kl 0", "--target-kl 0.0 must be finite and above 0"),
        ("--resume /dev", "--resume /dev is no complete run folder .*; name one that training made"),
        ("--resume runs/a__1 runs/a__2", "--resume takes one path, not runs/a__1 and runs/a__2: name one of them"),
    ],
)
def test_flags(lab: Lab, tmp_path: Path, flags: str, message: str) -> None:
    assert_one_line(lab.train(tmp_path / "runs", *flags.split()), message, status=2)
    assert not (tmp_path / "runs").exists()


def test_one_sample_a_minibatch_works_without_norm_adv(lab: Lab, tmp_path: Path) -> None:
    lab.trained(tmp_path, "--num-minibatches", 32, "--no-norm-adv", "--total-timesteps", 32)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no-such-flag", "Unrecognized options: --no-such-flag"),
        ("--backend warp", "invalid choice 'warp' for argument '--backend'"),
        ("--learning-rate fast", "--learning-rate: could not convert string to float: 'fast'"),
    ],
)
def test_what_the_parser_refuses(lab: Lab, tmp_path: Path, flags: str, message: str) -> None:
    ended = lab.train(tmp_path / "runs", *flags.split())
    assert ended.status == 2 and message in ended.err and "Traceback" not in ended.err
    assert "python -m rl_lab.ppo --help" in ended.err


def test_no_cuda(lab: Lab, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    ended = lab.train(tmp_path / "runs", "--device", "cuda")
    assert_one_line(ended, "--device cuda: torch finds no CUDA device here; --device cpu works", status=2)


def test_action_space(lab: Lab, tmp_path: Path) -> None:
    before = """
import gymnasium as gym
class Shifted(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.{space}
gym.register("Shifted-v0", Shifted)
"""
    for space in ("Discrete(2, start=1)", "MultiBinary(2)"):
        ended = lab.train(tmp_path / "runs", "--env", "Shifted-v0", before=before.format(space=space))
        assert_one_line(ended, rf"--env Shifted-v0: action space {re.escape(space)} is refused: use Discrete", status=2)


def test_backend(lab: Lab, tmp_path: Path) -> None:
    ended = lab.train(tmp_path / "runs", "--env", "Pusher-v5", "--backend", "native")
    assert_one_line(ended, "backend='native' has no Pusher-v5; it has .*CartPole-v1", status=1)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("algo", "flags", "message", "status"),
    [
        ("dqn", "--env Pendulum-v1", "--env Pendulum-v1: this command needs one Discrete action, not Box", 1),
        ("dqn", "--learning-starts 320", "--learning-starts 320 must be below --total-timesteps 320", 2),
        ("dqn", "--buffer-size 10000000000000", "--buffer-size 10000000000000 needs .* GB, .* or --replay-folder", 1),
        ("dqn", "--batch-size 99999999999", "--batch-size 99999999999 must be at most --buffer-size", 1),
        ("dqn", "--bf16", "--bf16 True must be off for vectors", 1),
        ("dqn", "--priority-beta 0.5", "--priority-beta 0.5 must be left out, or with --prioritized", 2),
        ("c51", "--v-max -100", "--v-max -100.0 must be finite and above --v-min -100.0", 2),
        ("c51", "--env HalfCheetah-v4", "--env HalfCheetah-v4: this command needs one Discrete action, not Box", 1),
        ("rainbow", "--noise-std 0", "--noise-std 0.0 must be finite and above 0: nothing else explores", 2),
        ("sac", "--env CartPole-v1", "--env CartPole-v1: SAC needs actions in a bounded Box, not Discrete", 1),
        ("sac", "--alpha 0.1", "--alpha 0.1 must be left out, or with --no-autotune", 2),
        ("td3", "--env CartPole-v1", "--env CartPole-v1: TD3 needs actions in a bounded Box, not Discrete", 1),
        ("td3", "--buffer-size 99", "--buffer-size 99 must be a multiple of --num-envs 2", 2),
        ("iql", "--dataset none.hdf5", "none.hdf5 is no file; D4RL's are at", 1),
        ("td3_bc", "", "--dataset is missing: a Minari id or a path", 1),
    ],
)
def test_other_commands(lab: Lab, tmp_path: Path, algo: str, flags: str, message: str, status: int) -> None:
    assert_one_line(lab.train(tmp_path / "runs", *flags.split(), algo=algo), message, status)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("algo", ["dqn", "sac", "iql"])
def test_torchrun_is_refused_where_ranks_share_nothing(lab: Lab, tmp_path: Path, algo: str) -> None:
    """They would train the same seed into folders of their own, one of which has no checkpoint."""
    before = "import os; os.environ.update(WORLD_SIZE='2', RANK='1')"
    ended = lab.train(tmp_path / "runs", before=before, algo=algo)
    assert_one_line(ended, "torchrun's 2 ranks would each train the same: start this command without it", status=2)
    assert not (tmp_path / "runs").exists()


def test_no_compiler(lab: Lab, tmp_path: Path) -> None:
    hide = f"import os; os.environ.update(PATH='/', RL_LAB_CACHE={str(tmp_path)!r}); os.environ.pop('CXX', None)"
    ended = lab.train(tmp_path / "runs", "--compile", before=hide)
    assert_one_line(ended, r"--compile needs a C\+\+ compiler .* pass --no-compile", status=1)


def test_runs_dir(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert_one_line(lab.train(tmp_path / "file"), "--runs-dir .*/file: .*; name a folder with room to write", status=1)
    assert (tmp_path / "file").read_text() == "mine"
    nobody = "import os; os.geteuid() or os.setuid(65534)"  # the superuser may write anywhere
    tmp_path.chmod(0o500)
    ended = lab.train(tmp_path / "runs", before=nobody)
    tmp_path.chmod(0o700)
    assert_one_line(ended, "--runs-dir .*/runs: .*Permission denied", status=1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--gamma 0.9", "--gamma 0.9: .* has 0.99, and a resumed run keeps its flags; leave the flag out"),
        ("--seed 2", "--seed 2: .* has 1"),
        ("--env Acrobot-v1", "--env Acrobot-v1: .* has CartPole-v1"),
        ("--total-timesteps 640", r"--total-timesteps 640: .* has 320, which its annealing follows \(--no-anneal-lr\)"),
        ("--total-timesteps 160", "--total-timesteps 160: .* has 320, and a resumed run keeps its flags"),
    ],
)
def test_resume_with_other_flags(lab: Lab, run: Path, flags: str, message: str) -> None:
    before = contents(run)
    assert_one_line(lab.run("--resume", run, *flags.split()), message, status=2)
    assert contents(run) == before


@pytest.fixture(scope="module")
def run(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be left as it is."""
    return lab.trained(tmp_path_factory.mktemp("runs"))[0]


@pytest.fixture
def own(run: Path, tmp_path: Path) -> Path:
    """A copy of it to harm, as it was before its end."""
    folder = Path(shutil.copytree(run, tmp_path / run.name))
    (folder / "model.safetensors").unlink()
    return folder


def test_resume_with_flags_of_another_command(lab: Lab, own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    del config["args"]["gae_lambda"]
    (own / "config.json").write_text(json.dumps(config))
    assert_one_line(lab.run("--resume", own), f"--resume {own}: a run of ppo with other flags", status=2)


def test_resume_without_the_other_folders(lab: Lab, tmp_path: Path) -> None:
    first, second = lab.trained(tmp_path, "--num-seeds", 2)
    shutil.rmtree(first)
    assert_one_line(lab.run("--resume", second), f"--resume {second} is no complete run folder.*{first.name}", status=2)


def test_resume_without_a_sound_checkpoint(lab: Lab, own: Path) -> None:
    (own / checkpoint.PREVIOUS).unlink()
    blob = bytearray((own / checkpoint.NAME).read_bytes())
    blob[-1] ^= 1
    (own / checkpoint.NAME).write_bytes(blob)
    before = contents(own)
    assert_one_line(lab.run("--resume", own), "is damaged.* is missing; name a run folder with a complete", status=1)
    assert contents(own) == before


def test_resume_with_a_foreign_checkpoint(lab: Lab, own: Path, tmp_path: Path) -> None:
    (own / checkpoint.PREVIOUS).unlink()
    (other,) = lab.trained(tmp_path / "other", "--num-steps", 8)
    shutil.copy(other / checkpoint.NAME, own)
    assert_one_line(lab.run("--resume", own), f"--resume {own}: its checkpoint is of another run", status=1)
    torch.save({"w": torch.ones(2)}, own / checkpoint.NAME)  # a pickle
    assert_one_line(lab.run("--resume", own), "another program wrote it", status=1)
    safetensors.torch.save_file({"w": torch.ones(2)}, own / checkpoint.NAME)
    assert_one_line(lab.run("--resume", own), "another program wrote it", status=1)
    checkpoint.save(own, {"w": torch.ones(2)})  # ours, of no run
    assert_one_line(lab.run("--resume", own), "its checkpoint is of another run", status=1)


def test_a_learning_rate_too_large(lab: Lab, tmp_path: Path) -> None:
    ended = lab.train(tmp_path, "--learning-rate", 1e30)
    message = "_loss of seed 1 is not finite after step 0; a smaller learning rate .* keeps the checkpoint of step 0"
    assert_one_line(ended, message, status=1)
    state = checkpoint.load(lab.folders(tmp_path)[0])["state"]
    assert all(torch.isfinite(x).all() for x in state["params"].values())
