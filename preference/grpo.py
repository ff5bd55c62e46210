"""Group relative policy optimization of a language model on prompts with a reward, and its family.

Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, section 4.1. For each prompt G completions are sampled; token t of
completion i has the ratio rho_it = pi(o_it) / pi_old(o_it) and the advantage A_i = (r_i - mean) / (std + 1e-4) of its
group, std with G - 1. With w_it the weight of a token, N completions of |o_i| tokens in a gradient step,

    L = -sum_it w_it * (min(rho_it * A_i, clip(rho_it, 1 - eps, 1 + eps_high) * A_i) - beta * kl_it)           [Eq. 3]

    grpo       w = 1 / (N |o_i|)
    dr_grpo    w = 1 / (N * max_new_tokens), A_i = r_i - mean         [Liu et al. 2025, arXiv:2503.20783, section 3.2]
    dapo       w = 1 / (all tokens of the round), by gradient step; eps_high = 0.28  [Yu et al. 2025, arXiv:2503.14476]
    bnpo       w = 1 / (all tokens of the gradient step)                                     [so called in TRL]
    gspo       as grpo with rho_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|)  [Zheng et al. 2025, arXiv:2507.18071, Eqs. 5, 7]
    rloo       log pi(o_it) in the place of the minimum, w = 1 / N, A_i = r_i - mean of the others
                                                                            [Ahmadian et al. 2024, arXiv:2402.14740]

KL from the model at the start, per token with d = log pi_ref - log pi [Schulman 2020, Approximating KL divergence]:
k3 = exp(d) - d - 1 (Eq. 4) and k2 = d^2 / 2 in the loss; k1 = -d, summed, is taken off the reward.

Differs from the papers: dapo samples no groups again whose rewards are all equal, nor does it shape rewards by length;
both are counted in the log. Dropout is off.

    python -m rl_lab.grpo --model smollm2-135m --task larger-of-two        expected results: docs/grpo.md
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks, summed, summed_table
from rl_lab.generation import Sampler
from rl_lab.language import Packed, Tree, encode_prompt, micro_batches, pack, token_logprobs
from rl_lab.language_training import LanguageArgs, LanguageRun, drawn, open_model
from rl_lab.reward_models import require_room
from rl_lab.tasks import rewarded, score, split

CLIPS = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4)}  # the papers'; (0.2, 0.2) for the others
SCALED = ("grpo", "dapo", "bnpo", "gspo")  # whose advantages are divided by the group's deviation


@dataclass(frozen=True, kw_only=True)
class Args(LanguageArgs):
    """Defaults are for a small model and short answers."""

    task: str = ""
    """larger-of-two, addition, countdown or gsm8k:FILE; or else --prompts and --reward"""
    prompts: str = ""
    """file or hub data set to take prompts from"""
    reward: tuple[str, ...] = ()
    """run folders of reward models, or functions "module:function" of lists of prompts and of completions to numbers"""
    reward_weights: tuple[float, ...] = ()
    """of the rewards in their sum; 1 each by default"""
    holdout: tuple[float, float] = (0.9, 1.0)
    """share of the prompts, by their hash, that is kept for evaluation"""
    eval_prompts: int = 500
    """held-out prompts to answer greedily before and after training, and every --eval-every"""
    steps: int = 40
    """rounds of sampling and learning"""
    prompts_per_step: int = 16
    """prompts of a round"""
    group_size: int = 8
    """completions of each prompt, G"""
    max_new_tokens: int = 0
    """longest completion; 0 for what suits the task"""
    temperature: float = 1.0
    """of sampling, and of the log-probabilities that are learned from"""
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "rloo"] = "grpo"
    """which of the family"""
    epochs: int = 1
    """times that a round's completions are learned from"""
    minibatches: int = 1
    """gradient steps of an epoch; groups stay whole"""
    clip_coef: float | None = None
    """eps; the default is the paper's of the loss"""
    clip_coef_high: float | None = None
    """eps_high; the default is --clip-coef where that is given, else the paper's"""
    beta: float = 0.0
    """weight of the KL from the model at the start"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """its estimator"""
    learning_rate: float = 1e-5
    checkpoint_every: int = 10
    """rounds between checkpoints; 0 for the first and last only"""

    may_be_zero: ClassVar[set[str]] = {*LanguageArgs.may_be_zero, "max_new_tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        own = bool(self.prompts), bool(self.reward)
        alone = own == ((False, False) if self.task else (True, True))
        self.require("task", alone, "given without --prompts and --reward, or left out with both of them")
        self.require("group_size", self.group_size > 1, "2 or more: a group's mean is the baseline")
        self.require("temperature", 0 < self.temperature < math.inf, "finite and above 0")
        self.require("minibatches", self.prompts_per_step % self.minibatches == 0, "a divisor of --prompts-per-step")
        few = len(self.reward_weights) in (0, len(self.reward)) and all(map(math.isfinite, self.reward_weights))
        self.require("reward_weights", few, f"{len(self.reward)} finite numbers, one for each --reward")
        unclipped = not (self.several or self.clip_coef or self.clip_coef_high)
        self.require("loss", self.loss != "rloo" or unclipped, "another to take several steps or to clip")
        self.require("holdout", 0 <= self.holdout[0] < self.holdout[1] <= 1, "two numbers with 0 <= low < high <= 1")
        self.require("beta", 0 <= self.beta < math.inf, "finite and 0 or more")
        self.require("kl", self.beta > 0 or self.kl == "k3", "left out without --beta")
        self.require("kl", self.kl != "k1" or self.loss not in SCALED, "k2 or k3: k1's deviation would undo --beta")

    @property
    def several(self) -> bool:
        """Whether a round's completions are learned from in several gradient steps."""
        return self.epochs * self.minibatches > 1

    @property
    def clips(self) -> tuple[float, float]:
        """eps and eps_high."""
        low, high = CLIPS.get(self.loss, (0.2, 0.2))
        return self.clip_coef or low, self.clip_coef_high or self.clip_coef or high


