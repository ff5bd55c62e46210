"""GRPO and its family: the losses by hand, a round against plain loops, and what a run promises."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from rl_lab import checkpoint
from rl_lab.cli import Stopped, parse
from rl_lab.generation import Sampler
from rl_lab.language import (
    Packed,
    Tree,
    encode_completion,
    encode_prompt,
    load_model,
    load_tokenizer,
    pack,
    save_model,
)
from rl_lab.language_training import LanguageRun
from rl_lab.preference import grpo
from rl_lab.preference.grpo import SCALED, WEIGHTS, Args, Totals, group_advantages, kl_estimate, learn, loss
from rl_lab.tasks import split

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOKENWISE = [name for name in WEIGHTS if name not in ("gspo", "rloo")]


def settings(**flags: Any) -> Args:
    return Args(**{"model": "x", "task": "addition", "device": "cpu", "bf16": False, **flags})


def row(lengths: list[int]) -> Packed:
    """What `loss` reads of completions of these lengths."""
    counts = torch.tensor(lengths)
    branch = torch.arange(len(lengths)).repeat_interleave(counts)
    return Packed({}, torch.zeros_like(branch), branch, counts.cumsum(0) - 1)


# Completions of 1, 3, 2 and 2 tokens; with eps 0.2 and eps_high 0.3 the terms min(rho A, clip(rho) A) of their tokens:
#   A = 1     rho 1.5            1.3                      sum  1.3
#   A = -1    rho 0.5, 1, 2      -0.8, -1, -2             sum -3.8
#   A = 2     rho 0.5, 1.25      1, 2.5                   sum  3.5
#   A = -1/2  rho 1, 1.4         -0.5, -0.7               sum -1.2
# They are a part of a gradient step of 8 completions and 20 tokens, in a round of 25 tokens a step.
LENGTHS, ADVANTAGES = [1, 3, 2, 2], [1.0, -1.0, 2.0, -0.5]
RATIOS = [1.5, 0.5, 1.0, 2.0, 0.5, 1.25, 1.0, 1.4]
TOTALS = Totals(sequences=8, tokens=20, round_tokens=25, longest=10)
VALUES = {
    "grpo": -(1.3 - 3.8 / 3 + 3.5 / 2 - 1.2 / 2) / 8,
    "dr_grpo": 0.2 / (8 * 10),
    "dapo": 0.2 / 25,
    "bnpo": 0.2 / 20,
    # rho_i = 1.5, (0.5 * 1 * 2)^(1/3) = 1, sqrt(0.625) = 0.7905694, sqrt(1.4) = 1.1832160; only the first is clipped
    "gspo": -(1.3 - 1 + 2 * 0.7905694 - 0.5 * 1.1832160) / 8,
    # log-probabilities -1 + log(rho): sums -0.5945349, -3, -2.4700036, -1.6635277
    "rloo": -(-0.5945349 + 3 - 2 * 2.4700036 + 0.5 * 1.6635277) / 8,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_by_hand(name: str) -> None:
    """Guards each weight, each denominator, the sign, the minimum, and a mean for a sum."""
    clips = {} if name == "rloo" else {"clip_coef": 0.2, "clip_coef_high": 0.3}
    old = torch.full((8,), -1.0)
    new, advantages = old + torch.tensor(RATIOS).log(), torch.tensor(ADVANTAGES)
    value, metrics = loss(new, old, None, advantages, row(LENGTHS), TOTALS, settings(loss=name, **clips))
    assert value.item() == pytest.approx(VALUES[name], rel=1e-5)
    assert metrics["policy_loss"].item() == value.item() and "kl" not in metrics
    if name in TOKENWISE:  # 1.5 with A > 0, 0.5 with A < 0; the others' minimum is the unclipped term
        assert metrics["clipfrac"].item() == pytest.approx(2 / 20)


def closed_form(
    new: Any, old: Any, reference: Any, lengths: Any, branch: Any, a: Any, n: Totals, args: Args
) -> np.ndarray:
    """Derivatives by the new log-probabilities, in numpy."""
    d, low, high = reference - new, *args.clips
    weights = {
        "grpo": 1 / (n.sequences * lengths[branch]),
        "gspo": 1 / (n.sequences * lengths[branch]),
        "dr_grpo": 1 / (n.sequences * n.longest),
        "dapo": 1 / n.round_tokens,
        "bnpo": 1 / n.tokens,
        "rloo": 1 / n.sequences,
    }[args.loss]
    kl = {"k1": 0 * d, "k2": -d, "k3": 1 - np.exp(d)}[args.kl]
    if args.loss == "rloo":
        return weights * (args.beta * kl - a[branch])
    log_ratio = new - old
    if args.loss == "gspo":
        log_ratio = np.array([log_ratio[branch == i].mean() for i in branch])
    ratio = np.exp(log_ratio)
    flat = np.where(a[branch] > 0, ratio > 1 + high, ratio < 1 - low)
    return weights * (args.beta * kl - np.where(flat, 0, ratio * a[branch]))


@pytest.mark.parametrize(
    ("name", "kl"), [(name, kl) for name in WEIGHTS for kl in ("k1", "k2", "k3") if kl != "k1" or name not in SCALED]
)
def test_gradient_is_the_closed_form(name: str, kl: str) -> None:
    random = np.random.default_rng(0)
    lengths = np.array([4, 1, 7, 3, 2, 5])
    branch = np.arange(6).repeat(lengths)
    new = -random.uniform(0.1, 3, len(branch))
    old, reference = new + random.normal(0, 0.4, len(branch)), new + random.normal(0, 0.5, len(branch))
    a = random.normal(size=6)
    args = settings(loss=name, beta=0.3, kl=kl)
    x = torch.tensor(new, requires_grad=True)
    fixed = (torch.tensor(y) for y in (old, reference, a))
    value, _ = loss(x, *fixed, row(lengths.tolist()), TOTALS, args)  # type: ignore[arg-type]
    value.backward()
    assert x.grad is not None
    wanted = closed_form(new, old, reference, lengths, branch, a, TOTALS, args)
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=1e-6, atol=1e-9)
    if kl == "k1" and name != "rloo":
        assert (wanted == 0).any() and (wanted != 0).any(), "both kinds of tokens, clipped and not"


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [
        (1, 1.25, True),  # beyond 1 + eps, within 1 + eps_high
        (1, 1.35, False),
        (1, 0.5, True),  # an unlikely good token is not clipped
        (-1, 0.85, True),
        (-1, 0.75, False),
        (-1, 1.35, True),
        (-1, 5.0, True),
    ],
)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_clip_bites_on_the_right_side(name: str, advantage: float, ratio: float, moves: bool) -> None:
    new = torch.tensor([math.log(ratio)], requires_grad=True)
    args = settings(loss=name, clip_coef=0.2, clip_coef_high=0.3)
    value, metrics = loss(new, torch.zeros(1), None, torch.tensor([advantage]), row([1]), Totals(1, 1, 1, 1), args)
    value.backward()
    assert new.grad is not None and (new.grad.item() != 0) == moves
    assert metrics["clipfrac"].item() == (not moves)


@pytest.mark.parametrize(
    ("flags", "clips"),
    [
        ({}, (0.2, 0.2)),
        ({"loss": "dapo"}, (0.2, 0.28)),
        ({"loss": "gspo"}, (3e-4, 4e-4)),
        ({"loss": "dapo", "clip_coef": 0.1}, (0.1, 0.1)),
        ({"loss": "dapo", "clip_coef_high": 0.4}, (0.2, 0.4)),
        ({"clip_coef": 0.1, "clip_coef_high": 0.4}, (0.1, 0.4)),
    ],
)
def test_clips_are_the_papers_or_those_given(flags: dict[str, Any], clips: tuple[float, float]) -> None:
    assert settings(**flags).clips == clips


@pytest.mark.parametrize("name", TOKENWISE)
def test_the_first_gradient_is_the_policy_gradient(name: str) -> None:
    """At ratio 1 nothing is clipped, and the derivative by log pi is -w A, as REINFORCE has it."""
    new = torch.tensor([-1.0, -0.3, -2.0, -0.1], requires_grad=True)
    value, metrics = loss(new, new.detach(), None, torch.tensor([0.5, -2.0]), row([1, 3]), TOTALS, settings(loss=name))
    value.backward()
    weights = WEIGHTS[name](torch.tensor([1.0, 3.0, 3.0, 3.0]), TOTALS)
    torch.testing.assert_close(new.grad, -weights * torch.tensor([0.5, -2.0, -2.0, -2.0]))
    assert metrics["clipfrac"] == 0


def test_kl_estimators_by_hand() -> None:
    """log pi = log 1/2, log pi_ref = log 1/4 and log 1: d = -log 2 and log 2."""
    new, reference = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 1.0]).log()
    x = math.log(2)
    assert kl_estimate(new, reference, "k1").tolist() == pytest.approx([x, -x])
    assert kl_estimate(new, reference, "k2").tolist() == pytest.approx([x * x / 2, x * x / 2])
    assert kl_estimate(new, reference, "k3").tolist() == pytest.approx([0.5 + x - 1, 2 - x - 1])


def test_what_kl_estimators_are_in_expectation() -> None:
    """By enumeration of a categorical: k1 and k3 estimate KL(pi || ref), k2 does not quite. But what descends is the
    gradient at fixed samples: k2's is that of KL(pi || ref), k3's that of KL(ref || pi), and k1's nothing."""
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([1.0, 0.4, -0.3, 0.0, 0.2], dtype=torch.float64).log_softmax(0)
    log_p = scores.log_softmax(0)
    p = log_p.exp()
    reverse, forward = (p * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
    means = {kind: (p.detach() * kl_estimate(log_p, log_q, kind)).sum() for kind in ("k1", "k2", "k3")}
    for kind in ("k1", "k3"):
        assert means[kind].item() == pytest.approx(reverse.item(), rel=1e-12)
    assert means["k2"].item() != pytest.approx(reverse.item(), rel=0.01)

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(x, scores, retain_graph=True)[0]

    torch.testing.assert_close(gradient(means["k2"]), gradient(reverse), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(means["k3"]), gradient(forward), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(means["k1"]), torch.zeros_like(scores), rtol=0, atol=1e-14)
    assert (gradient(means["k3"]) - gradient(reverse)).abs().max() > 0.1


def test_advantages_by_hand() -> None:
    """1, 0, 0, 1: mean 1/2, deviation with three in the denominator sqrt(1/3); the mean of the others is 1/3 or 2/3."""
    rewards = torch.tensor([[1.0, 0, 0, 1], [5, 5, 5, 5], [2, 0, 0, 0]])
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    b, c = 1.5 / (1 + 1e-4), -0.5 / (1 + 1e-4)
    for name in ("grpo", "dapo", "bnpo", "gspo"):
        wanted = torch.tensor([[a, -a, -a, a], [0, 0, 0, 0], [b, c, c, c]])
        torch.testing.assert_close(group_advantages(rewards, name), wanted, rtol=1e-6, atol=0)
    wanted = torch.tensor([[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [1.5, -0.5, -0.5, -0.5]])
    torch.testing.assert_close(group_advantages(rewards, "dr_grpo"), wanted)
    wanted = torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0, 0, 0, 0], [2, -2 / 3, -2 / 3, -2 / 3]])
    torch.testing.assert_close(group_advantages(rewards, "rloo"), wanted)


