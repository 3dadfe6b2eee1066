"""Both products of a frozen linear, for several that read one x: each distinct input is quantised once.

    y_i = (q(x ⊙ factor)·codes_iᵀ)·s_x ⊙ scale_i + b_i + x[:, columns]·column_weight_iᵀ + low_i·up_i
    dx  = Σ_i (q(dy_i ⊙ scale_i)·codes_i)·s_g ⊙ factor, at columns Σ_i dy_i·column_weight_i

Siblings that lie in one stack are one product in each direction. In backward their dy_i ⊙ scale_i are quantised as one
row: they add up in dx, so what counts is the error beside the largest of them, and dx is written once instead of
several times. With `spare_gradients` the largest columns of the dy_i ⊙ scale_i of this call stay out of the rounding:

    dx += Σ_i dy_i[:, J_i]·W_i[J_i], J_i the N_i / 64 columns j with the largest max|dy_i[:, j]|·scale_i[j]

2-D tensors: x (M, K), dy_i (M, N_i).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _passes as passes
from .frozen_weight import FrozenWeight

SPARED = 64
"""One column of dy in so many stays out of the rounding, where any does."""


@dataclass(frozen=True)
class Update:
    """A low-rank term of one output: adds `scale`·low·Bᵀ, low (M, r), B (N, r)."""

    low: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class LowBack:
    """A low-rank term of dx: adds mask ⊙ (d_low·A) / keep_rate, d_low (M, R), A (R, K), mask of (p, seeds, salt)."""

    d_low: Tensor
    A: Tensor
    p: float
    seeds: Tensor | None
    salt: int


def _runs(weights: Sequence[FrozenWeight]) -> list[list[int]]:
    """Places of weights that are one product: neighbours of one stack, in its order; all others stand alone."""
    order = sorted(range(len(weights)), key=lambda i: (id(weights[i].stack), weights[i].place))
    runs: list[list[int]] = []
    for i in order:
        one, last = weights[i], weights[runs[-1][-1]] if runs else None
        if last is not None and one.stack is not None and last.stack is one.stack and one.place == last.place + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return sorted(runs)


def _codes_of(weights: Sequence[FrozenWeight], run: list[int]) -> tuple[Tensor, Tensor | None]:
    """Codes (Σ N, K) and scales of a run."""
    first, last = weights[run[0]], weights[run[-1]]
    if first.stack is None or len(run) == 1:
        return first.codes, first.scale
    return first.stack.slice(first.place, last.place + 1)


def products(
    x: Tensor,
    weights: Sequence[FrozenWeight],
    biases: Sequence[Tensor | None],
    updates: Sequence[Update | None],
    triton: bool,
) -> list[Tensor]:
    """y_i of every weight, (M, N_i) in x's dtype, each a buffer of its own.

    Args:
        x: (M, K).
        updates: low-rank terms that come out with the product; None where there is none, or it is added later.
        triton: whether the Triton products run where they have the format.
    """
    found: list[Tensor | None] = [None] * len(weights)
    quantised: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
    for run in _runs(weights):
        first = weights[run[0]]
        key = (first.format, id(first.factor))
        kernels = _launches(first, triton)
        if key not in quantised:
            quantised[key] = _quantise(x, first, kernels)
        codes, row_scale = quantised[key]
        if kernels:
            for i in run:
                found[i] = _launched(codes, row_scale, weights[i], biases[i], updates[i], x.dtype)
        else:
            whole, _ = _codes_of(weights, run)
            product, start = first.units.product(codes, whole), 0
            for i in run:
                one, update = weights[i], updates[i]
                part = product[:, start : start + one.shape[0]]
                start += one.shape[0]
                term = (None, None, 1.0) if update is None else (update.low, update.B, update.scale)
                found[i] = passes.rescale(part, row_scale, one.scale, biases[i], x.dtype, *term)
            del product
        for i in run:
            one, y = weights[i], found[i]
            if one.columns is not None and one.column_weight is not None and y is not None:
                y.addmm_(x[:, one.columns], one.column_weight.to(x.dtype).t())
    assert all(y is not None for y in found)
    return [y for y in found if y is not None]


def products_back(
    dys: Sequence[Tensor | None],
    weights: Sequence[FrozenWeight],
    dtype: torch.dtype,
    triton: bool,
    low: LowBack | None = None,
) -> tuple[Tensor | None, bool]:
    """dx (M, K) of `dtype`, a buffer of its own, None where no output has a gradient; and whether `low` is in it, which
    a Triton product takes along."""
    dx: Tensor | None = None
    taken = False
    for run in _runs(weights):
        live = [i for i in run if dys[i] is not None]
        if not live:
            continue
        run = run[run.index(live[0]) : run.index(live[-1]) + 1]
        own = None if taken or not _launches(weights[run[0]], triton) else low
        part = _back_of_run([dys[i] for i in run], [weights[i] for i in run], dtype, triton, own)
        taken = taken or own is not None
        dx = part if dx is None else dx.add_(part)
    return dx, taken


def _launches(one: FrozenWeight, triton: bool) -> bool:
    """Whether Triton has this format; bf16 products are the vendor's."""
    return triton and one.format != "bf16"


