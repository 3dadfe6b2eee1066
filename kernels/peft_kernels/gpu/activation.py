"""Triton kernels of `peft_kernels.activation`, and the activations themselves, which `gpu.glu` uses too.

Elementwise over rows × columns. Contiguous tensors are one long row; a tensor of evenly spaced rows keeps its stride.
Launched without FP fusion: the kernels are bound by memory, and a value made again in another kernel must have the
same bits.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x), both with all their digits: 1 - sigmoid(x) has none left where it is small."""
    small = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    return tl.where(x < 0.0, smaller, larger), tl.where(x < 0.0, larger, smaller)


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and act'(x), both fp32. ½(1 + tanh(u)) is sigmoid(2u): Triton's own tanh needs a GPU library."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * cdf, cdf + x * density
    elif KIND == "gelu_tanh":
        share, rest = _sigmoids(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * share, share + x * share * rest * inner
    elif KIND == "quick_gelu":
        share, rest = _sigmoids(1.702 * x)
        return x * share, share * (1.0 + 1.702 * x * rest)
    elif KIND == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    else:
        tl.static_assert(KIND == "silu")
        share, rest = _sigmoids(x)
        return x * share, share * (1.0 + x * rest)


@triton.jit
def tile_of(cols, BLOCK: tl.constexpr):
    """(row, first column, offsets, mask) of this program: int64 scalars, int32 inside the tile."""
    blocks = tl.cdiv(cols, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    return row, first, offs, offs < cols - first


@triton.jit
def _forward_kernel(x_ptr, y_ptr, cols, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, first, offs, mask = tile_of(cols, BLOCK)
    x = tl.load(x_ptr + (row * x_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    y, _ = value_and_slope(x, KIND)
    tl.store(y_ptr + (row * cols + first) + offs, y, mask=mask)


@triton.jit
def _backward_kernel(dy_ptr, x_ptr, dx_ptr, cols, dy_stride, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, first, offs, mask = tile_of(cols, BLOCK)
    dy = tl.load(dy_ptr + (row * dy_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (row * x_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    _, slope = value_and_slope(x, KIND)
    tl.store(dx_ptr + (row * cols + first) + offs, dy * slope, mask=mask)


def as_rows(*tensors: Tensor) -> tuple[int, int, list[Tensor]]:
    """(rows, cols, the tensors as (rows, cols) with unit stride along cols), copied only where rows lie unevenly."""
    flat = [t if t.is_contiguous() or t.stride(-1) == 1 else t.contiguous() for t in tensors]
    if not all(t.is_contiguous() for t in flat):
        flat = [t.reshape(-1, t.shape[-1]) for t in flat]  # a view where the leading dimensions are evenly spaced
    if all(t.is_contiguous() for t in flat):
        flat = [t.view(1, -1) for t in flat]
    rows, cols = flat[0].shape
    return rows, cols, flat


def grid_of(rows: int, cols: int) -> tuple[int]:
    return (rows * triton.cdiv(cols, BLOCK),)


def launch_forward(x: Tensor, kind: str) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, cols, (flat,) = as_rows(x)
        _forward_kernel[grid_of(rows, cols)](
            flat, y, cols, flat.stride(0), KIND=kind, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False
        )
    return y


def launch_backward(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        rows, cols, (dy, x) = as_rows(dy, x)
        _backward_kernel[grid_of(rows, cols)](
            dy, x, dx, cols, dy.stride(0), x.stride(0),
            KIND=kind, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return dx


def elementwise_case(kernel, dtype: str, tensors: str, strides: str, cols: str = "i32", **constants) -> Case:
    """A case of a kernel over rows × columns; `tensors` and `strides` name its arguments, separated by spaces."""
    pointers = dict.fromkeys(tensors.split(), f"*{dtype}")
    return Case(
        kernel=kernel,
        label=" ".join([dtype, cols, *(str(value) for value in constants.values())]),
        signature={**pointers, "cols": cols, **dict.fromkeys(strides.split(), cols)},
        constants={**constants, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        aligned=(*pointers, "cols", *strides.split()),
    )


_KINDS = ("gelu", "gelu_tanh", "silu", "quick_gelu", "relu")
_VARIANTS = [("bf16", "i32", kind) for kind in _KINDS] + [("fp32", "i64", "gelu"), ("fp16", "i32", "gelu")]
CASES = [
    case
    for dtype, cols, kind in _VARIANTS
    for case in (
        elementwise_case(_forward_kernel, dtype, "x_ptr y_ptr", "x_stride", cols, KIND=kind),
        elementwise_case(_backward_kernel, dtype, "dy_ptr x_ptr dx_ptr", "dy_stride x_stride", cols, KIND=kind),
    )
]
