"""Kahneman-Tversky optimization of a language model on completions that are labelled desirable or not, one by one.

Ethayarajh et al. 2024, KTO: model alignment as prospect theoretic optimization, arXiv:2402.01306; equations as numbered
in its version 4.

    r = log(policy(y | x) / reference(y | x))
    v = lambda_D sigmoid(beta (r - z_0)) where y is desirable, else lambda_U sigmoid(beta (z_0 - r))
    L = lambda_y - v                                                                                          Eq. 8
    z_0 = max(0, mean of log(policy(y' | x) / reference(y' | x))), y' another example's completion; no gradient

Differs from the paper: z_0 is that of the whole batch, over all micro-batches and processes, so that the gradient does
not depend on how it is split; y' is the next example's completion unless that has the same prompt. Pairs give a
desirable and an undesirable completion each. Dropout is off; nothing is truncated but y', where it would end beyond
--max-tokens. The tables are in docs/kto.md.

    python -m rl_lab.kto --model smollm2-135m --data labelled.jsonl
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks, summed
from rl_lab.language import Tree, micro_batches, pack, token_logprobs
from rl_lab.language_training import Examples, LanguageRun, PreferenceArgs, drawn, open_data, open_model
from rl_lab.preference_data import kind_of
from rl_lab.preference_metrics import auc
from rl_lab.reference import branch_logprobs, cached_logprobs

BALANCE = (1.0, 1.5)  # weighted desirable over weighted undesirable examples, Eq. 9; once 4/3 (Eq. 8), as in TRL


@dataclass(frozen=True, kw_only=True)
class Args(PreferenceArgs):
    """Defaults are for a model of some 100 million weights."""

    beta: float = 0.1
    """how fast value saturates away from z_0"""
    desirable_weight: float = 1.0
    """lambda_D; a line says so where the paper would choose another one for so many examples"""
    undesirable_weight: float = 1.0
    """lambda_U"""
    steps: int = 250
    """gradient steps"""
    learning_rate: float = 5e-6
    """of AdamW"""
    warmup: int = 25
    """gradient steps over which the learning rate rises from zero"""
    micro_tokens: int = 8192 if torch.cuda.is_available() else 1
    """tokens that are computed at once, in whole examples and at least one; the gradient does not depend on it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("beta", "desirable_weight", "undesirable_weight"):
            self.require(field, 0 < getattr(self, field) < math.inf, "finite and above 0")
        self.require("batch_size", self.batch_size > 1, "2 or more: z_0 is of other examples' completions")


def mismatched(batch: Sequence[int], prompts: Sequence[Hashable]) -> list[int]:
    """For each example of a batch the one whose completion it takes: the next with another prompt, cyclically.

    Where the batch has no other prompt, the first in the data.

    Args:
        batch: indices of examples.
        prompts: of all examples, two different ones at least.
    """
    found = []
    for place, i in enumerate(batch):
        others = itertools.chain(batch[place + 1 :], batch[:place], range(len(prompts)))
        found.append(next(j for j in others if prompts[j] != prompts[i]))
    return found


def reference_point(policy_kl_logps: Tensor, reference_kl_logps: Tensor) -> Tensor:
    """() z_0, from (B,) log-probabilities of mismatched completions; without gradient."""
    return (policy_kl_logps - reference_kl_logps).mean().clamp(min=0).detach()


def loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    labels: Tensor,
    z_0: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Losses of single completions.                                                     [Ethayarajh et al. 2024, Eq. 8]

    Args:
        policy_logps, reference_logps: (B,) float32 sums over a completion's tokens, in nats.
        labels: (B,) bool, true where the completion is desirable.
        z_0: () the reference point, in nats.
        beta: how fast value saturates away from z_0; desirable_weight, undesirable_weight: lambda_D, lambda_U.
    Returns:
        (B,) losses, between 0 and the weight.
    """
    assert policy_logps.shape == reference_logps.shape == labels.shape == policy_logps.shape[:1] and z_0.ndim == 0
    gains = policy_logps - reference_logps - z_0
    losses = (-beta * torch.where(labels, gains, -gains)).sigmoid()  # 1 - sigmoid(x) is sigmoid(-x)
    return torch.where(labels, desirable_weight * losses, undesirable_weight * losses)


def weights_notice(
    num_desirable: int, num_undesirable: int, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """What to say of weights that the paper would not choose for so many examples, if anything.

    lambda_D n_D / (lambda_U n_U) in [1, 3/2]                                            [Ethayarajh et al. 2024, Eq. 9]
    """
    if not (num_desirable and num_undesirable):
        return f"{num_desirable} desirable and {num_undesirable} undesirable examples: one label alone has no contrast"
    balanced = undesirable_weight * num_undesirable / num_desirable  # desirable_weight at which the ratio is 1
    low, high = BALANCE
    if low <= round(desirable_weight / balanced, 6) <= high:
        return None
    return (
        f"{num_desirable} desirable and {num_undesirable} undesirable examples, weighted {desirable_weight:g} and "
        f"{undesirable_weight:g}: Ethayarajh et al. 2024, Eq. 9, advise desirable_weight from {low * balanced:.3g} to "
        f"{high * balanced:.3g} at this undesirable_weight"
    )


def singles(data: Examples) -> tuple[list[Tree], list[bool]]:
    """Completions one by one, each with its prompt, and whether it is desirable: of a pair, the chosen one is."""
    trees: list[Tree] = []
    labels: list[bool] = []
    for example, tree in zip(data.examples, data.trees, strict=True):
        trees += [Tree(tree.prompt, (tokens,)) for tokens in tree.branches]
        labels += example.labels or (True, False)
    return trees, labels


def measures(logps: Tensor, known: Tensor, labels: Tensor, z_0: Tensor, args: Args) -> dict[str, Tensor]:
    """(B,) losses, and what is logged beside them: zero where an example has the other label."""
    weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
    found = {"losses/loss": loss(logps, known, labels, z_0, beta=args.beta, **weights)}
    for kind, x in {"rewards": args.beta * (logps - known), "logps": logps}.items():
        found |= {f"{kind}/desirable": x.detach() * labels, f"{kind}/undesirable": x.detach() * ~labels}
    return found


def by_label(metrics: dict[str, float], labels: Sequence[bool]) -> dict[str, float]:
    """Means of `measures` over a batch with these labels, those of one label over its examples; none without any."""
    counts = {"desirable": sum(labels), "undesirable": len(labels) - sum(labels)}
    found: dict[str, float] = {}
    for name, x in metrics.items():
        count = counts.get(name.rpartition("/")[2], len(labels))
        found |= {name: x * len(labels) / count} if count else {}
    return found


def train(args: Args) -> LanguageRun:
    """Train a model; everything is in the run folder afterwards."""
    args = lasting(args)
    model, tokenizer = open_model(args)
    kind = "pairs" if kind_of(args.data) == "pairs" else "labelled completions"
    (data, told), (held_out, answers) = (singles(x) for x in open_data(args, tokenizer, kind))
    trees, labels = data + held_out, told + answers
    prompts = [tuple(tree.prompt) for tree in trees]
    args.require("data", len({*prompts[: len(data)]}) > 1, "of two prompts or more: z_0 is of other prompts' answers")
    args.require("holdout", len({*answers}) == 2, "a share with both labels, to be told apart")
    counts = sum(told), len(told) - sum(told)
    if notice := weights_notice(*counts, args.desirable_weight, args.undesirable_weight):
        print(notice)
    rank, size = ranks()
    reference = copy.deepcopy(model).requires_grad_(False)  # of mismatched completions, which are new in every step
    print(f"log-probabilities of {len(trees)} completions under the reference, computed once and kept")
    known = cached_logprobs(model, trees, args.micro_tokens, args.bf16)
    desirable = torch.tensor(labels, device=args.torch_device)
    run = LanguageRun(args, "kto", model, tokenizer, args.generators(0)[0], shard=args.shard, learned=[trees, labels])

    def point_of(batch: Sequence[int]) -> Tensor:
        """() z_0 of a whole batch; processes share the work."""
        wrong = []
        for i, j in zip(batch, mismatched(batch, prompts), strict=True):
            room = args.max_tokens - len(trees[i].prompt)
            wrong.append(Tree(trees[i].prompt, (trees[j].branches[0][:room],)))
        logps = torch.zeros(2, len(batch), device=args.torch_device)
        for row, of in zip(logps, (model, reference), strict=True):
            row[rank::size] = branch_logprobs(of, wrong[rank::size], args.micro_tokens, args.bf16)
        summed([logps])
        return reference_point(*logps)

    def parts(indices: Sequence[int], z_0: Tensor) -> Iterator[dict[str, Tensor]]:
        for group in micro_batches([trees[i] for i in indices], args.micro_tokens):
            mine = [indices[i] for i in group]
            packed = pack([trees[i] for i in mine], args.torch_device)
            logps = packed.sums(token_logprobs(model, packed, bf16=args.bf16))
            yield measures(logps, known[mine], desirable[mine], z_0, args)

    def evaluate() -> dict[str, Any]:
        indices = range(len(data), len(trees))
        z_0 = point_of(indices)
        with torch.no_grad():
            found = list(parts(indices, z_0))
        table = {name: torch.cat([part[name] for part in found]).cpu() for name in found[0]}
        means = by_label({name: float(x.mean()) for name, x in table.items()}, answers)
        areas = {"auc": auc(table["rewards/desirable"] + table["rewards/undesirable"], answers)}
        areas["length_baseline"] = auc([len(tree.branches[0]) for tree in held_out], answers)
        report = {"examples": len(answers), "desirable": sum(answers), **areas, "kl": float(z_0)}
        return report | {name.replace("/", "_"): x for name, x in means.items()}

    for step in run.steps():
        batch = drawn(len(data), args.batch_size, args.seed, step)
        z_0 = point_of(batch)
        metrics = by_label(run.learn(parts(batch[rank::size], z_0), args.batch_size), [labels[i] for i in batch])
        metrics["losses/kl"] = float(z_0)
        if run.evaluation_due:
            report = run.evaluated(evaluate)
            metrics |= {"eval/loss": report["losses_loss"], "eval/auc": report["auc"]["mean"]}
        run.log(metrics, f"loss {metrics['losses/loss']:.4f}, KL {metrics['losses/kl']:.3f}")
    report = run.evaluated(evaluate) | {"seconds": round(run.elapsed, 1)}
    form = "{mean:.3f} [{low:.3f}, {high:.3f}]"
    areas = form.format(**report["auc"]), form.format(**report["length_baseline"])
    run.finish(f"AUC of {len(held_out)} held-out completions {areas[0]}, of their lengths {areas[1]}", report)
    return run


def main() -> None:
    run(train, Args, data_parallel=True)
