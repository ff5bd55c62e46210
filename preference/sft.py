"""Supervised fine-tuning of a language model on completions to imitate.

Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv:2203.02155, section 3.5:
what comes before preferences are learned from. With N tokens in all completions y of a gradient step,

    L = -1/N sum_y sum_t log policy(y_t | x, y_<t)

Prompts are not learned, EOS is. N counts the tokens of the whole batch, over all micro-batches and processes: every
token weighs the same, so a long completion weighs more than a short one, and the gradient does not depend on how the
batch is split. Dropout is off; nothing is truncated, and completions do not see each other.

    python -m rl_lab.sft --model smollm2-135m --data completions.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks
from rl_lab.language import Tree, micro_batches, pack, token_logprobs
from rl_lab.language_training import LanguageRun, PreferenceArgs, drawn, open_data, open_model
from rl_lab.reference import branch_logprobs


@dataclass(frozen=True, kw_only=True)
class Args(PreferenceArgs):
    """Defaults are for a model of some 100 million weights."""

    steps: int = 250
    """gradient steps"""
    learning_rate: float = 2e-5
    """of AdamW"""
    warmup: int = 25
    """gradient steps over which the learning rate rises from zero"""


def num_tokens(trees: Sequence[Tree]) -> int:
    """Tokens of all completions."""
    return sum(len(tokens) for tree in trees for tokens in tree.branches)


def losses(model: torch.nn.Module, trees: Sequence[Tree], args: Args) -> Tensor:
    """(B,) -log policy(y | x), sums over the completions' tokens, in nats."""
    packed = pack(trees, args.torch_device)
    return -packed.sums(token_logprobs(model, packed, bf16=args.bf16))


def train(args: Args) -> LanguageRun:
    """Train a model; everything is in the run folder afterwards."""
    args = lasting(args)
    model, tokenizer = open_model(args)
    data, held_out = (x.trees for x in open_data(args, tokenizer, "completions"))
    rank, size = ranks()

    def evaluate() -> float:
        """Perplexity of a held-out token."""
        logps = branch_logprobs(model, held_out, args.micro_tokens, args.bf16)
        return math.exp(-float(logps.double().sum()) / num_tokens(held_out))

    def parts(trees: Sequence[Tree]) -> Iterator[dict[str, Tensor]]:
        for group in micro_batches(trees, args.micro_tokens):
            yield {"losses/loss": losses(model, [trees[i] for i in group], args)}

    before: float | None = None
    generator = args.generators(0)[0]
    run = LanguageRun(
        args, "sft", model, tokenizer, generator, None, lambda: {"before": before}, args.shard, [data, held_out]
    )
    before = run.saved["more"]["before"] if run.saved else None
    if before is None and run.iteration == 0:
        before = evaluate()
    for step in run.steps():
        batch = [data[i] for i in drawn(len(data), args.batch_size, args.seed, step)]
        metrics = run.learn(parts(batch[rank::size]), num_tokens(batch))
        if run.evaluation_due:
            metrics["eval/perplexity"] = run.evaluated(evaluate)
        run.log(metrics, f"loss {metrics['losses/loss']:.4f}")
    after = run.evaluated(evaluate)
    report = {"examples": len(held_out), "tokens": num_tokens(held_out), "before": before, "perplexity": after}
    told = f"perplexity of {len(held_out)} held-out completions: {before:.3f} before, {after:.3f} after"
    run.finish(told, report | {"seconds": round(run.elapsed, 1)})
    return run


def main() -> None:
    run(train, Args, data_parallel=True)
