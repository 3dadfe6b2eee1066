"""Triton kernels of `peft_kernels.dropout`; the math is there, the draw in `_philox`.

Bytes moved for x (M, K) of 2-byte elements: dropout 4MK (the minimum: one read, one write), keep mask MK.
"""

# mypy: allow-untyped-defs
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case
from ._philox import UNSPECIALISED, keep_tile, mask_arguments, scale_of, threshold_of


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One program's share: `rows` × `columns` of x."""

    rows: int = 16
    columns: int = 128
    num_warps: int = 4


TILE = Tile()


@triton.jit(do_not_specialize=UNSPECIALISED)
def _dropout_kernel(
    x_ptr,  # (M, K)
    y_ptr,  # (M, K); with MASK_ONLY int8, one where kept
    seeds_ptr,
    M,
    K,
    rows_per_sample,
    threshold,
    salt_lo,
    salt_hi,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK_ONLY: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    rows = tl.arange(0, ROWS)
    columns = first_column + tl.arange(0, COLUMNS)
    live = rows < M - first
    inside = live[:, None] & (columns < K)[None, :]
    offsets = rows[:, None] * K + columns[None, :]
    base = first.to(tl.int64) * K
    keep = keep_tile(seeds_ptr, first + rows, live, first_column, rows_per_sample, threshold, salt_lo, salt_hi, COLUMNS)
    if MASK_ONLY:
        tl.store(y_ptr + base + offsets, keep.to(tl.int8), mask=inside)
    else:
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + base + offsets, tl.where(keep, x * scale, 0.0), mask=inside)


def launch_dropout(
    x: Tensor, p: float, seeds: Tensor | None, rows_per_sample: int, salt: int, *, tile: Tile = TILE
) -> Tensor:
    """x (M, K) contiguous → x ⊙ mask / keep_rate, a new tensor of x's dtype."""
    if threshold_of(p) == 0:
        return x.clone()
    y = torch.empty_like(x)
    _launch(x, y, p, seeds, rows_per_sample, salt, tile, mask_only=False)
    return y


def launch_keep_mask(
    M: int,
    K: int,
    p: float,
    seeds: Tensor | None,
    rows_per_sample: int,
    salt: int,
    device: torch.device | str,
    *,
    tile: Tile = TILE,
) -> Tensor:
    """(M, K) bool: what every kernel keeps under these seeds, rows and salt."""
    if threshold_of(p) == 0:
        return torch.ones(M, K, dtype=torch.bool, device=device)
    kept = torch.empty(M, K, dtype=torch.int8, device=device)
    _launch(kept, kept, p, seeds, rows_per_sample, salt, tile, mask_only=True)
    return kept.view(torch.bool)


def _launch(
    x: Tensor, y: Tensor, p: float, seeds: Tensor | None, rows_per_sample: int, salt: int, tile: Tile, mask_only: bool
) -> None:
    M, K = y.shape
    if not y.numel():
        return
    mask = mask_arguments(p, seeds, rows_per_sample, salt, y)
    del mask["DROPOUT"]
    grid = (triton.cdiv(M, tile.rows), triton.cdiv(K, tile.columns))
    _dropout_kernel[grid](
        x, y, M=M, K=K, scale=scale_of(p), ROWS=tile.rows, COLUMNS=tile.columns, MASK_ONLY=mask_only,
        num_warps=tile.num_warps, **mask,
    )  # fmt: skip


def _case(dtype: str, mask_only: bool) -> Case:
    integers = dict.fromkeys(("M", "K", "rows_per_sample", "threshold", "salt_lo", "salt_hi"), "i32")
    return Case(
        kernel=_dropout_kernel,
        label=f"{dtype}{' mask' if mask_only else ''}",
        signature={
            "x_ptr": "*i8" if mask_only else f"*{dtype}",
            "y_ptr": "*i8" if mask_only else f"*{dtype}",
            "seeds_ptr": "*i64",
            **integers,
            "scale": "fp32",
        },
        constants={"ROWS": TILE.rows, "COLUMNS": TILE.columns, "MASK_ONLY": mask_only},
        num_warps=TILE.num_warps,
        aligned=("x_ptr", "y_ptr", "seeds_ptr", "K"),
    )


CASES = [*(_case(dtype, False) for dtype in ("bf16", "fp16", "fp32")), _case("bf16", True)]
