"""Measure what optimizing a learned reward does to the reward that it stands for [Gao et al. 2023, arXiv:2210.10760].

    gold     log-odds of a sentence being positive, by naive Bayes on sentences that people judged: what is meant
    proxy    a reward model of pairs of completions that gold compared: what is optimized, by best-of-n and by GRPO

python -m rl_lab.overoptimization pairs FOLDER --model M     prompts.jsonl, and pairs.jsonl to train a proxy on
python -m rl_lab.overoptimization best-of-n FOLDER --model M --proxy RUN        best_of_n.json: both scores of samples
python -m rl_lab.overoptimization report FOLDER --proxy RUN --policy RUN        report.json and overoptimization.png

`runs/overoptimization.sh` does all of it, docs/overoptimization.md says what came out. POLARITY, in the environment, is
the folder with Pang and Lee's sentences, rt-polarity.pos and rt-polarity.neg [2005, arXiv:cs/0506075].
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from rl_lab.best_of_n import expected_best, kl_bound
from rl_lab.checkpoint import replace_file
from rl_lab.curves.plot import png
from rl_lab.curves.store import read_scalars
from rl_lab.generate import open_language_model
from rl_lab.generation import Sampler
from rl_lab.language import Prompt
from rl_lab.log import provenance
from rl_lab.optim import fast_bf16
from rl_lab.preference_data import place, read, write_lines
from rl_lab.preference_metrics import share
from rl_lab.reward_models import RewardModel
from rl_lab.verify import pair_of

WORDS = 4  # of a sentence, which are a prompt
NEW_TOKENS = 16
PROMPTS, SAMPLES = 100, 16  # of best-of-n
BATCH = 32  # prompts completed side by side

Floats = NDArray[np.float64]


class NaiveBayes:
    """Multinomial, of words and word pairs that are there, counts smoothed by 1 [Wang and Manning 2012, section 2.1].

    Args:
        positive, negative: sentences.
    """

    def __init__(self, positive: Sequence[str], negative: Sequence[str]) -> None:
        counts = [Counter(x for text in texts for x in features(text)) for texts in (positive, negative)]
        known = sorted(counts[0].keys() | counts[1].keys())
        p, q = (np.array([1.0 + c[x] for x in known]) for c in counts)
        self.weights = dict(zip(known, np.log((p / p.sum()) / (q / q.sum())).tolist(), strict=True))
        self.bias = math.log(len(positive) / len(negative))

    def __call__(self, text: str) -> float:
        """The log-odds of the text being positive."""
        return self.bias + math.fsum(self.weights.get(x, 0.0) for x in features(text))


def features(text: str) -> set[str]:
    """A text's words and pairs of words, in small letters."""
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())
    return {*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))}


def sentences() -> tuple[list[str], list[str]]:
    """The positive and the negative sentences. ValueError if they are not where POLARITY says."""
    folder = os.environ.get("POLARITY", "")
    try:
        if not folder:
            raise OSError("it is not set")
        found = [Path(folder, f"rt-polarity.{x}").read_text(encoding="utf-8").splitlines() for x in ("pos", "neg")]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"POLARITY: {error}; it names the folder of rt-polarity.pos and rt-polarity.neg") from None
    return found[0], found[1]


def held_out(text: str) -> bool:
    """Whether a sentence is one of the tenth that gold does not learn from."""
    return place(text) >= 0.9


@functools.cache
def classifier() -> NaiveBayes:
    """Gold's, of nine tenths of the sentences."""
    positive, negative = ([x for x in texts if not held_out(x)] for texts in sentences())
    return NaiveBayes(positive, negative)


