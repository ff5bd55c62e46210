"""Talk with a model, or write its weights with the adapter merged into them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import track

from rl_lab.generation import choose, completions, generate
from rl_lab.language import Message, Prompt, Tokens, encode_prompt, load_model, load_tokenizer, locate, save_model
from rl_lab.preference.judge import is_reward_model

BATCH = 16  # prompts completed side by side


@dataclass(frozen=True)
class Args:
    """Talk with a model; without --prompt for as long as you like (end it by Ctrl-D)."""

    run: tyro.conf.Positional[str]
    """run folder, folder of a model, smollm2-135m, or an id of the Hugging Face hub"""
    prompt: str | None = None
    """answer this and end"""
    temperature: float = 0.7
    """0 takes the likeliest tokens"""
    max_new_tokens: int = 256
    """of an answer, at most"""
    raw: bool = False
    """continue the text as it is: no chat template, no memory of what was said"""
    seed: int = 1
    """of the sampling"""
    merge: Path | None = None
    """write the model with its adapter merged into this folder, for other tools, and end"""


def require_sampling(temperature: float, max_new_tokens: int) -> None:
    """Raise a ValueError unless answers can be sampled so."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"--temperature {temperature} must be finite and 0 or more")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} must be at least 1")


def open_language_model(name: str, flag: str) -> tuple[Any, Any]:
    """A model that answers, on the GPU if there is one, and its tokenizer. ValueError if there is none of that name."""
    tokenizer, model = load_tokenizer(name, flag), load_model(name, flag)
    if is_reward_model(name, model):
        raise ValueError(f"{flag} {name}: a reward model, which scores answers and gives none")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's generation config."""
    more = getattr(model.generation_config, "eos_token_id", None) or []
    return sorted({tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)})


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    title: str = "answers",
) -> tuple[list[str], list[bool]]:
    """An answer to each prompt as text, and whether it was cut at `max_new_tokens`; progress goes to stderr."""
    texts, cut, ends = [""] * len(prompts), [False] * len(prompts), end_ids(model, tokenizer)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # prompts of about one length need no padding
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for batch in track(batches, title, console=Console(stderr=True), transient=True):
        chosen = [prompts[i] for i in batch]
        rollout = generate(model, chosen, 1, max_new_tokens, temperature, ends, generator)
        for i, tokens, truncated in zip(batch, completions(rollout), rollout["truncated"].tolist(), strict=True):
            texts[i], cut[i] = tokenizer.decode(tokens, skip_special_tokens=True), truncated
    return texts, cut


@torch.no_grad()
def stream(
    model: Any, prompt: Tokens, max_new_tokens: int, temperature: float, ends: Iterable[int], generator: torch.Generator
) -> Iterator[int]:
    """The tokens of one answer as they come, without the one that ends it."""
    cache, ids = None, prompt
    for _ in range(max_new_tokens):
        inputs = torch.tensor([ids], device=generator.device)
        out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(choose(out.logits[:, -1].float(), temperature, generator))
        if token in ends:
            return
        yield token
        cache, ids = out.past_key_values, [token]


def say(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Print an answer while it comes, and return it."""
    told: list[int] = []
    shown = text = ""
    for token in tokens:
        told.append(token)
        text = tokenizer.decode(told, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a letter
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(text[len(shown) :])
    return text


def talk(args: Args) -> None:
    """Answer --prompt, or whatever is typed."""
    model, tokenizer = open_language_model(args.run, "RUN")
    if not args.raw and not tokenizer.chat_template:
        raise ValueError(f"RUN {args.run}: its tokenizer has no chat template; --raw continues plain text")
    generator, ends = torch.Generator(model.device).manual_seed(args.seed), end_ids(model, tokenizer)
    said: list[Message] = []
    for text in [args.prompt] if args.prompt is not None else typed():
        said.append({"role": "user", "content": text})
        prompt: Prompt = text if args.raw else said
        tokens = encode_prompt(tokenizer, prompt)
        answer = say(tokenizer, stream(model, tokens, args.max_new_tokens, args.temperature, ends, generator))
        said.append({"role": "assistant", "content": answer})


def typed() -> Iterator[str]:
    """Lines until the end of the input."""
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def merge(run: str, folder: Path) -> None:
    """Write a model that other tools load, a reward model too. ValueError if the folder exists."""
    if folder.exists():
        raise ValueError(f"--merge {folder} exists; name a new folder")
    tokenizer = load_tokenizer(run, "RUN")
    model = load_model(run, "RUN")
    if is_reward_model(run, model):
        model = load_model(run, "RUN", num_labels=1)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, tokenizer)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters of {locate(run)}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; every expected fault ends in one line and exit status 1 (2 for flags)."""
    args = tyro.cli(Args, prog="python -m rl_lab.generate", args=argv)
    try:
        require_sampling(args.temperature, args.max_new_tokens)
        if args.merge:
            merge(args.run, args.merge)
        else:
            talk(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
