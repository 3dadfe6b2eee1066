"""Triton kernels of `peft_kernels.dora`; the math is there. Tensors as (rows, features), row-major.

Elementwise over tiles. In backward a program walks a chunk of rows and keeps the column sums of that chunk; the chunks'
sums are reduced afterwards in fixed order.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case

BLOCK_M = 16
BLOCK_N = 128
NUM_WARPS = 4
SUM_ROWS = 128
"""Rows of a chunk where there is something to sum, a multiple of BLOCK_M."""


@triton.jit
def _factor(magnitude_ptr, norm_ptr, cols, features):
    magnitude = tl.load(magnitude_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + cols, mask=cols < features, other=1.0).to(tl.float32)
    return tl.div_rn(magnitude, norm)


@triton.jit
def _magnify_kernel(
    base_ptr,
    dropped_ptr,
    low_ptr,
    magnitude_ptr,
    norm_ptr,
    bias_ptr,
    y_ptr,
    together_ptr,
    rows,
    features,
    DROPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """DROPPED: base + (g-1)·dropped + g·low, and dropped + low where KEEP. Otherwise bias + g·base."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    row, cols = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (first + row < rows)[:, None] & (cols < features)[None, :]
    at = row[:, None] * features + cols[None, :]
    start = first * features
    g = _factor(magnitude_ptr, norm_ptr, cols, features)[None, :]
    y = tl.load(base_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    if DROPPED:
        dropped = tl.load(dropped_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(low_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        y = y + (g - 1) * dropped + g * low
        if KEEP:
            tl.store(together_ptr + start + at, dropped + low, mask=mask)
    else:
        y = g * y
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=cols < features, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + start + at, y, mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    z_ptr,
    magnitude_ptr,
    norm_ptr,
    dz_ptr,
    ddropped_ptr,
    magnitude_sums_ptr,
    bias_sums_ptr,
    rows,
    features,
    DROPPED: tl.constexpr,
    TRAINED: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dz = g·dy and, where DROPPED, (g-1)·dy; Σ dy·z / norm and Σ dy over this chunk of ROWS rows."""
    chunk = tl.program_id(0).to(tl.int64)
    row, cols = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < features
    at = row[:, None] * features + cols[None, :]
    g = _factor(magnitude_ptr, norm_ptr, cols, features)[None, :]
    magnitude_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        first = chunk * ROWS + start
        mask = (first + row < rows)[:, None] & inside[None, :]
        dy = tl.load(dy_ptr + first * features + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + first * features + at, g * dy, mask=mask)
        if DROPPED:
            tl.store(ddropped_ptr + first * features + at, (g - 1) * dy, mask=mask)
        if TRAINED:
            magnitude_sum += dy * tl.load(z_ptr + first * features + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_BIAS:
            bias_sum += dy
    if TRAINED:
        norm = tl.load(norm_ptr + cols, mask=inside, other=1.0).to(tl.float32)
        total = tl.div_rn(tl.sum(magnitude_sum, axis=0), norm)
        tl.store(magnitude_sums_ptr + chunk * features + cols, total, mask=inside)
    if NEED_BIAS:
        tl.store(bias_sums_ptr + chunk * features + cols, tl.sum(bias_sum, axis=0), mask=inside)


def _launch(
    base: Tensor,
    dropped: Tensor | None,
    low: Tensor | None,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    base, features = base.contiguous(), base.shape[-1]
    y, together = torch.empty_like(base), torch.empty_like(base) if keep else base.new_empty(0)
    if base.numel():
        rows = base.numel() // features
        _magnify_kernel[(triton.cdiv(rows, BLOCK_M), triton.cdiv(features, BLOCK_N))](
            base,
            base if dropped is None else dropped.contiguous(),
            base if low is None else low.contiguous(),
            magnitude.contiguous(),
            norm.contiguous(),
            base if bias is None else bias.contiguous(),
            y,
            together,
            rows,
            features,
            DROPPED=dropped is not None,
            HAS_BIAS=bias is not None,
            KEEP=keep,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return y, together


def launch_magnify(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    """bias + (magnitude / norm) ⊙ z."""
    return _launch(z, None, None, magnitude, norm, bias, False)[0]


def launch_magnify_dropped(
    base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    """(y, base_dropped + low); the second is empty unless `trained`."""
    return _launch(base, base_dropped, low, magnitude, norm, None, trained)


def launch_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, dropped: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(g⊙dy, (g-1)⊙dy, dmagnitude, dbias); sums in fp32; empty where not `dropped`, without z, not `need_bias`."""
    dy, features = dy.contiguous(), dy.shape[-1]
    rows = dy.numel() // features if features else 0
    chunk_rows = SUM_ROWS if z is not None or need_bias else BLOCK_M
    chunks = triton.cdiv(rows, chunk_rows)
    dz, ddropped = torch.empty_like(dy), torch.empty_like(dy) if dropped else dy.new_empty(0)
    magnitude_sums = dy.new_empty((chunks, 0 if z is None else features), dtype=torch.float32)
    bias_sums = dy.new_empty((chunks, features if need_bias else 0), dtype=torch.float32)
    if rows:
        _backward_kernel[(chunks, triton.cdiv(features, BLOCK_N))](
            dy,
            dy if z is None else z.contiguous(),
            magnitude.contiguous(),
            norm.contiguous(),
            dz,
            ddropped,
            magnitude_sums,
            bias_sums,
            rows,
            features,
            DROPPED=dropped,
            TRAINED=z is not None,
            NEED_BIAS=need_bias,
            ROWS=chunk_rows,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
    return dz, ddropped, magnitude_sums.sum(0), bias_sums.sum(0)


def _cases() -> list[Case]:
    cases = []
    block = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    sizes = {"rows": "i32", "features": "i32"}
    for kind in ("bf16", "fp32"):
        pointer = f"*{kind}"
        for dropped in (False, True):
            cases.append(
                Case(
                    kernel=_magnify_kernel,
                    label=f"{kind}{' dropped' if dropped else ''}",
                    signature={
                        **dict.fromkeys(("base_ptr", "dropped_ptr", "low_ptr"), pointer),
                        **dict.fromkeys(("magnitude_ptr", "norm_ptr"), "*fp32"),
                        **dict.fromkeys(("bias_ptr", "y_ptr", "together_ptr"), pointer),
                        **sizes,
                    },
                    constants={"DROPPED": dropped, "HAS_BIAS": not dropped, "KEEP": dropped, **block},
                    num_warps=NUM_WARPS,
                    aligned=("base_ptr", "dropped_ptr", "low_ptr", "y_ptr", "together_ptr", "features"),
                )
            )
            for trained in (False, True):
                cases.append(
                    Case(
                        kernel=_backward_kernel,
                        label=f"{kind}{' dropped' if dropped else ''}{' trained' if trained else ''}",
                        signature={
                            "dy_ptr": pointer,
                            "z_ptr": pointer,
                            "magnitude_ptr": "*fp32",
                            "norm_ptr": "*fp32",
                            "dz_ptr": pointer,
                            "ddropped_ptr": pointer,
                            "magnitude_sums_ptr": "*fp32",
                            "bias_sums_ptr": "*fp32",
                            **sizes,
                        },
                        constants={
                            "DROPPED": dropped,
                            "TRAINED": trained,
                            "NEED_BIAS": trained and not dropped,
                            "ROWS": SUM_ROWS if trained else BLOCK_M,
                            **block,
                        },
                        num_warps=NUM_WARPS,
                        aligned=("dy_ptr", "z_ptr", "dz_ptr", "ddropped_ptr", "magnitude_sums_ptr", "features"),
                    )
                )
    return cases


CASES = _cases()
