"""Launchers of fp8 products: both frozen GEMMs of a LoRA linear on the e4m3 units of Ada (sm_89) and Hopper (sm_90).

e4m3 has three bits behind the leading one, numbers up to 448 and steps of 2^-9 near zero; it has no infinities. The
kernels are in `_quantise` and `_eight_bit_gemm`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._eight_bit_gemm import launch_product, launch_product_back, product_cases
from ._quantise import quantise_cases, quantise_parts

__all__ = ["launch_product", "launch_product_back", "launch_quantise_parts", "launch_quantise_rows"]


def launch_quantise_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x·factor ≈ codes·row_scale: x (M, K), factor (K,) fp32 → codes (M, K) float8_e4m3fn, row_scale (M,) fp32."""
    return quantise_parts([x], factor, torch.float8_e4m3fn)


def launch_quantise_parts(parts: Sequence[Tensor], factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for parts (M, K_i) laid end to end, as one x (M, K) would be."""
    return quantise_parts(parts, factor, torch.float8_e4m3fn)


UNITS = {
    89: r"mma\.sync\.aligned\.m16n8k32\..*f32\.e4m3\.e4m3\.f32",
    90: r"wgmma\.mma_async\..*k32\.f32\.e4m3\.e4m3",
}
CASES = [
    *product_cases(torch.float8_e4m3fn, "fp8e4nv", UNITS),
    *quantise_cases(torch.float8_e4m3fn, "fp8e4nv", (89, 90)),
]