def test_equal_rewards_are_no_advantage_whatever_their_mean_s_rounding() -> None:
    """Adam makes whole steps of gradients however small, so almost zero would not do."""
    rounded = 0
    for size in range(2, 12):
        rewards = torch.tensor([0.1, 0.7, 1 / 3, 1e6 + 0.1, -2.3])[:, None].expand(-1, size)
        rounded += int((rewards.mean(1, keepdim=True) != rewards).any())
        for name in WEIGHTS:
            assert not group_advantages(rewards, name).any()
        assert grpo.all_equal(rewards).all()
    assert rounded, "the test has no mean that is rounded"


# A round: four prompts with three completions of one to seven tokens; 2 is the EOS token.
TREES = [
    Tree([5, 6, 7, 8], ([9, 10, 2], [11, 2], [40, 41, 42, 43, 44, 45, 2])),
    Tree([5, 6], ([22], [9, 10, 2], [5, 6, 7, 8, 2])),
    Tree([5, 6, 60], ([30, 31], [2], [9, 33, 2])),
    Tree([70, 71, 72], ([80, 81, 82, 83], [84, 2], [85, 86, 2])),
]
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0], [0.3, 0.3, 0.3], [2.0, -1.0, 0.0]])
RATE = 0.3  # large enough for ratios that are clipped


