"""What all tests share: one torch thread, one cache of compiled code, the optional reference data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for subprocesses; this one has torch loaded already
    os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
    if config.option.markexpr != "cuda":  # else `--device auto` would take a GPU where numbers are compared bit for bit
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")  # compiled graphs check shapes and strides, here only
    # What a test compiles, the later ones load, and so does the next session (`pytest --cache-clear` starts anew).
    if config.pluginmanager.has_plugin("cacheprovider"):
        assert config.cache is not None
        os.environ.setdefault("RL_LAB_CACHE", str(config.cache.mkdir("compiled")))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and `pytest -m cuda`")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference data beside the repository."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs the reference data in {path}")
    return path


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model of 30,000 random parameters, whose tokens are bytes, and ChatML for messages."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("models") / "tiny"
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(special + alphabet)}, []))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, chat_template=TEMPLATE, **ends)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = transformers.LlamaConfig(**sizes, **heads, **ids, initializer_range=0.2, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
