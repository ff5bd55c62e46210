"""Judges of answers: which of two answers to a prompt is better.

    Verifier        by a task's own function that scores an answer
    RewardJudge     by a trained reward model: P(first wins) = sigmoid(score(first) - score(second))
    LocalJudge      by a language model asked for A or B, of which the logits are read; nothing is sampled
    EndpointJudge   by a model behind an OpenAI-compatible endpoint, asked for A, B or tie

Each is called as judge(prompts, first, second) and returns `Verdicts`. The two that see both answers are asked in both
orders, since such judges favour a place [Zheng et al. 2023, arXiv:2306.05685]: an answer wins only if it does in either
order. `audit` says how often a judge agrees with people; a win rate is worth no more than that.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import torch

from rl_lab.endpoint import Endpoint
from rl_lab.language import Prompt, Tree, encode_prompt, is_reward_model, load_model, load_tokenizer, logits, pack
from rl_lab.preference_data import Example, plain
from rl_lab.preference_metrics import wilson
from rl_lab.reward_models import RewardModel, require_room
from rl_lab.tasks import Reward

QUESTION = """\
Below are a conversation and two answers that continue it. Decide which answer is better: more helpful, more correct and
less harmful. Neither the order of the answers nor their length matters.

[Conversation]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[End]
Which answer is better? Reply with {choices} and nothing else."""

WORKERS = 8  # requests at a time
UNPARSABLE = 0.1  # the largest share of replies


class Verdicts(NamedTuple):
    """What a judge says of N pairs.

    Attributes:
        wins: (N,) of the first answer: 1, 0 or 0.5 for a tie.
        probabilities: (N,) that the first answer wins, of judges that have them; else ().
        agreed: (N,) whether both orders gave the same verdict, None where a reply was unparsable, or answers are equal
            and nothing was asked; () of judges that do not see both answers.
        usage: of endpoints: requests, prompt_tokens and completion_tokens; unmetered, the replies that do not say how
            many tokens they took; nonsense, those that were neither A, B nor tie; unparsable, those that still were not
            when asked again. None of other judges.
    """

    wins: list[float]
    probabilities: Sequence[float] = ()
    agreed: Sequence[bool | None] = ()
    usage: Counter[str] | None = None

    @property
    def agreement(self) -> float | None:
        """Share of pairs with the same verdict in both orders, among those judged in both."""
        judged = [x for x in self.agreed if x is not None]
        return sum(judged) / len(judged) if judged else None


class Judge(Protocol):
    """What says which of two answers is better; `name` is for reports."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts: ...


class Rate(NamedTuple):
    """A share of `number` cases with its 95 % interval."""

    mean: float
    low: float
    high: float
    number: int


def rate(wins: Sequence[float]) -> Rate:
    """The win rate, ties as half, with Wilson's 95 % interval."""
    return Rate(sum(wins) / len(wins), *wilson(sum(wins), len(wins)), len(wins))


def audit(judge: Judge, pairs: Sequence[Example]) -> tuple[Rate, Verdicts]:
    """How often a judge prefers what people chose; a tie is half right, as a coin would be."""
    chosen, rejected = ([x.completions[i] for x in pairs] for i in range(2))
    verdicts = judged(judge, [x.prompt for x in pairs], chosen, rejected)
    return rate(verdicts.wins), verdicts