class Round:
    """A run whose optimizer is plain gradient descent and keeps the gradients of every step."""

    def __init__(self, model: Path, runs_dir: Path, rate: float = RATE, **flags: Any) -> None:
        self.args = settings(
            model=str(model), task="addition", prompts_per_step=4, group_size=3, max_grad_norm=1e9, learning_rate=rate,
            runs_dir=runs_dir, **flags,
        )  # fmt: skip
        network, tokenizer = load_model(str(model)), load_tokenizer(str(model))
        self.run = LanguageRun(self.args, "grpo", network, tokenizer, torch.Generator())
        self.reference = other(model) if self.args.beta else None
        self.gradients: list[dict[str, Tensor]] = []
        self.run.optimizer = torch.optim.SGD(self.run.trained.values(), lr=RATE)  # type: ignore[assignment]
        self.run.optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self.now()))

    def now(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.run.trained.items() if p.grad is not None}

    def learn(self, trees: list[Tree] = TREES, rewards: Tensor = REWARDS) -> dict[str, float]:
        return learn(self.run, self.reference, trees, rewards, 10, self.args)


def other(model: Path) -> Any:
    """A reference that is not the model."""
    network, random = load_model(str(model)), torch.Generator().manual_seed(3)
    for p in network.parameters():
        p.requires_grad_(False).add_(0.02 * torch.randn(p.shape, generator=random))
    return network


def plain(model: Path, args: Args) -> list[dict[str, Tensor]]:
    """The gradients of a round by loops over single sequences, without a line of `grpo`."""
    network, reference = load_model(str(model)), other(model)
    parameters = dict(network.named_parameters())

    def logprobs(policy: Any, i: int, j: int) -> Tensor:
        prompt, tokens = TREES[i].prompt, TREES[i].branches[j]
        logits = policy(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1] / args.temperature
        return logits.log_softmax(1)[range(len(tokens)), tokens]  # type: ignore[no-any-return]

    every = [(i, j) for i in range(4) for j in range(3)]
    with torch.no_grad():
        old = {x: logprobs(network, *x) for x in every}
        fixed = {x: logprobs(reference, *x) for x in every}
    rewards = {x: REWARDS[x].item() for x in every}
    if args.kl == "k1":
        rewards = {x: rewards[x] - args.beta * (old[x] - fixed[x]).sum().item() for x in every}
    advantages = {}
    for i, j in every:
        group = [rewards[i, k] for k in range(3)]
        mean, others = sum(group) / 3, [r for k, r in enumerate(group) if k != j]
        a = rewards[i, j] - (sum(others) / 2 if args.loss == "rloo" else mean)
        if args.loss not in ("rloo", "dr_grpo"):
            a /= math.sqrt(sum((r - mean) ** 2 for r in group) / 2) + 1e-4
        advantages[i, j] = a if len(set(group)) > 1 else 0.0

    found, size = [], 4 // args.minibatches
    for _ in range(args.epochs):
        for begin in range(0, 4, size):
            step = [(i, j) for i, j in every if begin <= i < begin + size]
            lengths = {x: len(old[x]) for x in every}
            total = torch.tensor(0.0)
            for x in step:
                new, a = logprobs(network, *x), advantages[x]
                ratio = (new - old[x]).exp()
                if args.loss == "gspo":
                    ratio = (new - old[x]).mean().exp()
                low, high = args.clips
                bound = 1 + high if a > 0 else 1 - low
                objective = (ratio.clamp(max=bound) if a > 0 else ratio.clamp(min=bound)) * a
                objective = new * a if args.loss == "rloo" else objective.expand(len(new))
                d = fixed[x] - new
                kl = {"k1": 0 * d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[args.kl]
                weight = {
                    "grpo": 1 / len(step) / lengths[x],
                    "gspo": 1 / len(step) / lengths[x],
                    "dr_grpo": 1 / len(step) / 10,
                    "dapo": args.minibatches / sum(lengths.values()),
                    "bnpo": 1 / sum(lengths[y] for y in step),
                    "rloo": 1 / len(step),
                }[args.loss]
                total = total - weight * (objective - args.beta * kl).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()))
            found.append(dict(zip(parameters, gradients, strict=True)))
            with torch.no_grad():
                for name, p in parameters.items():
                    p -= RATE * found[-1][name]
    return found


