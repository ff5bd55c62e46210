"""Sampling from a language model: a prompt is computed once, whatever number of completions it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rl_lab.language import Tokens
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
    longest = max(map(len, prompts))
    # Padded on the left, so that the next token of all has the same place; positions count from the prompt's begin.
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ends = torch.tensor(sorted(set(eos_ids)), device=device)
    actions = torch.zeros(max_new_tokens, count, dtype=torch.int64, device=device)
    alive = torch.zeros(max_new_tokens, count, dtype=torch.bool, device=device)
    rows = torch.arange(count, device=device)  # of those that are computed: the ones that have not ended, and some more
    running = torch.ones(count, dtype=torch.bool, device=device)

    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
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