def judged(judge: Judge, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
    """What a judge says of N pairs; equal answers tie, and it is not asked about them."""
    asked = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    if not asked:
        return Verdicts([0.5] * len(prompts))
    found = judge([prompts[i] for i in asked], [first[i] for i in asked], [second[i] for i in asked])

    def every(values: Sequence[Any], tie: Any) -> list[Any]:
        known = dict(zip(asked, values, strict=True)) if len(values) else {}
        return [known.get(i, tie) for i in range(len(prompts))] if known else []

    return Verdicts(every(found.wins, 0.5), every(found.probabilities, 0.5), every(found.agreed, None), found.usage)


class Verifier:
    """Judges by the scores of a task's function; the higher one wins."""

    def __init__(self, reward: Reward, name: str) -> None:
        self.reward, self.name = reward, name

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        scores, others = (self.reward(list(prompts), list(texts)) for texts in (first, second))
        return Verdicts(_higher(scores, others, self.name))


def longer() -> Verifier:
    """The baseline of every judge: the answer with more characters wins."""
    return Verifier(lambda _, completions: [float(len(x)) for x in completions], "the longer answer")


def _higher(first: Sequence[float], second: Sequence[float], name: str) -> list[float]:
    if any(map(math.isnan, [*first, *second])):
        raise ValueError(f"{name}: a score is not a number, so nothing wins")
    return [float(a > b) + 0.5 * (a == b) for a, b in zip(first, second, strict=True)]


class RewardJudge:
    """Judges by the scores of a reward model; the higher one wins, P = sigmoid(difference).

    Raises:
        ValueError: if there is none of that name, or it is a language model.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", flag: str = "--judge") -> None:
        self.name = f"{name} (reward model)"
        self.reward = RewardModel(name, flag, device, f"; llm:{name} asks a language model which answer is better")

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        twice = [prompt for prompt in prompts for _ in range(2)]
        texts = [text for pair in zip(first, second, strict=True) for text in pair]
        a, b = torch.tensor(self.reward(twice, texts)).view(-1, 2).unbind(1)  # (N,)
        return Verdicts(_higher(a.tolist(), b.tolist(), self.name), (a - b).sigmoid().tolist())


class LocalJudge:
    """Asks a language model which answer is better, and reads the logits of "A" and "B".

    Raises:
        ValueError: if there is none of that name, or it takes no messages, or is a reward model.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", flag: str = "--judge") -> None:
        self.name, self.device, self.flag = f"llm:{name}", device, flag
        self.tokenizer = load_tokenizer(name, flag)
        letters = [self.tokenizer(x, add_special_tokens=False)["input_ids"] for x in "AB"]
        if not self.tokenizer.chat_template or max(map(len, letters)) > 1:
            need = "its tokenizer needs a chat template, and A and B as tokens; an instruction-tuned model has them"
            raise ValueError(f"{flag} {self.name}: {need}")
        self.a, self.b = letters[0][0], letters[1][0]
        if is_reward_model(name):
            raise ValueError(f"{flag} {self.name}: a reward model; without llm: it judges by its scores")
        self.model = load_model(name, flag).to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        questions = _both_orders(prompts, first, second, "A or B")
        asked = [encode_prompt(self.tokenizer, [{"role": "user", "content": text}]) for text in questions]
        trees = [Tree(tokens, ([self.a],)) for tokens in asked]  # what is scored is the token after the question
        require_room(self.model, trees, f"{self.flag} {self.name}")
        leads = []
        for pair in zip(trees[: len(prompts)], trees[len(prompts) :], strict=True):  # what both begin with counts once
            scores = logits(self.model, pack(pair, self.device))  # (2, V)
            leads.append((scores[:, self.a] - scores[:, self.b]).cpu())
        lead = torch.stack(leads, 1).flatten()  # (2 N,)
        probabilities = (lead[: len(prompts)].sigmoid() + (-lead[len(prompts) :]).sigmoid()) / 2
        picks = _higher(lead.tolist(), [0.0] * len(lead), self.name)
        wins, agreed = _joined(picks)
        return Verdicts(wins, probabilities.tolist(), agreed)


def _both_orders(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str], choices: str) -> list[str]:
    """2 N questions: with the first answer as A, then with the second one as A."""
    rows = list(zip(map(plain, prompts), first, second, strict=True))
    rows += [(prompt, b, a) for prompt, a, b in rows]
    return [QUESTION.format(prompt=prompt, first=a, second=b, choices=choices) for prompt, a, b in rows]


def _joined(picks: Sequence[float | None]) -> tuple[list[float], list[bool | None]]:
    """(2 N,) wins of A in both orders to (N,) wins of the first answer and whether the orders agree."""
    half = len(picks) // 2
    pairs = [(a, None if b is None else 1 - b) for a, b in zip(picks[:half], picks[half:], strict=True)]
    agreed = [None if a is None or b is None else a == b for a, b in pairs]
    return [a if same and a is not None else 0.5 for (a, _), same in zip(pairs, agreed, strict=True)], agreed


class EndpointJudge:
    """Asks a model behind an endpoint which answer is better, for one word.

    A reply that is neither A, B nor tie is asked for once more, then the pair counts as a tie.

    Raises:
        ValueError: when called, if there is no reply, or more than `UNPARSABLE` of them say nothing.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint, self.name = endpoint, endpoint.name

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                replies = list(pool.map(self._ask, _both_orders(prompts, first, second, "A, B or tie")))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        usage = sum((counts for _, counts, _ in replies), Counter[str]())
        unparsable = [text for pick, _, text in replies if pick is None]
        if len(unparsable) > UNPARSABLE * len(replies):
            raise self.endpoint.error(
                f"{len(unparsable)} of {len(replies)} replies were neither A, B nor tie, such as "
                f"{unparsable[0]!r:.80}; a model that follows instructions works, if it does not think aloud"
            )
        wins, agreed = _joined([pick for pick, _, _ in replies])
        return Verdicts(wins, (), agreed, usage)

    def _ask(self, question: str) -> tuple[float | None, Counter[str], str]:
        """What A wins, None if two replies say nothing; what it took; and the last reply."""
        usage: Counter[str] = Counter()
        for _ in range(2):
            text, spent = self.endpoint(question)
            usage.update(spent)
            if match := re.fullmatch(r"\W*(a|b|tie)\W*", text, re.IGNORECASE):
                return {"a": 1.0, "b": 0.0, "tie": 0.5}[match[1].lower()], usage, text
            usage["nonsense"] += 1
        usage["unparsable"] += 1
        return None, usage, text
