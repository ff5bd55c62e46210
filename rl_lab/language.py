"""Causal language models: loading and saving, tokens, and log-probabilities of completions.

Models and tokenizers are those of Hugging Face's transformers; no code from a model's repository is run. A prompt with
its completions is a `Tree`: the prompt is computed once for all of them. Several trees make one row of tokens, each
token seeing its own branch and the prompt before it, at the positions it has there: nothing is padded, what all prompts
begin with is computed once, and logits only where a completion's token is predicted.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from rl_lab import require
from rl_lab.compiler import cache_folder

Tokens = list[int]
Message = dict[str, str]  # role, content
Prompt = str | list[Message]

KEPT = ("smollm2-135m",)  # names that `python -m rl_lab.models` makes


class Tree(NamedTuple):
    """A prompt and its completions as tokens; a completion ends with what ends it, if it ended."""

    prompt: Tokens
    branches: tuple[Tokens, ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.branches))


class Packed(NamedTuple):
    """Trees in one row of L tokens, K of which are scored, in the order of trees, branches and tokens.

    Attributes:
        inputs: what the model takes: input_ids, position_ids (1, L), attention_mask (1, 1, L, L) bool; and
            logits_to_keep (K,), the places whose logits predict the scored tokens.
        targets: (K,) the scored tokens.
        branch: (K,) which branch each belongs to, counted over all trees.
        ends: (branches,) place of each branch's last token.
    """

    inputs: dict[str, Tensor]
    targets: Tensor
    branch: Tensor
    ends: Tensor

    def sums(self, x: Tensor) -> Tensor:
        """(K,) numbers of tokens summed over each branch: (branches,)."""
        return torch.zeros(len(self.ends), dtype=x.dtype, device=x.device).index_add(0, self.branch, x)

    @property
    def lengths(self) -> Tensor:
        """(branches,) float32 numbers of scored tokens."""
        return torch.bincount(self.branch, minlength=len(self.ends)).float()


def models_folder() -> Path:
    """Where `python -m rl_lab.models` keeps what it made."""
    return cache_folder() / "models"


def locate(name: str, flag: str = "--model") -> str:
    """What transformers loads for a name: a folder, a run's model, one made by `rl_lab.models`, else an id of the hub.

    Raises:
        ValueError: if the name is one of `KEPT` and not made yet, or a folder without a model.
    """
    if (run := Path(name) / "model").is_dir():
        return str(run.resolve())  # absolute, as an adapter remembers it
    if Path(name).is_dir():
        known = any((Path(name) / file).is_file() for file in ("config.json", "adapter_config.json"))
        if not known or (Path(name) / "episodes.csv.gz").is_file():
            raise ValueError(f"{flag} {name}: a folder without a model; an unfinished run has none yet")
        return str(Path(name).resolve())
    if name in KEPT:
        folder = models_folder() / name
        if not folder.is_dir():
            raise ValueError(f"{flag} {name}: not in {folder} yet; `python -m rl_lab.models {name}` puts it there")
        return str(folder)
    return name


def load_model(name: str, flag: str = "--model", num_labels: int = 0, seed: int = 0) -> Any:
    """A model in float32, in eval mode, which leaves dropout out; a run's adapter is merged into its weights.

    Args:
        name: as `locate` takes it.
        num_labels: 0 for a causal language model, else one with a linear head of so many outputs on its last layer.
        seed: of the head's weights where the model has no such head yet: N(0, 1 / (d + 1)^2), d its inputs, so small
            that its outputs hardly differ.
    Raises:
        ValueError: if there is none, or no safetensors file of it, or one without all weights or with one that is not
            finite, or it is a reward model and no labels are asked for.
    """
    transformers = require("transformers", "preference")
    path = locate(name, flag)
    if not num_labels and is_reward_model(name, flag):
        raise ValueError(f"{flag} {name}: a reward model, which scores answers and gives none")
    if (Path(path) / "adapter_config.json").is_file():
        if not (Path(path) / "adapter_model.safetensors").is_file():  # peft would unpickle adapter_model.bin
            raise ValueError(f"{flag} {name}: an adapter without adapter_model.safetensors, which alone is read")
        peft = require("peft", "preference")
        config = peft.PeftConfig.from_pretrained(path)
        config.task_type = None  # a causal model's adapter fits a reward model too
        base = load_model(config.base_model_name_or_path, flag, num_labels, seed)
        model = peft.PeftModel.from_pretrained(base, path, config=config).merge_and_unload()
        model.name_or_path = path  # what a further adapter says it is for
        return model.requires_grad_(True).eval()  # peft froze it
    kind = transformers.AutoModelForSequenceClassification if num_labels else transformers.AutoModelForCausalLM
    labels = {"num_labels": num_labels} if num_labels else {}
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it would report the head's weights, which are looked after here
    try:
        model, report = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **labels
        )
    except (OSError, ValueError) as error:
        raise _unavailable(name, flag, error) from None
    if "score.weight" in report["missing_keys"]:
        head = model.score.weight.data
        head.normal_(0, 1 / (head.shape[1] + 1), generator=torch.Generator().manual_seed(seed))
    if missing := sorted(set(report["missing_keys"]) - {"score.weight"}):
        raise ValueError(f"{flag} {name}: its files lack {', '.join(missing[:3])}{' ...' if missing[3:] else ''}")
    if bad := [key for key, p in model.named_parameters() if not p.isfinite().all()]:
        raise ValueError(f"{flag} {name}: {bad[0]} has numbers that are not finite")
    _require_trees(model.eval(), f"{flag} {name}")
    return model


def longest_text(model: Any, packed: bool = True) -> float:
    """Tokens of a text at most: as many as there are positions; packed, also as a window of the attention spans.

    `pack` gives every layer one mask, which sees all that comes before.
    """
    config = model.config.get_text_config()
    names = ["max_position_embeddings", *["sliding_window", "attention_chunk_size"] * packed]
    return min((x for name in names if (x := getattr(config, name, None))), default=math.inf)


def is_reward_model(name: str, flag: str = "--model") -> bool:
    """Whether the head that was saved with a model, which must be there, gives scores; `load_model` loads either."""
    path = locate(name, flag)
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        return bool(json.loads(adapter.read_text()).get("task_type") == "SEQ_CLS")
    try:
        config = require("transformers", "preference").AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(name, flag, error) from None
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


@torch.no_grad()
def _require_trees(model: Any, name: str) -> None:
    """Raise a ValueError if branches packed in a row are not to the model what they are alone.

    It must go by the mask and the positions that it is given; a model whose attention counts places does not.
    """
    trees = [Tree([1, 2, 3], ([4, 5], [6, 7, 8])), Tree([1, 2, 9], ([10], [4, 11]))]
    packed, rows = pack(trees), [torch.tensor([tree.prompt + tokens]) for tree in trees for tokens in tree.branches]
    alone = torch.stack([model.base_model(row).last_hidden_state[0, -1] for row in rows])
    try:
        fits = bool((_hidden(model, packed)[packed.ends] - alone).abs().max() < 1e-3 * alone.abs().max())
    except (TypeError, ValueError, RuntimeError):  # it takes no such mask, or no positions
        fits = False
    if not fits:
        why = "its attention goes by places in the row, not by the mask and positions given"
        raise ValueError(f"{name}: {type(model).__name__} cannot be trained here: {why}; Llama, Qwen and others can")


def load_tokenizer(name: str, flag: str = "--model") -> Any:
    """A model's tokenizer. ValueError if there is none, or if it has no token that ends a text."""
    transformers = require("transformers", "preference")
    path = locate(name, flag)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unavailable(name, flag, error) from None
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{flag} {name}: its tokenizer has no EOS token, so no completion could end; set one in it")
    return tokenizer


