"""Triton kernels of `quantised_weight`: codes of 4 or 8 bits to numbers, in one pass.

Bytes moved for a number of 2 bytes: 2.5 from four bits, 3 from eight, and the absmax. bitsandbytes' two kernels write
the absmax of a nested weight out in float32 between them.
"""

# mypy: allow-untyped-defs

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case

BYTES = 512
"""Of 4-bit codes, two numbers each, that a program reads."""
ROWS, COLUMNS = 4, 512  # of 8-bit codes
NUM_WARPS = 4


@triton.jit
def _four_bits_kernel(
    codes_ptr,  # (⌈numbers/2⌉,) uint8
    table_ptr,  # (16,) fp32
    absmax_ptr,  # (blocks,) fp32, or uint8 if NESTED
    inner_table_ptr,  # (256,) fp32; this and what follows is read if NESTED
    inner_absmax_ptr,  # (⌈blocks/INNER_BLOCKSIZE⌉,) fp32
    offset_ptr,  # (1,) fp32
    out_ptr,  # (numbers,)
    numbers,
    BLOCKSIZE: tl.constexpr,
    INNER_BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    BYTES: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BYTES  # in bytes of codes
    places = tl.arange(0, BYTES)
    left = numbers - 2 * first  # numbers of this program, and those of later ones
    code = tl.load(codes_ptr + first + places, mask=2 * places < left, other=0).to(tl.int32)
    block = 2 * first // BLOCKSIZE
    blocks = (2 * places + (2 * first % BLOCKSIZE).to(tl.int32)) // BLOCKSIZE  # from that one on
    absmax = tl.load(absmax_ptr + block + blocks, mask=2 * places < left, other=0)
    if NESTED:
        inners = (blocks + (block % INNER_BLOCKSIZE).to(tl.int32)) // INNER_BLOCKSIZE
        inner = tl.load(inner_absmax_ptr + block // INNER_BLOCKSIZE + inners, mask=2 * places < left, other=0.0)
        absmax = tl.load(inner_table_ptr + absmax.to(tl.int32)) * inner + tl.load(offset_ptr)
    upper = tl.load(table_ptr + (code >> 4)) * absmax
    lower = tl.load(table_ptr + (code & 15)) * absmax
    both = tl.arange(0, 2 * BYTES)
    tl.store(out_ptr + 2 * first + both, tl.interleave(upper, lower), mask=both < left)


@triton.jit
def _eight_bits_kernel(
    codes_ptr,  # (N, K) int8
    absmax_ptr,  # (N,) fp32
    out_ptr,  # (N, K)
    N,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    live = first + rows < N
    inside = live[:, None] & (columns < K)[None, :]
    at = first * K + rows[:, None] * K + columns[None, :]
    code = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.float32)
    absmax = tl.load(absmax_ptr + first + rows, mask=live, other=0.0)
    tl.store(out_ptr + at, code * absmax[:, None] * 0.007874015718698502, mask=inside)


def launch_four_bits(
    codes: Tensor,
    table: Tensor,
    absmax: Tensor,
    blocksize: int,
    nested: tuple[Tensor, Tensor, Tensor, int] | None,
    out: Tensor,
) -> None:
    """Numbers of nf4 or fp4 codes into `out`, contiguous, at least one of them, rounded to its dtype.

    No product and sum become one instruction: the bits are those of plain torch.

    Args:
        codes: uint8 (⌈numbers/2⌉,).
        table: float32 (16,).
        absmax: float32 (blocks,), or uint8 where nested.
        nested: its table (256,), absmax and offset, all float32, and its blocksize.
    """
    *inner, inner_blocksize = nested or (table, table, table, 1)
    numbers = out.numel()
    _four_bits_kernel[(triton.cdiv(numbers, 2 * BYTES),)](
        codes, table, absmax, *inner, out, numbers,
        BLOCKSIZE=blocksize, INNER_BLOCKSIZE=inner_blocksize, NESTED=nested is not None,
        BYTES=BYTES, num_warps=NUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def launch_eight_bits(codes: Tensor, absmax: Tensor, out: Tensor) -> None:
    """Numbers of int8 codes (N, K), absmax float32 (N,), into `out`, contiguous, not empty, rounded to its dtype."""
    N, K = codes.shape
    _eight_bits_kernel[(triton.cdiv(N, ROWS), triton.cdiv(K, COLUMNS))](
        codes, absmax, out, N, K, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS, enable_fp_fusion=False
    )


def _four_bits_case(dtype: str, blocksize: int, nested: bool, numbers: str = "i32") -> Case:
    floats = dict.fromkeys(("table_ptr", "inner_table_ptr", "inner_absmax_ptr", "offset_ptr"), "*fp32")
    return Case(
        kernel=_four_bits_kernel,
        label=f"{dtype} blocks of {blocksize}{' nested' if nested else ''}{'' if numbers == 'i32' else ' ' + numbers}",
        signature={
            "codes_ptr": "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            "out_ptr": f"*{dtype}",
            "numbers": numbers,
            **floats,
        },
        constants={
            "BLOCKSIZE": blocksize,
            "INNER_BLOCKSIZE": 256 if nested else 1,
            "NESTED": nested,
            "BYTES": BYTES,
        },
        num_warps=NUM_WARPS,
        aligned=("codes_ptr", "table_ptr", "absmax_ptr", "out_ptr", "numbers"),
        fp_fusion=False,
    )


def _eight_bits_case(dtype: str) -> Case:
    sizes: dict[str, Any] = dict.fromkeys(("N", "K"), "i32")
    return Case(
        kernel=_eight_bits_kernel,
        label=dtype,
        signature={"codes_ptr": "*i8", "absmax_ptr": "*fp32", "out_ptr": f"*{dtype}", **sizes},
        constants={"ROWS": ROWS, "COLUMNS": COLUMNS},
        num_warps=NUM_WARPS,
        aligned=("codes_ptr", "absmax_ptr", "out_ptr", "N", "K"),
        fp_fusion=False,
    )


CASES = [
    *(_four_bits_case(dtype, 64, nested) for dtype in ("bf16", "fp16", "fp32") for nested in (False, True)),
    _four_bits_case("bf16", 4096, True),
    _four_bits_case("bf16", 64, True, "i64"),
    *(_eight_bits_case(dtype) for dtype in ("bf16", "fp16", "fp32")),
]
