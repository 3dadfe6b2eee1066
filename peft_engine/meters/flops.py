"""Floating-point operations of a step by torch's own counter, and how many this machine does in a second."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]
GEMM = {"cpu": 1024, "cuda": 8192, "mps": 2048}  # side of the square matrices


def count_flops(step: Callable[[], object]) -> int:
    """Operations of the matrix products, convolutions and attentions that `step` runs, a multiply-add as two.

    Element-wise work is not counted, recomputation is: what the machine does, not what the model needs. Nor are
    low-rank products that the compiled passes round int8 ones make on the way.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter:
        step()
    return int(counter.get_total_flops())


def _formulas() -> dict[Any, Any]:
    """What torch's table lacks: products added in place or of int8, attention on CPUs, the fused kernels on CUDA."""
    import peft_kernels._frozen_ops
    import peft_kernels._lora_ops  # noqa: F401 (both register their operators)

    aten, ours = torch.ops.aten, torch.ops.peft_kernels
    return {
        aten.addmm_: _addmm,
        aten._int_mm: _mm,
        aten.baddbmm_: _baddbmm,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        ours.lora_down: _down,
        ours.lora_ds_db: _ds_db,
        ours.lora_da: _da,
        ours.lora_add_dx: _add_dx,
        ours.frozen_product: _frozen,
        ours.frozen_product_back: _frozen_back,
    }


def _mm(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _addmm(into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _baddbmm(into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _down(x: Shape, a: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * a[0]


def _ds_db(dy: Shape, b: Shape, *_: Any, **__: Any) -> int:
    return 4 * dy[0] * dy[1] * b[1]


def _da(d_low: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * d_low[0] * d_low[1] * x[1]


def _add_dx(dx: Shape, d_low: Shape, *_: Any, **__: Any) -> int:
    return 2 * d_low[0] * d_low[1] * dx[1]


def _frozen(codes: Shape, row_scale: Shape, w: Shape, scale: Shape, bias: Any, low: Any, *_: Any, **__: Any) -> int:
    return 2 * codes[0] * w[0] * (codes[1] + (low[1] if low else 0))


def _frozen_back(codes: Shape, row_scale: Shape, w: Shape, factor: Any, d_low: Any, *_: Any, **__: Any) -> int:
    return 2 * codes[0] * w[1] * (codes[1] + (d_low[1] if d_low else 0))


def gemm_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> dict[str, Any]:
    """Measure the fastest of several products of square matrices.

    Returns:
        {"flops_per_second", "side", "dtype", "threads"}.
    """
    side = GEMM[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        _wait(device)
        start = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return {
        "flops_per_second": 2 * side**3 / best,
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