class Totals(NamedTuple):
    """What means over all micro-batches and processes divide by."""

    sequences: float  # of the gradient step
    tokens: float  # of the gradient step
    round_tokens: float  # of the round, over its gradient steps
    longest: int  # --max-new-tokens


WEIGHTS: dict[str, Callable[[Tensor, Totals], Tensor]] = {  # of tokens (K,), by the lengths (K,) of their completions
    "grpo": lambda lengths, n: 1 / (n.sequences * lengths),
    "dr_grpo": lambda lengths, n: torch.full_like(lengths, 1 / (n.sequences * n.longest)),
    "dapo": lambda lengths, n: torch.full_like(lengths, 1 / n.round_tokens),
    "bnpo": lambda lengths, n: torch.full_like(lengths, 1 / n.tokens),
    "gspo": lambda lengths, n: 1 / (n.sequences * lengths),
    "rloo": lambda lengths, n: torch.full_like(lengths, 1 / n.sequences),
}


def all_equal(rewards: Tensor) -> Tensor:
    """(P,) whether all rewards (P, G) of a group are equal, so that nothing can be learned from it."""
    return (rewards == rewards[:, :1]).all(1)


def group_advantages(rewards: Tensor, loss: str) -> Tensor:
    """(P, G) rewards of the groups to advantages; zero where all rewards of a group are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = centred.masked_fill(all_equal(rewards)[:, None], 0.0)  # Adam would take a mean's rounding for a gradient
    if loss == "rloo":
        return centred * rewards.shape[1] / (rewards.shape[1] - 1)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if loss in SCALED else centred


def kl_estimate(new: Tensor, reference: Tensor, kind: str) -> Tensor:
    """KL(pi || pi_ref) token by token, from log-probabilities (K,) of samples of pi."""
    d = reference - new
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}[kind]


def loss(
    new: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, packed: Packed, totals: Totals, args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the loss, and of the means that are logged, from log-probabilities (K,) of the sampled
    tokens, the reference's None without KL, and advantages (branches,) of the completions."""
    lengths, a, (low, high) = packed.lengths[packed.branch], advantages[packed.branch], args.clips
    log_ratio = new - old
    if args.loss == "gspo":
        log_ratio = (packed.sums(log_ratio) / packed.lengths)[packed.branch]
    ratio, weights = log_ratio.exp(), WEIGHTS[args.loss](lengths, totals)
    assert ratio.shape == a.shape == weights.shape
    gain = new * a if args.loss == "rloo" else torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    clipped = torch.where(a > 0, ratio > 1 + high, (ratio < 1 - low) & (a < 0))
    metrics = {"clipfrac": clipped.sum() / totals.tokens}
    if reference is not None:
        kl = kl_estimate(new, reference, args.kl)
        metrics["kl"] = kl.detach().sum() / totals.tokens
        gain = gain if args.kl == "k1" else gain - args.beta * kl
    total = -(weights * gain).sum()
    return total, {"policy_loss": total.detach(), **metrics}


class Part(NamedTuple):
    """A micro-batch: whole groups in one row, with fixed log-probabilities (K,) of the sampled tokens."""

    groups: list[int]  # their places in the round
    packed: Packed
    old: Tensor | None  # as they were sampled; None if the only gradient step has them itself
    reference: Tensor | None  # of the model at the start; None without KL


@torch.no_grad()
def divided(model: Any, reference: Any, trees: list[Tree], places: range, args: Args) -> list[Part]:
    """The micro-batches of a gradient step on the trees at these places."""
    parts, scale = [], (args.temperature, args.bf16)
    for group in micro_batches([trees[i] for i in places], args.micro_tokens):
        groups = [places[i] for i in group]
        packed = pack([trees[i] for i in groups], args.torch_device)
        old = token_logprobs(model, packed, *scale) if args.several or args.kl == "k1" else None
        parts.append(Part(groups, packed, old, token_logprobs(reference, packed, *scale) if reference else None))
    return parts


