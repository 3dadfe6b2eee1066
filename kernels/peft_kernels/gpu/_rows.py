"""What both norms share: tiles for whole rows, reading a sum, and sums over rows for their parameters.

`column_sums`: partial sums per chunk of rows, then one reduction in fixed order.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Width of the block (features, rounded up) → rows per program, warps: 16 values a thread, at least 4 warps.
TILES = {
    128: (16, 4),
    256: (8, 4),
    512: (4, 4),
    1024: (2, 4),
    2048: (1, 4),
    4096: (1, 8),
    8192: (1, 16),
}
WIDEST = 8192
LOOP = 4096
SUM_TILE = (16, 128)
SUM_ROWS = 128


def tile(features: int) -> dict[str, Any]:
    """Launch constants for rows of so many features."""
    whole = features <= WIDEST
    width = max(min(TILES), triton.next_power_of_2(features)) if whole else LOOP
    rows, warps = TILES[width]
    return {"WHOLE": whole, "BLOCK_M": rows, "BLOCK_N": width, "num_warps": warps}


@triton.jit
def _load_sum(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL: tl.constexpr):
    """x, or x + residual rounded to their dtype; in fp32."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _store_dx(dx_ptr, dh_ptr, at, mask, dx, HAS_DH: tl.constexpr):
    if HAS_DH:
        dx += tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx, mask=mask)


@triton.jit
def _column_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_sums_ptr,
    bias_sums_ptr,
    rows,
    features,
    CENTRED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Over this chunk of ROWS rows: Σ dy ⊙ xhat and Σ dy, one row each of a (chunks, features) table."""
    chunk = tl.program_id(0).to(tl.int64)
    row, cols = tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < features
    at = row[:, None] * features + cols[None, :]
    weight_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, ROWS, BLOCK_M):
        first = chunk * ROWS + start
        live = first + row < rows
        mask = live[:, None] & inside[None, :]
        dy = tl.load(dy_ptr + first * features + at, mask=mask, other=0.0).to(tl.float32)
        if NEED_BIAS:
            bias_sum += dy
        if NEED_WEIGHT:
            x = tl.load(x_ptr + first * features + at, mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                x -= tl.load(mean_ptr + first + row, mask=live, other=0.0)[:, None]
            weight_sum += dy * (x * tl.load(rstd_ptr + first + row, mask=live, other=0.0)[:, None])
    if NEED_WEIGHT:
        tl.store(weight_sums_ptr + chunk * features + cols, tl.sum(weight_sum, axis=0), mask=inside)
    if NEED_BIAS:
        tl.store(bias_sums_ptr + chunk * features + cols, tl.sum(bias_sum, axis=0), mask=inside)


def column_sums(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """(Σ_rows dy ⊙ xhat, Σ_rows dy), (features,) in fp32 each, empty where not needed."""
    features = x.shape[-1]
    rows = x.numel() // features
    chunks = triton.cdiv(rows, SUM_ROWS)
    weight_sums, bias_sums = (
        torch.empty((chunks, features if need else 0), dtype=torch.float32, device=x.device)
        for need in (need_weight, need_bias)
    )
    if rows and (need_weight or need_bias):
        block_m, block_n = SUM_TILE
        _column_sums_kernel[(chunks, triton.cdiv(features, block_n))](
            dy,
            x,
            rstd if mean is None else mean,
            rstd,
            weight_sums,
            bias_sums,
            rows,
            features,
            CENTRED=mean is not None,
            NEED_WEIGHT=need_weight,
            NEED_BIAS=need_bias,
            ROWS=SUM_ROWS,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return weight_sums.sum(0), bias_sums.sum(0)


def _tiles() -> list[tuple[str, dict[str, Any], int]]:
    """Every entry of the table, and the loop: name, constants, warps."""
    found = []
    for features in (*TILES, WIDEST + 1):
        constants = tile(features)
        warps = constants.pop("num_warps")
        name = f"{constants['BLOCK_M']}x{constants['BLOCK_N']}{'' if constants['WHOLE'] else ' loop'}"
        found.append((name, constants, warps))
    return found
