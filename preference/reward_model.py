"""Reward models: of whole answers from preference pairs, and of the steps of a solution from labelled steps.

Outcome (`--kind outcome`): Bradley and Terry 1952, Biometrika 39; Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al.
2022, arXiv:2203.02155. With c the chosen answer and d the rejected one of a prompt,

    L = -log sigmoid(r_c - r_d - m) + eta (r_c + r_d)^2

    m = 0: Ouyang et al., Eq. 1; a margin m >= 0: Touvron et al. 2023, Llama 2, arXiv:2307.09288, Eq. 2
    eta, --centring, holds the rewards around zero: Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2

Process (`--kind process`): Lightman et al. 2023, arXiv:2305.20050; Wang et al. 2023, Math-Shepherd, arXiv:2312.08935.
The probability that a step is right is sigmoid(r) at its last token, learnt by binary cross-entropy; a solution's score
is their minimum, their product, or the last one.

A reward is read at EOS, or at the line break that ends a step but the last, in training as in use. Differs from the
papers: rewards are not shifted afterwards, pairs of one prompt may come in different batches, the head begins smaller.
From TRL: nothing is padded or cut off, a prompt is computed once for both its answers. Tables: docs/reward_model.md.

    python -m rl_lab.reward_model --model smollm2-135m --data pairs.jsonl --lora-rank 16 --learning-rate 1e-4
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks, summed
from rl_lab.language import Tokens, Tree, autocast, micro_batches, pack, rewards
from rl_lab.language_training import Examples, LanguageRun, PreferenceArgs, drawn, open_data, open_model
from rl_lab.preference_metrics import headline, pair_report, reliability_diagram, step_report

SEPARATOR = "\n"  # ends a step, but the last, which EOS ends


@dataclass(frozen=True, kw_only=True)
class Args(PreferenceArgs):
    """Learning rate and warm-up are Llama 2's [Touvron et al. 2023, section 3.2.2]."""

    kind: Literal["outcome", "process"] = "outcome"
    """a reward for an answer, learnt from pairs, or for each step of a solution, from labelled steps"""
    margin: float = 0.0
    """by which the chosen reward should be larger, where a line of the data has no margin"""
    centring: float = 0.0
    """weight of the squared sum of a pair's rewards, eta"""
    aggregation: Literal["min", "product", "last"] | None = None
    """of a solution's steps to its score; --kind process needs one"""
    batch_size: int = 32
    """pairs, or solutions, of a gradient step"""
    steps: int = 500
    """gradient steps"""
    learning_rate: float = 1e-5
    """of AdamW, after the warm-up"""
    warmup: int = 15
    """gradient steps over which the learning rate rises from zero"""

    def __post_init__(self) -> None:
        super().__post_init__()
        process = self.kind == "process"
        for field in ("margin", "centring"):
            self.require(field, 0 <= getattr(self, field) < np.inf, "finite and 0 or more")
            self.require(field, not process or getattr(self, field) == 0, "left out: --kind process has no pairs")
        wanted = "min, product or last for --kind process" if process else "left out: --kind outcome has no steps"
        self.require("shard", not self.shard, "left out: reward models are not divided")
        self.require("aggregation", (self.aggregation is not None) == process, wanted)