def _unavailable(name: str, flag: str, error: Exception) -> ValueError:
    first = str(error).strip().partition("\n")[0]
    return ValueError(
        f"{flag} {name}: neither a folder with a model nor to be had from the Hugging Face hub ({first}); "
        f"a local folder with config.json and model.safetensors works, and so does {' or '.join(KEPT)}"
    )


def save_model(folder: Path, model: Any, tokenizer: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Write what `from_pretrained` loads, an adapter alone where there is one; the folder is whole or not there.

    Args:
        weights: by name, if they are not those in the model.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary, state_dict=weights)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def add_lora(model: Any, rank: int, seed: int) -> Any:
    """The model with adapters of low rank on every linear layer but the head [Hu et al. 2022, arXiv:2106.09685].

    Their scale is alpha / rank with alpha = 2 * rank. B is zero, so the model is at first what it was.
    """
    peft = require("peft", "preference")
    head = "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=head)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config).eval()


def encode_prompt(tokenizer: Any, prompt: Prompt) -> Tokens:
    """A prompt's tokens: messages by the tokenizer's chat template, text with what the tokenizer puts before a text."""
    if isinstance(prompt, str):
        ids: Tokens = tokenizer(prompt)["input_ids"]
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        return ids or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    if not tokenizer.chat_template:
        raise ValueError("--model: its tokenizer has no chat template, which messages need; plain prompts work")
    try:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the prompt {str(prompt)!r:.80}: {error}") from None
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them already
    return ids