FOUR = {"epochs": 2, "minibatches": 2}
CASES = [
    *({"loss": name} for name in WEIGHTS),
    *({"loss": name, **FOUR} for name in WEIGHTS if name != "rloo"),
    {"temperature": 0.7, **FOUR, "beta": 0.1},
    {"loss": "dapo", "epochs": 3, "beta": 0.2, "kl": "k2"},
    {"loss": "bnpo", "minibatches": 4},
    {"loss": "dr_grpo", "minibatches": 4, "beta": 0.2, "kl": "k1"},
    {"loss": "rloo", "beta": 0.2, "kl": "k1", "temperature": 1.5},
]


@pytest.mark.parametrize("flags", CASES, ids=lambda flags: " ".join(map(str, flags.values())))
def test_a_round_is_what_plain_loops_make_of_it(tiny_model: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Guards old log-probabilities, temperature, groups, minibatches, totals over micro-batches, and where KL enters;
    and the gradients do not depend on how a step is divided."""
    wanted = plain(tiny_model, settings(prompts_per_step=4, **flags))
    rounds = []
    for tokens in (1, 20, 10_000):
        rounds.append(Round(tiny_model, tmp_path / str(tokens), micro_tokens=tokens, **flags))
        metrics = rounds[-1].learn()
        assert len(rounds[-1].gradients) == len(wanted)
        for step in range(len(wanted)):  # what differs by rounding in one step differs more in the next
            tolerance = 1e-6 if step == 0 else 1e-5
            torch.testing.assert_close(rounds[-1].gradients[step], wanted[step], rtol=1e-4, atol=2 * tolerance)
            torch.testing.assert_close(rounds[-1].gradients[step], rounds[0].gradients[step], rtol=1e-5, atol=tolerance)
        if rounds[-1].args.epochs > 1:
            assert metrics["clipfrac"] > 0, "no ratio left the bounds, so that old as new would pass"
        assert math.isfinite(metrics["policy_loss"]) and ("kl" in metrics) == (rounds[-1].args.beta > 0)


def test_metrics_are_means_over_the_tokens_of_all_steps(tiny_model: Path, tmp_path: Path) -> None:
    """The KL of a model that is its own reference is 0, and of another the mean over 36 tokens, however divided."""
    found = [Round(tiny_model, tmp_path / str(n), micro_tokens=n, beta=1e-9) for n in (1, 10_000)]
    ours = [x.learn()["kl"] for x in found]
    with torch.no_grad():
        packed = pack(TREES)
        new, fixed = (grpo.token_logprobs(x, packed) for x in (load_model(str(tiny_model)), found[0].reference))
    assert ours == pytest.approx([kl_estimate(new, fixed, "k3").mean().item()] * 2, rel=1e-4)
    once, twice = (Round(tiny_model, tmp_path / f"epochs {n}", 1e-9, loss="bnpo", epochs=n).learn() for n in (1, 2))
    assert twice["policy_loss"] == pytest.approx(once["policy_loss"], rel=1e-4) and abs(once["policy_loss"]) > 1e-3


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_constant_reward_moves_nothing(tiny_model: Path, tmp_path: Path, name: str) -> None:
    """With Adam, which makes whole steps of gradients however small."""
    args = settings(model=str(tiny_model), loss=name, prompts_per_step=4, group_size=3, runs_dir=tmp_path)
    network = load_model(str(tiny_model))
    run = LanguageRun(args, "grpo", network, load_tokenizer(str(tiny_model)), torch.Generator())
    for _ in range(3):
        learn(run, None, TREES, torch.full((4, 3), 0.7), 10, args)
    for name_, p in load_model(str(tiny_model)).named_parameters():
        assert torch.equal(run.trained[name_], p)


# What a run does, with prompts and rewards of one's own.

LETTERS = """
calls, fault = [], {}
def share(prompts, completions):
    calls.append((list(prompts), list(completions)))
    numbers = [sum(x in "abcdefghij" for x in text) / (len(text) or 1) + len(prompt) / 100
               for prompt, text in zip(prompts, completions, strict=True)]
    if len(calls) == fault.get("call"):
        if fault["kind"] == "raises":
            raise KeyError("lost\\nand found")
        if fault["kind"] == "few":
            return numbers[1:]
        numbers[2] = float("nan")
    return numbers
def length(prompts, completions):
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of rewards: share of the letters a to j; its `calls`, and a `fault` to commit."""
    (tmp_path / "letters.py").write_text(LETTERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import letters

    yield letters
    del sys.modules["letters"]


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path, letters: Any) -> Callable[..., Args]:
    """Makes the flags of a run of five rounds on prompts of a file."""
    lines = (json.dumps({"prompt": f"{i} is"}) for i in range(40))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))

    def make(runs_dir: str = "runs", **changes: Any) -> Args:
        defaults: dict[str, Any] = {
            "model": str(tiny_model), "task": "", "prompts": str(tmp_path / "prompts.jsonl"), "steps": 5,
            "reward": ("letters:share",), "holdout": (0.6, 1.0), "eval_prompts": 7, "prompts_per_step": 4,
            "group_size": 4, "max_new_tokens": 6, "learning_rate": 1e-2, "eval_every": 2, "checkpoint_every": 3,
        }  # fmt: skip
        return settings(**defaults | changes, runs_dir=tmp_path / runs_dir)

    return make


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    return {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def record(run: Path) -> dict[str, Any]:
    """All that a run leaves, but times."""
    tables = {tag: x for tag, x in scalars(run).items() if tag != "charts/SPS"}
    found = json.loads((run / "evaluation.json").read_text())
    assert found.pop("seconds") >= 0
    weights = {name: x.detach().numpy().tobytes() for name, x in load_model(str(run)).named_parameters()}
    saved = checkpoint.load(run)["state"]
    return {"events": tables, "evaluation": found, "weights": weights, "generator": saved["generator"].tolist()}


def resumed(run: Path) -> Path:
    args = parse(["--resume", str(run)], Args)
    assert isinstance(args, Args)
    return grpo.train(args).logs.folders[0]


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_a_run_s_prompts_answers_and_logs(flags: Callable[..., Args], letters: Any, tiny_model: Path) -> None:
    """Evaluation is greedy, on held-out prompts; rounds have whole groups of other prompts; everything is logged."""
    args = flags()
    run = grpo.train(args).logs.folders[0]
    (first, answers), *rounds, (last, final) = letters.calls
    every = [f"{i} is" for i in range(40)]
    held_out, known = split(every, args.holdout)
    assert first == last == held_out[:7]
    in_training = [prompts for prompts, _ in rounds if len(prompts) == 16]
    assert len(in_training) == 5 and [p for p, _ in rounds if len(p) != 16] == [first, first]
    for prompts in in_training:
        assert prompts == [p for p in prompts[::4] for _ in range(4)] and len(set(prompts)) == 4
        assert set(prompts) <= set(known)
    assert len({p for prompts in in_training for p in prompts}) == 20  # an epoch is not over, so none came twice

    network, tokenizer = load_model(str(tiny_model)), load_tokenizer(str(tiny_model))
    for prompt, answer in zip(first, answers, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer

    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["held_out"] == 7
    for when, texts in (("before", answers), ("after", final)):
        assert evaluation[when] == pytest.approx(sum(letters.share(first, texts)) / 7)
    assert answers != final
    tables = scalars(run)
    names = {"charts/reward", "charts/equal_groups", "charts/cut", "charts/length", "charts/SPS", "eval/reward"}
    names |= {"charts/learning_rate", "losses/policy_loss", "losses/clipfrac", "losses/grad_norm"}
    assert tables.keys() == names
    assert [step for step, _ in tables["eval/reward"]] == [2, 4]
    for name in names - {"eval/reward"}:
        assert [step for step, _ in tables[name]] == [1, 2, 3, 4, 5]
    texts = letters.calls[1]
    assert tables["charts/reward"][0][1] == pytest.approx(sum(letters.share(*texts)) / 16, rel=1e-5)
    assert 0 < tables["charts/cut"][0][1] <= 1 and 0 < tables["charts/length"][0][1] <= 6


def test_several_rewards_are_summed_by_their_weights(flags: Callable[..., Args], letters: Any) -> None:
    args = flags(reward=("letters:share", "letters:length"), reward_weights=(2.0, -0.5), steps=1)
    run = grpo.train(args).logs.folders[0]
    prompts, texts = letters.calls[1]
    wanted = [2 * a - 0.5 * b for a, b in zip(letters.share(prompts, texts), map(len, texts), strict=True)]
    tables = {tag: x[0][1] for tag, x in scalars(run).items()}
    assert tables["charts/reward"] == pytest.approx(sum(wanted) / 16, rel=1e-5)
    assert tables["charts/reward/letters:length"] == pytest.approx(sum(map(len, texts)) / 16, rel=1e-5)
    assert tables["charts/reward/letters:share"] == pytest.approx(sum(letters.share(prompts, texts)) / 16, rel=1e-5)


def test_a_reward_model_rewards(flags: Callable[..., Args], letters: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Its score of each completion, beside a function's that counts for nothing; a language model is none."""
    model, tokenizer = load_model(str(tiny_model), num_labels=1), load_tokenizer(str(tiny_model))
    torch.nn.init.normal_(model.score.weight)
    save_model(tmp_path / "judge" / "model", model, tokenizer)
    args = flags(reward=(str(tmp_path / "judge"), "letters:share"), reward_weights=(1.0, 0.0), steps=1)
    run = grpo.train(args).logs.folders[0]
    wanted = []
    for prompt, text in zip(*letters.calls[1], strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, text)])
        wanted.append(float((model.base_model(ids).last_hidden_state[0, -1] @ model.score.weight[0]).detach()))
    tables = {tag: x[0][1] for tag, x in scalars(run).items()}
    assert tables["charts/reward"] == tables["charts/reward/judge"] == pytest.approx(sum(wanted) / 16, rel=1e-4)
    with pytest.raises(ValueError, match=r"--reward .*tiny: no reward model; a trained one works, or a function"):
        grpo.train(flags(reward=(str(tiny_model),)))
    with pytest.raises(ValueError, match="--reward a/judge b/judge: two have the same name"):
        grpo.train(flags(reward=("a/judge", "b/judge")))


