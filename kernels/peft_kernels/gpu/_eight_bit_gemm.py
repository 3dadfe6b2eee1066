"""The GEMM of 8-bit codes that `int8_gemm` and `fp8_gemm` share: both layouts, rescaled, with bias and LoRA behind it.

    y = (left·right) · row_scale_m · column_scale_n + bias_n + scale·mask ⊙ (low·up) / keep_rate

Codes are multiplied and added up in int32 (exact) or in fp32, everything behind them in fp32, and y is rounded once.
Bytes moved: the GEMM's own, MD + DN + 2MN, and 2r(M + N): rescaling and the low-rank product add no pass over y.

8-bit tensor cores read both operands along the contraction. `right` lies so in forward (codes·codesᵀ); in backward
(codes·codes) it doesn't, and from `TURNED_ROWS` rows on a transposed copy of it is made first, in 2DN bytes: computed,
a twentieth of the GEMM's time at 8192 rows. Below, the kernel gathers its bytes itself.

On Hopper, operands whose rows begin at multiples of 16 bytes are loaded through TMA descriptors. Its fp8 units add up
in 14 bits; with `exact`, every `DEPTH` products are added to a sum in fp32. Backward does that, forward does not, as is
torchao's default too.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._launch import interpreted
from ._cases import Case
from ._philox import UNSPECIALISED, keep_tile, mask_arguments, scale_of
from ._quantise import architecture, turned
from .lora_backward import launch_dx
from .lora_forward import GROUP, MASK_SIGNATURE, Tile, add_low_rank, block_of, rank_block

TURNED_ROWS = 256
DEEPEST = (2**31 - 1) // 127**2  # products that an int32 is sure to hold
MULTIPROCESSORS = 132  # of an H100
LEAST = {torch.int8: 80, torch.float8_e4m3fn: 89}  # the first card on which Triton multiplies such codes


def product_tile(M: int, N: int, arch: int, *, exact: bool = False, dropout: bool = False) -> Tile:
    """What shared memory and registers allow: 227 KiB on sm_90 and sm_100, 163 on sm_80, 99 on all others.

    exact: fp8 with a second accumulator; dropout: a mask and a second accumulator behind the loop.
    """
    depth = 128 if arch in (80, 90, 100) else 64
    if M <= 64:
        return Tile(rows=64, columns=128, depth=depth, num_warps=4, num_stages=3)
    if arch != 90:  # Triton 3.7 multiplies int8 on sm_100 as on sm_80, and spills in wider tiles
        return Tile(rows=128, columns=128, depth=depth, num_warps=8, num_stages=3)
    if exact or dropout or triton.cdiv(M, 128) * triton.cdiv(N, 256) < MULTIPROCESSORS:
        return Tile(rows=128, columns=128, depth=128, num_warps=8, num_stages=4)
    return Tile(rows=128, columns=256, depth=128, num_warps=8, num_stages=4)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _product_kernel(
    left_ptr,  # (M, D) codes; a descriptor of them with DESCRIPTORS, right_ptr as well
    right_ptr,  # (D, N) codes, or (N, D) with RIGHT_TRANSPOSED
    row_scale_ptr,  # (M,) fp32
    column_scale_ptr,  # (N,) fp32
    bias_ptr,  # (N,)
    low_ptr,  # (M, r)
    up_ptr,  # (r, N), or (N, r) with UP_TRANSPOSED
    y_ptr,  # (M, N)
    seeds_ptr,
    M,
    N,
    D,
    r,
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
    INTEGER: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RIGHT_TRANSPOSED: tl.constexpr,
    UP_TRANSPOSED: tl.constexpr,
    COLUMN_SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    LOW: tl.constexpr,
    DROPOUT: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    first, first_column = block_of(M, N, ROWS, COLUMNS, GROUP)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live, wanted = rows < M - first, columns < N - first_column
    if not DESCRIPTORS:
        left_ptr += first.to(tl.int64) * D
        right_ptr += first_column.to(tl.int64) * (D if RIGHT_TRANSPOSED else 1)

    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.int32 if INTEGER else tl.float32)
    for d in range(0, D, DEPTH):
        if DESCRIPTORS:
            left = left_ptr.load([first, d])
            right = tl.trans(right_ptr.load([first_column, d]))
        else:
            deep = tl.arange(0, DEPTH)
            there = deep < D - d
            left = tl.load(
                left_ptr + d + rows[:, None] * D + deep[None, :], mask=live[:, None] & there[None, :], other=0.0
            )
            inside = there[:, None] & wanted[None, :]
            if RIGHT_TRANSPOSED:
                right = tl.load(right_ptr + d + columns[None, :] * D + deep[:, None], mask=inside, other=0.0)
            else:
                right = tl.load(right_ptr + deep[:, None] * N + columns[None, :], mask=inside, other=0.0)
                right_ptr += DEPTH * N
        if INTEGER:
            acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        elif EXACT:
            acc = tl.dot(left, right, acc, max_num_imprecise_acc=DEPTH)
        else:
            acc = tl.dot(left, right, acc)

    y = acc.to(tl.float32) * tl.load(row_scale_ptr + first + rows, mask=live, other=0.0)[:, None]
    if COLUMN_SCALE:
        y *= tl.load(column_scale_ptr + first_column + columns, mask=wanted, other=0.0)[None, :]
    if LOW:
        low_ptr += first.to(tl.int64) * r
        up_ptr += first_column.to(tl.int64) * (r if UP_TRANSPOSED else 1)
        if DROPOUT:
            extra = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            extra = add_low_rank(
                extra, low_ptr, up_ptr, rows, columns, live, wanted, N, r, RANK, UP_TRANSPOSED, INTERPRET
            )
            keep = keep_tile(
                seeds_ptr, first + rows, live, first_column, rows_per_sample, threshold, salt_lo, salt_hi, COLUMNS
            )
            y += tl.where(keep, extra * scale, 0.0)
        else:  # in place: a second accumulator of the largest tile would not fit
            y = add_low_rank(
                y * (1.0 / scale), low_ptr, up_ptr, rows, columns, live, wanted, N, r, RANK, UP_TRANSPOSED, INTERPRET
            )
            y *= scale
    if BIAS:
        y += tl.load(bias_ptr + first_column + columns, mask=wanted, other=0.0).to(tl.float32)[None, :]
    y_ptr += first.to(tl.int64) * N + first_column
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y, mask=live[:, None] & wanted[None, :])


def launch_product(
    codes: Tensor,
    row_scale: Tensor,
    wcodes: Tensor,
    wscale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    B: Tensor | None,
    lora_scale: float,
    out_dtype: torch.dtype,
    *,
    exact: bool = False,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Y = (codes·wcodesᵀ)·row_scale·wscale + bias + lora_scale·low·Bᵀ, (M, N).

    codes (M, K), row_scale (M,), wcodes (N, K), wscale (N,), bias (N,), low (M, r), B (N, r).
    """
    low_rank = None if low is None or B is None else _LowRank(low, B.t(), lora_scale)
    how = _How(exact=exact, tile=tile, descriptors=descriptors)
    return _product(codes, wcodes.t(), row_scale, wscale, bias, low_rank, out_dtype, how)


