"""Training a language model: its flags, its run folder, and a gradient step over micro-batches and processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rl_lab import distributed
from rl_lab.checkpoint import replace_file
from rl_lab.cli import BaseArgs
from rl_lab.distributed import ranks, summed, whole
from rl_lab.language import Tree, add_lora, load_model, load_tokenizer, longest_text, save_model
from rl_lab.optim import fast_bf16
from rl_lab.preference_checks import template_end
from rl_lab.preference_data import Example, read, select, tokenize
from rl_lab.reference import digest
from rl_lab.run import SMALLER, BaseRun

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LanguageArgs(BaseArgs):
    """Flags of every training command of a language model."""

    model: str
    """folder of a model, a run folder, smollm2-135m, or an id of the Hugging Face hub"""
    steps: int
    """gradient steps"""
    learning_rate: float
    """of AdamW, after the warm-up"""
    warmup: int = 0
    """gradient steps over which the learning rate rises from zero"""
    decay: bool = True
    """let the learning rate fall to zero as a line"""
    max_grad_norm: float = 1.0
    """bound on the gradient's norm"""
    weight_decay: float = 0.0
    """of AdamW"""
    lora_rank: int = 0
    """train adapters of this rank on every linear layer; 0 trains all weights"""
    micro_tokens: int = 8192 if torch.cuda.is_available() else 1024
    """tokens that are computed at once, in whole examples and at least one; the gradient does not depend on it"""
    bf16: bool = fast_bf16()
    """matrix products in bfloat16; the default is whether they are fast here"""
    torch_threads: int = torch.get_num_threads()
    """CPU threads of torch; the default is all cores, or what OMP_NUM_THREADS says"""
    checkpoint_every: int = 100
    """gradient steps between checkpoints; 0 for the first and last only"""

    may_be_zero: ClassVar[set[str]] = {*BaseArgs.may_be_zero, "warmup", "lora_rank"}
    may_change: ClassVar[set[str]] = {*BaseArgs.may_change, "data", "prompts"}  # a run knows what it learns from

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("weight_decay", 0 <= self.weight_decay < math.inf, "finite and 0 or more")
        self.require("warmup", self.warmup < self.steps, f"below --steps {self.steps}, or the rate never gets there")

    @property
    def name(self) -> str:
        return Path(self.model).name

    @property
    def total_steps(self) -> int:
        return self.steps


