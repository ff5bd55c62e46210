"""Answer a task's prompts with a language model: how many a program finds right, or pairs of right and wrong ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from rl_lab.checkpoint import replace_file
from rl_lab.generation import Sampler
from rl_lab.language import Prompt, load_model, load_tokenizer
from rl_lab.optim import fast_bf16
from rl_lab.preference_data import place, write_lines
from rl_lab.preference_metrics import share
from rl_lab.tasks import Task, make


@dataclass(frozen=True)
class Args:
    """Greedy answers and their accuracy; with --pairs sampled ones, and a pair of each prompt that has both kinds."""

    model: Annotated[str, tyro.conf.Positional]
    """folder of a model, a run folder, smollm2-135m, or an id of the Hugging Face hub"""
    task: str
    """larger-of-two, addition, countdown or gsm8k:FILE"""
    share: tuple[float, float] = (0.9, 1.0)
    """share of the prompts, by their hash; grpo keeps 0.9 to 1 for evaluation by default"""
    num_prompts: int = 500
    """how many of them, at most"""
    pairs: Path | None = None
    """write pairs to this .jsonl file"""
    group_size: int = 8
    """answers to a prompt, with --pairs"""
    json: Path | None = None
    """write the accuracy to this file too"""
    seed: int = 1
    """of their sampling, at temperature 1"""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    bf16: bool = fast_bf16()
    """matrix products in bfloat16"""


def require_valid(args: Args) -> None:
    """Raise a ValueError that says which flag cannot be so, before anything is sampled."""
    for flag, path in (("--pairs", args.pairs), ("--json", args.json)):
        if path and not path.absolute().parent.is_dir():
            raise ValueError(f"{flag} {path} must be a file in a folder that exists")
    if args.pairs and args.group_size < 2:
        raise ValueError(f"--group-size {args.group_size} must be at least 2, for a right and a wrong answer")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; --device cpu works")


def pair_of(texts: list[str], rewards: list[float]) -> tuple[str, str] | None:
    """The first of the best answers and the first of the worst, unless all are equal or none is there."""
    best, worst = max(rewards, default=0.0), min(rewards, default=0.0)
    return None if best == worst else (texts[rewards.index(best)], texts[rewards.index(worst)])


def chosen_prompts(task: Task, args: Args) -> list[Prompt]:
    low, high = args.share
    prompts = [prompt for prompt in task.prompts if low <= place(prompt) < high][: args.num_prompts]
    if not prompts or args.num_prompts < 1:
        raise ValueError(f"--share {low} {high} with --num-prompts {args.num_prompts}: no prompts of {args.task}")
    return prompts


def main() -> None:
    """See the module."""
    args = tyro.cli(Args, prog="python -m rl_lab.verify", description=__doc__)
    try:
        require_valid(args)
        task = make(args.task)
        prompts = chosen_prompts(task, args)
        model, tokenizer = load_model(args.model).to(args.device), load_tokenizer(args.model)
        generator = torch.Generator(args.device).manual_seed(args.seed)
        sample = Sampler(model, tokenizer, task.stop, task.max_new_tokens, generator, args.bf16)
        size, temperature = (args.group_size, 1.0) if args.pairs else (1, 0.0)
        rewards: list[float] = []
        lines: list[dict[str, Any]] = []
        for i in range(0, len(prompts), 64):
            batch = prompts[i : i + 64]
            _, texts, cut = sample(batch, size, temperature)
            found = task.reward([prompt for prompt in batch for _ in range(size)], texts)
            rewards += found
            for j, prompt in enumerate(batch):
                mine = range(j * size, (j + 1) * size)
                whole = [k for k in mine if not cut[k]]  # a stump would be taught to end
                if pair := pair_of([texts[k] for k in whole], [found[k] for k in whole]):
                    lines.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
        told = share(rewards)
        print(
            f"{args.model} on {len(prompts)} prompts of {args.task}, {'sampled' if args.pairs else 'greedy'}: "
            f"{told['mean']:.3f} right" + ("" if args.pairs else f" [{told['low']:.3f}, {told['high']:.3f}]")
        )
        if args.pairs:
            write_lines(args.pairs, lines)
            print(f"{args.pairs}: {len(lines)} pairs, of the prompts with right and wrong answers")
        if args.json:
            report = {"model": args.model, "task": args.task, "prompts": len(prompts), "accuracy": told}
            replace_file(args.json, json.dumps(report, indent=2).encode())
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
