"""Triton kernels of `peft_kernels.lora_linear`, backward; the math is there, the mask in `_philox`.

Bytes moved, elements of 2 bytes, beside the minimum that the roofline allows (c, t: columns and rows of one block):
    dS and dB      2MN + 8MNr(1/c + 1/t) of partial sums, mostly inside L2   minimum 2MN; above rank 64 dY is read twice
    dA             2MK + 8MKr/t of partial sums                              minimum 2MK
    dX             4MK + 2Mr                                                 minimum 0, inside the GEMM
    seeded dGEMM   the frozen GEMM's own + 2r(M + K)                         the minimum
At M = 8192, N = 4096, r = 16 that is 1.4 times 2MN for dS and dB (c = 256, t = 512), 1.06 times 2MK for dA.
Nothing is added atomically: every block writes partial sums of its own, which a second kernel adds up in order. How
rows are split depends on shapes only, so that a gradient is the same bits from run to run.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import interpreted
from ._cases import Case
from ._philox import UNSPECIALISED, keep_tile, mask_arguments, scale_of
from .lora_forward import MASK_SIGNATURE, NAMES, RANKS, Tile, combinations, project, rank_block, seeded_gemm, widened

PROGRAMS = 264  # two for each multiprocessor of an H100
SUM_BLOCK = 1024
FUSED_RANK = 64  # above it the partial sums of dS would outweigh a second read of dY


def outer_tile(r: int, dtype: torch.dtype) -> Tile:
    """Of dᵀ·x, summed over rows: a block holds `columns` of x against the whole rank, `rows` at a step."""
    block = rank_block(r)
    if dtype == torch.float32:
        return Tile(rows=16, columns=64 if block <= 64 else 32, num_warps=4 if block <= 64 else 8, num_stages=2)
    if block == 256:
        return Tile(rows=32, columns=64, num_warps=8, num_stages=2)
    return Tile(rows=64 if block <= 64 else 32, columns=128, num_warps=4 if block <= 32 else 8)


def fused_tile(r: int, dtype: torch.dtype) -> Tile:
    """Of dS and dB together: wide, since partial sums of dS are written once for every `columns`."""
    if dtype == torch.float32:
        return Tile(rows=16, columns=64, num_warps=4 if r <= 32 else 8, num_stages=2)
    return Tile(rows=64, columns=256, num_warps=8, num_stages=2)


def dx_tile(dtype: torch.dtype) -> Tile:
    return Tile(rows=32, columns=64 if dtype == torch.float32 else 128, num_warps=4, num_stages=2)


def split_of(M: int, stripes: int, tile: Tile) -> tuple[int, int]:
    """(splits, rows of each): one wave of blocks where stripes allow it, four steps at least for each block."""
    splits = max(1, min(PROGRAMS // stripes, triton.cdiv(M, 4 * tile.rows)))
    rows = triton.cdiv(triton.cdiv(M, splits), tile.rows) * tile.rows
    return triton.cdiv(M, rows), rows


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(parts_ptr, out_ptr, parts, n, scale, BLOCK: tl.constexpr):
    """out[i] = scale · Σ parts[:, i], in order."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    places = tl.arange(0, BLOCK)
    inside = places < n - start
    parts_ptr += start
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(parts_ptr + places, mask=inside, other=0.0)
        parts_ptr += n
    tl.store(out_ptr + start + places, total * scale, mask=inside)


