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
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks, summed
from rl_lab.generation import Sampler
from rl_lab.language import Packed, Tree, autocast, micro_batches, pack, token_logprobs
from rl_lab.language_training import LanguageArgs, LanguageRun, drawn, open_model
from rl_lab.preference_data import place, read
from rl_lab.tasks import Task, make, reward_function, score

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
    """functions "module:function" of prompts and completions, lists both, that return a number for each"""
    reward_weights: tuple[float, ...] = ()
    """of the rewards in their sum; 1 each by default"""
    holdout: tuple[float, float] = (0.9, 1.0)
    """share of the prompts, by their hash, that is kept for evaluation"""
    eval_prompts: int = 500
    """held-out prompts to answer greedily before and after training, and every --eval-every"""
    steps: int = 30
    """rounds of sampling and learning"""
    prompts_per_step: int = 6
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
    """eps_high, likewise"""
    beta: float = 0.0
    """weight of the KL from the model at the start"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """its estimator"""
    learning_rate: float = 1e-5
    """of AdamW"""
    decay: bool = False
    """let the learning rate fall to zero as a line"""
    micro_tokens: int = 1024
    """tokens that are computed at once; the gradient does not depend on it"""

    may_be_zero: ClassVar[set[str]] = {*LanguageArgs.may_be_zero, "max_new_tokens"}

    def __post_init__(self) -> None:
        super().__post_init__()
        given = bool(self.prompts) and bool(self.reward)
        self.require("task", bool(self.task) != given, "given, or else --prompts and --reward")
        self.require("group_size", self.group_size > 1, "2 or more: a group's mean is the baseline")
        self.require("temperature", self.temperature > 0, "above 0")
        self.require("minibatches", self.prompts_per_step % self.minibatches == 0, "a divisor of --prompts-per-step")
        weights = not self.reward_weights or len(self.reward_weights) == len(self.reward)
        self.require("reward_weights", weights, f"{len(self.reward)} numbers, one for each --reward")
        once = self.loss != "rloo" or not self.several
        self.require("loss", once, "another with several --epochs or --minibatches: rloo has no ratio")
        low, high = self.holdout
        self.require("holdout", 0 <= low < high <= 1, "two numbers with 0 <= low < high <= 1")
        self.require("beta", self.beta >= 0, "0 or more")

    @property
    def several(self) -> bool:
        """Whether a round's completions are learned from in several gradient steps."""
        return self.epochs * self.minibatches > 1

    @property
    def clips(self) -> tuple[float, float]:
        low, high = CLIPS.get(self.loss, (0.2, 0.2))
        return self.clip_coef or low, self.clip_coef_high or self.clip_coef or high


class Totals(NamedTuple):
    """What a mean over all micro-batches and processes divides by.

    Attributes:
        sequences, tokens: of the gradient step.
        round_tokens: of the round, over its gradient steps.
        longest: --max-new-tokens.
    """

    sequences: float
    tokens: float
    round_tokens: float
    longest: int


WEIGHTS: dict[str, Callable[[Tensor, Totals], Tensor]] = {  # of tokens (K,), by the lengths (K,) of their completions
    "grpo": lambda lengths, n: 1 / (n.sequences * lengths),
    "dr_grpo": lambda lengths, n: torch.full_like(lengths, 1 / (n.sequences * n.longest)),
    "dapo": lambda lengths, n: torch.full_like(lengths, 1 / n.round_tokens),
    "bnpo": lambda lengths, n: torch.full_like(lengths, 1 / n.tokens),
    "gspo": lambda lengths, n: 1 / (n.sequences * lengths),
    "rloo": lambda lengths, n: torch.full_like(lengths, 1 / n.sequences),
}


