"""Triton kernels of `peft_kernels.glu`; the math is there, the activations and the tiling in `gpu.activation`."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case
from .activation import BLOCK, NUM_WARPS, as_rows, elementwise_case, grid_of, tile_of, value_and_slope


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, cols, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row, first, offs, mask = tile_of(cols, BLOCK)
    gate = tl.load(gate_ptr + (row * gate_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    value, _ = value_and_slope(gate, ACTIVATION)
    tl.store(h_ptr + (row * cols + first) + offs, value * up, mask=mask)


@triton.jit
def _backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    dgate_ptr,
    dup_ptr,
    cols,
    dh_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    WANT_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, first, offs, mask = tile_of(cols, BLOCK)
    dh = tl.load(dh_ptr + (row * dh_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + (row * gate_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + first) + offs, mask=mask, other=0.0).to(tl.float32)
    value, slope = value_and_slope(gate, ACTIVATION)
    out = row * cols + first
    if WANT_H:
        tl.store(h_ptr + out + offs, value * up, mask=mask)
    tl.store(dgate_ptr + out + offs, dh * up * slope, mask=mask)
    tl.store(dup_ptr + out + offs, dh * value, mask=mask)


def launch_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        rows, cols, (gate, up) = as_rows(gate, up)
        _forward_kernel[grid_of(rows, cols)](
            gate, up, h, cols, gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return h


def launch_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, want_h: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(h, dgate, dup), contiguous; h is empty where it is not wanted."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    h = gate.new_empty(gate.shape if want_h else (0,))
    if gate.numel():
        rows, cols, (dh, gate, up) = as_rows(dh, gate, up)
        _backward_kernel[grid_of(rows, cols)](
            dh, gate, up, h, dgate, dup, cols, dh.stride(0), gate.stride(0), up.stride(0),
            ACTIVATION=activation, WANT_H=want_h, BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return h, dgate, dup


def _cases(dtype: str, cols: str, activation: str) -> list[Case]:
    backward = "dh_ptr gate_ptr up_ptr h_ptr dgate_ptr dup_ptr", "dh_stride gate_stride up_stride"
    return [
        elementwise_case(
            _forward_kernel, dtype, "gate_ptr up_ptr h_ptr", "gate_stride up_stride", cols, ACTIVATION=activation
        ),
        *(
            elementwise_case(_backward_kernel, dtype, *backward, cols, ACTIVATION=activation, WANT_H=want_h)
            for want_h in (False, True)
        ),
    ]


_VARIANTS = [("bf16", "i32", kind) for kind in ("silu", "gelu", "gelu_tanh")]
_VARIANTS += [("fp32", "i64", "silu"), ("fp16", "i32", "silu")]
CASES = [case for variant in _VARIANTS for case in _cases(*variant)]
