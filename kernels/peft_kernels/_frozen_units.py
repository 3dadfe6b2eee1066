"""What multiplies frozen weights: one object per format and device, with the codes in and the bare product out.

Around it stand the passes that make codes of rows and rows of products (`_passes`), the same for every unit.
"""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from . import _passes as passes

Format = Literal["bf16", "int8", "fp8"]
CODES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
assert set(CODES) == set(get_args(Format))


class Units(Protocol):
    """Matrix units of one format. W stands for a frozen weight's codes (N, K)."""

    def quantise(
        self, parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Codes (M, Σ widths) of rows made of parts, and their scales (M,), None for a format that has none."""

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        """codes (M, K)·Wᵀ → (M, N), accumulated in int32 or float32 (bf16 units may round to bfloat16)."""

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        """codes (M, N)·W → (M, K), accumulated likewise."""


class Quantising:
    """Rows quantised by their largest number; what int8 and fp8 units share."""

    dtype: torch.dtype

    def quantise(
        self, parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        return passes.quantise(parts, widths, factors, self.dtype)


class Bf16:
    """bfloat16 products: an eighth of int8's resolution is not needed where the units are nearly as fast (AMX)."""

    def quantise(
        self, parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, None]:
        return laid_out(parts, widths, factors, torch.bfloat16), None

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes, weight.t())

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes, weight)


class Exact:
    """No rounding at all: the derivative of the layer, for gradcheck. Codes have the dtype of the rows."""

    def quantise(
        self, parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None]
    ) -> tuple[Tensor, None]:
        first = next(part for part in parts if part is not None)
        return laid_out(parts, widths, factors, first.dtype), None

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes, weight.to(codes.dtype).t())

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes, weight.to(codes.dtype))


class Emulated(Quantising):
    """int8 or fp8 codes multiplied in float64, where the units are missing; for tests. int8 has the units' own bits."""

    def __init__(self, format: Format) -> None:
        self.dtype = CODES[format]
        self.into = torch.int32 if format == "int8" else torch.float32

    def product(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes.to(torch.float64), weight.to(torch.float64).t()).to(self.into)

    def product_back(self, codes: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(codes.to(torch.float64), weight.to(torch.float64)).to(self.into)


def laid_out(
    parts: Sequence[Tensor | None], widths: Sequence[int], factors: Sequence[Tensor | None], dtype: torch.dtype
) -> Tensor:
    """Parts end to end as one matrix of `dtype`, multiplied by their factors before they are rounded."""
    first = next(part for part in parts if part is not None)
    if len(parts) == 1:
        (factor,) = factors
        return (first if factor is None else first * factor).to(dtype)
    whole = first.new_empty(first.shape[0], sum(widths), dtype=dtype)
    for part, factor, to in zip(parts, factors, whole.split(list(widths), 1), strict=True):
        if part is None:
            to.zero_()
        else:
            to.copy_(part if factor is None else part * factor)
    return whole


def units_of(format: Format) -> Units:
    """The real units of a format."""
    if format == "int8":
        from .int8_linear import Int8

        return Int8()
    if format == "fp8":
        from .fp8_linear import Fp8

        return Fp8()
    return Bf16()
