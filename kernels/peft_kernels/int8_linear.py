"""int8 matrix units through torch: oneDNN's VNNI and AMX products on a CPU, cuBLASLt's on CUDA.

    y  = (q(x)·Wqᵀ)·s_x ⊙ s_N + b           q(x) = round(x / s_x), s_x = max|x| / 127 for each row
    dx = (q(dy ⊙ s_N)·Wq)·s_g               straight through: the rounding counts as the identity

Shapes: x (M, K), Wq (N, K) int8 with one scale s_N for each of its rows. Sums are int32 and exact up to K = 133,000.
Rows and products are scaled by `_passes`; the layers on top are `lora_linear`'s (Projection with a FrozenWeight).
Source: row-wise dynamic quantisation as in LLM.int8() (Dettmers et al. 2022), without its mixed decomposition.
"""

import threading
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
        return int8_product(codes, weight.t(), _room(codes, weight.shape[0]))

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        return int8_product(codes, weight, _room(codes, weight.shape[1]))


_rooms = threading.local()


def _room(codes: Tensor, columns: int) -> Tensor | None:
    """Where this thread's products on a CPU lie, one after another: fresh memory would cost a third of the product."""
    if type(codes) is not Tensor or codes.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    size = len(codes) * columns
    room: Tensor | None = getattr(_rooms, "room", None)
    if room is None or room.numel() < size:
        with torch.inference_mode(False):  # what is made inside could not be written to outside
            room = _rooms.room = torch.empty(size, dtype=torch.int32)
    return room.as_strided((len(codes), columns), (columns, 1))


def int8_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left·right in int32, exactly.

    Args:
        left: (M, K) int8; right: (K, N) int8, of any layout. Sizes that CUDA's products don't take (M below 17, K
            or N no multiple of 8) are filled up with zeros inside.
        out: (M, N) int32 on a CPU, to write to.

    Returns:
        (M, N) int32, `out` where given.
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
    return torch._int_mm(left, right) if out is None else torch._int_mm(left, right, out=out)


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
