"""Look for what fails silently in preference data, before a model is trained on them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from rl_lab.cli import flag
from rl_lab.language import load_tokenizer
from rl_lab.preference_checks import Finding, check
from rl_lab.preference_data import kind_of, read, select


@dataclass(frozen=True)
class Args:
    """Look for what fails silently in preference data; exit code 0 without errors, 1 with, 2 for bad flags."""

    data: tyro.conf.Positional[str]
    """.jsonl or .jsonl.gz file, or "name" or "name:split" of the Hugging Face hub: pairs, completions or prompts"""
    model: str
    """whose tokenizer and chat template: a folder, a run folder, smollm2-135m, or an id of the Hugging Face hub"""
    max_tokens: int = 512
    """of the longest example that training keeps, the prompt included"""
    train: tuple[float, float] = (0.0, 0.9)
    """part of the prompts that is trained on"""
    holdout: tuple[float, float] = (0.9, 1.0)
    """part of the prompts that is tested on"""
    json: Path | None = None
    """file for the same report as JSON"""

    def check(self) -> None:
        """Raise ValueError for flags out of their range."""
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens} must be at least 1")
        for name in ("train", "holdout"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(f"{flag(name)} {low:g} {high:g} must be two numbers in [0, 1], the first one smaller")


def report(args: Args) -> dict[str, Any]:
    """What there is in the data, and what the checks found. ValueError if data or tokenizer cannot be read."""
    kind = kind_of(args.data, "DATA")
    examples, left_out = read(args.data, kind, "DATA")
    tokenizer = load_tokenizer(args.model)
    parts = {
        name: {"from": part[0], "to": part[1], "examples": len(select(examples, part))}
        for name, part in (("train", args.train), ("holdout", args.holdout))
    }
    return {
        "data": args.data,
        "kind": kind,
        "model": args.model,
        "max_tokens": args.max_tokens,
        "examples": len(examples),
        **parts,
        "findings": check(examples, left_out, tokenizer, args.max_tokens, args.train, args.holdout),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """The report as text: a head, a line for each finding, and their numbers."""
    parts = ", ".join("{} {:g} to {:g}: {:,}".format(name, *found[name].values()) for name in ("train", "holdout"))
    head = f"{found['data']} for {found['model']}: {found['examples']:,} {found['kind']} ({parts})"
    levels = Counter(finding.level for finding in found["findings"])
    sums = (f"{levels[level]} {level}{'s' * (levels[level] != 1)}" for level in ("error", "warning", "note"))
    return [head, *map(line, found["findings"]), ", ".join(sums)]


def line(finding: Finding) -> str:
    """One finding in one line, with count, share and the first place where there are such."""
    start = f"{finding.level:8} {finding.check}"
    if finding.level == "ok" and not finding.numbers:
        return start if finding.total is None else f"{start}: none of {finding.total:,}"
    if finding.total is None:
        return f"{start}: {finding.text}"
    share = f"{finding.count:,} of {finding.total:,} ({finding.share:.1%})"
    first = f", first {finding.first}" if finding.first else ""
    return f"{start}: {share}{first}: {finding.text}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = tyro.cli(Args, prog="python -m rl_lab.doctor", args=argv)
    code = 2
    try:
        args.check()
        code = 1
        found = report(args)
        print(*lines(found), sep="\n")
        if args.json:
            findings = [asdict(finding) | {"share": finding.share} for finding in found["findings"]]
            args.json.write_text(json.dumps(found | {"findings": findings}, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return code
    return int(any(finding.level == "error" for finding in found["findings"]))


if __name__ == "__main__":
    sys.exit(main())
