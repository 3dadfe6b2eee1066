"""Triton kernel of `peft_kernels.rope`; the math is there.

One program per (sample, position): it reads that position's cos and sin once and turns every query and key head.
Launched without FP fusion, so that fp32 has the bits of the eager formula.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from ._cases import Case

TILE = 2048  # heads × half a head held at once, at most
PER_THREAD = 8  # numbers of each half that a thread holds, at least: 16 bytes of half precision


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, heads, x_head, y_head, cos_first, cos_second, sin_first, sin_second,
    INVERSE: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, WIDTH)[None, :]
    for start in range(0, heads, BLOCK_HEADS):
        rows = start + tl.arange(0, BLOCK_HEADS)[:, None]
        mask = (rows < heads) & (cols < HALF)
        x_at = x_ptr + rows.to(tl.int64) * x_head + cols
        y_at = y_ptr + rows.to(tl.int64) * y_head + cols
        first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_at + HALF, mask=mask, other=0.0).to(tl.float32)
        if INVERSE:
            turned_first = first * cos_first + second * sin_second
            turned_second = second * cos_second - first * sin_first
        else:
            turned_first = first * cos_first - second * sin_first
            turned_second = second * cos_second + first * sin_second
        tl.store(y_at, turned_first, mask=mask)
        tl.store(y_at + HALF, turned_second, mask=mask)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, positions, q_heads, k_heads,
    q_sample, q_head, q_position, k_sample, k_head, k_position,
    q_out_sample, q_out_head, q_out_position, k_out_sample, k_out_head, k_out_position,
    cos_sample, cos_position, sin_sample, sin_position,
    INVERSE: tl.constexpr, BLOCK_HEADS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    sample = (program // positions).to(tl.int64)
    position = (program % positions).to(tl.int64)
    cols = tl.arange(0, WIDTH)[None, :]
    mask = cols < HALF
    cos_at = cos_ptr + (sample * cos_sample + position * cos_position) + cols
    sin_at = sin_ptr + (sample * sin_sample + position * sin_position) + cols
    cos_first = tl.load(cos_at, mask=mask, other=0.0).to(tl.float32)
    cos_second = tl.load(cos_at + HALF, mask=mask, other=0.0).to(tl.float32)
    sin_first = tl.load(sin_at, mask=mask, other=0.0).to(tl.float32)
    sin_second = tl.load(sin_at + HALF, mask=mask, other=0.0).to(tl.float32)
    _turn_heads(
        q_ptr + (sample * q_sample + position * q_position),
        q_out_ptr + (sample * q_out_sample + position * q_out_position),
        q_heads, q_head, q_out_head, cos_first, cos_second, sin_first, sin_second,
        INVERSE, BLOCK_HEADS, HALF, WIDTH,
    )  # fmt: skip
    _turn_heads(
        k_ptr + (sample * k_sample + position * k_position),
        k_out_ptr + (sample * k_out_sample + position * k_out_position),
        k_heads, k_head, k_out_head, cos_first, cos_second, sin_first, sin_second,
        INVERSE, BLOCK_HEADS, HALF, WIDTH,
    )  # fmt: skip


def _tile(half: int, heads: int) -> dict[str, int]:
    """`half` is a constant of the kernel: only so does the compiler know that 40 columns start at 16 bytes."""
    width = triton.next_power_of_2(half)
    return {"BLOCK_HEADS": max(1, min(triton.next_power_of_2(heads), TILE // width)), "HALF": half, "WIDTH": width}


def _num_warps(tile: dict[str, int]) -> int:
    return min(4, max(1, tile["BLOCK_HEADS"] * tile["WIDTH"] // (32 * PER_THREAD)))


def launch_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool, q_out: Tensor, k_out: Tensor) -> None:
    """Writes the turned q and k, (B, H, T, D) and (B, Hkv, T, D), into q_out and k_out of any layout."""
    samples, q_heads, positions, head = q.shape
    if not (q.numel() or k.numel()):
        return
    inputs = [t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, cos, sin)]
    q, k, cos, sin = inputs
    tile = _tile(head // 2, max(q_heads, k.shape[1]))
    # an expanded first dimension, or one table for all samples, has stride 0
    tables = [(0 if t.shape[0] == 1 else t.stride(0), t.stride(1)) for t in (cos, sin)]
    _rope_kernel[(samples * positions,)](
        q, k, cos, sin, q_out, k_out, positions, q_heads, k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3], *k_out.stride()[:3], *tables[0], *tables[1],
        INVERSE=inverse, num_warps=_num_warps(tile), enable_fp_fusion=False, **tile,
    )  # fmt: skip


def _case(dtype: str, table: str, inverse: bool, heads: int, head: int, integers: str = "i32") -> Case:
    out = dtype if inverse or table == dtype else "fp32"  # forward, the wider of the two
    types = {"q": dtype, "k": dtype, "cos": table, "sin": table, "q_out": out, "k_out": out}
    pointers = {f"{name}_ptr": f"*{type_}" for name, type_ in types.items()}
    strides = [f"{x}_{of}" for x in ("q", "k", "q_out", "k_out") for of in ("sample", "head", "position")]
    strides += [f"{x}_{of}" for x in ("cos", "sin") for of in ("sample", "position")]
    tile = _tile(head // 2, heads)
    return Case(
        kernel=_rope_kernel,
        label=f"{dtype} {table} {heads}x{head}{' inverse' if inverse else ''} {integers}",
        signature={
            **pointers,
            **dict.fromkeys(("positions", "q_heads", "k_heads"), "i32"),
            **dict.fromkeys(strides, integers),
        },
        constants={"INVERSE": inverse, **tile},
        num_warps=_num_warps(tile),
        aligned=(*pointers, *strides),
    )


CASES = [
    *(_case(dtype, dtype, inverse, 32, 128) for dtype in ("bf16", "fp16", "fp32") for inverse in (False, True)),
    _case("bf16", "fp32", False, 32, 128),
    *(_case("bf16", "bf16", False, heads, head) for heads, head in ((9, 64), (8, 256), (32, 80), (1, 16))),
    _case("fp32", "fp32", True, 9, 64, "i64"),
]
