"""fp8 (e4m3) matrix units through torch: `_scaled_mm` with bare products, on CUDA from Ada and Hopper (sm_89) on.

    y  = (q(x)·Wqᵀ)·s_x ⊙ s_N + b           q(x) = e4m3(x / s_x), s_x = max|x| / 448 for each row
    dx = (q(dy ⊙ s_N)·Wq)·s_g               straight through: the rounding counts as the identity

Shapes: x (M, K), Wq (N, K) float8_e4m3fn with one scale s_N for each of its rows. Sums are float32 (cuBLASLt's slow
accumulation: the fast one keeps 14 bits). The scales are applied by `_passes`, as for int8.
"""

import torch
from torch import Tensor

from ._frozen_units import Quantising

MULTIPLE = 16
NEEDS = (8, 9)


class Fp8(Quantising):
    dtype = torch.float8_e4m3fn

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        return fp8_product(codes, weight.t())

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        # cuBLASLt takes its right operand by columns only: a copy of the weight, which lives for one product
        return fp8_product(codes, weight.t().contiguous().t())


def fp8_product(left: Tensor, right: Tensor) -> Tensor:
    """left·right in float32.

    Args:
        left: (M, K), right: (K, N) by columns, both float8_e4m3fn on CUDA. Sizes that are no multiple of 16 are
            filled up with zeros inside.

    Returns:
        (M, N) float32.
    """
    (rows, inner), columns = left.shape, right.shape[1]
    if not rows or not inner or not columns:
        return left.new_zeros(rows, columns, dtype=torch.float32)
    across, deep = -columns % MULTIPLE, -inner % MULTIPLE
    if across or deep:  # padding is not written for float8; its zero has int8's bits
        left = torch.nn.functional.pad(left.view(torch.int8), (0, deep)).view(left.dtype)
        turned = torch.nn.functional.pad(right.t().view(torch.int8), (0, deep, 0, across))
        right = turned.view(right.dtype).t()
    one = torch.ones((), device=left.device)
    found = torch._scaled_mm(left, right, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    return found[:, :columns]


def cuda_units(device: int) -> bool:
    """Whether this GPU multiplies e4m3 numbers."""
    return torch.cuda.get_device_capability(device) >= NEEDS