@dataclass(frozen=True, kw_only=True)
class PreferenceArgs(LanguageArgs):
    """Flags of every command that learns from examples."""

    data: str
    """.jsonl or .jsonl.gz file, or a data set of the Hugging Face hub as name or name:split"""
    train: tuple[float, float] = (0.0, 0.9)
    """share of the prompts, by their hash, to learn from"""
    holdout: tuple[float, float] = (0.9, 1.0)
    """share of the prompts to evaluate on"""
    max_tokens: int = 512
    """of a prompt with a completion; longer examples are left out"""
    batch_size: int = 8
    """examples of a gradient step"""
    eval_examples: int = 500
    """held-out examples to evaluate on, at most"""
    shard: bool = False
    """under torchrun, divide weights, gradients and moments among the processes (FSDP2)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("train", "holdout"):
            low, high = getattr(self, field)
            self.require(field, 0 <= low < high <= 1, "two numbers with 0 <= low < high <= 1")
        apart = self.train[1] <= self.holdout[0] or self.holdout[1] <= self.train[0]
        self.require("holdout", apart, f"apart from --train {self.train}")


class Examples(NamedTuple):
    """Examples with their tokens, in the same order."""

    examples: list[Example]
    trees: list[Tree]


def open_data(args: PreferenceArgs, tokenizer: Any, kind: str) -> tuple[Examples, Examples]:
    """What to learn from and what to evaluate on. ValueError if either is empty.

    Args:
        kind: of `preference_data.KINDS`.
    """
    size = ranks()[1]
    args.require("batch_size", args.batch_size >= size, f"{size} or more: each process needs an example")
    if args.shard:  # the ranks have to compute equally often
        args.require("shard", size > 1, "left out without torchrun")
        args.require("batch_size", args.batch_size % size == 0, f"a multiple of the {size} processes for --shard")
        args.require("micro_tokens", args.micro_tokens == 1, "1, that is one example at once, for --shard")
    everything, left_out = read(args.data, kind)
    shares = []
    for field in ("train", "holdout"):
        chosen = select(everything, getattr(args, field))
        trees, kept = tokenize(chosen, tokenizer, args.max_tokens)
        told = f"{len(chosen) - len(kept)} of {len(chosen)} examples have more than {args.max_tokens} tokens"
        args.require(field, bool(trees), f"a share with examples to use: {told} (--max-tokens)")
        shares.append(Examples([chosen[i] for i in kept], trees))
        if len(kept) < len(chosen):
            print(f"--{field}: {told}")
    messages = any(not isinstance(example.prompt, str) for example in everything)
    if messages and (end := template_end(tokenizer)).level != "ok":
        print(f"the chat template of --model {args.model}: {end.text}")
    if left_out:
        print(f"{len(left_out)} pairs are left out: their answers do not follow one prompt (the first: {left_out[0]})")
    train, (examples, trees) = shares
    most = min(args.eval_examples, len(trees))
    most -= most % size if args.shard else 0
    args.require("holdout", most > 0, f"a share with {size} examples or more for --shard")
    return train, Examples(examples[:most], trees[:most])


def open_model(args: LanguageArgs, num_labels: int = 0) -> tuple[Any, Any]:
    """The model to train, on its device and with adapters if they are asked for, and its tokenizer.

    Raises:
        ValueError: if there is none, or one that was made for shorter texts than --max-tokens.
    """
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, num_labels=num_labels, seed=args.seed)
    if isinstance(args, PreferenceArgs):
        most = longest_text(model)
        args.require("max_tokens", args.max_tokens <= most, f"at most {most}, what --model {args.model} was made for")
    if args.lora_rank:
        model = add_lora(model, args.lora_rank, args.seed)
    return model.to(args.torch_device), tokenizer


@functools.cache
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, 3, epoch)).permutation(count).tolist()
    return order


def drawn(count: int, size: int, seed: int, step: int) -> list[int]:
    """Indices of batch number `step`: epochs follow each other, each a fresh permutation of range(count).

    It depends on nothing else, so a resumed run need not know what it has drawn.
    """
    places = range(step * size, (step + 1) * size)
    return [_permutation(count, seed, place // count)[place % count] for place in places]


class LanguageRun(BaseRun):
    """A training run of one language model; its steps are gradient steps.

    Args:
        args, algo, about: as `BaseRun` takes them.
        model: whose parameters that require gradients are trained.
        tokenizer: saved with it.
        generator: of all that is drawn.
        state: gives what the method has besides, as nested dicts of tensors and JSON values.
        shard: divide the model among the processes, from now on.
        learned: what is learned from and evaluated on, JSON values and tensors; a resumed run must have the same, and
            the same `model` at its start.

    Raises:
        ValueError: as `BaseRun`, and if a resumed run is to learn from something else.
    """

    args: LanguageArgs

    def __init__(
        self,
        args: LanguageArgs,
        algo: str,
        model: Any,
        tokenizer: Any,
        generator: torch.Generator,
        about: dict[str, Any] | None = None,
        state: Callable[[], dict[str, Any]] = dict,
        shard: bool = False,
        learned: Any = None,
    ) -> None:
        begun = json.dumps([learned, digest(model)], default=torch.Tensor.tolist)
        self._learned = hashlib.sha256(begun.encode()).hexdigest()
        if shard:
            distributed.shard(model, args.torch_device)
        self.shard = shard
        self.model, self.tokenizer, self.generator, self._more = model, tokenizer, generator, state
        self._evaluation: Any = None  # of the model as it is
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.trained.values()), args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        super().__init__(args, algo, self._state, about)
        if self.saved:
            if self.saved["learned"] != self._learned:
                told = "its model, prompts or examples are not those that it began with: put these back, in their order"
                raise ValueError(f"--resume {args.resume}: {told}")
            for name, p in self.trained.items():
                p.data.copy_(self.saved["params"][name])
            self._load_moments(self.saved["moments"])
            generator.set_state(self.saved["generator"].cpu())

    def _state(self) -> dict[str, Any]:
        params = {name: whole(p) for name, p in self.trained.items()}
        moments = {name: {x: whole(y) for x, y in self.optimizer.state[p].items()} for name, p in self.trained.items()}
        random = self.generator.get_state()
        state = {"params": params, "moments": moments, "generator": random, "more": self._more()}
        return state | {"learned": self._learned}

    def _load_moments(self, moments: dict[str, dict[str, Tensor]]) -> None:
        for name, p in self.trained.items():
            for kind, x in moments[name].items():
                self.optimizer.state[p][kind] = x.to(p.device)  # "step" too, as the fused one keeps it there

    def steps(self) -> Iterator[int]:
        """The gradient steps to do."""
        return self.iterations(self.args.steps, 1)

    @property
    def learning_rate(self) -> float:
        """Of the step now running: up along a line, then down along one."""
        step, args = self.iteration, self.args
        if step < args.warmup:
            return args.learning_rate * (step + 1) / args.warmup
        left = (args.steps - step) / max(args.steps - args.warmup, 1)
        return args.learning_rate * (left if args.decay else 1.0)

    def update(self, losses: Iterator[Tensor]) -> float:
        """One gradient step of the sum of `losses`, over micro-batches and over processes; returns the gradient's norm.

        Each loss is divided already by what it is a mean over in the whole batch of all processes, so that the gradient
        does not depend on how the batch is split.
        """
        parameters = list(self.trained.values())
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        for loss in losses:
            (loss * ranks()[1] if self.shard else loss).backward()  # what is divided is averaged, too
        if not self.shard:
            summed([p.grad for p in parameters if p.grad is not None])
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)))
        if not math.isfinite(norm):
            raise self.diverged("the gradient's norm is not finite", SMALLER)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self._evaluation = None
        return norm

    def evaluated(self, evaluate: Callable[[], T]) -> T:
        """What `evaluate` finds, computed once after each gradient step; not None."""
        if self._evaluation is None:
            self._evaluation = evaluate()
        found: T = self._evaluation
        return found

    def learn(self, parts: Iterable[dict[str, Tensor]], count: int) -> dict[str, float]:
        """One gradient step on the mean of `losses/loss`; returns the means of all measures, and the gradient's norm.

        Args:
            parts: measures of micro-batches, each (B,) with a number for every example.
            count: examples of all micro-batches of all processes; their tokens, where numbers are sums over these.
        """
        sums: dict[str, Tensor] = {}

        def losses() -> Iterator[Tensor]:
            for measures in parts:
                for name, x in measures.items():
                    sums[name] = sums.get(name, torch.zeros((), device=x.device)) + x.detach().sum()
                yield measures["losses/loss"].sum() / count

        norm = self.update(losses())
        means = torch.stack(list(sums.values())) / count
        summed([means])
        return {**dict(zip(sums, means.tolist(), strict=True)), "losses/grad_norm": norm}

    @contextlib.contextmanager
    def resumable(self, unchanged: bool = False) -> Iterator[None]:
        """Around functions of the user: if one fails, say how to go on from the last checkpoint.

        Args:
            unchanged: nothing is since the running step began, and by what is done here only the generator: the
                checkpoint is made then.
        Raises:
            ValueError: with how to go on, for a ValueError.
        """
        random = self.generator.get_state()
        try:
            yield
        except ValueError as error:
            if unchanged:
                self.generator.set_state(random)
                self.checkpoint()
            raise ValueError(f"{error}; checkpointed at step {self.checkpointed}; {self.how_to_go_on}") from error

    def log(self, metrics: dict[str, float], extra: str = "") -> None:
        """Log a gradient step. FloatingPointError if a loss is not finite."""
        table = {name: [x] for name, x in metrics.items()}
        self.require_finite(table)
        self.log_metrics(table | {"charts/learning_rate": [self.learning_rate]}, extra)

    def finish(self, score: str, result: dict[str, Any]) -> None:
        """Write `model/`, which `from_pretrained` loads, and `evaluation.json`; say where everything is."""
        folder = self.logs.folders[0]
        weights = None
        if self.shard:  # of weights that are one under two names, the first name
            every = dict(self.model.named_parameters(remove_duplicate=False)).keys()
            again = every - dict(self.model.named_parameters()).keys()
            weights = {name: whole(x) for name, x in self.model.state_dict().items() if name not in again}
        if not ranks()[0]:  # the other ranks' folders do not last
            save_model(folder / "model", self.model, self.tokenizer, weights)
        replace_file(folder / "evaluation.json", json.dumps(result, indent=2).encode())
        print(f"{folder}: {score}")
        self.logs.close()
