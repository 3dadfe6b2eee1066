"""Passes over memory round the eight-bit products: quantise rows, scale products back. Compiled on a CPU, else torch.

    quantise   scale_i = max_k |v_ik| / limit,  code_ik = round(v_ik / scale_i),  v = x ⊙ factor
    rescale    y_ij = product_ij · row_scale_i · column_scale_j + bias_j

Shapes: M tokens, K or N features. `limit` is 127 (int8) or 448 (float8_e4m3fn), the largest code. Both versions of a
pass have the same bits.
"""

from collections.abc import Sequence
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from . import _compiled as compiled

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST = 2.0**-126
"""The smallest scale: the inverse of a smaller one would overflow."""


def quantise(
    parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes of rows that are made of parts laid end to end, with one scale for each row.

    Args:
        parts: (M, widths[i]) each, floating; None is zeros. At least one is there.
        factors: (widths[i],) float32 by which a part's columns are multiplied, or None.
        dtype: int8 or float8_e4m3fn.

    Returns:
        codes (M, Σ widths) of `dtype` and scales (M,) float32. Rows of zeros have scale 1; rows with NaN or infinity
        have scale NaN, so that whatever is made of them is NaN, and any codes.
    """
    first = next(part for part in parts if part is not None)
    if dtype == torch.int8 and first.shape[0] and compiled.usable(*parts, *factors):
        return _quantise_compiled(parts, widths, factors, first)
    rows = [
        first.new_zeros(first.shape[0], width, dtype=torch.float32)
        if part is None
        else (part.to(torch.float32) if factor is None else part.to(torch.float32) * factor)
        for part, width, factor in zip(parts, widths, factors, strict=True)
    ]
    return quantise_plain(rows[0] if len(rows) == 1 else torch.cat(rows, 1), dtype)


def quantise_plain(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The definition, for one float32 (M, K)."""
    largest = v.abs().amax(1) if v.shape[1] else v.new_zeros(v.shape[0])
    scale = torch.where(largest > 0, (largest / LIMITS[dtype]).clamp_min(LEAST), 1.0)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    scaled = v * (1 / scale).unsqueeze(1)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def _quantise_compiled(
    parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None], first: Tensor
) -> tuple[Tensor, Tensor]:
    rows, count, total = first.shape[0], len(parts), sum(widths)
    codes = torch.empty(rows, total, dtype=torch.int8)
    scales = torch.empty(rows)
    addresses, longs = c_void_p * count, c_int64 * count
    compiled.call(
        "quantise", count,
        addresses(*(None if part is None else part.data_ptr() for part in parts)),
        longs(*(0 if part is None else compiled.pitch(part) for part in parts)),
        longs(*widths),
        addresses(*(None if factor is None else factor.data_ptr() for factor in factors)),
        rows, total, codes, scales,
    )  # fmt: skip
    return codes, scales


def column_absmax(part: Tensor) -> Tensor:
    """max|v| of each column of (M, N), float32 (N,), NaN where a column holds one; M ≥ 1."""
    if compiled.usable(part):
        found = torch.empty(part.shape[1])
        compiled.call("column_absmax", part, compiled.pitch(part), *part.shape, found)
        return found
    return part.abs().amax(0).to(torch.float32)


def rescale(
    products: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    low: Tensor | None = None,
    up: Tensor | None = None,
    by: float = 1.0,
) -> Tensor:
    """products ⊙ row_scale ⊙ column_scale + bias + by·low·upᵀ, in float32 (float64 for float64 products), rounded once.

    Args:
        products: (M, N) int32 or floating; a slice of the columns of a wider matrix may be given.
        row_scale: (M,), column_scale: (N,), bias: (N,), each or None.
        low: (M, r), up: (N, r), both or neither.

    Returns:
        (M, N) of `dtype`, a buffer of its own.
    """
    if row_scale is not None and _compiled_takes(products) and compiled.usable(row_scale, column_scale, bias):
        y = _rescale_compiled(products, row_scale, column_scale, bias)
    else:
        wide = torch.promote_types(torch.float32, products.dtype) if products.is_floating_point() else torch.float32
        y = products.to(wide, copy=True)
        if row_scale is not None:
            y.mul_(row_scale.unsqueeze(1))
        if column_scale is not None:
            y.mul_(column_scale)
        if bias is not None:
            y.add_(bias)
    if low is not None and up is not None:
        y = y.addmm_(low, up.t(), alpha=by) if low.dtype == y.dtype else y.add_(low @ up.t(), alpha=by)
    return y.to(dtype)


def _compiled_takes(products: Tensor) -> bool:
    plain = type(products) is Tensor and products.dtype == torch.int32 and products.device.type == "cpu"
    return plain and products.numel() > 0 and products.stride(1) == 1


def _rescale_compiled(products: Tensor, row_scale: Tensor, column_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, features = products.shape
    if bias is not None and column_scale is None:
        column_scale = torch.ones(features)
    y = torch.empty(rows, features)
    compiled.call(
        "rescale", products, compiled.pitch(products), rows, features, row_scale, column_scale, bias, y, features
    )
    return y