def test_a_gradient_that_is_not_finite_ends_the_run(
    flags: Callable[..., Args], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it reaches the weights, also where the loss is finite."""
    true = torch.nn.utils.clip_grad_norm_
    calls: list[int] = []

    def norm(*args: Any) -> Tensor:
        calls.append(1)
        return true(*args) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", norm)
    with pytest.raises(FloatingPointError, match="the gradient's norm is not finite after step 2; a smaller"):
        grpo.train(flags())


def test_prompts_that_cannot_be_used_are_told_before_training(flags: Callable[..., Args], letters: Any) -> None:
    with pytest.raises(ValueError, match=r"^--model .*: 40 of 40 texts are longer than its 2048 tokens; take them out"):
        grpo.train(flags(max_new_tokens=2047))
    assert not letters.calls


def test_dr_grpo_divides_by_the_longest_there_may_be(
    flags: Callable[..., Args], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the longest there was."""
    seen: list[int] = []
    whole = grpo.learn

    def watched(*given: Any) -> Any:
        seen.append(given[4])
        return whole(*given)

    monkeypatch.setattr(grpo, "learn", watched)
    grpo.train(args := flags(loss="dr_grpo", steps=2))
    assert seen == [args.max_new_tokens] * 2 == [6, 6]


def test_the_reference_stays_at_the_start(flags: Callable[..., Args]) -> None:
    """A reference that were the model itself would have no KL from it, ever."""
    found = [x for _, x in scalars(grpo.train(flags(beta=1e-9)).logs.folders[0])["losses/kl"]]
    assert abs(found[0]) < 1e-6 and min(found[1:]) > 1e-4


def test_sampling_has_the_temperature(flags: Callable[..., Args], letters: Any) -> None:
    """Near 0 all completions of a prompt are the same, and are counted as nothing to learn from."""
    run = grpo.train(flags(temperature=1e-4, steps=1)).logs.folders[0]
    texts = letters.calls[1][1]
    assert texts[::4] == texts[1::4] == texts[2::4] == texts[3::4]
    assert scalars(run)["charts/equal_groups"] == [(1, 1.0)]
    letters.calls.clear()
    grpo.train(flags("other", temperature=1.0, steps=1))
    assert len(set(letters.calls[1][1])) == 16


def test_a_round_s_ratios_are_one_at_the_temperature(flags: Callable[..., Args]) -> None:
    """With the log-probabilities of another temperature, ratios of 1 would leave gspo's bounds of 3e-4 at once."""
    tables = scalars(grpo.train(flags(temperature=0.7, epochs=2, loss="gspo", learning_rate=1e-12)).logs.folders[0])
    assert {x for _, x in tables["losses/clipfrac"]} == {0.0}


@pytest.mark.parametrize("ends", [False, True])
def test_cut_completions_are_told_once(
    flags: Callable[..., Args], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ends: bool
) -> None:
    """Hardly any completion of six tokens has the one EOS token; with 200 of 259 that end one, nearly all do."""
    network = load_model(str(tiny_model))
    network.generation_config.eos_token_id = list(range(2, 202)) if ends else 2
    network.save_pretrained(tmp_path / "ending")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "ending")
    run = grpo.train(flags(model=str(tmp_path / "ending"), temperature=3.0)).logs.folders[0]
    assert all((share < 0.5) == ends for _, share in scalars(run)["charts/cut"])
    told = capsys.readouterr().out.count("note: more than half of the completions were cut at --max-new-tokens 6\n")
    assert told == (not ends)


