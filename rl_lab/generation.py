"""Sampling from a language model: a prompt is computed once, whatever number of completions it gets; and what all
prompts begin with is computed once for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_lab.language import Prompt, Tokens, Tree, autocast, common_prefix, encode_prompt, longest_text
from rl_lab.rollout import Rollout


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Tokens],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Sequence[int],
    generator: torch.Generator,
) -> Rollout:
    """Complete every prompt `group_size` times. As an environment's, the rows of a rollout are steps: here tokens.

    Args:
        prompts: N of at least one token each.
        max_new_tokens: T, at most.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        eos_ids: tokens each of which ends a completion; it is the completion's last.
        generator: on the model's device.
    Returns:
        actions: (T, N * group_size) int64, a prompt's completions side by side; 0 after the end.
        alive: (T, N * group_size) bool, whether the token is one of the completion.
        terminated, truncated: (N * group_size,) bool, whether it ended by itself, or was cut.
    """
    device, count = generator.device, len(prompts) * group_size
    shared, longest = min(common_prefix(prompts), min(map(len, prompts)) - 1), max(map(len, prompts))
    # Padded behind what they share, so that the next token of all has the same place; positions do not count padding.
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + x[shared:] for pad, x in zip(pads, prompts, strict=True)], device=device)
    mask = torch.tensor([[1] * shared + [0] * pad + [1] * (longest - shared - pad) for pad in pads], device=device)
    positions = (mask.cumsum(1)[:, shared:] - 1).clamp(min=0)
    ends = torch.tensor(sorted(set(eos_ids)), device=device)
    actions = torch.zeros(max_new_tokens, count, dtype=torch.int64, device=device)
    alive = torch.zeros(max_new_tokens, count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # of those that are computed: the ones that have not ended, and some more
    running = torch.ones(count, dtype=torch.bool, device=device)

    given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "use_cache": True, "logits_to_keep": 1}
    if shared:
        ahead = torch.tensor([prompts[0][:shared]], device=device)
        cache = model(input_ids=ahead, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(prompts))
        given["past_key_values"] = cache
    out = model(input_ids=ids, **given)
    if not out.logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite, so nothing can be sampled")
    cache, scores = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)
    cache.batch_repeat_interleave(group_size)
    mask, positions = (x.repeat_interleave(group_size, 0) for x in (mask, positions[:, -1:]))
    for t in range(max_new_tokens):
        tokens = choose(scores.float(), temperature, generator)
        actions[t, rows] = torch.where(running, tokens, 0)
        alive[t, rows] = running
        running = running & ~torch.isin(tokens, ends)
        left = int(running.sum())
        if t + 1 == max_new_tokens or not left:
            break
        if 2 * left <= len(rows):  # what has ended is computed along until it is half of all
            keep = running.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, tokens, mask, positions, running = (x[keep] for x in (rows, tokens, mask, positions, running))
        mask, positions = torch.cat([mask, mask[:, -1:]], 1), positions + 1
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        scores = out.logits[:, -1]
    truncated = torch.zeros(count, dtype=torch.bool, device=device)
    truncated[rows] = running
    length = int(alive.any(1).sum())
    return {"actions": actions[:length], "alive": alive[:length], "terminated": ~truncated, "truncated": truncated}


def choose(scores: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Tokens (B,) for logits (B, V)."""
    if temperature == 0:
        return scores.argmax(1)
    return torch.multinomial((scores / temperature).softmax(1), 1, generator=generator).squeeze(1)


def completions(rollout: Rollout) -> list[Tokens]:
    """The tokens of each completion, with the one that ended it."""
    tokens, alive = rollout["actions"].T, rollout["alive"].T
    return [row[mask].tolist() for row, mask in zip(tokens, alive, strict=True)]


class Sampler:
    """Completes prompts with a model, as text and as trees.

    Args:
        stop: a text that ends a completion, besides the model's EOS tokens; "" for none.
        longest: tokens of a completion at most.
    """

    def __init__(
        self, model: Any, tokenizer: Any, stop: str, longest: int, generator: torch.Generator, bf16: bool
    ) -> None:
        self.model, self.tokenizer, self.stop, self.longest = model, tokenizer, stop, longest
        self.generator, self.bf16, self.room = generator, bf16, longest_text(model, packed=False)
        ends = model.generation_config.eos_token_id
        ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        if stop:  # which may be a part of many tokens
            texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
            ids |= {i for i, text in enumerate(texts) if stop in text}
        self.eos_ids = sorted(ids)

    def encode(self, prompt: Prompt) -> Tokens:
        """A prompt's tokens. ValueError if the model was not made for so many and a completion's."""
        ids = encode_prompt(self.tokenizer, prompt)
        if len(ids) + self.longest > self.room:
            told = f"{len(ids):,} tokens of a prompt and {self.longest:,} of its completion"
            raise ValueError(f"{told} are more than the {self.room:,} that the model was made for")
        return ids

    def __call__(
        self, prompts: list[Prompt], group_size: int, temperature: float
    ) -> tuple[list[Tree], list[str], Tensor]:
        """The prompts' trees of `group_size` branches each, all completions as text, and whether each was cut."""
        ids = [self.encode(prompt) for prompt in prompts]
        with autocast(self.generator.device, self.bf16):
            rollout = generate(self.model, ids, group_size, self.longest, temperature, self.eos_ids, self.generator)
        tokens = completions(rollout)
        groups = (tuple(tokens[i : i + group_size]) for i in range(0, len(tokens), group_size))
        texts = [self.tokenizer.decode(x, skip_special_tokens=True) for x in tokens]
        texts = [text.partition(self.stop)[0] if self.stop else text for text in texts]
        return [Tree(x, group) for x, group in zip(ids, groups, strict=True)], texts, rollout["truncated"]

    def greedy(self, prompts: list[Prompt]) -> list[str]:
        """The likeliest token again and again, in batches."""
        batches = (prompts[i : i + 64] for i in range(0, len(prompts), 64))
        return [text for batch in batches for text in self(batch, 1, 0.0)[1]]
