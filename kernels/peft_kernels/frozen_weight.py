"""Frozen weights in a narrow format, and what multiplies them at that format's speed.

    int8, fp8   W ≈ codes ⊙ scale, one scale for each output row: max|W_n| / 127 or / 448
    bf16        W ≈ codes

Two levers against input channels that are much larger than the others, folded in once:

    smooth      x / smooth meets W ⊙ smooth (Xiao et al. 2022, SmoothQuant, eq. 3)
    columns     these input channels keep their full precision beside the codes, which are 0 there
                (Dettmers et al. 2022, LLM.int8(), section 3)

and one against columns of dy that are much larger than the others, chosen anew in every backward:

    spare_gradients   the largest 1/64 of them meet the rows of W that the codes stand for, unrounded

Shapes: W (N, K), N out, K in; scale (N,), smooth (K,), columns (C,), column_weight (N, C).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor

from . import _passes as passes
from ._frozen_units import CODES, Format, Units, units_of


@dataclass(frozen=True, eq=False)
class Stack:
    """Codes and scales of siblings behind each other, so that one product serves them all.

    Attributes:
        codes: (Σ N, K); scale: (Σ N,), None for bf16.
        widths: N of each.
    """

    codes: Tensor
    scale: Tensor | None
    widths: tuple[int, ...]

    def slice(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of the siblings first … last-1."""
        start, end = sum(self.widths[:first]), sum(self.widths[:last])
        return self.codes[start:end], None if self.scale is None else self.scale[start:end]


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """A weight (N, K) as codes. See the module for what they mean; `freeze` makes them.

    Attributes:
        format: "bf16" | "int8" | "fp8".
        codes: (N, K) of the format's dtype, contiguous.
        scale: float32 (N,), None for bf16.
        dtype: of the weight that was frozen.
        smooth: float32 (K,) or None; columns: int64 (C,) or None, with column_weight (N, C) of `dtype`.
        units: what multiplies the codes.
        stack, place: the siblings that this one lies among, and where; None where it stands alone.
        factor: float32 (K,), what x is multiplied by before it is rounded: 1 / smooth, 0 at columns; None is 1.
        spare_gradients: whether the largest columns of dy are not rounded. With it, and only in backward, what a row
            is rounded to depends on the other rows of its call, within the error of the format.
    """

    format: Format
    codes: Tensor
    scale: Tensor | None
    dtype: torch.dtype
    smooth: Tensor | None = None
    columns: Tensor | None = None
    column_weight: Tensor | None = None
    units: Units = field(default_factory=lambda: units_of("bf16"))
    stack: Stack | None = None
    place: int = 0
    factor: Tensor | None = None
    spare_gradients: bool = False

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        return False

    def dequantised(self, first: int = 0, last: int | None = None) -> Tensor:
        """(N, K) float32, or the rows first … last-1 of it: the weight that the layer computes with."""
        weight = self.codes[first:last].to(torch.float32)
        if self.scale is not None:
            weight *= self.scale[first:last].unsqueeze(1)
        if self.smooth is not None:
            weight /= self.smooth
        if self.columns is not None and self.column_weight is not None:
            weight[:, self.columns] = self.column_weight[first:last].to(torch.float32)
        return weight

    def pieces(self, rows: int) -> Iterator[Tensor]:
        """`dequantised`, so many rows at a time."""
        for first in range(0, self.shape[0], rows):
            yield self.dequantised(first, first + rows)

    def tensors(self) -> dict[str, Tensor]:
        """What it holds beside its codes, by name."""
        named = {n: getattr(self, n) for n in ("scale", "smooth", "columns", "column_weight", "factor")}
        return {name: t for name, t in named.items() if t is not None}

    def moved(self, codes: Tensor) -> "FrozenWeight":
        """The same with these codes, a copy of its own, on their device; outside of any stack."""
        there: dict[str, Any] = {name: t.to(codes.device) for name, t in self.tensors().items()}
        return replace(self, codes=codes, stack=None, place=0, **there)


def freeze(
    weight: Tensor,
    format: Format,
    *,
    smooth: Tensor | None = None,
    columns: Tensor | None = None,
    spare_gradients: bool = False,
    transposed: bool = False,
    units: Units | None = None,
) -> FrozenWeight:
    """Codes of a weight. The weight is read, not kept.

    Args:
        weight: (N, K) float16 | bfloat16 | float32 | float64, or (K, N) where `transposed` (GPT-2's Conv1D).
        format: "bf16", "int8" or "fp8".
        smooth: (K,), positive; int8 and fp8 only.
        columns: int64 (C,), input channels that are not rounded; int8 and fp8 only.
        spare_gradients: whether the largest columns of dy are not rounded either; int8 and fp8 only.
        units: other units than the format's own, for tests.

    Raises:
        ValueError: a weight that is not finite, or settings that do not fit it.
    """
    settings: dict[str, Any] = {"smooth": smooth, "columns": columns, "spare_gradients": spare_gradients}
    return freeze_siblings([weight], format, **settings, transposed=transposed, units=units)[0]


