"""Frozen 8-bit products as registered ops on Triton kernels; FakeTensorMode and torch.compile see their shapes.

Codes are int8 or float8_e4m3fn, 2-D; weights are (N, K), contiguous or the transpose of a contiguous (K, N). See
`frozen_weight` for the math.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


def _launchers(codes: torch.dtype) -> ModuleType:
    if codes == torch.int8:
        from .gpu import int8_gemm

        return int8_gemm
    from .gpu import fp8_gemm

    return fp8_gemm


@torch.library.custom_op("peft_kernels::frozen_quantise_rows", mutates_args=())
def quantise_rows(x: Tensor, factor: Tensor | None, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """x·factor ≈ codes·row_scale: x (M, K), factor (K,) fp32 → codes (M, K), row_scale (M,) fp32.

    A row of zeros has scale 1; a row that holds a NaN or an infinity has scale NaN.
    """
    found: tuple[Tensor, Tensor] = _launchers(codes).launch_quantise_rows(x.contiguous(), factor)
    return found


@quantise_rows.register_fake
def _(x: Tensor, factor: Tensor | None, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=codes), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("peft_kernels::frozen_quantise_parts", mutates_args=())
def quantise_parts(parts: Sequence[Tensor], factor: Tensor | None, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of parts (M, K_i) laid end to end, (M, Σ K_i), without laying them anywhere first."""
    found: tuple[Tensor, Tensor] = _launchers(codes).launch_quantise_parts(parts, factor)
    return found


@quantise_parts.register_fake
def _(parts: Sequence[Tensor], factor: Tensor | None, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    first, width = parts[0], sum(part.shape[1] for part in parts)
    return first.new_empty(first.shape[0], width, dtype=codes), first.new_empty(first.shape[0], dtype=torch.float32)


@torch.library.custom_op("peft_kernels::frozen_product", mutates_args=())
def product(
    codes: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    B: Tensor | None,
    lora_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """y = (codes·weightᵀ)·row_scale·scale + bias + lora_scale·low·Bᵀ, (M, N) of `dtype`.

    codes (M, K), row_scale (M,), weight (N, K), scale (N,), bias (N,), low (M, r), B (N, r).
    """
    y: Tensor = _launchers(codes.dtype).launch_product(
        codes.contiguous(), row_scale, weight, scale, bias, low, B, lora_scale, dtype
    )
    return y


@product.register_fake
def _(
    codes: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    B: Tensor | None,
    lora_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("peft_kernels::frozen_product_back", mutates_args=())
def product_back(
    codes: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    d_low: Tensor | None,
    A: Tensor | None,
    dtype: torch.dtype,
    p: float,
    seeds: Tensor | None,
    salt: int,
) -> Tensor:
    """dx = (codes·weight)·row_scale·factor + mask ⊙ (d_low·A) / keep_rate, (M, K) of `dtype`.

    codes (M, N), row_scale (M,), weight (N, K), factor (K,) fp32, d_low (M, r), A (r, K). The mask is that of p, seeds
    (samples,) and salt, as in `lora_linear`.
    """
    rows = codes.shape[0] // max(1, 1 if seeds is None else seeds.numel())
    dx: Tensor = _launchers(codes.dtype).launch_product_back(
        codes.contiguous(), row_scale, weight, d_low, A, dtype, factor=factor, p=p, seeds=seeds, rows_per_sample=rows,
        salt=salt,
    )  # fmt: skip
    return dx


@product_back.register_fake
def _(
    codes: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    d_low: Tensor | None,
    A: Tensor | None,
    dtype: torch.dtype,
    p: float,
    seeds: Tensor | None,
    salt: int,
) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[1], dtype=dtype)
