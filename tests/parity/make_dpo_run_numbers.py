"""Writes dpo_run_numbers.json: the losses of fifty steps of TRL's DPOTrainer, and the margins it logs.

    python3.11 -m venv peers
    peers/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    peers/bin/python tests/parity/make_dpo_run_numbers.py

Model and pairs are made here, from numpy's legacy generator, whose numbers do not change; the test makes them likewise.
"""

from __future__ import annotations

import json
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
STEPS, BATCH = 50, 4
SETTINGS = {"beta": 0.1, "learning_rate": 1e-3, "max_grad_norm": 1.0, "weight_decay": 0.0}


def pairs() -> list[dict[str, str]]:
    """STEPS * BATCH pairs of random letters, of different lengths; some answers are empty."""
    random = np.random.RandomState(0)
    letters = list(string.ascii_lowercase + " ")

    def text(low: int, high: int) -> str:
        return "".join(random.choice(letters, random.randint(low, high)))

    rows = [{"prompt": text(3, 20), "chosen": text(0, 16), "rejected": text(0, 16)} for _ in range(STEPS * BATCH)]
    return [row | {"prompt": f"{i}:{row['prompt']}"} for i, row in enumerate(rows)]


def write_model(folder: Path) -> None:
    """A Llama of three layers and width 64 with random weights; its tokens are bytes, and padding is EOS."""
    import tokenizers
    import torch
    import transformers

    special = ["<|begin|>", "<|end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(special + alphabet)}, []))
    tokens.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = tokenizers.decoders.ByteLevel()
    ends = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, **ends)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **ids))
    random = np.random.RandomState(1)
    for name, p in sorted(model.named_parameters()):
        if p.ndim > 1:  # norms begin at 1
            p.data.copy_(torch.tensor(random.normal(0, 0.1, tuple(p.shape)), dtype=torch.float32))
        assert "bias" not in name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def trained(folder: Path) -> list[dict[str, float]]:
    """What TRL logs of each step."""
    import datasets
    import transformers
    import trl

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = trl.DPOConfig(
        output_dir=str(folder / "runs"), max_steps=STEPS, per_device_train_batch_size=BATCH, **SETTINGS,
        lr_scheduler_type="linear", warmup_steps=0, optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.999,
        adam_epsilon=1e-8, train_sampling_strategy="sequential", max_length=None, bf16=False, use_cpu=True,
        gradient_checkpointing=False, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_list(pairs())
    trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def main() -> None:
    import torch
    import transformers
    import trl

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name))
        rows = trained(Path(name))
    found: dict[str, Any] = {"settings": SETTINGS, "losses": [row["loss"] for row in rows]}
    for name in ("rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "learning_rate"):
        found[name] = [row[name] for row in rows]
    found["versions"] = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "dpo_run_numbers.json").write_text(json.dumps(found) + "\n")
    print(rows[0], rows[-1], file=sys.stderr)


if __name__ == "__main__":
    main()
