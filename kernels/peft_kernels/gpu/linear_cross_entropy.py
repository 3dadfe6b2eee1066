"""Triton kernel of `peft_kernels.linear_cross_entropy`; the math is there. GEMMs stay with cuBLAS.

One program owns one row of the chunk of logits and reads it twice: an online maximum and sum, then dlogit over the
logits in place. The second read of a row finds it in L2 for the vocabularies of today (128k bf16 logits: 256 KB).
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl

from .._cross_entropy_chunks import ROW_ALIGN
from ._cases import Case

BLOCK = 4096
NUM_WARPS = 8


@triton.jit
def _tanh(x):
    """To a few ulps also near zero, where (1 − e)/(1 + e) cancels; the interpreter has no libdevice."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    near = x * (
        1 + y * (-0.3333333333333333 + y * (0.13333333333333333 + y * (-0.05396825396825397 + y * 0.02186948853615520)))
    )
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _load_logits(row_ptr, cols, V, width, softcap, CAPPED: tl.constexpr):
    """fp32 logits of one block after the cap, 0 past V; the padding that a vector load takes along is thrown away."""
    z = tl.load(row_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    z = tl.where(cols < V, z, 0.0)
    if CAPPED:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def _rows_kernel(
    logits_ptr,  # (R, V), rows `stride` apart
    targets_ptr,  # (R,)
    weights_ptr,  # (R,) fp32, read if WEIGHTED
    losses_ptr,  # (R,) fp32
    V,
    width,  # V and the row's padding, which becomes 0
    stride,
    ignore_index,
    softcap,
    z_loss,
    logit_scale,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    at_target = tl.load(row_ptr + tl.where(inside, target, 0)).to(tl.float32)
    if CAPPED:
        at_target = softcap * _tanh(at_target / softcap)
    lanes = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + lanes
        z = tl.where(cols < V, _load_logits(row_ptr, cols, V, width, softcap, CAPPED), float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    lse = top + tl.log(total)
    weight = tl.full((), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + row)
    # a target outside the vocabulary must not pass for a class: it makes loss and gradient NaN
    weight = tl.where(ignored, 0.0, tl.where(inside, weight, float("nan")))
    loss = weight * (lse - at_target + z_loss * lse * lse)
    tl.store(losses_ptr + row, tl.where(ignored, 0.0, loss))
    if GRAD:
        weight = weight * logit_scale
        tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
        for start in range(0, V, BLOCK):
            cols = start + lanes
            z = _load_logits(row_ptr, cols, V, width, softcap, CAPPED)
            d = tl.exp(z - top) / total * (1 + 2 * z_loss * lse) - tl.where(cols == target, 1.0, 0.0)
            if CAPPED:
                d = d * (1 - (z / softcap) * (z / softcap))
            tl.store(row_ptr + cols, tl.where(ignored | (cols >= V), 0.0, weight * d), mask=cols < width)


def launch_rows(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    logit_scale: float,
    grad: bool,
) -> torch.Tensor:
    """Losses (R,) fp32 of `logits` (R, V), which become dlogit in place where `grad`; a row's padding becomes 0."""
    R, V = logits.shape
    assert logits.stride(1) == 1
    padding = logits.stride(0) - V
    width = V + padding if 0 <= padding < ROW_ALIGN else V
    losses = torch.empty(R, dtype=torch.float32, device=logits.device)
    if R:
        _rows_kernel[(R,)](
            logits,
            targets.contiguous(),
            losses if weights is None else weights.contiguous(),
            losses,
            V,
            width,
            logits.stride(0),
            ignore_index,
            softcap,
            z_loss,
            logit_scale,
            WEIGHTED=weights is not None,
            CAPPED=softcap > 0,
            GRAD=grad,
            BLOCK=min(BLOCK, triton.next_power_of_2(V)),
            num_warps=NUM_WARPS,
        )
    return losses


CASES = [
    Case(
        kernel=_rows_kernel,
        label=f"{dtype}{' weighted' * weighted}{' capped' * capped}{' grad' * grad}",
        signature={
            "logits_ptr": f"*{dtype}",
            "targets_ptr": "*i64",
            "weights_ptr": "*fp32",
            "losses_ptr": "*fp32",
            "V": "i32",
            "width": "i32",
            "stride": "i32",
            "ignore_index": "i32",
            "softcap": "fp32",
            "z_loss": "fp32",
            "logit_scale": "fp32",
        },
        constants={"WEIGHTED": weighted, "CAPPED": capped, "GRAD": grad, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
        aligned=("logits_ptr", "targets_ptr", "weights_ptr", "losses_ptr", "width", "stride"),
    )
    for dtype in ("bf16", "fp16", "fp32")
    for weighted, capped, grad in ((False, False, False), (False, False, True), (True, True, True))
]
