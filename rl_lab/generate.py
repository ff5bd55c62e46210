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

from rl_lab.generation import Sampler, choose
from rl_lab.language import (
    Message,
    Prompt,
    is_reward_model,
    load_model,
    load_tokenizer,
    locate,
    save_model,
)

BATCH = 64  # prompts completed side by side: every token reads all weights once for all of them


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
    tokenizer = load_tokenizer(name, flag)
    return load_model(name, flag).to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def complete(
    sampler: Sampler, prompts: Sequence[Prompt], temperature: float, title: str = "answers"
) -> tuple[list[str], list[bool]]:
    """An answer to each prompt, and whether it was cut; progress goes to stderr."""
    texts, cut = [""] * len(prompts), [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(str(prompts[i])))  # padded to the longest in a batch
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for batch in track(batches, title, console=Console(stderr=True), transient=True):
        _, answers, truncated = sampler([prompts[i] for i in batch], 1, temperature)
        for i, answer, was_cut in zip(batch, answers, truncated.tolist(), strict=True):
            texts[i], cut[i] = answer, was_cut
    return texts, cut


@torch.no_grad()
def stream(sampler: Sampler, prompt: Prompt, temperature: float) -> Iterator[int]:
    """The tokens of one answer as they come, without the one that ends it."""
    cache, ids = None, sampler.encode(prompt)
    for _ in range(sampler.longest):
        inputs = torch.tensor([ids], device=sampler.generator.device)
        out = sampler.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(choose(out.logits[:, -1].float(), temperature, sampler.generator))
        if token in sampler.eos_ids:
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
    generator = torch.Generator(model.device).manual_seed(args.seed)
    sampler = Sampler(model, tokenizer, "", args.max_new_tokens, generator, bf16=False)
    said: list[Message] = []
    for text in [args.prompt] if args.prompt is not None else typed():
        said.append({"role": "user", "content": text})
        answer = say(tokenizer, stream(sampler, text if args.raw else said, args.temperature))
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
    model = load_model(run, "RUN", num_labels=int(is_reward_model(run)))
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
