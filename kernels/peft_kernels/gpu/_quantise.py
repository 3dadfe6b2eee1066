"""Rows of activations as 8-bit codes, and 8-bit matrices turned over: what `int8_gemm` and `fp8_gemm` share.

    scale_m = max_k |x_mk·f_k| / largest code        1 for a row of zeros, NaN for a row that holds a NaN or an inf
    code_mk = x_mk·f_k · (1 / scale_m), rounded to the nearest code, ties to even

In this order and without fused multiply-adds, so that the bits are those of the same line in torch. Bytes moved, x of
2 bytes: 3MK, the least there is; rows longer than `WIDEST` are read twice, the second time mostly from L2.
"""

# mypy: allow-untyped-defs
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case
from ._rows import LOOP, TILES

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# Width of the block → rows per program, warps: up to 32 values a thread. Wider ones spill.
WIDE_TILES = {**TILES, 16384: (1, 16)}
WIDEST = max(WIDE_TILES)
LOOP_WARPS = 16  # with 8, sm_90 keeps 24 bytes of a loop over fp32 rows in memory
SIDE = 128


@cache
def architecture(device: torch.device) -> int:
    """80 for sm_80; that too where kernels are interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_grid(dtype: torch.dtype, arch: int) -> bool:
    """Whether codes are rounded before they are converted: before Hopper, Triton makes e4m3 of fp16, cut off from fp32;
    its interpreter rounds halves up and carries nothing into the exponent."""
    return dtype == torch.float8_e4m3fn and arch < 90


def quantise_tile(features: int) -> dict[str, Any]:
    """Launch constants for rows of so many features."""
    whole = features <= WIDEST
    width = max(min(WIDE_TILES), triton.next_power_of_2(features)) if whole else LOOP
    rows, warps = WIDE_TILES[width] if whole else (1, LOOP_WARPS)
    return {"WHOLE": whole, "ROWS": rows, "COLUMNS": width, "num_warps": warps}


@triton.jit
def _part(x_ptr, rows, columns, live, K):
    inside = live[:, None] & ((columns >= 0) & (columns < K))[None, :]
    return tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _factored(
    x_ptr, y_ptr, z_ptr, factor_ptr, rows, columns, live, KX, KY, KZ, PARTS: tl.constexpr, FACTOR: tl.constexpr
):
    """A block of the parts' rows laid end to end, times factor, in fp32."""
    x = _part(x_ptr, rows, columns, live, KX)
    if PARTS > 1:
        x = tl.where((columns < KX)[None, :], x, _part(y_ptr, rows, columns - KX, live, KY))
    if PARTS > 2:
        x = tl.where((columns < KX + KY)[None, :], x, _part(z_ptr, rows, columns - (KX + KY), live, KZ))
    if FACTOR:
        x *= tl.load(factor_ptr + columns, mask=columns < KX + KY + KZ, other=0.0)[None, :]
    return x


@triton.jit
def _magnitude(x):
    """|x| as an integer that grows with it: inf is above every number, and NaN above inf, which no maximum loses."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _on_grid(v):
    """v rounded to e4m3: three bits behind the leading one, and steps of 2^-9 below 2^-6."""
    bits = v.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    small = (v + 24576.0) - 24576.0  # 1.5·2^14, whose last bit is 2^-9
    small = small.to(tl.int32, bitcast=True) | (bits & -0x80000000)  # zero keeps its sign
    return tl.where(tl.abs(v) < 0.015625, small, normal).to(tl.float32, bitcast=True)


@triton.jit
def _code(v, INTEGER: tl.constexpr, ON_GRID: tl.constexpr):
    if INTEGER:
        # 1.5·2^23, whose last bit is 1: the sum ends in the nearest integer's two's complement
        return (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        if ON_GRID:
            v = _on_grid(v)
        return v.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["M"])
def _quantise_kernel(
    x_ptr,  # (M, KX)
    y_ptr,  # (M, KY), read if PARTS > 1
    z_ptr,  # (M, KZ), read if PARTS > 2
    factor_ptr,  # (K,) fp32, K = KX + KY + KZ
    codes_ptr,  # (M, K)
    row_scale_ptr,  # (M,) fp32
    M,
    KX,
    KY,
    KZ,
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
    PARTS: tl.constexpr,
    FACTOR: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ON_GRID: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live = rows < M - first
    K = KX + KY + KZ
    x_ptr += first.to(tl.int64) * KX
    y_ptr += first.to(tl.int64) * KY
    z_ptr += first.to(tl.int64) * KZ
    codes_ptr += first.to(tl.int64) * K
    row_scale_ptr += first
    if WHOLE:
        x = _factored(x_ptr, y_ptr, z_ptr, factor_ptr, rows, columns, live, KX, KY, KZ, PARTS, FACTOR)
        most = tl.max(_magnitude(x), axis=1)
    else:
        magnitudes = tl.zeros((ROWS, COLUMNS), tl.int32)
        for start in range(0, K, COLUMNS):
            x = _factored(x_ptr, y_ptr, z_ptr, factor_ptr, rows, start + columns, live, KX, KY, KZ, PARTS, FACTOR)
            magnitudes = tl.maximum(magnitudes, _magnitude(x))
        most = tl.max(magnitudes, axis=1)
    most = most.to(tl.float32, bitcast=True)
    # the smallest normal number at least: below it 1 / scale would overflow
    scale = tl.where(most > 0, tl.maximum(tl.div_rn(most, LARGEST), 1.1754943508222875e-38), 1.0)
    scale = tl.where(most < float("inf"), scale, float("nan"))
    inverse = tl.div_rn(1.0, scale)[:, None]
    tl.store(row_scale_ptr + rows, scale, mask=live)
    if WHOLE:
        inside = live[:, None] & (columns < K)[None, :]
        tl.store(codes_ptr + rows[:, None] * K + columns[None, :], _code(x * inverse, INTEGER, ON_GRID), mask=inside)
    else:
        for start in range(0, K, COLUMNS):
            x = _factored(x_ptr, y_ptr, z_ptr, factor_ptr, rows, start + columns, live, KX, KY, KZ, PARTS, FACTOR)
            inside = live[:, None] & (start + columns < K)[None, :]
            places = codes_ptr + rows[:, None] * K + start + columns[None, :]
            tl.store(places, _code(x * inverse, INTEGER, ON_GRID), mask=inside)


def quantise_parts(parts: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (M, K) of `dtype` of parts (M, K_i), laid end to end, and their scales (M,) fp32; factor (K,) fp32.

    Up to three parts are read where they lie; more are copied together first.
    """
    if len(parts) > 3:
        parts = [torch.cat(list(parts), 1)]
    parts = [part.contiguous() for part in parts]
    M, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    K, first = sum(widths), parts[0]
    codes = torch.empty(M, K, dtype=dtype, device=first.device)
    row_scale = torch.empty(M, dtype=torch.float32, device=first.device)
    if not K:
        row_scale.fill_(1)
    if not M * K:
        return codes, row_scale
    constants = quantise_tile(K)
    x, y, z = [*parts, first, first][:3]
    KX, KY, KZ = [*widths, 0, 0][:3]
    _quantise_kernel[(triton.cdiv(M, constants["ROWS"]),)](
        x, y, z, first if factor is None else factor, codes, row_scale, M=M, KX=KX, KY=KY, KZ=KZ,
        LARGEST=LARGEST[dtype], INTEGER=dtype == torch.int8, PARTS=len(parts), FACTOR=factor is not None,
        ON_GRID=on_grid(dtype, architecture(first.device)), enable_fp_fusion=False, **constants,
    )  # fmt: skip
    return codes, row_scale


