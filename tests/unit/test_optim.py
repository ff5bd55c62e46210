"""Adam and gradient clipping against torch.optim.Adam and torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from rl_lab.optim import adam, clip_gradients, fast_bf16, init_adam

SHAPES = {"weight": (4, 3), "bias": (4,), "logstd": ()}


def random_tensors(generator: torch.Generator, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_ten_clipped_steps_equal_torch(eps: float) -> None:
    """Guards against a wrong bias correction, epsilon inside the root, moments exchanged, and a clip per tensor.

    The gradients' norms run from 0.03 to 30, so that some are clipped and some are not; the learning rate falls."""
    generator = torch.Generator().manual_seed(0)
    params = random_tensors(generator)
    peers = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer, state = torch.optim.Adam(peers.values(), eps=eps), init_adam(params)
    clipped = 0
    for t in range(10):
        grads = random_tensors(generator, scale=0.01 * 2**t)
        for name, peer in peers.items():
            peer.grad = grads[name].clone()
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - t / 10)
        peer_norm = torch.nn.utils.clip_grad_norm_(peers.values(), 0.5)
        optimizer.step()

        bounded, norm = clip_gradients(grads, 0.5)
        clipped += bool(norm > 0.5)
        torch.testing.assert_close(norm, peer_norm)
        for name, peer in peers.items():
            torch.testing.assert_close(bounded[name], peer.grad, rtol=1e-6, atol=1e-8)
        params, state = adam(params, bounded, state, torch.tensor(0.1 * (1 - t / 10)), eps)
        for name, peer in peers.items():
            torch.testing.assert_close(params[name], peer.detach(), rtol=1e-6, atol=1e-6)
    assert 0 < clipped < 10
    assert state["step"] == 10


def test_step_ten_thousand_equals_torch() -> None:
    """Guards against a bias correction that is lost to rounding late in a run."""
    params = {"weight": torch.tensor([1.0, -2.0])}
    peer = params["weight"].clone().requires_grad_()
    optimizer, state = torch.optim.Adam([peer], lr=1e-3), init_adam(params)
    state["step"] += 10_000
    peer.grad = torch.tensor([0.3, -0.001])
    moments = {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}
    optimizer.state[peer] = {"step": torch.tensor(10_000.0), **moments}
    optimizer.step()
    new, _ = adam(params, {"weight": peer.grad}, state, torch.tensor(1e-3), 1e-8)
    torch.testing.assert_close(new["weight"], peer.detach(), rtol=1e-7, atol=0)


def test_agents_side_by_side_are_clipped_apart() -> None:
    """Guards against one norm or one step count over all seeds."""
    generator = torch.Generator().manual_seed(1)
    agents = [random_tensors(generator) for _ in range(3)]
    grads = [random_tensors(generator, scale) for scale in (0.01, 1.0, 100.0)]

    def step(params: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
        bounded, _ = clip_gradients(grads, 0.5)
        return adam(params, bounded, init_adam(params), torch.tensor(0.1), 1e-5)[0]

    def stacked(trees: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([tree[name] for tree in trees]) for name in SHAPES}

    together = vmap(step)(stacked(agents), stacked(grads))
    for name, alone in stacked([step(p, g) for p, g in zip(agents, grads, strict=True)]).items():
        torch.testing.assert_close(together[name], alone)


def test_no_gradient_no_step() -> None:
    """Guards against a division of zero by zero where nothing is to be learned."""
    params = random_tensors(torch.Generator().manual_seed(2))
    bounded, norm = clip_gradients({name: torch.zeros_like(p) for name, p in params.items()}, 0.5)
    assert norm == 0
    new, _ = adam(params, bounded, init_adam(params), torch.tensor(0.1), 1e-5)
    assert all(torch.equal(new[name], p) for name, p in params.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processor's precision is asked where there is no GPU")
@pytest.mark.parametrize(
    ("found", "fast"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_is_chosen_only_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, object], fast: bool
) -> None:
    """Guards against a default that takes twice the time, as on Intel's processors whose matrix unit is hidden."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert fast_bf16() == fast
