"""Launchers of int8 products: both frozen GEMMs of a LoRA linear on the int8 units of Ampere (sm_80) and later.

Turing has such units, but Triton compiles no `tl.dot` of int8 for it: there the products are `torch._int_mm`, cuBLAS.
The kernels are in `_quantise` and `_eight_bit_gemm`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._eight_bit_gemm import launch_product, launch_product_back, product_cases
from ._quantise import quantise_cases, quantise_parts

__all__ = ["launch_product", "launch_product_back", "launch_quantise_parts", "launch_quantise_rows"]


def launch_quantise_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x·factor ≈ codes·row_scale: x (M, K), factor (K,) fp32 → codes (M, K) int8 in ±127, row_scale (M,) fp32."""
    return quantise_parts([x], factor, torch.int8)


def launch_quantise_parts(parts: Sequence[Tensor], factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for parts (M, K_i) laid end to end, as one x (M, K) would be."""
    return quantise_parts(parts, factor, torch.int8)


UNITS = {
    80: r"mma\.sync\.aligned\.m16n8k32\..*s32\.s8\.s8\.s32",
    89: r"mma\.sync\.aligned\.m16n8k32\..*s32\.s8\.s8\.s32",
    90: r"wgmma\.mma_async\..*k32\.s32\.s8\.s8",
}
CASES = [
    *product_cases(torch.int8, "i8", UNITS),
    *quantise_cases(torch.int8, "i8", (75, 80, 90)),
]
