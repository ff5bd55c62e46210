"""Optimizer steps as pure functions of dicts of tensors, equal to torch.optim's and torch.nn.utils' arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rl_lab.networks import Params

AdamState = dict[str, Any]  # first, second: moments by parameter name; step: () steps taken


def init_adam(params: Params) -> AdamState:
    """Moments at zero. The step count is float64: float32 powers of 0.999 would be too coarse."""
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    step = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
    return {"first": zeros, "second": dict(zeros), "step": step}


def fast_bf16() -> bool:
    """Whether matrices are multiplied faster in bfloat16 than in float32 here; where it is emulated, far slower.

    Of processors those with AMX, and AMD's with AVX-512 BF16, twice as fast; Intel's takes twice float32's time.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    intel = str(found.get("cpu_name", "")).startswith("Intel")
    return bool(found.get("amx_bf16", False) or (found.get("avx512_bf16", False) and not intel))


def in_bf16(params: Params, name: str, enabled: bool) -> Params:
    """The parameters under `name` in bfloat16, which their layers then compute in; gradients and Adam stay float32."""
    return {key: p.bfloat16() if enabled and key.startswith(f"{name}.") else p for key, p in params.items()}


def clip_gradients(grads: Params, max_norm: float) -> tuple[Params, Tensor]:
    """Scale all gradients so that their joint Euclidean norm is at most `max_norm`; also returns the norm before."""
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return {name: g * scale for name, g in grads.items()}, norm


def computed_once(x: Tensor) -> Tensor:
    """The () tensor x, stored before it is used.

    Inductor would compute it anew for every 16 elements of what it scales: Adam's powers took four fifths of its time.
    """
    return x.as_strided((), ())


def adam(
    params: Params,
    grads: Params,
    state: AdamState,
    learning_rate: Tensor | float,
    eps: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[Params, AdamState]:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), epsilon outside the corrected root as in torch.optim.Adam.

    Args:
        learning_rate: a () tensor where it is annealed, which then does not compile anew.
    """
    beta1, beta2 = betas
    step = state["step"] + 1
    step_size = computed_once((learning_rate / (1 - beta1**step)).float())
    correction = computed_once((1 - beta2**step).sqrt().float())
    first = {name: m + (1 - beta1) * (grads[name] - m) for name, m in state["first"].items()}
    second = {name: beta2 * v + (1 - beta2) * grads[name].square() for name, v in state["second"].items()}
    new = {name: p - step_size * first[name] / (second[name].sqrt() / correction + eps) for name, p in params.items()}
    return new, {"first": first, "second": second, "step": step}