def launch_product_back(
    codes: Tensor,
    row_scale: Tensor,
    wcodes: Tensor,
    d_low: Tensor | None,
    A: Tensor | None,
    out_dtype: torch.dtype,
    *,
    factor: Tensor | None = None,
    p: float = 0.0,
    seeds: Tensor | None = None,
    rows_per_sample: int = 1,
    salt: int = 0,
    exact: bool = True,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """dX = (codes·wcodes)·row_scale·factor + mask ⊙ (d_low·A) / keep_rate, (M, K).

    codes (M, N), row_scale (M,), wcodes (N, K), contiguous or the transpose of a contiguous (K, N), factor (K,),
    d_low (M, r), A (r, K).
    """
    if codes.shape[0] >= TURNED_ROWS and wcodes.stride(1) == 1:
        wcodes = turned(wcodes).t()
    low_rank = None if d_low is None or A is None else _LowRank(d_low, A, 1.0, (p, seeds, rows_per_sample, salt))
    how = _How(exact=exact, tile=tile, descriptors=descriptors)
    return _product(codes, wcodes, row_scale, factor, None, low_rank, out_dtype, how)


@dataclass(frozen=True, kw_only=True)
class _How:
    """How a product is launched; None: as the tables say."""

    exact: bool
    tile: Tile | None
    descriptors: bool | None


@dataclass(frozen=True)
class _LowRank:
    """scale·mask ⊙ (low·up) / keep_rate: low (M, r), up (r, N), contiguous or .t() of it; `mask`: p, seeds, …, salt."""

    low: Tensor
    up: Tensor
    scale: float
    mask: tuple[float, Tensor | None, int, int] = (0.0, None, 1, 0)

    def add_into(self, y: Tensor) -> None:
        """In a pass of its own, in its own dtype."""
        if self.mask[0]:
            launch_dx(y, (self.low * self.scale).contiguous(), self.up.contiguous(), *self.mask)
        elif y.dtype == self.low.dtype:
            y.addmm_(self.low, self.up, alpha=self.scale)
        else:
            y.copy_(torch.addmm(y.to(self.low.dtype), self.low, self.up, alpha=self.scale))


def _product(
    left: Tensor,  # (M, D)
    right: Tensor,  # (D, N)
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    low_rank: _LowRank | None,
    dtype: torch.dtype,
    how: _How,
) -> Tensor:
    assert left.dtype == right.dtype, f"codes must be of one dtype, got {left.dtype} and {right.dtype}"
    assert left.is_contiguous()
    arch = architecture(left.device)
    if arch < LEAST[left.dtype] and not interpreted():
        raise ValueError(
            f"Triton multiplies {left.dtype} from sm_{LEAST[left.dtype]} on, got sm_{arch}. Use backend='torch'."
        )
    if left.dtype == torch.int8 and left.shape[1] > DEEPEST:
        raise ValueError(f"An int32 holds {DEEPEST} products of int8, got {left.shape[1]}. Leave this layer full.")
    y = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    if not y.numel():
        return y
    if low_rank is None or not low_rank.low.shape[1] or not low_rank.scale:
        _run(left, right, row_scale, column_scale, bias, None, y, how)
    elif low_rank.low.element_size() > 2:  # no tensor core multiplies fp32: as scalar code it would hold up the rest
        _run(left, right, row_scale, column_scale, bias, None, y, how)
        low_rank.add_into(y)
    else:
        _run(left, right, row_scale, column_scale, bias, low_rank, y, how)
    return y


def _run(
    left: Tensor,
    right: Tensor,
    row_scale: Tensor,
    column_scale: Tensor | None,
    bias: Tensor | None,
    low_rank: _LowRank | None,
    y: Tensor,
    how: _How,
) -> None:
    (M, D), N, integer, arch = left.shape, right.shape[1], left.dtype == torch.int8, architecture(left.device)
    right_transposed = right.t().is_contiguous()
    right = right if right_transposed else right.contiguous()
    low = up = y
    r, scale, mask = 0, 1.0, mask_arguments(0.0, None, 1, 0, left)
    if low_rank is not None:
        low, up, r = low_rank.low.contiguous(), low_rank.up, low_rank.low.shape[1]
        up = up if up.t().is_contiguous() else up.contiguous()
        mask = mask_arguments(*low_rank.mask, left)
        scale = low_rank.scale * scale_of(low_rank.mask[0])
    exact = how.exact and not integer and arch == 90
    tile = how.tile or product_tile(M, N, arch, exact=exact, dropout=mask["DROPOUT"])
    descriptors = how.descriptors
    if descriptors is None:
        there = D > 0 and D % 16 == 0 and not (left.data_ptr() | right.data_ptr()) % 16
        descriptors = arch >= 90 and right_transposed and there
    _product_kernel[(triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns),)](
        TensorDescriptor.from_tensor(left, [tile.rows, tile.depth]) if descriptors else left,
        TensorDescriptor.from_tensor(right.t(), [tile.columns, tile.depth]) if descriptors else right,
        row_scale, row_scale if column_scale is None else column_scale, row_scale if bias is None else bias, low, up, y,
        M=M, N=N, D=D, r=r, scale=scale, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
        RANK=min(rank_block(r), 32), GROUP=GROUP, INTEGER=integer, EXACT=exact, DESCRIPTORS=descriptors,
        RIGHT_TRANSPOSED=right_transposed, UP_TRANSPOSED=not up.is_contiguous(), COLUMN_SCALE=column_scale is not None,
        BIAS=bias is not None, LOW=low_rank is not None, INTERPRET=interpreted(), num_warps=tile.num_warps,
        num_stages=tile.num_stages, **mask,
    )  # fmt: skip