def _sum(parts: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """scale · parts.sum(0), rounded once."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    _sum_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
        parts, out, parts=parts.shape[0], n=out.numel(), scale=scale, BLOCK=SUM_BLOCK, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=UNSPECIALISED)
def _outer_kernel(
    d_ptr,  # (M, r)
    x_ptr,  # (M, K)
    parts_ptr,  # (splits, r, K) fp32, or (splits, K, r) with OUT_TRANSPOSED
    seeds_ptr,
    M,
    K,
    r,
    split_rows,
    rows_per_sample,
    threshold,
    salt_lo,
    salt_hi,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    OUT_TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    start = tl.program_id(1) * split_rows
    end = tl.minimum(start + split_rows, M)
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, RANK)
    columns = first_column + tl.arange(0, COLUMNS)
    acc = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for first in range(start, end, ROWS):
        live = rows < end - first
        x = tl.load(
            x_ptr + tl.cast(first, tl.int64) * K + rows[:, None] * K + columns[None, :],
            mask=live[:, None] & (columns < K)[None, :],
            other=0.0,
        )
        d = tl.load(
            d_ptr + tl.cast(first, tl.int64) * r + rows[:, None] * r + ranks[None, :],
            mask=live[:, None] & (ranks < r)[None, :],
            other=0.0,
        )
        x = widened(x, INTERPRET)
        if DROPOUT:
            keep = keep_tile(
                seeds_ptr, first + rows, live, first_column, rows_per_sample, threshold, salt_lo, salt_hi, COLUMNS
            )
            x = tl.where(keep, x, 0.0)
        acc = tl.dot(tl.trans(x), widened(d, INTERPRET), acc, input_precision="ieee")
    parts_ptr += tl.program_id(1).to(tl.int64) * K * r
    places = columns[:, None] * r + ranks[None, :] if OUT_TRANSPOSED else ranks[None, :] * K + columns[:, None]
    tl.store(parts_ptr + places, acc, mask=(columns < K)[:, None] & (ranks < r)[None, :])


def launch_da(
    dS: Tensor, x: Tensor, p: float, seeds: Tensor | None, rows_per_sample: int, salt: int, *, tile: Tile | None = None
) -> Tensor:
    """dA = dSᵀ·dropout(x): dS (M, r), x (M, K) → (r, K) fp32."""
    return _outer(dS, x, p, seeds, rows_per_sample, salt, tile=tile)


def _outer(
    d: Tensor,
    x: Tensor,
    p: float = 0.0,
    seeds: Tensor | None = None,
    rows_per_sample: int = 1,
    salt: int = 0,
    *,
    scale: float = 1.0,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """scale·dᵀ·dropout(x) (r, K) in fp32, (K, r) if `transposed`."""
    (M, r), K = d.shape, x.shape[1]
    shape = (K, r) if transposed else (r, K)
    if not M * K * r:
        return torch.zeros(shape, device=x.device)
    tile = tile or outer_tile(r, x.dtype)
    stripes = triton.cdiv(K, tile.columns)
    splits, split_rows = split_of(M, stripes, tile)
    parts = torch.empty(splits, *shape, device=x.device)
    mask = mask_arguments(p, seeds, rows_per_sample, salt, x)
    _outer_kernel[(stripes, splits)](
        d, x, parts, M=M, K=K, r=r, split_rows=split_rows, ROWS=tile.rows, COLUMNS=tile.columns, RANK=rank_block(r),
        OUT_TRANSPOSED=transposed, INTERPRET=interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
        **mask,
    )  # fmt: skip
    return _sum(parts, torch.float32, scale * scale_of(p))


@triton.jit(do_not_specialize=["M"])
def _ds_db_kernel(
    dy_ptr,  # (M, N)
    b_ptr,  # (N, r)
    s_ptr,  # (M, r)
    ds_parts_ptr,  # (stripes, M, r) fp32
    db_parts_ptr,  # (splits, N, r) fp32
    M,
    N,
    r,
    split_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    stripe, split = tl.program_id(0), tl.program_id(1)
    start = split * split_rows
    end = tl.minimum(start + split_rows, M)
    rows, ranks = tl.arange(0, ROWS), tl.arange(0, RANK)
    columns = stripe * COLUMNS + tl.arange(0, COLUMNS)
    wanted = (columns < N)[:, None] & (ranks < r)[None, :]
    b = widened(tl.load(b_ptr + columns[:, None] * r + ranks[None, :], mask=wanted, other=0.0), INTERPRET)
    ds_parts_ptr += stripe.to(tl.int64) * M * r
    acc = tl.zeros((COLUMNS, RANK), dtype=tl.float32)
    for first in range(start, end, ROWS):
        live = rows < end - first
        dy = tl.load(
            dy_ptr + tl.cast(first, tl.int64) * N + rows[:, None] * N + columns[None, :],
            mask=live[:, None] & (columns < N)[None, :],
            other=0.0,
        )
        inside = live[:, None] & (ranks < r)[None, :]
        s = tl.load(s_ptr + tl.cast(first, tl.int64) * r + rows[:, None] * r + ranks[None, :], mask=inside, other=0.0)
        dy = widened(dy, INTERPRET)
        acc = tl.dot(tl.trans(dy), widened(s, INTERPRET), acc, input_precision="ieee")
        ds = tl.dot(dy, b, input_precision="ieee")
        tl.store(ds_parts_ptr + tl.cast(first, tl.int64) * r + rows[:, None] * r + ranks[None, :], ds, mask=inside)
    db_parts_ptr += split.to(tl.int64) * N * r
    tl.store(db_parts_ptr + columns[:, None] * r + ranks[None, :], acc, mask=wanted)


def launch_ds_db(dY: Tensor, B: Tensor, S: Tensor, scale: float, *, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """dS = scale·dY·B (M, r) in dY's dtype and dB = scale·dYᵀ·S (N, r) in fp32, from one read of dY (M, N)."""
    (M, N), r = dY.shape, B.shape[1]
    if r > FUSED_RANK:
        return project(dY, B, scale=scale, transposed=True), _outer(S, dY, scale=scale, transposed=True)
    if not M * N * r:
        return torch.zeros(M, r, dtype=dY.dtype, device=dY.device), torch.zeros(N, r, device=dY.device)
    tile = tile or fused_tile(r, dY.dtype)
    stripes = triton.cdiv(N, tile.columns)
    splits, split_rows = split_of(M, stripes, tile)
    ds_parts = torch.empty(stripes, M, r, device=dY.device)
    db_parts = torch.empty(splits, N, r, device=dY.device)
    _ds_db_kernel[(stripes, splits)](
        dY, B, S, ds_parts, db_parts, M=M, N=N, r=r, split_rows=split_rows, ROWS=tile.rows, COLUMNS=tile.columns,
        RANK=rank_block(r), INTERPRET=interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return _sum(ds_parts, dY.dtype, scale), _sum(db_parts, torch.float32, scale)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _add_dx_kernel(
    dx_ptr,  # (M, K), added to
    ds_ptr,  # (M, r)
    a_ptr,  # (r, K)
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
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    rows, columns = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    live = rows < M - first
    ds_ptr += first.to(tl.int64) * r
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for j in range(0, r, RANK):
        ranks = j + tl.arange(0, RANK)
        ds = tl.load(ds_ptr + rows[:, None] * r + ranks[None, :], mask=live[:, None] & (ranks < r)[None, :], other=0.0)
        inside = (ranks < r)[:, None] & (columns < K)[None, :]
        a = tl.load(a_ptr + ranks[:, None] * K + columns[None, :], mask=inside, other=0.0)
        acc = tl.dot(widened(ds, INTERPRET), widened(a, INTERPRET), acc, input_precision="ieee")
    acc *= scale
    if DROPOUT:
        keep = keep_tile(
            seeds_ptr, first + rows, live, first_column, rows_per_sample, threshold, salt_lo, salt_hi, COLUMNS
        )
        acc = tl.where(keep, acc, 0.0)
    dx_ptr += first.to(tl.int64) * K
    places = dx_ptr + rows[:, None] * K + columns[None, :]
    inside = live[:, None] & (columns < K)[None, :]
    acc += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, acc, mask=inside)


def launch_dx(
    dX: Tensor,
    dS: Tensor,
    A: Tensor,
    p: float,
    seeds: Tensor | None,
    rows_per_sample: int,
    salt: int,
    *,
    tile: Tile | None = None,
) -> None:
    """dX += mask ⊙ (dS·A) / keep_rate, in place: dX (M, K) contiguous and the caller's own, dS (M, r), A (r, K)."""
    (M, K), r = dX.shape, A.shape[0]
    if not M * K * r:
        return
    assert dX.is_contiguous()
    tile = tile or dx_tile(dX.dtype)
    mask = mask_arguments(p, seeds, rows_per_sample, salt, dX)
    _add_dx_kernel[(triton.cdiv(M, tile.rows), triton.cdiv(K, tile.columns))](
        dX, dS, A, M=M, K=K, r=r, scale=scale_of(p), ROWS=tile.rows, COLUMNS=tile.columns, RANK=min(rank_block(r), 64),
        INTERPRET=interpreted(), num_warps=tile.num_warps, num_stages=tile.num_stages, **mask,
    )  # fmt: skip


def launch_seeded_dgemm(
    dY: Tensor,
    W: Tensor,
    dS: Tensor,
    A: Tensor,
    p: float,
    seeds: Tensor | None,
    rows_per_sample: int,
    salt: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """dX = dY·W + mask ⊙ (dS·A) / keep_rate, (M, K). W: (N, K), contiguous or the transpose of a contiguous (K, N)."""
    return seeded_gemm(dY, W, dS, A, 1.0, p=p, seeds=seeds, rows_per_sample=rows_per_sample, salt=salt, tile=tile)


def _case(kernel: object, label: str, dtype: str, pointers: str, sizes: str, tile: Tile, **constants: object) -> Case:
    """A case whose pointers are `dtype` but for partial sums, which are fp32."""
    names = pointers.split()
    dropout = "DROPOUT" in constants
    return Case(
        kernel=kernel,
        label=label,
        signature={
            **{name: "*fp32" if "parts" in name else f"*{dtype}" for name in names},
            **dict.fromkeys(sizes.split(), "i32"),
            **(MASK_SIGNATURE if dropout else {}),
            **({"scale": "fp32"} if kernel is _add_dx_kernel else {}),
        },
        constants={"ROWS": tile.rows, "COLUMNS": tile.columns, "INTERPRET": False, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        tensor_cores=dtype != "fp32",
        aligned=(*names, *sizes.split()[1:]),
    )


def _cases() -> Iterator[Case]:
    for dtype, r, dropout in combinations():
        label, kind = f"{dtype} r{r}{' p' if dropout else ''}", NAMES[dtype]
        yield _case(
            _outer_kernel, label, dtype, "d_ptr x_ptr parts_ptr", "M K r split_rows", outer_tile(r, kind),
            RANK=r, OUT_TRANSPOSED=not dropout, DROPOUT=dropout,
        )  # fmt: skip
        if r <= 64:
            yield _case(
                _add_dx_kernel, label, dtype, "dx_ptr ds_ptr a_ptr", "M K r", dx_tile(kind), RANK=r, DROPOUT=dropout
            )
    for dtype, r in ((dtype, r) for dtype in NAMES for r in RANKS if r <= FUSED_RANK):
        yield _case(
            _ds_db_kernel, f"{dtype} r{r}", dtype, "dy_ptr b_ptr s_ptr ds_parts_ptr db_parts_ptr", "M N r split_rows",
            fused_tile(r, NAMES[dtype]), RANK=r,
        )  # fmt: skip
    for dtype in NAMES:
        yield Case(
            kernel=_sum_kernel,
            label=dtype,
            signature={"parts_ptr": "*fp32", "out_ptr": f"*{dtype}", "parts": "i32", "n": "i32", "scale": "fp32"},
            constants={"BLOCK": SUM_BLOCK},
            aligned=("parts_ptr", "out_ptr", "n"),
        )


CASES = list(_cases())
