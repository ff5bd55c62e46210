"""Training a language model by DPO and by GRPO here and in TRL, side by side: CPU-seconds and memory.

    python3.11 -m venv ../trl
    ../trl/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.23.0
    python -m rl_lab.models smollm2-135m
    python -m benchmarks.preference --trl-python ../trl/bin/python --data harmless-base-test.jsonl.gz

All weights of SmolLM2-135M are trained, one thread each, one after the other to save memory, on the same examples in
the same order: DPO on 4 pairs a step in float32; GRPO on larger-of-two, 6 prompts with 8 completions of up to 4
tokens, in bfloat16 where that is faster. TRL computes the reference's log-probabilities in every step,
rl_lab once at the start: their part of a step is told apart, as an example that comes again does not cost it again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.table import Table

from benchmarks import race
from benchmarks.report import machine, publish
from rl_lab.language import load_tokenizer, locate
from rl_lab.language_training import drawn
from rl_lab.optim import fast_bf16
from rl_lab.preference_data import Example, place, read, select, tokenize
from rl_lab.tasks import make

PAIRS, PROMPTS, SAMPLES = 4, 6, 48  # of a gradient step


@dataclass(frozen=True)
class Flags:
    """Flags of the benchmark."""

    data: Path
    """pairs to learn from, of which the first are taken"""
    trl_python: Path | None = None
    """interpreter with TRL; without it TRL is left out"""
    model: str = "smollm2-135m"
    """as `rl_lab.dpo` takes it"""
    methods: tuple[str, ...] = ("dpo", "grpo")
    """which ones"""
    steps: int = 3
    """gradient steps that are measured, after one that is not"""
    max_tokens: int = 256
    """of a prompt with a completion; longer pairs are left out"""
    save: Path | None = None
    """JSON file for the result; what is printed goes beside it as .txt"""


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row_of(pair: Example) -> dict[str, Any]:
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in pair.completions)
    return {"prompt": pair.prompt, "chosen": chosen, "rejected": rejected}


def pairs(flags: Flags, count: int) -> tuple[list[Example], Example]:
    """So many pairs to learn from, and one that is held out; none longer than --max-tokens."""
    tokenizer, found = load_tokenizer(flags.model), read(str(flags.data), "pairs")[0]
    shares = [select(found, share)[: 2 * count] for share in ((0.0, 0.9), (0.9, 1.0))]
    known, held_out = ([share[i] for i in tokenize(share, tokenizer, flags.max_tokens)[1]] for share in shares)
    return known[:count], held_out[0]


def contenders(method: str, flags: Flags, folder: Path) -> list[race.Contender]:
    """Ours and TRL's, each with one step more than is measured, as a process at its end has no clock."""
    steps, bf16 = flags.steps + 2, method == "grpo" and fast_bf16()
    ours = [sys.executable, "-m", "benchmarks.ours", method, "--model", locate(flags.model), "--steps", str(steps)]
    ours += ["--runs-dir", str(folder / "runs"), "--bf16" if bf16 else "--no-bf16"]
    if method == "dpo":
        known, held_out = pairs(flags, PAIRS * steps)
        ours += ["--data", write(folder / "ours.jsonl", map(row_of, [*known, held_out])), "--warmup", "0"]
        ours += ["--batch-size", str(PAIRS), "--eval-examples", "1"]
        order = [i for step in range(steps) for i in drawn(len(known), PAIRS, 1, step)]
        data = write(folder / "trl.jsonl", (row_of(known[i]) for i in order))
    else:
        ours += ["--task", "larger-of-two", "--prompts-per-step", str(PROMPTS), "--group-size", str(SAMPLES // PROMPTS)]
        ours += ["--max-new-tokens", "4", "--eval-prompts", "1"]
        prompts = [x for x in make("larger-of-two").prompts if place(x) < 0.9]
        order = [i for step in range(steps) for i in drawn(len(prompts), PROMPTS, 1, step)]
        data = write(folder / "trl.jsonl", ({"prompt": prompts[i]} for i in order))
    found = [race.Contender("rl_lab", ours, race.ROOT, 1, first=-2 if method == "dpo" else 0)]
    if flags.trl_python:
        peer = [str(flags.trl_python.absolute()), "-P", str(Path(__file__).with_name("trl_peer.py"))]
        command = [*peer, method, locate(flags.model), data, str(steps), "bf16" if bf16 else "float32"]
        found.append(race.Contender("TRL", command, folder, 1))
    return found


def raced(method: str, flags: Flags, folder: Path) -> dict[str, dict[str, Any]]:
    """By contender, CPU-seconds of each measured step, and the most bytes held until the last one.

    Of ours also `reference`: CPU-seconds for the reference's log-probabilities of a step's pairs.
    """
    environ = os.environ | {"RL_LAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, dict[str, Any]] = {}
    for contender in contenders(method, flags, folder):
        trainee, mine = race.Trainee(contender, environ), {}
        if contender.first < 0:
            before, after = (trainee.advance(mark)["cpu"] for mark in (-1, 0))
            mine["reference"] = (after - before) * PAIRS / (PAIRS * (flags.steps + 2) + 1)
        clocks = [trainee.advance(step)["cpu"] for step in range(1, flags.steps + 2)]  # the first step is warm-up
        found[contender.name] = mine | {"seconds": np.diff(clocks).tolist(), "memory": trainee.memory}
        trainee.process.kill()
        trainee.process.wait()
    return found


def measure(flags: Flags) -> dict[str, Any]:
    """Run the benchmark."""
    results = {}
    for method in flags.methods:
        with tempfile.TemporaryDirectory() as name:
            results[method] = raced(method, flags, Path(name))
    return {
        "model": flags.model,
        "max_tokens": flags.max_tokens,
        "results": results,
        "bf16": {"dpo": False, "grpo": fast_bf16()},
        "versions": race.versions(sys.executable, race.ROOT),
        "trl": race.versions(str(flags.trl_python), race.ROOT) if flags.trl_python else None,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def table(report: dict[str, Any]) -> Table:
    """CPU-seconds of a gradient step, examples per CPU-second and gigabytes, and how many times TRL's."""
    shown = Table("", title=f"{report['model']}: medians of gradient steps (least to most); × TRL")
    for name in ("CPU-seconds a step", "pairs or samples per CPU-second", "×", "peak memory, GB", "×"):
        shown.add_column(name, justify="right")

    def add(name: str, seconds: list[float], count: int, memory: float, peer: dict[str, Any] | None) -> None:
        median = float(np.median(seconds))
        times = f"{np.median(peer['seconds']) / median:.2f}" if peer else ""
        less = f"{memory / peer['memory']:.2f}" if peer else ""
        cell = f"{median:.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        shown.add_row(name, cell, f"{count / median:.3f}", times, f"{memory / 1e9:.2f}", less)

    for method, results in report["results"].items():
        count, peer, ours = {"dpo": PAIRS, "grpo": SAMPLES}[method], results.get("TRL"), results["rl_lab"]
        once = f", {method} with the reference kept" if method == "dpo" else f", {method}"
        add(f"rl_lab{once}", ours["seconds"], count, ours["memory"], peer)
        if method == "dpo":
            with_it = [x + ours["reference"] for x in ours["seconds"]]
            add("rl_lab, dpo with its computing", with_it, count, ours["memory"], peer)
        if peer:
            add(f"TRL, {method}", peer["seconds"], count, peer["memory"], None)
    return shown


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    if unknown := set(flags.methods) - {"dpo", "grpo"}:
        raise SystemExit(f"--methods {' '.join(sorted(unknown))}: known are dpo grpo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))  # which runs what atexit has
    try:
        report = measure(flags)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    publish(report, [table(report)], ("bf16", "versions", "trl", "machine"), flags.save, 140)


if __name__ == "__main__":
    main()