def test_stopped_and_resumed_is_the_same_run(flags: Callable[..., Args], letters: Any) -> None:
    """Parameters, moments, samples, logged values, and the evaluation before training."""
    changes: dict[str, Any] = {"epochs": 2, "beta": 0.1, "weight_decay": 0.1, "decay": True, "warmup": 2}
    whole = record(grpo.train(flags("whole", **changes)).logs.folders[0])
    with pytest.raises(Stopped):
        grpo.train(flags("stopped", **changes, stop_at=3))
    run = only(flags("stopped").runs_dir)
    assert not (run / "evaluation.json").exists() and not (run / "model").exists()
    letters.calls.clear()
    assert record(resumed(run)) == whole
    assert len(letters.calls) == 2 + 2  # two rounds, the evaluations at step 4 and at the end, none before
    assert record(resumed(run)) == whole  # finished


RAISES = r"reward letters:share failed at .*letters\.py:9: KeyError: 'lost\\nand found'"
FEW = r"reward letters:share gave \(\d+,\) numbers for \d+ completions"
NAN = r"reward letters:share gave nan for the completion '.*'"


@pytest.mark.parametrize(
    ("kind", "message", "call", "step"),
    [
        ("raises", RAISES, 1, 0),  # the evaluation before training
        ("raises", RAISES, 3, 1),  # the second round
        ("few", FEW, 5, 2),  # the third
        ("nan", NAN, 3, 1),
        ("nan", NAN, 4, 0),  # the evaluation in the second round, after its gradient step
        ("nan", NAN, 9, 5),  # the evaluation after training
    ],
)
def test_a_reward_that_fails_loses_nothing(
    flags: Callable[..., Args], letters: Any, kind: str, message: str, call: int, step: int
) -> None:
    """One line with the reward's name and what is wrong; the round is checkpointed, and resumed bit for bit."""
    whole = record(grpo.train(flags("whole")).logs.folders[0])
    letters.calls.clear()
    letters.fault.update(call=call, kind=kind)
    with pytest.raises(ValueError, match=message) as caught:
        grpo.train(flags("faulty"))
    letters.fault.clear()
    run = only(flags("faulty").runs_dir)
    assert checkpoint.load(run)["run"]["iteration"] == step
    assert str(caught.value).endswith(f"; checkpointed at step {step}; continue with --resume {run}")
    assert "\n" not in str(caught.value)
    assert record(resumed(run)) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": ""}, "--task  must be given without --prompts and --reward, or left out with both"),
        ({"task": "", "prompts": "x"}, "--task  must be given"),
        ({"task": "", "reward": ("a:b",)}, "--task  must be given"),
        ({"prompts": "x"}, "--task addition must be given without"),
        ({"reward": ("a:b",)}, "--task addition must be given without"),
        ({"group_size": 1}, "--group-size 1 must be 2 or more"),
        ({"group_size": 0}, "--group-size 0 must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0 must be finite and above 0"),
        ({"temperature": math.inf}, "--temperature inf must be finite and above 0"),
        ({"minibatches": 3, "prompts_per_step": 4}, "--minibatches 3 must be a divisor of --prompts-per-step"),
        ({"reward_weights": (1.0,)}, "--reward-weights .* must be 0 finite numbers, one for each --reward"),
        ({"loss": "rloo", "epochs": 2}, "--loss rloo must be another to take several steps"),
        ({"loss": "rloo", "minibatches": 2}, "--loss rloo must be another to take several steps"),
        ({"loss": "rloo", "clip_coef": 0.1}, "--loss rloo must be another .* to clip"),
        ({"loss": "rloo", "clip_coef_high": 0.1}, "--loss rloo must be another .* to clip"),
        ({"clip_coef": 0.0}, "--clip-coef 0.0 must be finite and above 0"),
        ({"clip_coef_high": 0.0}, "--clip-coef-high 0.0 must be finite and above 0"),
        ({"clip_coef_high": -0.1}, "--clip-coef-high -0.1 must be"),
        ({"holdout": (0.5, 0.5)}, "--holdout .* must be two numbers with 0 <= low < high <= 1"),
        ({"holdout": (0.5, 1.5)}, "--holdout .* must be two numbers"),
        ({"beta": -0.1}, "--beta -0.1 must be finite and 0 or more"),
        ({"beta": math.nan}, "--beta nan must be finite and 0 or more"),
        ({"kl": "k2"}, "--kl k2 must be left out without --beta"),
        ({"learning_rate": 0.0}, "--learning-rate 0.0 must be finite and above 0"),
        ({"max_new_tokens": -1}, "--max-new-tokens -1 must be at least 0"),
        ({"eval_prompts": 0}, "--eval-prompts 0 must be at least 1"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"stop_at": 31, "steps": 30}, "--stop-at 31 must be at most 30, the whole run"),
    ],
    ids=str,
)
def test_flags_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_reward_weights_are_one_for_each_reward() -> None:
    own: dict[str, Any] = {"task": "", "prompts": "x", "reward": ("a:b", "a:c")}
    settings(**own, reward_weights=(1.0, 0.0))
    for weights in ((1.0,), (1.0, 2.0, 3.0), (1.0, math.nan)):
        with pytest.raises(ValueError, match=r"--reward-weights .* must be 2 finite numbers, one for each --reward"):
            settings(**own, reward_weights=weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "addition1", "prompts": "", "reward": ()}, "--task addition1: there are larger-of-two, addition"),
        ({"reward": ("letters:none",)}, "--reward letters:none: .*'none'; it names a function as module:function"),
        ({"holdout": (0.0, 1.0)}, r"--holdout \(0.0, 1.0\) must be shares with prompts in and out, of 40"),
        ({"holdout": (0.9999, 1.0)}, r"--holdout \(0.9999, 1.0\) must be shares with prompts in and out"),
        ({"prompts": "none.jsonl"}, "--prompts none.jsonl: No such file .*; a whole .jsonl"),
    ],
)
def test_what_a_run_cannot_begin_with(flags: Callable[..., Args], changes: dict[str, Any], message: str) -> None:
    args = flags(**changes)
    with pytest.raises(ValueError, match=message):
        grpo.train(args)
    assert not args.runs_dir.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", "prompts.jsonl:2: a int, not an object with prompt"),
        ('{"prompt": 3}', "prompts.jsonl:2: 3 is neither a string nor a list of messages"),
        ('{"prompt"', "prompts.jsonl:2: no JSON"),
        ('{"question": "x"}', "prompts.jsonl:2: has question; needs"),
    ],
)
def test_a_malformed_file_of_prompts_is_named(
    flags: Callable[..., Args], tmp_path: Path, line: str, message: str
) -> None:
    args = flags()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        grpo.train(args)