def group_advantages(rewards: Tensor, loss: str) -> Tensor:
    """(P, G) rewards of the groups to advantages; zero where all rewards of a group are equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
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
    """A micro-batch's part of the loss, and of the means that are logged.

    Args:
        new, old, reference: (K,) log-probabilities of the sampled tokens; reference None without KL in the loss.
        advantages: (branches,) of the completions.
    """
    lengths = packed.lengths[packed.branch]
    weights, log_ratio = WEIGHTS[args.loss](lengths, totals), new - old
    if args.loss == "gspo":
        log_ratio = (packed.sums(log_ratio) / packed.lengths)[packed.branch]
    ratio, a, (low, high) = log_ratio.exp(), advantages[packed.branch], args.clips
    assert ratio.shape == a.shape == weights.shape
    gain = new * a if args.loss == "rloo" else torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    clipped = torch.where(a > 0, ratio > 1 + high, ratio < 1 - low)
    metrics = {"clipfrac": clipped.sum() / totals.tokens}
    if reference is not None:
        kl = kl_estimate(new, reference, args.kl)
        metrics["kl"] = kl.detach().sum() / totals.tokens
        gain = gain - args.beta * kl
    return -(weights * gain).sum(), metrics


class Part(NamedTuple):
    """A micro-batch: which groups of the round it has, these in one row, and fixed log-probabilities (K,) if needed."""

    groups: list[int]
    packed: Packed
    old: Tensor | None
    reference: Tensor | None


def train(args: Args) -> LanguageRun:
    """Train a model; everything is in the run folder afterwards."""
    args = lasting(args)
    if args.task:
        task = make(args.task)
        functions = [task.reward]
    else:
        functions = [reward_function(name) for name in args.reward]
        task = Task([x.prompt for x in read(args.prompts, "prompts", "--prompts")[0]], functions[0], "", 128)
    low, high = args.holdout
    held_out = [x for x in task.prompts if low <= place(x) < high][: args.eval_prompts]
    known = [x for x in task.prompts if not low <= place(x) < high]
    args.require("holdout", bool(known and held_out), f"shares with prompts in and out, of {len(task.prompts)}")
    weights = args.reward_weights or (1.0,) * len(functions)
    rewards = list(zip(args.reward or (args.task,), functions, weights, strict=True))
    longest, device = args.max_new_tokens or task.max_new_tokens, args.torch_device

    model, tokenizer = open_model(args)
    rank, size = ranks()
    (generator,) = args.generators(rank)
    sample = Sampler(model, tokenizer, task.stop, longest, generator, args.bf16)
    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    before: float | None = None  # training, held-out reward
    run = LanguageRun(args, "grpo", model, tokenizer, generator, state=lambda: {"before": before})
    if run.saved:
        before = run.saved["more"]["before"]

    def logprobs(model: Any, packed: Packed) -> Tensor:
        with autocast(device, args.bf16):
            return token_logprobs(model, packed, args.temperature)

    def parts_of(trees: list[Tree], number: int) -> list[Part]:
        """The micro-batches of gradient step `number` of an epoch."""
        mine, parts = list(range(number, len(trees), args.minibatches)), []
        for places in micro_batches([trees[i] for i in mine], args.micro_tokens):
            groups = [mine[i] for i in places]
            packed = pack([trees[i] for i in groups], device)
            with torch.no_grad():
                old = logprobs(model, packed) if args.several or (reference and args.kl == "k1") else None
                fixed = logprobs(reference, packed) if reference else None
            parts.append(Part(groups, packed, old, fixed))
        return parts

    def losses(parts: list[Part], advantages: Tensor, totals: Totals, metrics: dict[str, float]) -> Iterator[Tensor]:
        for groups, packed, old, fixed in parts:
            new, chosen = logprobs(model, packed), advantages[groups].flatten()
            fixed = None if args.kl == "k1" else fixed
            value, found = loss(new, new.detach() if old is None else old, fixed, chosen, packed, totals, args)
            for name, x in {"policy_loss": value.detach(), **found}.items():
                metrics[name] = metrics.get(name, 0.0) + float(x) / (args.epochs * args.minibatches)
            yield value

    def evaluate() -> float:
        """Mean reward of greedy answers to the held-out prompts."""
        batches = [held_out[i : i + 64] for i in range(0, len(held_out), 64)]
        return sum(float(score(rewards, batch, sample(batch, 1, 0.0)[1]).sum()) for batch in batches) / len(held_out)

    if before is None and run.iteration == 0:
        before = evaluate()
    for step in run.steps():
        random = generator.get_state()
        prompts = [known[i] for i in drawn(len(known), args.prompts_per_step, args.seed, step)][rank::size]
        trees, texts, cut = sample(prompts, args.group_size, args.temperature)
        try:
            values = score(rewards, [x for x in prompts for _ in range(args.group_size)], texts).view(len(trees), -1)
        except ValueError as error:
            generator.set_state(random)
            run.checkpoint()
            raise ValueError(f"{error}; checkpointed at step {step}: --resume {run.logs.folders[0]}") from error
        minibatches = [parts_of(trees, number) for number in range(args.minibatches)]
        shaped = values.to(device, copy=True)
        if reference and args.kl == "k1":
            for groups, packed, old, fixed in itertools.chain(*minibatches):
                assert old is not None and fixed is not None
                shaped[groups] -= args.beta * packed.sums(kl_estimate(old, fixed, "k1")).view(len(groups), -1)
        advantages = group_advantages(shaped, args.loss)
        sizes = [[(len(part.packed.ends), len(part.packed.targets)) for part in parts] for parts in minibatches]
        counts = torch.stack([torch.tensor(x, dtype=torch.float32).sum(0) for x in sizes])  # sequences, tokens
        summed([counts])
        metrics: dict[str, float] = {}
        for _ in range(args.epochs):
            for parts, (sequences, tokens) in zip(minibatches, counts.tolist(), strict=True):
                totals = Totals(sequences, tokens, float(counts[:, 1].mean()), longest)
                metrics["grad_norm"] = run.update(losses(parts, advantages, totals, metrics))

        reward, equal = float(values.mean()), float((values.std(1) == 0).float().mean())
        table = {f"losses/{name}": x for name, x in metrics.items()}
        table |= {"charts/reward": reward, "charts/equal_groups": equal, "charts/cut": float(cut.float().mean())}
        table["charts/length"] = sum(len(x) for tree in trees for x in tree.branches) / len(texts)
        if run.evaluation_due:
            table["eval/reward"] = evaluate()
        run.log(table, f"reward {reward:.3f}")
    after = evaluate()
    result = {"held_out": len(held_out), "before": before, "after": after, "seconds": round(run.elapsed, 1)}
    run.finish(f"reward of {len(held_out)} held-out prompts, greedy: {before:.3f} before, {after:.3f} after", result)
    return run


def main() -> None:
    run(train, Args)
