"""Trained reward models as functions of prompts and completions, for `grpo` to learn from and for judges to compare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from rl_lab.language import (
    Prompt,
    Tree,
    encode_completion,
    encode_prompt,
    is_reward_model,
    load_model,
    load_tokenizer,
    longest_text,
    score,
)
from rl_lab.log import run_flags, run_folder

MICRO_TOKENS = 2048  # computed at once


class RewardModel:
    """Scores completions by a sequence classifier with one output, read at the completion's end.

    Raises:
        ValueError: if there is none of that name, or it is a language model.
    """

    def __init__(self, name: str, flag: str, device: torch.device | str = "cpu", instead: str = "") -> None:
        self.name, self.flag = name, flag
        self.tokenizer = load_tokenizer(name, flag)
        if not is_reward_model(name):
            raise ValueError(f"{flag} {name}: no reward model" + instead)
        if (run_flags(run_folder(name)) or {}).get("kind") == "process":
            raise ValueError(f"{flag} {name}: a model of steps, which gives an answer no score; --kind outcome's do")
        try:
            self.model = load_model(name, flag, num_labels=1).requires_grad_(False).to(device)
        except RuntimeError as error:  # sizes differ
            raise ValueError(f"{flag} {name}: its head does not give one score ({error})") from None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """A score for each completion; for those of one prompt that follow each other, it is computed once.

        So is the score of equal ones, which rounding would tell apart by their places.
        """
        texts, trees, groups = iter(completions), [], []
        for prompt, same in itertools.groupby(prompts):
            groups.append([next(texts) for _ in same])
            branches = tuple(encode_completion(self.tokenizer, text) for text in dict.fromkeys(groups[-1]))
            trees.append(Tree(encode_prompt(self.tokenizer, prompt), branches))
        require_room(self.model, trees, f"{self.flag} {self.name}")
        found: list[float] = []
        for group, scores in zip(groups, score(self.model, trees, MICRO_TOKENS), strict=True):
            known = dict(zip(dict.fromkeys(group), scores, strict=True))
            found += [known[text] for text in group]
        return found


def require_room(model: Any, trees: Sequence[Tree], name: str, more: int = 0, packed: bool = True) -> None:
    """Raise a ValueError if texts, with `more` tokens to come, are longer than what the model was made for.

    Args:
        packed: as `longest_text` takes it; false where they are but sampled from.
    """
    most = longest_text(model, packed)
    long = sum(len(tree.prompt) + max(map(len, tree.branches), default=0) + more > most for tree in trees)
    if long:
        raise ValueError(f"{name}: {long} of {len(trees)} texts are longer than its {most} tokens; take them out")