def test_messages_without_a_template_are_refused_plainly(
    flags: Callable[..., Args], tmp_path: Path, tiny_model: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = None
    load_model(str(tiny_model)).save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    args = flags(model=str(tmp_path / "bare"))
    lines = (json.dumps({"prompt": [{"role": "user", "content": str(i)}]}) for i in range(40))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"no chat template, which messages need; plain prompts work$"):
        grpo.train(args)


def test_ranks_share_minibatches_evenly(flags: Callable[..., Args], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo, "ranks", lambda: (0, 2))
    message = "--prompts-per-step 4 must be a multiple of --minibatches times torchrun's 2 ranks"
    with pytest.raises(ValueError, match=message):
        grpo.train(flags(minibatches=4))


class Tokens(SimpleNamespace):
    """A tokenizer of five tokens, the last of which ends a text."""

    texts = ("a", "\n", "b\nc", "\n\n", "<end>")
    eos_token_id = 4

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return ["".join(self.texts[i] for i in row) for row in rows]


@pytest.mark.parametrize(
    ("stop", "ends", "wanted"),
    [("", None, [4]), ("", 0, [0, 4]), ("", [0, 3], [0, 3, 4]), ("\n", None, [1, 2, 3, 4]), ("\n\n", 4, [3, 4])],
)
def test_every_end_of_the_model_and_every_token_with_the_stop_text_ends(
    stop: str, ends: int | list[int] | None, wanted: list[int]
) -> None:
    sizes = SimpleNamespace(get_text_config=SimpleNamespace)  # which name no limit
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends), config=sizes)
    assert Sampler(model, Tokens(), stop, 5, torch.Generator(), False).eos_ids == wanted


