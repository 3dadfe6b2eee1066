"""Which elements dropout keeps, drawn inside whatever kernel needs to know (Philox-4x32-10, Salmon et al. 2011).

Row m of x (M, K) is position m % rows_per_sample of sample m // rows_per_sample. Eight neighbours in a row share one
draw: key = the sample's 64-bit seed, counter = (column // 8, position, salt low, salt high); its four 32-bit outputs,
low half first, are the 16-bit numbers of columns 8g, 8g+1, …, 8g+7. An element is kept where its number ≥ threshold.
The map knows nothing of block sizes, of M, or of the other samples, so a mask can be drawn again by any kernel.
"""

# mypy: allow-untyped-defs
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# arguments whose value must not make a new compilation
UNSPECIALISED = ["M", "rows_per_sample", "threshold", "salt_lo", "salt_hi"]


def threshold_of(p: float) -> int:
    """The 16-bit number below which an element is dropped."""
    return round(p * 65536)


def scale_of(p: float) -> float:
    """What kept values are multiplied by: 1 / the rate at which they really are kept. 0 where nothing is kept."""
    kept = 65536 - threshold_of(p)
    return 65536 / kept if kept else 0.0


def mask_arguments(p: float, seeds: Tensor | None, rows_per_sample: int, salt: int, stand_in: Tensor) -> dict[str, Any]:
    """A kernel's arguments that name a mask. Without dropout no seeds are read and `stand_in` takes their place."""
    dropped = threshold_of(p) > 0
    if dropped:
        assert seeds is not None, "dropout needs seeds"
        assert seeds.dtype == torch.int64, f"seeds must be int64, got {seeds.dtype}"
        seeds = seeds.contiguous()
    return {
        "seeds_ptr": seeds if dropped else stand_in,
        "rows_per_sample": max(rows_per_sample, 1),
        "threshold": threshold_of(p),
        "salt_lo": _signed(salt),
        "salt_hi": _signed(salt >> 32),
        "DROPOUT": dropped,
    }


def _signed(word: int) -> int:
    """The low 32 bits as int32, so that every salt gives the same argument type."""
    return (word + 2**31) % 2**32 - 2**31


@triton.jit
def keep_tile(
    seeds_ptr,
    row,  # (R,) int32: row of x
    live,  # (R,) which rows exist
    first_column,  # multiple of 8
    rows_per_sample,
    threshold,
    salt_lo,
    salt_hi,
    COLUMNS: tl.constexpr,
):
    """(R, COLUMNS) of booleans: what is kept of x[row, first_column : first_column + COLUMNS]."""
    seed = tl.load(seeds_ptr + row // rows_per_sample, mask=live, other=0)
    group = first_column // 8 + tl.arange(0, COLUMNS // 8)
    position = (row % rows_per_sample)[:, None]
    word = tl.broadcast_to(group[None, :], position.shape[0], COLUMNS // 8)
    none = tl.zeros_like(word)
    o0, o1, o2, o3 = tl.philox(seed[:, None], word, none + position, none + salt_lo, none + salt_hi)
    # interleaving twice over puts output i at 4g + i; halves then alternate, low first
    low = tl.interleave(tl.interleave(_low(o0), _low(o2)), tl.interleave(_low(o1), _low(o3)))
    high = tl.interleave(tl.interleave(_high(o0), _high(o2)), tl.interleave(_high(o1), _high(o3)))
    return tl.interleave(low >= threshold, high >= threshold)


@triton.jit
def _low(x):
    return (x & 0xFFFF).to(tl.int32)


@triton.jit
def _high(x):
    return (x >> 16).to(tl.int32)