def freeze_siblings(
    weights: Sequence[Tensor],
    format: Format,
    *,
    smooth: Tensor | None = None,
    columns: Tensor | None = None,
    spare_gradients: bool = False,
    transposed: bool = False,
    units: Units | None = None,
) -> list[FrozenWeight]:
    """Codes of weights that read one input, in one stack. Arguments as `freeze`; weights (N_i, K)."""
    _check(weights, format, smooth, columns, spare_gradients, transposed)
    rows = [weight.detach().t() if transposed else weight.detach() for weight in weights]
    widths, (_, features) = tuple(len(row) for row in rows), rows[0].shape
    device = rows[0].device
    codes = torch.empty(sum(widths), features, dtype=CODES[format], device=device)
    scale = None if format == "bf16" else torch.empty(sum(widths), device=device)
    smooth = None if smooth is None else smooth.detach().to(device, torch.float32)
    columns = None if columns is None or not len(columns) else columns.to(device)
    factor = _factor(smooth, columns, features, device)
    stack = Stack(codes, scale, widths)
    found = []
    for place, row in enumerate(rows):
        own_codes, own_scale = stack.slice(place, place + 1)
        if own_scale is None:
            own_codes.copy_(row)
        else:
            made, scales = passes.quantise([_prepared(row, smooth, columns)], [features], [None], CODES[format])
            own_codes.copy_(made)
            own_scale.copy_(scales)
        kept = None if columns is None else row[:, columns].contiguous()
        found.append(
            FrozenWeight(
                format, own_codes, own_scale, row.dtype, smooth, columns, kept, units or units_of(format),
                stack if len(rows) > 1 else None, place, factor, spare_gradients,
            )
        )  # fmt: skip
    return found


def _prepared(weight: Tensor, smooth: Tensor | None, columns: Tensor | None) -> Tensor:
    """W ⊙ smooth with zeros at `columns`, float32: what is rounded."""
    wide = weight.to(torch.float32)
    if smooth is not None:
        wide = wide * smooth
    return wide.contiguous() if columns is None else wide.index_fill(1, columns, 0)


def _factor(smooth: Tensor | None, columns: Tensor | None, features: int, device: torch.device) -> Tensor | None:
    if smooth is None and columns is None:
        return None
    factor = torch.ones(features, device=device) if smooth is None else 1 / smooth
    return factor if columns is None else factor.index_fill(0, columns, 0)


def _check(
    weights: Sequence[Tensor],
    format: Format,
    smooth: Tensor | None,
    columns: Tensor | None,
    spare_gradients: bool,
    transposed: bool,
) -> None:
    """Raises one ValueError that names every fault."""
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}.")
    faults = []
    if not weights or any(w.dim() != 2 or not w.is_floating_point() or not w.numel() for w in weights):
        shown = [f"{tuple(w.shape)} {w.dtype}" for w in weights]
        raise ValueError(f"freeze: a floating-point weight (N, K) is expected, got {', '.join(shown) or 'none'}.")
    features = weights[0].shape[0 if transposed else 1]
    for weight in weights:
        if weight.shape[0 if transposed else 1] != features or weight.dtype != weights[0].dtype:
            faults.append(f"siblings must read {features} features in {weights[0].dtype}, got {tuple(weight.shape)}")
        if weight.requires_grad:
            faults.append("a weight that requires grad is not frozen")
        if not bool(weight.isfinite().all()):
            faults.append("the weight holds NaN or infinity")
    if format == "bf16" and (smooth is not None or columns is not None or spare_gradients):
        faults.append("bf16 has no outliers to mend: smooth, columns and spare_gradients are for int8 and fp8")
    if smooth is not None and (smooth.shape != (features,) or not bool((smooth > 0).all() & smooth.isfinite().all())):
        faults.append(f"smooth must be {features} positive numbers, got {tuple(smooth.shape)}")
    if columns is not None and (
        columns.dim() != 1
        or columns.dtype != torch.int64
        or len(columns.unique()) != len(columns)
        or bool(((columns < 0) | (columns >= features)).any())
    ):
        faults.append(f"columns must be different int64 indices below {features}, got {columns.dtype}")
    if faults:
        raise ValueError("freeze: " + "; ".join(faults) + ".")
