"""Direct preference optimization of a language model on pairs of completions, and its family.

Rafailov et al. 2023, Direct preference optimization: your language model is secretly a reward model, arXiv:2305.18290.

    h = log(policy / reference) of a completion; w the chosen one, l the rejected one
    L_DPO = -log sigmoid(beta (h_w - h_l))                                                                     Eq. 7

Of the family (`LOSSES` has their functions, `SETTINGS` their hyper-parameters):

    ipo            Azar et al. 2024, arXiv:2310.12036, Eq. 17
    hinge          Zhao et al. 2023, SLiC-HF, arXiv:2305.10425, as Liu et al. 2024, arXiv:2309.06657, Eq. 10 write it
    robust         Chowdhury et al. 2024, arXiv:2403.00409, section 3.1
    conservative   Mitchell 2023, A note on DPO with noisy preferences, ericmitchell.ai/cdpo.pdf, Eqs. 3 and 4
    apo_zero, apo_down    D'Oosterlinck et al. 2024, arXiv:2408.06266, Eqs. 7 and 8
    simpo          Meng et al. 2024, arXiv:2405.14734, Eq. 6; without a reference
    orpo           Hong et al. 2024, arXiv:2403.07691, Eqs. 3 to 7; without a reference
    tdpo1, tdpo2   Zeng et al. 2024, arXiv:2404.11999, section 4

Differs from the papers: IPO takes averages over tokens, as its authors did; hinge takes ratios to the reference and no
likelihood term, as TRL; ORPO's odds are bounded where a completion is certain. Dropout is off, in the policy as in the
reference; nothing is truncated. The tables are in docs/dpo.md.

    python -m rl_lab.dpo --model smollm2-135m --data pairs.jsonl        expected results: docs/dpo.md
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rl_lab.cli import run
from rl_lab.distributed import lasting, ranks
from rl_lab.language import Packed, Tree, autocast, logits, micro_batches, pack
from rl_lab.language_training import LanguageRun, PreferenceArgs, drawn, open_data, open_model
from rl_lab.preference_metrics import larger, share
from rl_lab.reference import cached_logprobs


@dataclass(frozen=True, kw_only=True)
class Args(PreferenceArgs):
    """Defaults are for a model of some 100 million weights."""

    loss: Literal[
        "sigmoid", "ipo", "hinge", "robust", "conservative", "apo_zero", "apo_down", "simpo", "orpo", "tdpo1", "tdpo2"
    ] = "sigmoid"  # which of the family
    beta: float = 0.1  # how much a log-ratio to the reference counts; simpo wants 2
    label_smoothing: float = 0.0  # share of wrong labels that robust and conservative reckon with
    gamma: float = 0.5  # simpo's margin
    alpha: float = 0.5  # weight of tdpo2's KLs
    orpo_lambda: float = 0.1  # weight of orpo's odds
    steps: int = 250
    learning_rate: float = 5e-6
    warmup: int = 25
    micro_tokens: int = 8192 if torch.cuda.is_available() else 1
    """tokens that are computed at once, in whole pairs and at least one; the gradient does not depend on it"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("beta", float(self.loss == "simpo") < self.beta < float("inf"), "finite, above 0 or simpo's 1")
        noisy, eps = "label_smoothing" in SETTINGS[self.loss], self.label_smoothing
        self.require("label_smoothing", 0 < eps < 0.5 if noisy else not eps, "in (0, 0.5) if --loss takes it, else 0")
        for field, default in (("beta", 0.1), ("gamma", 0.5), ("alpha", 0.5), ("orpo_lambda", 0.1)):
            given = getattr(self, field)
            self.require(field, 0 <= given < float("inf"), "finite and 0 or more")
            used = field in SETTINGS[self.loss] or given == default
            self.require(field, used, f"left out: --loss {self.loss} does not take it")


@dataclass(frozen=True)
class Pairs:
    """What the two models say of B pairs of completions; every field is (B,).

    Log-probabilities are float32 sums over a completion's tokens, in nats; lengths count those tokens; the KLs are
    sum_t KL(reference(. | y_<t) || policy(. | y_<t)) along a completion, also in nats.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    reference_chosen_logps: Tensor | None = None  # but for REFERENCE_FREE
    reference_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None  # for NEED_LENGTHS
    rejected_lengths: Tensor | None = None
    chosen_kls: Tensor | None = None  # for NEED_KLS
    rejected_kls: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {x.shape for x in vars(self).values() if x is not None}
        assert shapes == {self.policy_chosen_logps.shape[:1]}, f"not one (B,): {shapes}"

    @property
    def logratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of the chosen and of the rejected."""
        assert self.reference_chosen_logps is not None and self.reference_rejected_logps is not None
        chosen = self.policy_chosen_logps - self.reference_chosen_logps
        return chosen, self.policy_rejected_logps - self.reference_rejected_logps

    @property
    def kls(self) -> tuple[Tensor, Tensor]:
        """Sequential KLs of the chosen and of the rejected."""
        assert self.chosen_kls is not None and self.rejected_kls is not None
        return self.chosen_kls, self.rejected_kls

    def per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        """The averages, from sums over the tokens of the chosen and of the rejected."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        return chosen / self.chosen_lengths, rejected / self.rejected_lengths

    @property
    def average_logps(self) -> tuple[Tensor, Tensor]:
        """The policy's log-probability per token, of the chosen and of the rejected."""
        return self.per_token(self.policy_chosen_logps, self.policy_rejected_logps)