@triton.jit
def _turn_kernel(w_ptr, t_ptr, N, K, SIDE: tl.constexpr):
    """(N, K) → (K, N), single bytes."""
    first, first_column = tl.program_id(0) * SIDE, tl.program_id(1) * SIDE
    rows, columns = tl.arange(0, SIDE), tl.arange(0, SIDE)
    inside = (rows < N - first)[:, None] & (columns < K - first_column)[None, :]
    w_ptr += first.to(tl.int64) * K + first_column
    t_ptr += first_column.to(tl.int64) * N + first
    tile = tl.load(w_ptr + rows[:, None] * K + columns[None, :], mask=inside, other=0)
    inside = (columns < K - first_column)[:, None] & (rows < N - first)[None, :]
    tl.store(t_ptr + columns[:, None] * N + rows[None, :], tl.trans(tile), mask=inside)


def turned(codes: Tensor) -> Tensor:
    """The transpose of contiguous 8-bit codes (N, K) as a contiguous (K, N)."""
    N, K = codes.shape
    out = torch.empty(K, N, dtype=codes.dtype, device=codes.device)
    if N * K:
        _turn_kernel[(triton.cdiv(N, SIDE), triton.cdiv(K, SIDE))](
            codes.view(torch.int8), out.view(torch.int8), N=N, K=K, SIDE=SIDE, num_warps=8
        )
    return out


def quantise_cases(dtype: torch.dtype, name: str, archs: tuple[int, ...]) -> Iterator[Case]:
    """Every width of the table and the loop; `name`: Triton's of the codes' type."""
    pointers, sizes = ("x_ptr", "y_ptr", "z_ptr", "factor_ptr", "codes_ptr", "row_scale_ptr"), ("KX", "KY", "KZ")
    # e4m3 from fp32 on Hopper, from fp16 (two at a time) before
    units = {grid: rf"cvt\.rn\.satfinite\.e4m3x2\.{'f16x2' if grid else 'f32'}" for grid in (False, True)}
    for features in (*WIDE_TILES, WIDEST + 1):
        for source, parts, factor in (("bf16", 1, False), ("bf16", 3, True), ("fp32", 1, True)):
            if source == "fp32" and features not in (LOOP, WIDEST, WIDEST + 1):
                continue
            constants = quantise_tile(features)
            warps = constants.pop("num_warps")
            size = f"{constants['ROWS']}x{constants['COLUMNS']}{'' if constants['WHOLE'] else ' loop'}"
            types = (*[f"*{source}"] * 3, "*fp32", f"*{name}", "*fp32")
            for grid in sorted({on_grid(dtype, arch) for arch in archs}):
                own = tuple(f"sm_{arch}" for arch in archs if on_grid(dtype, arch) == grid)
                yield Case(
                    kernel=_quantise_kernel,
                    label=f"{source} to {name} {size} parts{parts}{' factor' if factor else ''}",
                    signature={**dict(zip(pointers, types, strict=True)), "M": "i32", **dict.fromkeys(sizes, "i32")},
                    constants={
                        **constants, "LARGEST": LARGEST[dtype], "INTEGER": dtype == torch.int8, "PARTS": parts,
                        "FACTOR": factor, "ON_GRID": grid,
                    },
                    num_warps=warps,
                    aligned=(*pointers, *sizes),
                    archs=own,
                    demands={} if dtype == torch.int8 else dict.fromkeys(own, units[grid]),
                    fp_fusion=False,
                )  # fmt: skip


CASES = [
    Case(
        kernel=_turn_kernel,
        label=f"{SIDE}x{SIDE}",
        signature={"w_ptr": "*i8", "t_ptr": "*i8", "N": "i32", "K": "i32"},
        constants={"SIDE": SIDE},
        num_warps=8,
        aligned=("w_ptr", "t_ptr", "N", "K"),
    )
]