def outcome_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, centring: float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_d - m) + eta (r_c + r_d)^2                                      [Touvron et al. 2023, Eq. 2]

    (B,) losses from (B,) rewards; margin m is (B,) or for all, centring is eta                [Eisenstein et al. 2023]
    """
    assert chosen.shape == rejected.shape and chosen.ndim == 1
    return -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


def process_loss(rewards: Tensor, labels: Tensor) -> Tensor:
    """-y log sigmoid(r) - (1 - y) log(1 - sigmoid(r)), for (T,) steps; y is 1 for a right one  [Wang et al. 2023]"""
    assert rewards.shape == labels.shape and rewards.ndim == 1
    return F.binary_cross_entropy_with_logits(rewards, labels, reduction="none")


def aggregate(probabilities: Tensor, how: str) -> float:
    """A solution's score from the (T,) probabilities that its steps are right.

    min: Wang et al. 2023. product, the probability that all are: Lightman et al. 2023. last: the final step's.
    """
    return {"min": probabilities.min(), "product": probabilities.prod(), "last": probabilities[-1]}[how].item()


class Item(NamedTuple):
    """What is learnt from at once: a pair, or a solution of T steps."""

    tree: Tree  # a prompt with the chosen and the rejected answer, or with the solution
    targets: Tensor  # (1,) margin of the pair, or (T,) labels of the steps, 1 for a right one
    back: Tensor | None = None  # of a solution, (T,) how many tokens before its last one each step ends


def chain(tree: Tree, separator: Tokens) -> tuple[Tree, Tensor]:
    """A solution whose steps are branches, each with its EOS: the same in one branch, and `Item.back` of it."""
    steps = [*([*tokens[:-1], *separator] for tokens in tree.branches[:-1]), tree.branches[-1]]
    lengths = torch.tensor([len(tokens) for tokens in steps])
    return Tree(tree.prompt, ([*itertools.chain(*steps)],)), lengths.sum() - lengths.cumsum(0)


def itemize(data: Examples, tokenizer: Any, args: Args) -> list[Item]:
    """What to learn from; solutions of more than `args.max_tokens` tokens are left out."""
    if args.kind == "outcome":
        margins = [args.margin if x.margin is None else x.margin for x in data.examples]
        return [Item(tree, torch.tensor([float(m)])) for tree, m in zip(data.trees, margins, strict=True)]
    separator = tokenizer(SEPARATOR, add_special_tokens=False)["input_ids"]
    found = [(chain(tree, separator), x.labels) for x, tree in zip(*data, strict=True)]
    return [Item(tree, torch.tensor(y).float(), back) for (tree, back), y in found if len(tree) <= args.max_tokens]


def load(args: Args, tokenizer: Any) -> tuple[list[Item], list[Item]]:
    """What to learn from, and what to evaluate on. ValueError if either is empty, or the data of another kind."""
    shares = open_data(args, tokenizer, "pairs" if args.kind == "outcome" else "labelled steps")
    train, holdout = (itemize(data, tokenizer, args) for data in shares)
    for field, items, data in (("train", train, shares[0]), ("holdout", holdout, shares[1])):
        told = f"{len(data.trees) - len(items)} of {len(data.trees)} solutions have more than {args.max_tokens} tokens"
        args.require(field, bool(items), f"a share with solutions to use: {told} (--max-tokens)")
        if len(items) < len(data.trees):
            print(f"--{field}: {told}")
    return train, holdout


def rewards_of(model: Any, items: Sequence[Item]) -> Tensor:
    """The rewards of all items one after the other: chosen and rejected of each pair, or all steps of each solution."""
    packed = pack([item.tree for item in items], model.device)
    backs = [item.back for item in items if item.back is not None]
    if not backs:
        return rewards(model, packed)
    ends = packed.ends.repeat_interleave(torch.tensor([len(x) for x in backs], device=model.device))
    return rewards(model, packed, ends - torch.cat(backs).to(model.device))


def targets_of(items: Sequence[Item]) -> Tensor:
    """The targets of all items one after the other."""
    return torch.cat([item.targets for item in items])


def measures(values: Tensor, targets: Tensor, args: Args) -> dict[str, Tensor]:
    """Losses, and what is logged beside them: (B,) of pairs or (T,) of steps, from their rewards and targets."""
    targets = targets.to(values.device)
    if args.kind == "process":
        right = ((values > 0) == (targets > 0.5)).float()
        return {"losses/loss": process_loss(values, targets), "rewards/accuracy": right, "rewards/mean": values}
    chosen, rejected = values.view(-1, 2).unbind(1)
    return {
        "losses/loss": outcome_loss(chosen, rejected, targets, args.centring),
        "rewards/accuracy": ((chosen - rejected).sign() + 1) / 2,
        "rewards/margin": chosen - rejected,
        "rewards/mean": (chosen + rejected) / 2,
    }


def parts(model: Any, items: Sequence[Item], args: Args) -> Iterator[dict[str, Tensor]]:
    """The measures of each micro-batch."""
    for group in micro_batches([item.tree for item in items], args.micro_tokens):
        mine = [items[i] for i in group]
        with autocast(args.torch_device, args.bf16):
            values = rewards_of(model, mine)
        yield measures(values, targets_of(mine), args)


@torch.no_grad()
def predict(model: Any, items: Sequence[Item], args: Args) -> list[Tensor]:
    """The rewards of each item, (2,) of chosen and rejected or (T,) of steps; all ranks compute them together."""
    rank, size = ranks()
    sizes = [2 if item.back is None else len(item.back) for item in items]
    found = [torch.zeros(n) for n in sizes]
    mine = range(rank, len(items), size)
    for group in micro_batches([items[i].tree for i in mine], args.micro_tokens):
        part = [mine[i] for i in group]
        with autocast(args.torch_device, args.bf16):
            values = rewards_of(model, [items[i] for i in part]).cpu()
        for i, x in zip(part, values.split([sizes[i] for i in part]), strict=True):
            found[i].copy_(x)
    summed(found)
    return found


def evaluate(model: Any, items: Sequence[Item], args: Args) -> dict[str, Any]:
    """What evaluation.json says of the held-out items."""
    found = predict(model, items, args)
    lengths = [[len(tokens) for tokens in item.tree.branches] for item in items]
    loss = measures(torch.cat(found), targets_of(items), args)["losses/loss"].mean().item()
    if args.kind == "outcome":
        return {"loss": loss} | pair_report(torch.stack(found).numpy(), np.array(lengths))
    scores = [aggregate(x.sigmoid(), str(args.aggregation)) for x in found]
    labels = [item.targets.numpy() for item in items]
    return {"loss": loss} | step_report([x.sigmoid().numpy() for x in found], labels, scores, np.concatenate(lengths))


def train(args: Args) -> LanguageRun:
    """Train a reward model; everything is in the run folder afterwards."""
    args = lasting(args)
    rank, size = ranks()
    model, tokenizer = open_model(args, num_labels=1)
    items, held_out = load(args, tokenizer)
    about = {"examples": {"train": len(items), "holdout": len(held_out)}}
    run = LanguageRun(args, "reward_model", model, tokenizer, args.generators(0)[0], about, learned=[items, held_out])
    evaluation = functools.partial(evaluate, model, held_out, args)

    for step in run.steps():
        batch = [items[i] for i in drawn(len(items), args.batch_size, args.seed, step)]
        metrics = run.learn(parts(model, batch[rank::size], args), len(targets_of(batch)))
        if run.evaluation_due:
            metrics |= {f"eval/{name}": x for name, x in headline(run.evaluated(evaluation)).items()}
        run.log(metrics, f"loss {metrics['losses/loss']:.4f}, accuracy {metrics['rewards/accuracy']:.2f}")
    report = run.evaluated(evaluation) | {"seconds": round(run.elapsed, 1)}
    reliability_diagram(report, run.logs.folders[0] / "reliability.png")
    run.finish("held out: " + "  ".join(f"{name}={x:.3g}" for name, x in headline(report).items()), report)
    return run


def main() -> None:
    run(train, Args, data_parallel=True)
