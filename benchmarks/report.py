"""What every benchmark's report says of the machine, and how it is printed and kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LOAD = os.getloadavg()  # when the benchmark began


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, the load at the beginning and now, and the GPU that was computed on."""
    cpu = next(x.partition(": ")[2] for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x)
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"cpu": cpu, "cores": os.cpu_count(), **gpu, "load_before": LOAD, "load_after": os.getloadavg()}


def publish(
    report: dict[str, Any], tables: list[Table], notes: tuple[str, ...], save: Path | None, width: int | None
) -> None:
    """Print tables and these parts of the report; the report goes to `save` as JSON, what is printed beside it."""
    console = Console(width=width, record=True)
    console.print(*tables)
    for name in notes:
        console.print(f"{name}: {json.dumps(report[name]) if report[name] else 'left out'}")
    if save:
        save.write_text(json.dumps(report, indent=1) + "\n")
        save.with_suffix(".txt").write_text(console.export_text())
