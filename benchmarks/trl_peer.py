"""TRL's trainers with rl_lab's hyper-parameters; a line "SPS: ..." after every gradient step.

    trl_peer.py dpo|grpo MODEL FILE STEPS float32|bf16

FILE has pairs, or prompts, in the order in which they are learned from. Runs in TRL's own environment, so that nothing
of rl_lab is imported here. Activations are kept, which is faster than TRL's default to compute them again.
"""

from __future__ import annotations

import re
import sys
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl


class Marks(transformers.TrainerCallback):
    """A line after each step."""

    def on_step_end(self, *_: Any, **__: Any) -> None:
        print("SPS: 0", flush=True)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 where the larger of a line's two numbers is written."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        numbers = re.findall(r"\d+", prompt.rpartition("\n")[2])
        found.append(float(text.partition("\n")[0].strip() == max(numbers, key=int)))
    return found


def main() -> None:
    method, name, path, steps, precision = sys.argv[1:]
    torch.set_num_threads(1)
    both = {
        "output_dir": tempfile.mkdtemp(), "max_steps": int(steps), "use_cpu": True, "bf16": precision == "bf16",
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "logging_steps": 1, "warmup_steps": 0,
    }  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    data = datasets.load_dataset("json", data_files=path, split="train")
    given = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [Marks()]}
    if method == "dpo":
        config = trl.DPOConfig(
            per_device_train_batch_size=4, beta=0.1, learning_rate=5e-6, train_sampling_strategy="sequential", **both
        )
        trainer = trl.DPOTrainer(model, args=config, **given)
    else:
        config = trl.GRPOConfig(
            per_device_train_batch_size=48, num_generations=8, max_completion_length=4, temperature=1.0, beta=0.0,
            loss_type="grpo", learning_rate=1e-5, shuffle_dataset=False, **both,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(model, reward_funcs=reward, args=config, **given)
    trainer.train()


if __name__ == "__main__":
    main()