def test_what_follows_the_stop_text_is_learned_from_but_not_judged(tiny_model: Path) -> None:
    """The token that ended a completion is its last, as the EOS token is; the text ends before it."""
    tokenizer = load_tokenizer(str(tiny_model))
    sample = Sampler(load_model(str(tiny_model)), tokenizer, "e", 30, torch.Generator().manual_seed(0), False)
    (tree,), texts, cut = sample(["x"], 64, 3.0)
    end = tokenizer("e")["input_ids"][0]
    stopped = [(tokens, text) for tokens, text in zip(tree.branches, texts, strict=True) if tokens[-1] == end]
    assert stopped and not any("e" in text for text in texts)
    for tokens, text in stopped:
        assert tokens.count(end) == 1 and tokenizer.decode(tokens, skip_special_tokens=True) == text + "e"
    assert cut.tolist() == [tokens[-1] not in sample.eos_ids for tokens in tree.branches]


SHARED = {"beta": 0.1, "loss": "dapo", **FOUR}


def shares(model: str, folder: str) -> None:
    """What each of several processes does in the next test."""
    rank, size = grpo.ranks()
    for number, flags in enumerate((SHARED, {"loss": "grpo"}, {"loss": "bnpo", "minibatches": 2})):
        part = Round(Path(model), Path(folder) / f"runs {rank} {number}", **flags)  # type: ignore[arg-type]
        metrics = part.learn(TREES[rank::size], REWARDS[rank::size])
        torch.save((part.gradients, metrics), f"{folder}/{rank} {number}.pt")


def test_two_processes_are_one(tiny_model: Path, tmp_path: Path) -> None:
    """The gradients of each step, and what is logged, with totals over both processes."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT)!r}]\n"
        f"import test_grpo\ntest_grpo.shares({str(tiny_model)!r}, {str(tmp_path)!r})\n"
    )
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    for number, flags in enumerate((SHARED, {"loss": "grpo"}, {"loss": "bnpo", "minibatches": 2})):
        whole = Round(tiny_model, tmp_path / f"runs {number}", **flags)  # type: ignore[arg-type]
        metrics = whole.learn()
        for rank in range(2):
            gradients, found = torch.load(tmp_path / f"{rank} {number}.pt", weights_only=True)
            torch.testing.assert_close(gradients, whole.gradients, rtol=1e-5, atol=1e-5)
            assert found == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_torchrun_trains(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_model), "--task", "larger-of-two", "--steps", "2", "--eval-prompts", "5"]
    flags += ["--prompts-per-step", "4", "--group-size", "2", "--runs-dir", str(tmp_path), "--device", "cpu"]
    done = subprocess.run(
        [*TORCHRUN, "-m", "rl_lab.grpo", *flags], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    run = only(tmp_path)  # rank 0's alone
    assert json.loads((run / "evaluation.json").read_text())["held_out"] == 5
    tables = scalars(run)
    assert [step for step, _ in tables["losses/policy_loss"]] == [1, 2]
    for name, most in (("length", 4), ("cut", 1), ("reward", 1)):  # means over both processes, not sums
        assert all(0 <= x <= most for _, x in tables[f"charts/{name}"])
    assert tables["charts/length"][0][1] > 3
    assert load_model(str(run)) and done.stdout.count("held-out prompts, greedy") == 1
