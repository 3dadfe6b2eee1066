"""LoRA linears that read one x: y_i = x·W_iᵀ + b_i + Σ_j s_j·dropout_j(x)·A_jᵀ·B_jᵀ (Hu et al. 2021, eq. 3).

    S  = dropout(x)·Aᵀ                                  (M, r)
    y  = x·Wᵀ + b + s·S·Bᵀ                              (M, N)
    dS = s·dy·B        dB = s·dyᵀ·S                     one read of dy
    dA = dSᵀ·dropout(x)                                 (r, K)
    dx = dy·W + mask ⊙ (dS·A) / keep_rate               summed over i and j in one buffer

Shapes: M tokens, K in, N out, r rank. Saved for backward: x (or, where x is the output of a norm or an activation, what
that one saved anyway), every S, and the seeds of the masks. Nothing else of size M×K or M×N.

The frozen GEMM is cuBLAS or oneDNN; s·S·Bᵀ is added into its output. On CUDA the low-rank products and masks are
Triton kernels (`_lora_ops`).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _lora_ops as ops
from ._launch import Backend, use_triton
from .dropout import check
from .recompute import Recipe, recipe_of


@dataclass(frozen=True)
class Adapter:
    """A low-rank pair.

    Attributes:
        A: (r, K); B: (N, r), of one dtype. Each gets a gradient where it requires one.
        scale: alpha/r, or alpha/sqrt(r).
        p: dropout on this adapter's input; 0 outside training.
        salt: names the mask among the masks of a sample and step.
        bias: (N,), added times `scale` (peft's `lora_bias`).
    """

    A: Tensor
    B: Tensor
    scale: float
    p: float = 0.0
    salt: int = 0
    bias: Tensor | None = None


@dataclass(frozen=True)
class Projection:
    """A frozen linear with the adapters that are active on it.

    Attributes:
        weight: (N, K), or (K, N) where `transposed` (GPT-2's Conv1D). It gets no gradient.
        bias: (N,), trained or not.
    """

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()
    transposed: bool = False


def lora_linear_reference(x: Tensor, projection: Projection, masks: Sequence[Tensor] = ()) -> Tensor:
    """The definition. `masks`: one per adapter, x's shape, 0 or 1/keep_rate; none without dropout."""
    weight = projection.weight.t() if projection.transposed else projection.weight
    y = torch.nn.functional.linear(x, weight, projection.bias)
    for place, one in enumerate(projection.adapters):
        low = torch.nn.functional.linear(x * masks[place] if masks else x, one.A)
        y = y + torch.nn.functional.linear(low, one.B, one.bias) * one.scale
    return y


@dataclass(frozen=True)
class _Pair:
    """Where one adapter stands: `at` of its A (then B, bias) among the tensors, `projection` it belongs to."""

    projection: int
    at: int
    scale: float


@dataclass(frozen=True)
class _Bundle:
    """Adapters that read the same (dropped) x: all without dropout together, each with dropout alone."""

    p: float
    salt: int
    pairs: tuple[_Pair, ...]


@dataclass(frozen=True)
class _Layout:
    """Everything of a call that shapes and settings decide. Tensors stand as: seeds, the recipe's inputs, then per
    projection weight, bias, (A, B, bias)…; `linears` holds (place of the weight, transposed)."""

    linears: tuple[tuple[int, bool], ...]
    bundles: tuple[_Bundle, ...]


@lru_cache(maxsize=4096)
def _lay_out(settings: tuple[Any, ...], inputs: int) -> _Layout:
    """`settings`: per projection (transposed, ((scale, p, salt, dtype), …)); `inputs`: tensors of the recipe."""
    at, linears = 1 + inputs, []
    bundles: dict[Any, list[Any]] = {}
    for place, (transposed, adapters) in enumerate(settings):
        linears.append((at, transposed))
        at += 2
        for scale, p, salt, dtype in adapters:
            key = (p, salt, at) if p else (0.0, 0, dtype)
            bundles.setdefault(key, []).append(_Pair(place, at, scale))
            at += 3
    return _Layout(tuple(linears), tuple(_Bundle(key[0], key[1], tuple(pairs)) for key, pairs in bundles.items()))


@dataclass(frozen=True)
class _Plan:
    """A call's layout, how x is made again, autocast's dtype (None outside), and the backend."""

    layout: _Layout
    recipe: Recipe | None
    dtype: torch.dtype | None
    triton: bool

    def cast(self, t: Any) -> Any:
        return t if t is None or self.dtype is None else t.to(self.dtype)

    def stacked(self, bundle: _Bundle, tensors: Any) -> Tensor:
        """The A's of a bundle above each other (R, K)."""
        rows = [self.cast(tensors[pair.at]) for pair in bundle.pairs]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def region(self, x: Tensor) -> AbstractContextManager[Any]:
        """Autocast is done by hand inside: it knows nothing of `out=` and in-place products."""
        return nullcontext() if self.dtype is None else torch.autocast(x.device.type, enabled=False)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        needs, seeds, cast = ctx.needs_input_grad[2:], tensors[0], plan.cast
        flat = cast(x.reshape(-1, x.shape[-1]))
        sketches: list[Tensor | None] = []
        with plan.region(x):
            outputs = [
                ops.base(flat, cast(tensors[at]), cast(tensors[at + 1]), transposed)
                for at, transposed in plan.layout.linears
            ]
            for bundle in plan.layout.bundles:
                stacked = plan.stacked(bundle, tensors)
                low = ops.down(flat.to(stacked.dtype), stacked, bundle.p, seeds, bundle.salt, plan.triton)
                first = 0
                for pair in bundle.pairs:
                    b, bias, y = cast(tensors[pair.at + 1]), cast(tensors[pair.at + 2]), outputs[pair.projection]
                    y = ops.add_up(y, low[:, first : first + b.shape[1]], b, pair.scale)
                    outputs[pair.projection] = y if bias is None else y.add_(bias, alpha=pair.scale)
                    first += b.shape[1]
                sketches.append(low if any(needs[pair.at + 1] for pair in bundle.pairs) else None)
        reads_x = any(needs[pair.at] for bundle in plan.layout.bundles for pair in bundle.pairs)
        ctx.plan, ctx.shape, ctx.dtype, ctx.count = plan, x.shape, x.dtype, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if reads_x and plan.recipe is None else None, *tensors, *sketches)
        return tuple(outputs)  # in two dimensions: a view made in here could not be changed in place by its reader

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, *rest = ctx.saved_tensors
        needs, tensors, sketches = ctx.needs_input_grad, rest[: ctx.count], rest[ctx.count :]
        grads: list[Tensor | None] = [None] * ctx.count
        flat: Tensor | None = None
        dx: Tensor | None = None
        rows = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        for (at, transposed), dy in zip(plan.layout.linears, rows, strict=True):
            if dy is None:
                continue
            if needs[1]:
                dx = ops.base_back(dy, plan.cast(tensors[at]), dx, transposed)
            if needs[2 + at + 1]:
                grads[at + 1] = dy.sum(0).to(tensors[at + 1].dtype)
        for bundle, low in zip(plan.layout.bundles, sketches, strict=True):
            live = [pair for pair in bundle.pairs if rows[pair.projection] is not None]
            wants_a = any(needs[2 + pair.at] for pair in live)
            if not live or not (wants_a or dx is not None or low is not None):
                continue
            stacked = plan.stacked(bundle, tensors)
            d_low = _up_back(plan, bundle, stacked, rows, low, tensors, grads, needs)
            if wants_a and flat is None:
                flat = plan.cast(_input_again(plan, x, tensors).reshape(-1, ctx.shape[-1]))
            own = flat.to(stacked.dtype) if wants_a and flat is not None else None
            da = ops.down_back(d_low, own, stacked, dx, bundle.p, tensors[0], bundle.salt, plan.triton)
            first = 0
            for pair in bundle.pairs:
                a = tensors[pair.at]
                if da is not None and needs[2 + pair.at] and rows[pair.projection] is not None:
                    grads[pair.at] = da[first : first + a.shape[0]].to(a.dtype)
                first += a.shape[0]
        return None, None if dx is None else dx.to(ctx.dtype).view(ctx.shape), *grads


def _up_back(
    plan: _Plan,
    bundle: _Bundle,
    stacked: Tensor,
    rows: list[Any],
    low: Tensor | None,
    tensors: Any,
    grads: Any,
    needs: Any,
) -> Tensor:
    """dS of a whole bundle (M, R), zero where an output has no gradient; fills in the gradients of B and its bias."""
    several, first, d_low = len(bundle.pairs) > 1, 0, None
    for pair in bundle.pairs:
        dy, b, bias = rows[pair.projection], plan.cast(tensors[pair.at + 1]), tensors[pair.at + 2]
        last = first + b.shape[1]
        if several and d_low is None:
            count = next(dy.shape[0] for dy in rows if dy is not None)
            d_low = stacked.new_empty(count, stacked.shape[0])
        out = None if d_low is None else d_low[:, first:last]
        if dy is None:
            assert out is not None
            out.zero_()
        else:
            dy = dy.to(stacked.dtype)
            sketch = low[:, first:last] if low is not None and needs[2 + pair.at + 1] else None
            d_pair, db = ops.up_back(dy, b, sketch, pair.scale, plan.triton, out)
            grads[pair.at + 1] = None if db is None else db.to(tensors[pair.at + 1].dtype)
            if bias is not None and needs[2 + pair.at + 2]:
                grads[pair.at + 2] = dy.sum(0).mul_(pair.scale).to(bias.dtype)
            if d_low is None:
                d_low = d_pair
        first = last
    assert d_low is not None
    return d_low


def _input_again(plan: _Plan, x: Tensor | None, tensors: Any) -> Tensor:
    if plan.recipe is None:
        assert x is not None
        return x
    return plan.recipe.make(*tensors[1 : 1 + len(plan.recipe.inputs)])


def lora_linears(
    x: Tensor, projections: Sequence[Projection], seeds: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, ...]:
    """Outputs of several LoRA linears over one x (query, key and value; gate and up), which is read and saved once.

    Args:
        x: (samples, …, K) float16 | bfloat16 | float32 | float64, not modified.
        projections: their weights have x's dtype (any, under autocast). Adapters of a wider dtype than x compute in
            theirs, as peft's do, and the sum is rounded once.
        seeds: int64 (samples,), needed where an adapter has p > 0. Each adapter draws a mask of its own, by its salt.
        backend: of the low-rank products and masks.

    Returns:
        One tensor (samples, …, N_i) per projection, in the dtype of the frozen product. Differentiable once in x, in
        every A, B and bias.

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight that requires grad, missing seeds.
    """
    recipe = recipe_of(x)
    tensors: list[Tensor | None] = [seeds, *(recipe.inputs if recipe else ())]
    settings = []
    for one in projections:
        _check(x, one, seeds)
        tensors += (one.weight, one.bias)
        for pair in one.adapters:
            tensors += (pair.A, pair.B, pair.bias)
        settings.append((one.transposed, tuple((pair.scale, pair.p, pair.salt, pair.A.dtype) for pair in one.adapters)))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if x.dtype == torch.float64:
        dtype = None  # autocast leaves float64 alone
    layout = _lay_out(tuple(settings), len(recipe.inputs) if recipe else 0)
    plan = _Plan(layout, recipe, dtype, use_triton(x, backend))
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(plan, x, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linear(x: Tensor, projection: Projection, seeds: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """One LoRA linear; see `lora_linears`."""
    return lora_linears(x, (projection,), seeds, backend=backend)[0]


def _check(x: Tensor, one: Projection, seeds: Tensor | None) -> None:
    out, features = one.weight.shape[::-1] if one.transposed else one.weight.shape
    if x.shape[-1] != features:
        raise ValueError(f"lora_linear: x has {x.shape[-1]} features, the weight takes {features}.")
    if one.weight.requires_grad:
        raise ValueError("lora_linear: the weight requires grad; only frozen weights are fused. Freeze it or unfuse.")
    for pair in one.adapters:
        if pair.A.shape != (pair.A.shape[0], features) or pair.B.shape != (out, pair.A.shape[0]):
            raise ValueError(
                f"lora_linear: A must be (r, {features}) and B ({out}, r), "
                f"got {tuple(pair.A.shape)} and {tuple(pair.B.shape)}."
            )
        check(x, pair.p, seeds)
