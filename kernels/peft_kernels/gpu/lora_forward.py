"""Triton kernels of `peft_kernels.lora_linear`, forward; the math is there, the mask in `_philox`.

Bytes moved, elements of 2 bytes, beside the minimum that the roofline allows:
    down         2MK + 2Mr (+ 2rK per row block, from L2)        minimum 2MK + 2Mr
    seeded GEMM  2MK + 2NK + 2MN + 2r(M + N), tiles reread from L2: the frozen GEMM's own; s·S·Bᵀ adds no pass over Y
Products are accumulated in fp32 and rounded once at the store; fp32 operands are multiplied in fp32, not TF32.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import interpreted
from ._cases import Case
from ._philox import UNSPECIALISED, keep_tile, mask_arguments, scale_of

GROUP = 8  # row blocks that walk over the columns together, so that their operands stay in L2


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A launch configuration: one block of the result, and how deep a step of the contraction goes."""

    rows: int
    columns: int
    depth: int = 0
    num_warps: int = 4
    num_stages: int = 3


def rank_block(r: int) -> int:
    """The rank as tensor cores take it: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(r))


def down_tile(M: int, r: int, dtype: torch.dtype) -> Tile:
    """A block of rows meets the whole rank, so x is read once; fewer rows a block where M would leave the card idle."""
    block = rank_block(r)
    if dtype == torch.float32:
        return Tile(rows=16, columns=block, depth=32 if block <= 64 else 16, num_warps=4 if block <= 64 else 8)
    rows = 64 if M >= 8192 else 32 if M >= 4096 else 16
    return Tile(
        rows=rows,
        columns=block,
        depth=128 if block <= 32 or (rows, block) == (32, 64) else 64,
        num_warps=4 if block <= 128 else 8,
    )


def gemm_tile(dtype: torch.dtype) -> Tile:
    """Of the GEMM that the low-rank product starts."""
    if dtype == torch.float32:
        return Tile(rows=64, columns=64, depth=16, num_warps=8, num_stages=3)
    return Tile(rows=128, columns=128, depth=64, num_warps=8, num_stages=3)


def rank_step(r: int, dtype: torch.dtype) -> int:
    """How much of the rank the GEMM's prologue takes at once."""
    return 16 if dtype == torch.float32 else min(rank_block(r), 32)


@triton.jit
def widened(x, INTERPRET: tl.constexpr):
    """The interpreter computes nothing on bf16; tensor cores take it as it is."""
    if INTERPRET:
        x = x.to(tl.float32)
    return x


@triton.jit(do_not_specialize=UNSPECIALISED)
def _down_kernel(
    x_ptr,  # (M, K)
    a_ptr,  # (r, K), or (K, r) with A_TRANSPOSED
    s_ptr,  # (M, r)
    seeds_ptr,
    M,
    K,
    r,
    rows_per_sample,
    threshold,
    salt_lo,
    salt_hi,
    scale,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows = tl.arange(0, ROWS)
    live = rows < M - first
    ranks = tl.arange(0, RANK)
    x_ptr += first.to(tl.int64) * K
    acc = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for k in range(0, K, DEPTH):
        columns = k + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + rows[:, None] * K + columns[None, :], mask=live[:, None] & (columns < K)[None, :], other=0.0
        )
        inside = (columns < K)[:, None] & (ranks < r)[None, :]
        if A_TRANSPOSED:
            a = tl.load(a_ptr + columns[:, None] * r + ranks[None, :], mask=inside, other=0.0)
        else:
            a = tl.load(a_ptr + ranks[None, :] * K + columns[:, None], mask=inside, other=0.0)
        x = widened(x, INTERPRET)
        if DROPOUT:
            keep = keep_tile(seeds_ptr, first + rows, live, k, rows_per_sample, threshold, salt_lo, salt_hi, DEPTH)
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(x, widened(a, INTERPRET), acc, input_precision="ieee")
    s_ptr += first.to(tl.int64) * r
    tl.store(s_ptr + rows[:, None] * r + ranks[None, :], acc * scale, mask=live[:, None] & (ranks < r)[None, :])


def launch_down(
    x: Tensor, A: Tensor, p: float, seeds: Tensor | None, rows_per_sample: int, salt: int, *, tile: Tile | None = None
) -> Tensor:
    """S = dropout(x)·Aᵀ: x (M, K), A (r, K) → (M, r) of x's dtype."""
    return project(x, A, p, seeds, rows_per_sample, salt, tile=tile)