def _back_of_run(
    dys: Sequence[Tensor | None],
    weights: Sequence[FrozenWeight],
    dtype: torch.dtype,
    triton: bool,
    low: LowBack | None,
) -> Tensor:
    first, widths = weights[0], [one.shape[0] for one in weights]
    whole, scale = _codes_of(weights, list(range(len(weights))))
    spared = [_largest(dy, one) for dy, one in zip(dys, weights, strict=True)]
    scales = [_without(one.scale, places) for one, places in zip(weights, spared, strict=True)]
    if _launches(first, triton):
        from . import _frozen_ops as ops

        there = [dy for dy in dys if dy is not None]
        rows = [there[0].new_zeros(len(there[0]), n) if dy is None else dy for dy, n in zip(dys, widths, strict=True)]
        if any(places is not None for places in spared):
            scale = torch.cat([one for one in scales if one is not None])
        codes, row_scale = ops.quantise_parts(rows, scale, first.codes.dtype)
        term = (None, None, dtype, 0.0, None, 0)
        if low is not None:
            term = (low.d_low, low.A, dtype, low.p, low.seeds, low.salt)  # type: ignore[assignment]
        dx = ops.product_back(codes, row_scale, whole, first.factor, *term)
    else:
        codes, row_scales = first.units.quantise(dys, widths, scales)
        dx = passes.rescale(first.units.product_back(codes, whole), row_scales, first.factor, None, dtype)
    if first.columns is not None:
        own = [
            dy.to(dtype) @ one.column_weight.to(dtype)
            for dy, one in zip(dys, weights, strict=True)
            if dy is not None and one.column_weight is not None
        ]
        dx.index_add_(1, first.columns, sum(own[1:], start=own[0]))  # the codes there are zeros; `low` may be in it
    for dy, one, places in zip(dys, weights, spared, strict=True):
        if dy is not None and places is not None:
            dx.addmm_(dy[:, places].to(dtype), _rows(one, places, dtype))
    return dx


def _largest(dy: Tensor | None, one: FrozenWeight) -> Tensor | None:
    """Columns of dy (M, N) that are not rounded, int64 (N // 64,); None where there are none."""
    count = one.shape[0] // SPARED
    if dy is None or not one.spare_gradients or one.scale is None or not count or not len(dy):
        return None
    return (passes.column_absmax(dy) * one.scale).topk(count).indices


def _without(scale: Tensor | None, places: Tensor | None) -> Tensor | None:
    return scale if scale is None or places is None else scale.index_fill(0, places, 0)


def _rows(one: FrozenWeight, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight as its codes stand for them, (len(places), K), with zeros at the full-precision columns."""
    assert one.scale is not None
    wide = torch.promote_types(torch.float32, dtype)
    rows = one.codes[places].to(wide) * one.scale[places].to(wide).unsqueeze(1)
    return (rows if one.factor is None else rows * one.factor).to(dtype)


def _quantise(x: Tensor, one: FrozenWeight, kernels: bool) -> tuple[Tensor, Tensor | None]:
    if kernels:
        from . import _frozen_ops as ops

        codes, row_scale = ops.quantise_rows(x, one.factor, one.codes.dtype)
        return codes, row_scale
    return one.units.quantise([x], [x.shape[1]], [one.factor])


def _launched(
    codes: Tensor,
    row_scale: Tensor | None,
    one: FrozenWeight,
    bias: Tensor | None,
    update: Update | None,
    dtype: torch.dtype,
) -> Tensor:
    """The product with everything behind it in one kernel."""
    from . import _frozen_ops as ops

    low, b, by = (None, None, 1.0) if update is None else (update.low, update.B, update.scale)
    y: Tensor = ops.product(codes, row_scale, one.codes, one.scale, bias, low, b, by, dtype)
    return y