def learn(
    run: LanguageRun, reference: Any, trees: list[Tree], rewards: Tensor, longest: int, args: Args
) -> dict[str, float]:
    """Every gradient step on a round of completions; returns means over them and over the tokens of all processes.

    Args:
        reference: the model at the start; None without KL.
        trees, rewards: this process's share of the round, P prompts of G completions each, and (P, G).
        longest: tokens of a completion at most.
    """
    size = len(trees) // args.minibatches
    places = [range(i, i + size) for i in range(0, len(trees), size)]
    minibatches = [divided(run.model, reference, trees, x, args) for x in places]
    shaped = rewards.to(args.torch_device, copy=True)
    for groups, packed, old, fixed in itertools.chain(*minibatches) if args.kl == "k1" else []:
        assert old is not None and fixed is not None
        shaped[groups] -= args.beta * packed.sums(kl_estimate(old, fixed, "k1")).view(len(groups), -1)
    advantages = group_advantages(shaped, args.loss)
    sizes = [[(len(x.packed.ends), len(x.packed.targets)) for x in parts] for parts in minibatches]
    counts = torch.stack([torch.tensor(x, dtype=torch.float64).sum(0) for x in sizes])  # sequences, tokens
    summed([counts])
    metrics: dict[str, float] = {}

    def losses(parts: list[Part], totals: Totals) -> Iterator[Tensor]:
        for groups, packed, old, fixed in parts:
            new = token_logprobs(run.model, packed, args.temperature, args.bf16)
            old = new.detach() if old is None else old
            value, found = loss(new, old, fixed, advantages[groups].flatten(), packed, totals, args)
            for name, x in found.items():
                metrics[name] = metrics.get(name, 0.0) + float(x) / (args.epochs * args.minibatches)
            yield value

    for _ in range(args.epochs):
        for parts, (sequences, tokens) in zip(minibatches, counts.tolist(), strict=True):
            norm = run.update(losses(parts, Totals(sequences, tokens, float(counts[:, 1].mean()), longest)))
    return summed_table(metrics) | {"grad_norm": norm}


def train(args: Args) -> LanguageRun:
    """Train a model; everything is in the run folder afterwards."""
    args = lasting(args)
    rank, size = ranks()
    shares = f"a multiple of --minibatches times torchrun's {size} ranks"
    args.require("prompts_per_step", args.prompts_per_step % (args.minibatches * size) == 0, shares)
    task, rewards = rewarded(args.task, args.prompts, args.reward, args.reward_weights, args.torch_device)
    held_out, known = split(task.prompts, args.holdout)
    args.require("holdout", bool(held_out and known), f"shares with prompts in and out, of {len(task.prompts)}")
    held_out, longest = held_out[: args.eval_prompts], args.max_new_tokens or task.max_new_tokens

    (model, tokenizer), (generator,) = open_model(args), args.generators(rank)
    asked = [Tree(encode_prompt(tokenizer, x), ()) for x in task.prompts]
    require_room(model, asked, f"--model {args.model}", longest)
    sample = Sampler(model, tokenizer, task.stop, longest, generator, args.bf16)
    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    before: float | None = None  # training, held-out reward
    run = LanguageRun(args, "grpo", model, tokenizer, generator, None, lambda: {"before": before}, learned=asked)
    before = run.saved["more"]["before"] if run.saved else None

    def evaluate() -> float:
        """Mean reward of greedy answers to the held-out prompts."""
        texts = sample.greedy(mine := held_out[rank::size])
        with run.resumable():
            total = float(score(rewards, mine, texts)[0].sum())
        return summed_table({"reward": total})["reward"] / len(held_out)

    if before is None and run.iteration == 0:
        before = evaluate()
    note = functools.cache(print)  # once
    for step in run.steps():
        prompts = [known[i] for i in drawn(len(known), args.prompts_per_step, args.seed, step)][rank::size]
        with run.resumable(unchanged=True):
            trees, texts, cut = sample(prompts, args.group_size, args.temperature)
            values, each = score(rewards, [x for x in prompts for _ in range(args.group_size)], texts)
        metrics = learn(run, reference, trees, values := values.view(len(trees), -1), longest, args)

        lengths = torch.tensor([len(x) for tree in trees for x in tree.branches])
        charts = {"reward": values, "equal_groups": all_equal(values), "cut": cut, "length": lengths}
        charts |= {f"reward/{name}": x for name, x in each.items() if len(each) > 1}
        means = summed_table({f"charts/{name}": float(x.float().mean()) / size for name, x in charts.items()})
        table = means | {f"losses/{name}": x for name, x in metrics.items()}
        if means["charts/cut"] > 0.5:
            note(f"note: more than half of the completions were cut at --max-new-tokens {longest}")
        if run.evaluation_due:
            table["eval/reward"] = run.evaluated(evaluate)
        run.log(table, f"reward {means['charts/reward']:.3f}")
    result = {"held_out": len(held_out), "before": before, "after": (after := run.evaluated(evaluate))}
    told = f"reward of {len(held_out)} held-out prompts, greedy: {before:.3f} before, {after:.3f} after"
    run.finish(told, result | {"seconds": round(run.elapsed, 1)})
    return run


def main() -> None:
    run(train, Args, data_parallel=True)