def project(
    x: Tensor,
    A: Tensor,
    p: float = 0.0,
    seeds: Tensor | None = None,
    rows_per_sample: int = 1,
    salt: int = 0,
    *,
    scale: float = 1.0,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """scale·dropout(x)·Aᵀ, where A is (r, K), or (K, r) if `transposed`."""
    M, K = x.shape
    r = A.shape[1] if transposed else A.shape[0]
    s = torch.empty(M, r, dtype=x.dtype, device=x.device)
    if not s.numel():
        return s
    tile = tile or down_tile(M, r, x.dtype)
    mask = mask_arguments(p, seeds, rows_per_sample, salt, x)
    _down_kernel[(triton.cdiv(M, tile.rows),)](
        x, A, s, M=M, K=K, r=r, scale=scale * scale_of(p), ROWS=tile.rows, DEPTH=tile.depth, RANK=rank_block(r),
        A_TRANSPOSED=transposed, INTERPRET=interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages, **mask,
    )  # fmt: skip
    return s


@triton.jit
def block_of(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's block of an (M, N) result, by its first row and column.

    Blocks are numbered down a band of GROUP row blocks, then on to the next column block.
    """
    row_blocks, column_blocks = tl.cdiv(M, ROWS), tl.cdiv(N, COLUMNS)
    band = tl.program_id(0) // (GROUP * column_blocks)
    place = tl.program_id(0) % (GROUP * column_blocks)
    height = tl.minimum(row_blocks - band * GROUP, GROUP)
    return (band * GROUP + place % height) * ROWS, (place // height) * COLUMNS


@triton.jit
def add_low_rank(
    acc,
    low_ptr,  # at the block's first row
    up_ptr,  # at the block's first column
    rows,
    columns,
    live,
    wanted,
    N,
    r,
    RANK: tl.constexpr,
    UP_TRANSPOSED: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """acc + low·up for one block."""
    for j in range(0, r, RANK):
        ranks = j + tl.arange(0, RANK)
        low = tl.load(
            low_ptr + rows[:, None] * r + ranks[None, :], mask=live[:, None] & (ranks < r)[None, :], other=0.0
        )
        inside = (ranks < r)[:, None] & wanted[None, :]
        if UP_TRANSPOSED:
            up = tl.load(up_ptr + columns[None, :] * r + ranks[:, None], mask=inside, other=0.0)
        else:
            up = tl.load(up_ptr + ranks[:, None] * N + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(widened(low, INTERPRET), widened(up, INTERPRET), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=UNSPECIALISED)
def _seeded_gemm_kernel(
    left_ptr,  # (M, D)
    right_ptr,  # (D, N), or (N, D) with RIGHT_TRANSPOSED; rows lie right_stride apart
    low_ptr,  # (M, r)
    up_ptr,  # (r, N), or (N, r) with UP_TRANSPOSED
    bias_ptr,  # (N,)
    y_ptr,  # (M, N)
    seeds_ptr,
    M,
    N,
    D,
    r,
    right_stride,
    rows_per_sample,
    threshold,
    salt_lo,
    salt_hi,
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr,
    UP_TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first, first_column = block_of(M, N, ROWS, COLUMNS, GROUP)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live, wanted = rows < M - first, columns < N - first_column
    left_ptr += first.to(tl.int64) * D
    low_ptr += first.to(tl.int64) * r
    y_ptr += first.to(tl.int64) * N + first_column
    right_ptr += first_column.to(tl.int64) * (right_stride if RIGHT_TRANSPOSED else 1)
    up_ptr += first_column.to(tl.int64) * (r if UP_TRANSPOSED else 1)

    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    acc = add_low_rank(acc, low_ptr, up_ptr, rows, columns, live, wanted, N, r, RANK, UP_TRANSPOSED, INTERPRET)
    acc *= scale
    if DROPOUT:
        keep = keep_tile(
            seeds_ptr, first + rows, live, first_column, rows_per_sample, threshold, salt_lo, salt_hi, COLUMNS
        )
        acc = tl.where(keep, acc, 0.0)

    for d in range(0, D, DEPTH):
        deep = tl.arange(0, DEPTH)
        there = deep < D - d
        left = tl.load(left_ptr + d + rows[:, None] * D + deep[None, :], mask=live[:, None] & there[None, :], other=0.0)
        inside = there[:, None] & wanted[None, :]
        if RIGHT_TRANSPOSED:
            right = tl.load(right_ptr + d + columns[None, :] * right_stride + deep[:, None], mask=inside, other=0.0)
        else:
            right = tl.load(right_ptr + deep[:, None] * right_stride + columns[None, :], mask=inside, other=0.0)
            right_ptr += DEPTH * right_stride
        acc = tl.dot(widened(left, INTERPRET), widened(right, INTERPRET), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + first_column + columns, mask=wanted, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], acc, mask=live[:, None] & wanted[None, :])


def launch_seeded_gemm(
    x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, B: Tensor, scale: float, *, tile: Tile | None = None
) -> Tensor:
    """Y = x·Wᵀ + scale·S·Bᵀ + bias, (M, N). W: (N, K), contiguous or the transpose of a contiguous (K, N)."""
    return seeded_gemm(x, W.t(), S, B.t(), scale, bias=bias, tile=tile)


def seeded_gemm(
    left: Tensor,
    right: Tensor,
    low: Tensor,
    up: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    p: float = 0.0,
    seeds: Tensor | None = None,
    rows_per_sample: int = 1,
    salt: int = 0,
    tile: Tile | None = None,
) -> Tensor:
    """left·right + bias + scale·mask ⊙ (low·up) / keep_rate. right (D, N), up (r, N): contiguous, or .t() of it."""
    M, D = left.shape
    N, r = right.shape[1], low.shape[1]
    y = torch.empty(M, N, dtype=left.dtype, device=left.device)
    if not y.numel():
        return y
    if 1 not in right.stride():
        right = right.contiguous()
    right_transposed, up_transposed = right.stride(1) != 1, not up.is_contiguous()
    assert not up_transposed or up.t().is_contiguous()
    tile = tile or gemm_tile(left.dtype)
    mask = mask_arguments(p, seeds, rows_per_sample, salt, left)
    _seeded_gemm_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        left, right, low, up, left if bias is None else bias, y, M=M, N=N, D=D, r=r,
        right_stride=right.stride(0 if not right_transposed else 1), scale=scale * scale_of(p), ROWS=tile.rows,
        COLUMNS=tile.columns, DEPTH=tile.depth, RANK=rank_step(r, left.dtype), GROUP=GROUP,
        RIGHT_TRANSPOSED=right_transposed, UP_TRANSPOSED=up_transposed, BIAS=bias is not None, INTERPRET=interpreted(),
        num_warps=tile.num_warps, num_stages=tile.num_stages, **mask,
    )  # fmt: skip
    return y


NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MASK_SIGNATURE = {"seeds_ptr": "*i64"} | dict.fromkeys(("rows_per_sample", "threshold", "salt_lo", "salt_hi"), "i32")
RANKS = (16, 32, 64, 128, 256)


def combinations() -> Iterator[tuple[str, int, bool]]:
    """(dtype, rank, dropout) worth a compilation: fp16 differs from bf16 in one instruction's name."""
    yield from (("bf16", r, True) for r in RANKS)
    yield from (("fp32", r, True) for r in RANKS)
    yield from (("fp16", 16, True), ("bf16", 16, False), ("bf16", 256, False), ("fp32", 16, False))


def _down_cases() -> Iterator[Case]:
    for dtype, r, dropout in combinations():
        for M in (8192, 4096, 1) if dtype == "bf16" else (8192,):
            tile = down_tile(M, r, NAMES[dtype])
            yield Case(
                kernel=_down_kernel,
                label=f"{dtype} r{r} rows{tile.rows}{' p' if dropout else ''}",
                signature={
                    **dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), f"*{dtype}"),
                    **dict.fromkeys(("M", "K", "r"), "i32"),
                    **MASK_SIGNATURE,
                    "scale": "fp32",
                },
                constants={
                    "ROWS": tile.rows, "DEPTH": tile.depth, "RANK": r, "A_TRANSPOSED": not dropout and r > 64,
                    "DROPOUT": dropout, "INTERPRET": False,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                tensor_cores=dtype != "fp32",
                aligned=("x_ptr", "a_ptr", "s_ptr", "K", "r"),
            )  # fmt: skip


def _gemm_cases() -> Iterator[Case]:
    forms = {"forward": (True, True, True, False), "Conv1D": (False, True, True, False)}
    forms |= {"backward": (False, False, False, True), "Conv1D back": (True, False, False, True)}
    for dtype in NAMES:
        for r in (16, 32) if dtype == "bf16" else (16,):
            for form, (right_transposed, up_transposed, bias, dropout) in forms.items():
                tile = gemm_tile(NAMES[dtype])
                pointers = ("left_ptr", "right_ptr", "low_ptr", "up_ptr", "bias_ptr", "y_ptr")
                sizes = ("M", "N", "D", "r", "right_stride")
                yield Case(
                    kernel=_seeded_gemm_kernel,
                    label=f"{dtype} r{r} {form}",
                    signature={
                        **dict.fromkeys(pointers, f"*{dtype}"),
                        **dict.fromkeys(sizes, "i32"),
                        **MASK_SIGNATURE,
                        "scale": "fp32",
                    },
                    constants={
                        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "RANK": r, "GROUP": GROUP,
                        "RIGHT_TRANSPOSED": right_transposed, "UP_TRANSPOSED": up_transposed, "BIAS": bias,
                        "DROPOUT": dropout, "INTERPRET": False,
                    },
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    tensor_cores=dtype != "fp32",
                    aligned=(*pointers, *sizes[1:]),
                )  # fmt: skip


CASES = [*_down_cases(), *_gemm_cases()]