def encode_completion(tokenizer: Any, text: str) -> Tokens:
    """A completion's tokens, with the one that ends it. They are the prompt's continuation whatever the prompt is."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def common_prefix(prompts: Sequence[Tokens]) -> int:
    """How many tokens all prompts begin with, such as a system message or worked examples."""
    first, last = min(prompts), max(prompts)  # in the order of words, all others lie between
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))


def pack(trees: Sequence[Tree], device: torch.device | str = "cpu") -> Packed:
    """Trees in one row, behind what all their prompts begin with. Prompts and branches have at least one token each."""
    shared = common_prefix([tree.prompt for tree in trees])
    ids = trees[0].prompt[:shared]
    positions = list(range(shared))
    tree, segment = [-1] * shared, [-1] * shared  # the tree, -1 in what they share; the branch, -1 in a prompt
    places: list[int] = []
    targets: Tokens = []
    branch: list[int] = []
    ends: list[int] = []
    for number, (prompt, branches) in enumerate(trees):
        ids += prompt[shared:]
        positions += range(shared, len(prompt))
        segment += [-1] * (len(prompt) - shared)
        last = len(ids) - 1 if len(prompt) > shared else shared - 1
        for tokens in branches:
            first = len(ids)
            places += [last, *range(first, first + len(tokens) - 1)]
            targets += tokens
            branch += [len(ends)] * len(tokens)
            segment += [len(ends)] * len(tokens)
            ids += tokens
            positions += range(len(prompt), len(prompt) + len(tokens))
            ends.append(len(ids) - 1)
        tree += [number] * (len(ids) - len(tree))
    row, kind, part = (torch.tensor(x, device=device) for x in (range(len(ids)), tree, segment))
    below = (kind[:, None] == kind) & ((part == -1) | (part[:, None] == part))
    mask = (row[:, None] >= row) & ((kind == -1) | below)
    inputs = {
        "input_ids": torch.tensor([ids], device=device),
        "position_ids": torch.tensor([positions], device=device),
        "attention_mask": mask[None, None],
        "logits_to_keep": torch.tensor(places, device=device),
    }
    scored, counted, last_places = (torch.tensor(x, device=device) for x in (targets, branch, ends))
    return Packed(inputs, scored, counted, last_places)


def micro_batches(trees: Sequence[Tree], most: int) -> list[list[int]]:
    """Indices of trees, in their order, in groups of at most `most` tokens, or of one tree that is longer."""
    groups: list[list[int]] = []
    room = 0
    for index, tree in enumerate(trees):
        if not groups or len(tree) > room:
            groups.append([])
            room = most
        groups[-1].append(index)
        room -= len(tree)
    return groups


def _inputs(model: Any, packed: Packed) -> dict[str, Any]:
    """What the model takes; attention written out in Python adds the mask, where PyTorch's own selects by it."""
    inputs: dict[str, Any] = {**packed.inputs, "use_cache": False}
    if model.config._attn_implementation == "eager":
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)
    return inputs


def _hidden(model: Any, packed: Packed) -> Tensor:
    """(L, D) outputs of the last layer."""
    inputs = {name: x for name, x in _inputs(model, packed).items() if name != "logits_to_keep"}
    return model.base_model(**inputs).last_hidden_state[0]  # type: ignore[no-any-return]


def logits(model: Any, packed: Packed) -> Tensor:
    """(K, V) float32 logits that predict the scored tokens."""
    return model(**_inputs(model, packed)).logits[0].float()  # type: ignore[no-any-return]


def token_logprobs(model: Any, packed: Packed, temperature: float = 1.0, bf16: bool = False) -> Tensor:
    """(K,) float32 log-probabilities of the scored tokens at the temperature that they are sampled at."""
    with autocast(packed.targets.device, bf16):
        scores = logits(model, packed) / temperature
    return scores.gather(1, packed.targets[:, None]).squeeze(1) - scores.logsumexp(1)


def rewards(model: Any, packed: Packed, places: Tensor | None = None) -> Tensor:
    """(branches,) float32 rewards: a reward model's output at each branch's last token; or (R,) at `places`."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters stay in
    hidden = _hidden(model, packed)
    with torch.autocast(hidden.device.type, enabled=False):  # rewards of 8 bits would be tied
        read: Tensor = model.score(hidden[packed.ends if places is None else places].float())
    return read.squeeze(1)


@torch.no_grad()
def score(model: Any, trees: Sequence[Tree], micro_tokens: int = 1024) -> list[list[float]]:
    """The rewards of each tree's branches, which end with EOS (`encode_completion`) as those that it was trained on."""
    found: list[list[float]] = []
    for group in micro_batches(trees, micro_tokens):
        values = iter(rewards(model, pack([trees[i] for i in group], model.device)).tolist())
        found += [[next(values) for _ in trees[i].branches] for i in group]
    return found


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16, weights and sums in float32; or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