def sigmoid(pairs: Pairs, *, beta: float) -> Tensor:
    """-log sigmoid(beta (h_w - h_l))                                                   [Rafailov et al. 2023, Eq. 7]"""
    chosen, rejected = pairs.logratios
    return -F.logsigmoid(beta * (chosen - rejected))


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """(h_w - h_l - 1 / (2 beta))^2, with h per token; beta is the paper's tau             [Azar et al. 2024, Eq. 17]"""
    chosen, rejected = pairs.per_token(*pairs.logratios)
    return (chosen - rejected - 1 / (2 * beta)).square()


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta (h_w - h_l)): SLiC's margin is 1 / beta                              [Liu et al. 2024, Eq. 10]"""
    chosen, rejected = pairs.logratios
    return (1 - beta * (chosen - rejected)).relu()


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e), L = L_DPO                                 [Chowdhury et al. 2024, 3.1]

    Where a share e = label_smoothing < 1/2 of the labels is flipped, its mean is that of L_DPO without flips.
    """
    chosen, rejected = pairs.logratios
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)
    return losses / (1 - 2 * label_smoothing)


def conservative(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """(1 - e) L(w, l) + e L(l, w), L = L_DPO, e = label_smoothing: stops at 1 - e      [Mitchell 2023, Eqs. 3 and 4]"""
    chosen, rejected = pairs.logratios
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """-sigmoid(beta h_w) + sigmoid(beta h_l): w up, l down                        [D'Oosterlinck et al. 2024, Eq. 7]"""
    chosen, rejected = pairs.logratios
    return -(beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """sigmoid(beta h_w) - sigmoid(beta (h_w - h_l)): both down, l more            [D'Oosterlinck et al. 2024, Eq. 8]"""
    chosen, rejected = pairs.logratios
    return (beta * chosen).sigmoid() - (beta * (chosen - rejected)).sigmoid()


def simpo(pairs: Pairs, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (p_w - p_l) - gamma), p the log-probability per token              [Meng et al. 2024, Eq. 6]"""
    chosen, rejected = pairs.average_logps
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of P = exp(logps) < 1                                                  [Hong et al. 2024, Eq. 4]

    At P = 1 they are infinite; P is held one rounding below (ours).
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - (-logps.expm1()).log()


def orpo(pairs: Pairs, *, orpo_lambda: float) -> Tensor:
    """-p_w - lambda log sigmoid(log odds_w - log odds_l), p per token                 [Hong et al. 2024, Eqs. 3 - 7]"""
    chosen, rejected = pairs.average_logps
    return -chosen - orpo_lambda * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def tdpo1(pairs: Pairs, *, beta: float) -> Tensor:
    """-log sigmoid(beta (h_w - h_l - (KL_l - KL_w)))                                   [Zeng et al. 2024, section 4]"""
    (chosen, rejected), (chosen_kls, rejected_kls) = pairs.logratios, pairs.kls
    return -F.logsigmoid(beta * (chosen - rejected - (rejected_kls - chosen_kls)))


def tdpo2(pairs: Pairs, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta (h_w - h_l - alpha (KL_l - sg(KL_w)))), sg without gradient    [Zeng et al. 2024, section 4]"""
    (chosen, rejected), (chosen_kls, rejected_kls) = pairs.logratios, pairs.kls
    return -F.logsigmoid(beta * (chosen - rejected - alpha * (rejected_kls - chosen_kls.detach())))


VARIANTS = (sigmoid, ipo, hinge, robust, conservative, apo_zero, apo_down, simpo, orpo, tdpo1, tdpo2)
LOSSES: dict[str, Callable[..., Tensor]] = {loss.__name__: loss for loss in VARIANTS}  # (Pairs, **settings) -> (B,)
SETTINGS = {name: tuple(signature(loss).parameters)[1:] for name, loss in LOSSES.items()}  # what each must be given
REFERENCE_FREE = frozenset({"simpo", "orpo"})
NEED_LENGTHS, NEED_KLS = frozenset({"ipo", "simpo", "orpo"}), frozenset({"tdpo1", "tdpo2"})


def implicit_rewards(pairs: Pairs, *, beta: float) -> tuple[Tensor, Tensor]:
    """Rewards the policy stands for, of the chosen and of the rejected: (B,) each, without gradient.

    beta h [Rafailov et al. 2023, section 4]; without a reference beta p, p per token [Meng et al. 2024, Eq. 4].
    """
    chosen, rejected = pairs.average_logps if pairs.reference_chosen_logps is None else pairs.logratios
    return beta * chosen.detach(), beta * rejected.detach()


def sequential_kls(model_logits: Tensor, reference_logits: Tensor, packed: Packed) -> Tensor:
    """(branches,) sum_t KL(reference(. | y_<t) || policy(. | y_<t)), from (K, V) logits    [Zeng et al. 2024, Eq. 9]"""
    policy, reference = model_logits.log_softmax(1), reference_logits.log_softmax(1)
    return packed.sums((reference.exp() * (reference - policy)).sum(1))


def pairs_of(model: Any, reference: Any, trees: list[Tree], known: Tensor | None, args: Args) -> Pairs:
    """What the models say of a micro-batch of pairs.

    Args:
        reference: the model at the start, for losses with KLs; else None.
        known: (B, 2) its log-probabilities of the chosen and the rejected; None for losses without a reference.
    """
    packed = pack(trees, args.torch_device)
    with autocast(args.torch_device, args.bf16):
        scores = logits(model, packed)
        with torch.no_grad():
            start = logits(reference, packed) if reference else None
    logps = packed.sums(scores.gather(1, packed.targets[:, None]).squeeze(1) - scores.logsumexp(1))
    kls = None if start is None else sequential_kls(scores, start, packed)
    numbers = (logps, known, packed.lengths, kls)  # each (2 B,), chosen and rejected in turn
    sides = [side for x in numbers for side in ((None, None) if x is None else x.view(-1, 2).unbind(1))]
    return Pairs(*sides)  # type: ignore[arg-type]


def measures(pairs: Pairs, args: Args) -> dict[str, Tensor]:
    """(B,) losses, and what is logged beside them."""
    losses = LOSSES[args.loss](pairs, **{name: getattr(args, name) for name in SETTINGS[args.loss]})
    chosen, rejected = implicit_rewards(pairs, beta=args.beta)
    return {
        "losses/loss": losses,
        "rewards/accuracy": ((chosen - rejected).sign() + 1) / 2,  # a tie is half a success
        "rewards/margin": chosen - rejected,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "logps/chosen": pairs.policy_chosen_logps.detach(),  # both may fall
        "logps/rejected": pairs.policy_rejected_logps.detach(),
    }


def train(args: Args) -> LanguageRun:
    """Train a model; everything is in the run folder afterwards."""
    args = lasting(args)
    model, tokenizer = open_model(args)
    data, held_out = (x.trees for x in open_data(args, tokenizer, "pairs"))
    trees, (rank, size), known = data + held_out, ranks(), None
    reference = copy.deepcopy(model).requires_grad_(False) if args.loss in NEED_KLS else None
    if args.loss not in REFERENCE_FREE:
        print(f"log-probabilities of {len(trees)} pairs under the reference, computed once and kept")
        known = cached_logprobs(model, trees, args.micro_tokens, args.bf16).view(-1, 2)
    run = LanguageRun(args, "dpo", model, tokenizer, args.generators(0)[0], shard=args.shard, learned=trees)

    def parts(indices: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        for group in micro_batches([trees[i] for i in indices], args.micro_tokens):
            mine = [indices[i] for i in group]
            fixed = None if known is None else known[mine]
            yield measures(pairs_of(model, reference, [trees[i] for i in mine], fixed, args), args)

    def evaluate() -> dict[str, Any]:
        with torch.no_grad():
            found = list(parts(range(len(data), len(trees))))
        table = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        lengths = [[len(x) for x in tree.branches] for tree in held_out]
        report = {"pairs": len(held_out), "accuracy": share(table["rewards/accuracy"].cpu())}
        report |= {"length_baseline": share(larger(*zip(*lengths, strict=True)))}
        return report | {name.replace("/", "_"): float(x.mean()) for name, x in table.items()}

    for step in run.steps():
        indices = drawn(len(data), args.batch_size, args.seed, step)[rank::size]
        metrics = run.learn(parts(indices), args.batch_size)
        if run.evaluation_due:
            report = run.evaluated(evaluate)
            metrics |= {"eval/loss": report["losses_loss"], "eval/accuracy": report["accuracy"]["mean"]}
        run.log(metrics, f"loss {metrics['losses/loss']:.4f}, accuracy {metrics['rewards/accuracy']:.2f}")
    report = run.evaluated(evaluate) | {"seconds": round(run.elapsed, 1)}
    form = "{mean:.3f} [{low:.3f}, {high:.3f}]"
    shares = form.format(**report["accuracy"]), form.format(**report["length_baseline"])
    run.finish(f"accuracy on {len(held_out)} held-out pairs {shares[0]}, of taking the longer one {shares[1]}", report)
    return run


def main() -> None:
    run(train, Args, data_parallel=True)