def product_cases(dtype: torch.dtype, name: str, unit: dict[int, str]) -> Iterator[Case]:
    """Every tile of the table with what it is launched for. `name`: Triton's of the codes; `unit`: arch → PTX."""
    integer, archs = dtype == torch.int8, list(unit)
    wide = {"M": 8192, "N": 4096}
    # form → (RIGHT_TRANSPOSED, UP_TRANSPOSED, COLUMN_SCALE, BIAS, LOW, DROPOUT, exact), at the size that it is seen at
    forms = {
        "forward": ((True, True, True, True, True, False, False), wide),
        "forward r32": ((True, True, True, True, True, False, False), wide),
        "forward few rows": ((True, True, True, False, True, False, False), {"M": 512, "N": 1024}),
        "forward 64 rows": ((True, True, True, False, True, False, False), {"M": 64, "N": 4096}),
        "forward plain": ((True, False, True, False, False, False, False), wide),
        "back": ((True, False, True, False, True, False, False), wide),
        "back dropout": ((True, False, False, False, True, True, False), wide),
        "back dropout r32": ((True, False, False, False, True, True, False), wide),
        "back gathered": ((False, False, False, False, True, True, False), {"M": 255, "N": 4096}),
    }
    if not integer:
        forms["back exact"] = ((True, False, False, False, True, False, True), wide)
        forms["back exact dropout"] = ((True, False, False, False, True, True, True), wide)
    for arch in archs:
        for form, (flags, size) in forms.items():
            right_transposed, up_transposed, column_scale, bias, low, dropout, exact = flags
            if exact and arch != 90:
                continue
            tile = product_tile(**size, arch=arch, exact=exact, dropout=dropout)
            for descriptors in (False, True) if arch >= 90 and right_transposed else (False,):
                pointers = ("row_scale_ptr", "column_scale_ptr", "bias_ptr", "low_ptr", "up_ptr", "y_ptr")
                left = f"tensordesc<{name}[{tile.rows}, {tile.depth}]>" if descriptors else f"*{name}"
                right = f"tensordesc<{name}[{tile.columns}, {tile.depth}]>" if descriptors else f"*{name}"
                operands = () if descriptors else ("left_ptr", "right_ptr")
                yield Case(
                    kernel=_product_kernel,
                    label=f"{name} {form} {tile.rows}x{tile.columns}x{tile.depth}{' TMA' if descriptors else ''}",
                    signature={
                        "left_ptr": left, "right_ptr": right,
                        **{one: "*fp32" if "scale" in one else "*bf16" for one in pointers},
                        **dict.fromkeys(("M", "N", "D", "r"), "i32"), **MASK_SIGNATURE, "scale": "fp32",
                    },
                    constants={
                        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth,
                        "RANK": 32 if "r32" in form else 16, "GROUP": GROUP,
                        "INTEGER": integer, "EXACT": exact, "DESCRIPTORS": descriptors,
                        "RIGHT_TRANSPOSED": right_transposed, "UP_TRANSPOSED": up_transposed,
                        "COLUMN_SCALE": column_scale, "BIAS": bias, "LOW": low, "DROPOUT": dropout, "INTERPRET": False,
                    },
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    tensor_cores=True,
                    aligned=(*operands, *pointers, "N", "D", "r"),
                    archs=(f"sm_{arch}",),
                    demands={f"sm_{arch}": unit[arch]},
                )  # fmt: skip
