"""A language model's training that was killed and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import random
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rl_lab import checkpoint
from tests.language_runs import labelled, left, pairs, write
from tests.reliability.test_resume import WRITES, has_checkpoint

if TYPE_CHECKING:
    from tests.reliability.conftest import Lab

# Kills the process when so many Python and C functions have been called since the first step, and prints how many.
CALLS = """
import os, signal, sys
def count(frame, event, argument, seen=[0]):
    if event in ("call", "c_call"):
        seen[0] += 1
        if seen[0] == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "call" and frame.f_code.co_name == "finish":
            print("count:", seen[0])
import rl_lab.language_training, rl_lab.run
rl_lab.run.FLUSH_EVERY = 1e9  # or a slow machine would make more calls
steps = rl_lab.language_training.LanguageRun.steps
rl_lab.language_training.LanguageRun.steps = lambda run: (sys.setprofile(count), steps(run))[1]
"""
FLAGS = "--steps 10 --warmup 2 --learning-rate 1e-3 --checkpoint-every 2 --eval-every 4 --no-bf16"
ROUNDS = (
    "--prompts-per-step 4 --group-size 2 --max-new-tokens 4 --reward letters:early --holdout 0.5 1 --eval-prompts 2"
)
LETTERS = "def early(_, texts): return [sum(x < 'n' for x in text) for text in texts]"


@pytest.mark.parametrize("before", [CALLS, WRITES], ids=["calls", "writes"])
@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("dpo", "--batch-size 3"),
        ("dpo", "--batch-size 3 --lora-rank 2 --loss tdpo2"),
        ("kto", "--batch-size 3"),
        ("grpo", ROUNDS),
        ("grpo", f"{ROUNDS} --epochs 2 --minibatches 2 --beta 0.1"),
    ],
)
def test_killed_and_resumed(
    language_lab: Lab, tiny_model: Path, tmp_path: Path, algo: str, more: str, before: str
) -> None:
    """Four times, anywhere between two function calls or two writes: checkpoints, logs, and the reference's files; of
    GRPO the samples and the evaluation before training."""
    lab, rows = language_lab, labelled(40) if algo == "kto" else pairs()
    data = "--prompts" if algo == "grpo" else "--data"
    flags = ["--model", tiny_model, data, write(tmp_path / "data.jsonl", rows), *FLAGS.split(), *more.split()]
    (tmp_path / "letters.py").write_text(LETTERS)
    here = f"import os, sys; sys.path.insert(0, {str(tmp_path)!r}); os.environ['RL_LAB_CACHE'] = {{!r}}\n"

    def injected(moment: int, name: str) -> str:
        return here.format(str(tmp_path / name)) + before.replace("{moment}", str(moment))

    whole = lab.run(*flags, "--runs-dir", tmp_path / "whole", before=injected(0, "cache"), algo=algo)
    assert (whole.status, whole.err) == (0, "")
    count = int(whole.out.rpartition("count: ")[2].split()[0])
    choose = random.Random(0)
    runs_dir, reached = tmp_path / "killed", set()
    for session, moment in enumerate([*(choose.randrange(count // 8, count // 3) for _ in range(4)), 0]):
        begun = [run for run in tmp_path.glob("killed */*") if has_checkpoint([run])]
        words = ["--resume", *begun] if begun else [*flags, "--runs-dir", f"{runs_dir} {session}"]
        ended = lab.run(*words, before=injected(moment, "other cache"), algo=algo)
        assert ended.status == (-signal.SIGKILL if moment else 0), ended.err
        with warnings.catch_warnings(action="ignore"):  # of a previous one
            reached |= {checkpoint.load(run)["run"]["iteration"] for run in begun if has_checkpoint([run])}
    assert len(reached) >= 3, "the kills did not spread over the run"
    (killed,), (undisturbed,) = begun, (tmp_path / "whole").iterdir()
    assert left(killed) == left(undisturbed)
