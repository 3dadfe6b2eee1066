"""int8 matrix units through torch: oneDNN's VNNI and AMX products on a CPU, cuBLASLt's on CUDA.

    y  = (q(x)·Wqᵀ)·s_x ⊙ s_N + b           q(x) = round(x / s_x), s_x = max|x| / 127 for each row
    dx = (q(dy ⊙ s_N)·Wq)·s_g               straight through: the rounding counts as the identity

Shapes: x (M, K), Wq (N, K) int8 with one scale s_N for each of its rows. Sums are int32 and exact up to K = 133,000.
Rows and products are scaled by `_passes`; the layers on top are `lora_linear`'s (Projection with a FrozenWeight).
Source: row-wise dynamic quantisation as in LLM.int8() (Dettmers et al. 2022), without its mixed decomposition.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._frozen_units import Quantising

LEAST_ROWS = 17  # of cuBLASLt's int8 products
MULTIPLE = 8


class Int8(Quantising):
    dtype = torch.int8

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        return int8_product(codes, weight.t())

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        return int8_product(codes, weight)


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """left·right in int32, exactly.

    Args:
        left: (M, K) int8; right: (K, N) int8, of any layout. Sizes that CUDA's products don't take (M below 17, K
            or N no multiple of 8) are filled up with zeros inside.

    Returns:
        (M, N) int32.
    """
    (rows, inner), columns = left.shape, right.shape[1]
    if not rows or not inner or not columns:
        return left.new_zeros(rows, columns, dtype=torch.int32)
    if left.is_cuda:
        down, across, deep = max(LEAST_ROWS - rows, 0), -columns % MULTIPLE, -inner % MULTIPLE
        if down or across or deep:
            left = torch.nn.functional.pad(left, (0, deep, 0, down))
            right = torch.nn.functional.pad(right, (0, across, 0, deep))
            return torch._int_mm(left, right)[:rows, :columns]
    return torch._int_mm(left, right)


@cache
def cpu_units() -> str | None:
    """The int8 units of this CPU ("AMX", "VNNI"), None where it has none and `_int_mm` is slow."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    if "amx_int8" in flags:
        return "AMX"
    return "VNNI" if flags & {"avx512_vnni", "avx_vnni"} else None