def gold(prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
    """The gold reward of each completion, its prompt left out; `grpo --reward rl_lab.overoptimization:gold`."""
    return [classifier()(text) for text in completions]


def beginnings() -> list[str]:
    """The distinct first words of the sentences that gold has not seen, in an order that means nothing."""
    texts = sorted({" ".join(x.split()[:WORDS]) for texts in sentences() for x in texts if held_out(x)})
    random.Random(0).shuffle(texts)
    return texts


def completed(name: str, prompts: Sequence[Prompt], each: int, seed: int) -> list[list[str]]:
    """`each` sampled completions of every prompt."""
    model, tokenizer = open_language_model(name, "--model")
    generator = torch.Generator(model.device).manual_seed(seed)
    sample = Sampler(model, tokenizer, "", NEW_TOKENS, generator, fast_bf16())
    batches = [list(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH)]
    texts = [text for batch in batches for text in sample(batch, each, 1.0)[1]]
    return [texts[i : i + each] for i in range(0, len(texts), each)]


def pairs(folder: tyro.conf.Positional[Path], model: str, number: int = 600, seed: int = 1) -> None:
    """Write prompts.jsonl, and pairs.jsonl: of four completions of each of other prompts gold's best and worst.

    Args:
        folder: where to.
        model: that completes; as `rl_lab.grpo --model`.
        number: of pairs at most; fewer if gold finds all four equal.
        seed: of the sampling.
    """
    texts = sentences()
    right = [(classifier()(x) > 0) == good for good, side in zip((True, False), texts, strict=True) for x in side]
    unseen = [held_out(x) for side in texts for x in side]
    told = share([x for x, out in zip(right, unseen, strict=True) if out])
    print("gold is right on {0} sentences in {mean:.3f} [{low:.3f}, {high:.3f}]".format(sum(unseen), **told))
    folder.mkdir(parents=True, exist_ok=True)
    every = beginnings()
    replace_file(folder / "gold.json", json.dumps({"sentences": sum(unseen), "accuracy": told}, indent=1).encode())
    write_lines(folder / "prompts.jsonl", [{"prompt": x} for x in every[:PROMPTS]])
    asked, rows = every[PROMPTS : PROMPTS + number], []
    for prompt, answers in zip(asked, completed(model, asked, 4, seed), strict=True):
        if pair := pair_of(answers, gold([prompt] * 4, answers)):
            rows.append({"prompt": prompt, "chosen": pair[0], "rejected": pair[1]})
    write_lines(folder / "pairs.jsonl", rows)
    print(f"{folder}: {PROMPTS} prompts and {len(rows)} pairs")


def best_of_n(folder: tyro.conf.Positional[Path], model: str, proxy: str, seed: int = 2) -> None:
    """Write best_of_n.json: proxy's and gold's scores of completions of prompts.jsonl.

    Args:
        folder: with prompts.jsonl.
        model: that completes.
        proxy: run folder of the reward model.
        seed: of the sampling.
    """
    prompts = [x.prompt for x in read(str(folder / "prompts.jsonl"), "prompts", "FOLDER")[0]]
    judge = RewardModel(proxy, "--proxy", "cuda" if torch.cuda.is_available() else "cpu")
    answers = completed(model, prompts, SAMPLES, seed)
    asked, texts = [x for x in prompts for _ in range(SAMPLES)], [x for row in answers for x in row]
    found = {"proxy": judge(asked, texts), "gold": gold(asked, texts)}
    tables = {name: np.array(x).reshape(-1, SAMPLES).tolist() for name, x in found.items()}
    replace_file(folder / "best_of_n.json", json.dumps(tables).encode())
    print(f"{folder / 'best_of_n.json'}: {len(prompts)} prompts, {SAMPLES} completions each")


# f(d) of R(d) = d (alpha - beta f(d))                                                              [Gao et al. 2023]
FORMS: dict[str, Callable[[Floats], Floats]] = {"best-of-n": lambda d: d, "GRPO": np.log}


def fit(d: Floats, gain: Floats, method: str) -> dict[str, float | None]:
    """alpha and beta of Gao et al.'s form by least squares, and where it has its peak.

    Args:
        d: (N,) square roots of the KL from the model at the start, in nats.
        gain: (N,) rewards less the reward at d = 0, in whatever unit.
        method: of `FORMS`.
    Returns:
        alpha, beta; rms, the residuals' root mean square; and peak, the d of the largest reward, None where the form
        never falls: alpha / (2 beta), or exp(alpha / beta - 1).
    """
    d, gain = d[d > 0], gain[d > 0]
    columns = np.stack([d, -d * FORMS[method](d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    peak = None
    if beta > 0:
        peak = float(max(alpha, 0.0) / (2 * beta) if method == "best-of-n" else np.exp(min(alpha / beta - 1, 700.0)))
    rms = float(np.sqrt(np.mean((columns @ [alpha, beta] - gain) ** 2)))
    return {"alpha": float(alpha), "beta": float(beta), "rms": rms, "peak": peak}


def curves(folder: Path, proxy: str, policy: Path) -> dict[str, dict[str, list[float]]]:
    """Of both methods: d, and by how much proxy and gold exceed what they are at the start, in standard deviations of
    the scores there."""
    table = {name: np.array(x) for name, x in json.loads((folder / "best_of_n.json").read_text()).items()}
    best = {name: expected_best(table["proxy"], table[name]) for name in ("proxy", "gold")}

    def gains(name: str, scores: ArrayLike) -> list[float]:
        found: list[float] = ((np.asarray(scores) - table[name].mean()) / table[name].std()).tolist()
        return found

    tags = {"proxy": f"charts/reward/{Path(proxy).name}", "gold": "charts/reward/rl_lab.overoptimization:gold"}
    logged = read_scalars(policy, (*tags.values(), "losses/kl", "charts/length"))
    kl = np.array(logged["losses/kl"]) * logged["charts/length"]  # of a completion, not of a token
    return {
        "best-of-n": {
            "d": [math.sqrt(kl_bound(n)) for n in best["gold"]],
            **{name: gains(name, list(x.values())) for name, x in best.items()},
        },
        "GRPO": {
            "d": np.sqrt(kl.clip(min=0)).tolist(),
            **{name: gains(name, logged[tag]) for name, tag in tags.items()},
        },
    }


def draw(found: dict[str, dict[str, list[float]]], fits: dict[str, dict[str, dict[str, Any]]]) -> bytes:
    """Both methods' rewards over the distance, with the fitted forms, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (method, x) in zip(figure.subplots(1, 2), found.items(), strict=True):
        for name, colour in (("proxy", "#e08214"), ("gold", "#2f7de1")):
            d = np.linspace(1e-3, max(x["d"]), 200)
            form = fits[method][name]
            axes.plot(x["d"], x[name], "o", markersize=3, color=colour, label=name)
            axes.plot(d, d * (form["alpha"] - form["beta"] * FORMS[method](d)), color=colour, linewidth=1)
        axes.set(
            title=method,
            xlabel="square root of the KL from the start (KL in nats)",
            ylabel="gain, standard deviations at the start",
        )
        axes.axhline(0, color="0.7", linewidth=0.6)
        axes.legend(frameon=False)
    return png(figure)


def report(folder: tyro.conf.Positional[Path], proxy: str, policy: Path) -> None:
    """Write report.json and overoptimization.png: both rewards over the distance, and Gao et al.'s forms.

    Args:
        folder: with best_of_n.json.
        proxy: run folder of the reward model.
        policy: run folder of grpo, with the rewards proxy and rl_lab.overoptimization:gold, and --beta above 0.
    """
    found = curves(folder, proxy, policy)
    fits = {
        method: {name: fit(np.array(x["d"]), np.array(x[name]), method) for name in ("proxy", "gold")}
        for method, x in found.items()
    }
    print(f"{'':12}{'reward':8}{'alpha':>9}{'beta':>9}{'rms':>9}{'peak at d':>11}{'largest d':>11}")
    for method, forms in fits.items():
        for name, x in forms.items():
            numbers = "".join(f"{x[key]:9.3f}" for key in ("alpha", "beta", "rms"))
            peak = "none" if x["peak"] is None else f"{x['peak']:.3g}"
            print(f"{method:12}{name:8}{numbers}{peak:>11}{max(found[method]['d']):11.3g}")
    about = {"gold": json.loads((folder / "gold.json").read_text())}
    for name, run in (("proxy", Path(proxy)), ("policy", policy)):
        config = json.loads((run / "config.json").read_text())
        about[name] = {key: config[key] for key in ("command", "git_commit")}
        about[name] |= {"evaluation": json.loads((run / "evaluation.json").read_text())}
    whole = {"curves": found, "fits": fits, **about, **provenance()}
    replace_file(folder / "report.json", json.dumps(whole, indent=1).encode())
    replace_file(folder / "overoptimization.png", draw(found, fits))
    print(f"{folder / 'report.json'}, {folder / 'overoptimization.png'}")


def main() -> None:
    """The commands; every expected fault ends in one line."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"pairs": pairs, "best-of-n": best_of_n, "report": report},
            prog="python -m rl_lab.overoptimization",
            description=__doc__,
        )
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
