"""LoRA linears that read one x: y_i = x·W_iᵀ + b_i + Σ_j s_j·dropout_j(x)·A_jᵀ·B_jᵀ (Hu et al. 2021, eq. 3).

    S  = dropout(x)·Aᵀ                                  (M, r)
    y  = x·Wᵀ + b + s·S·Bᵀ                              (M, N)
    dS = s·dy·B        dB = s·dyᵀ·S                     one read of dy
    dA = dSᵀ·dropout(x)                                 (r, K)
    dx = dy·W + mask ⊙ (dS·A) / keep_rate               summed over i and j in one buffer

Shapes: M tokens, K in, N out, r rank. Saved for backward: x (or, where x is the output of a norm or an activation, what
that one saved anyway), every S, and the seeds of the masks. Nothing else of size M×K or M×N.

The frozen GEMM is cuBLAS or oneDNN; s·S·Bᵀ is added into its output. On CUDA the low-rank products and masks are
Triton kernels (`_lora_ops`). With a `FrozenWeight` in W's place it runs on the units of that format
(`_frozen_products`): x is rounded once for all that read it; S and dA see x as it is. A `QuantisedWeight` becomes
numbers in a scratch buffer before each of its two products (`_quantised_products`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _compiled as compiled
from . import _lora_ops as ops
from . import _quantised_products as quantised_products
from ._frozen_products import LowBack, Update, products, products_back
from ._launch import Backend, use_triton
from ._lora_plan import Bundle, Plan, lay_out
from .dropout import check
from .frozen_weight import FrozenWeight
from .quantised_weight import QuantisedWeight
from .recompute import recipe_of


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
        weight: (N, K), or (K, N) where `transposed` (GPT-2's Conv1D), or codes, always (N, K). It gets no gradient.
        bias: (N,), trained or not.
    """

    weight: Tensor | FrozenWeight | QuantisedWeight
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()
    transposed: bool = False


def lora_linear_reference(x: Tensor, projection: Projection, masks: Sequence[Tensor] = ()) -> Tensor:
    """The definition; for codes without rounding x. `masks`: one per adapter, x's shape, 0 or 1/keep_rate;
    none without dropout."""
    held = projection.weight
    weight = held if isinstance(held, Tensor) else held.dequantised().to(x.dtype)
    y = torch.nn.functional.linear(x, weight.t() if projection.transposed else weight, projection.bias)
    for place, one in enumerate(projection.adapters):
        low = torch.nn.functional.linear(x * masks[place] if masks else x, one.A)
        y = y + torch.nn.functional.linear(low, one.B, one.bias) * one.scale
    return y


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        needs, cast = ctx.needs_input_grad[2:], plan.cast
        flat = cast(x.reshape(-1, x.shape[-1]))
        sketches: list[Tensor | None] = []
        updates: list[list[tuple[Update, Tensor | None]]] = [[] for _ in plan.frozen]
        with plan.region(x):
            for bundle in plan.layout.bundles:
                stacked = plan.stacked(bundle, tensors)
                low = _down(flat.to(stacked.dtype), stacked, bundle, tensors, plan)
                first = 0
                for pair in bundle.pairs:
                    b, bias = cast(tensors[pair.at + 1]), cast(tensors[pair.at + 2])
                    update = Update(low[:, first : first + b.shape[1]], b, pair.scale)
                    updates[pair.projection].append((update, bias))
                    first += b.shape[1]
                sketches.append(low if any(needs[pair.at + 1] for pair in bundle.pairs) else None)
            outputs = _base(plan, flat, tensors, [found[0][0] if found else None for found in updates])
            for place, (found, frozen) in enumerate(zip(updates, plan.frozen, strict=True)):
                for number, (update, bias) in enumerate(found):
                    y = outputs[place]
                    if frozen is None or number:  # the first one came out with the frozen product
                        y = ops.add_up(y, update.low, update.B, update.scale)
                    outputs[place] = y if bias is None else y.add_(bias, alpha=update.scale)
        reads_x = any(needs[pair.at] for bundle in plan.layout.bundles for pair in bundle.pairs)
        ctx.plan, ctx.shape, ctx.dtype, ctx.count = plan.bare(), x.shape, x.dtype, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if reads_x and plan.recipe is None else None, *tensors, *sketches)
        return tuple(outputs)  # in two dimensions: a view made in here could not be changed in place by its reader

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, *rest = ctx.saved_tensors
        needs, tensors, sketches = ctx.needs_input_grad, rest[: ctx.count], rest[ctx.count :]
        grads: list[Tensor | None] = [None] * ctx.count
        rows = [None if dy is None else dy.reshape(-1, dy.shape[-1]) for dy in dys]
        for (at, _), dy in zip(plan.layout.linears, rows, strict=True):
            if dy is not None and needs[2 + at + 1]:
                grads[at + 1] = dy.sum(0).to(tensors[at + 1].dtype)
        halves: list[tuple[Bundle, Tensor, Tensor, bool]] = []
        for bundle, low in zip(plan.layout.bundles, sketches, strict=True):
            live = [pair for pair in bundle.pairs if rows[pair.projection] is not None]
            wants_a = any(needs[2 + pair.at] for pair in live)
            if live and (wants_a or needs[1] or low is not None):
                stacked = plan.stacked(bundle, tensors)
                d_low = _up_back(plan, bundle, stacked, rows, low, tensors, grads, needs)
                halves.append((bundle, stacked, d_low, wants_a))
        dx, taken = _base_back(plan, rows, tensors, halves) if needs[1] else (None, False)
        flat: Tensor | None = None
        for place, (bundle, stacked, d_low, wants_a) in enumerate(halves):
            if wants_a and flat is None:
                flat = plan.cast(plan.input_again(x, tensors).reshape(-1, ctx.shape[-1]))
            own = flat.to(stacked.dtype) if wants_a and flat is not None else None
            into = None if taken and not place else dx
            if own is None and into is None:
                continue
            da = _down_back(d_low, own, stacked, into, bundle, tensors, plan)
            first = 0
            for pair in bundle.pairs:
                a = tensors[pair.at]
                if da is not None and needs[2 + pair.at] and rows[pair.projection] is not None:
                    grads[pair.at] = da[first : first + a.shape[0]].to(a.dtype)
                first += a.shape[0]
        return None, None if dx is None else dx.to(ctx.dtype).view(ctx.shape), *grads


def _base(plan: Plan, x: Tensor, tensors: Any, updates: list[Update | None]) -> list[Tensor]:
    """x·Wᵀ + b of every projection, with the low-rank terms of those whose weights are codes."""
    narrow = [i for i, one in enumerate(plan.frozen) if one is not None]
    linears = plan.layout.linears
    biases = [tensors[linears[i][0] + 1] for i in narrow]
    weights = [one for one in plan.frozen if one is not None]
    found = iter(products(x, weights, biases, [updates[i] for i in narrow], plan.triton))
    return [_one_base(plan, x, i, tensors) if one is None else next(found) for i, one in enumerate(plan.frozen)]


def _one_base(plan: Plan, x: Tensor, place: int, tensors: Any) -> Tensor:
    """x·Wᵀ + b of a projection whose weight is numbers, or is made numbers."""
    (at, transposed), quantised = plan.layout.linears[place], plan.quantised[place]
    bias = plan.cast(tensors[at + 1])
    if quantised is None:
        return ops.base(x, plan.cast(tensors[at]), bias, transposed)
    return quantised_products.product(x, quantised, bias, plan.dtype or quantised.dtype or x.dtype)


def _base_back(
    plan: Plan, rows: list[Tensor | None], tensors: Any, halves: list[tuple[Bundle, Tensor, Tensor, bool]]
) -> tuple[Tensor | None, bool]:
    """Σ dy·W (M, K), None where no output has a gradient; and whether the first bundle's dS·A is in it already."""
    weights = [one for one in plan.frozen if one is not None]
    low = None
    if plan.triton and halves:  # one kernel makes both
        bundle, stacked, d_low, _ = halves[0]
        low = LowBack(d_low, stacked, bundle.p, tensors[0] if bundle.p else None, bundle.salt)
    own = [dy for dy, one in zip(rows, plan.frozen, strict=True) if one is not None]
    kind = next((dy.dtype for dy in rows if dy is not None), torch.float32)
    dx, taken = products_back(own, weights, kind, plan.triton, low) if weights else (None, False)
    for place, ((at, transposed), dy) in enumerate(zip(plan.layout.linears, rows, strict=True)):
        quantised = plan.quantised[place]
        if dy is None or plan.frozen[place] is not None:
            continue
        if quantised is None:
            dx = ops.base_back(dy, plan.cast(tensors[at]), dx, transposed)
        else:
            dtype = plan.dtype or quantised.dtype or dy.dtype
            dx = quantised_products.product_back(dy, quantised, dx, dtype)
    return dx, taken


def _down(x: Tensor, stacked: Tensor, bundle: Bundle, tensors: Any, plan: Plan) -> Tensor:
    """S of a whole bundle (M, R)."""
    if not bundle.sparse:
        return ops.down(x, stacked, bundle.p, tensors[0], bundle.salt, plan.triton)
    ranks = [(tensors[pair.at].shape[0], pair.salt) for pair in bundle.pairs]
    return ops.down_sparse(x, stacked, bundle.p, tensors[0], ranks)


def _down_back(
    d_low: Tensor, x: Tensor | None, stacked: Tensor, dx: Tensor | None, bundle: Bundle, tensors: Any, plan: Plan
) -> Tensor | None:
    """dA of a whole bundle (R, K), None without x; adds its share into dx where there is one."""
    if not bundle.sparse:
        return ops.down_back(d_low, x, stacked, dx, bundle.p, tensors[0], bundle.salt, plan.triton)
    ranks = [(tensors[pair.at].shape[0], pair.salt) for pair in bundle.pairs]
    return ops.down_back_sparse(d_low, x, stacked, dx, bundle.p, tensors[0], ranks)


def _up_back(
    plan: Plan,
    bundle: Bundle,
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


def lora_linears(
    x: Tensor,
    projections: Sequence[Projection],
    seeds: Tensor | None = None,
    *,
    backend: Backend = "auto",
    passes: bool = False,
) -> tuple[Tensor, ...]:
    """Outputs of several LoRA linears over one x (query, key and value; gate and up), which is read and saved once.

    Args:
        x: (samples, …, K) float16 | bfloat16 | float32 | float64, not modified.
        projections: their weights have x's dtype (any, under autocast), or are codes. Adapters of a wider dtype than x
            compute in theirs, as peft's do, and the sum is rounded once.
        seeds: int64 (samples,), needed where an adapter has p > 0. Each adapter draws a mask of its own, by its salt.
        backend: of the low-rank products and masks, and of FrozenWeights' products. A QuantisedWeight on CUDA is
            unpacked by Triton wherever that is installed.
        passes: let the compiled passes take dropped elements out behind one product with x, where they run: the same
            masks, other rounding.

    Returns:
        One tensor (samples, …, N_i) per projection, in the dtype of the frozen product. Differentiable once in x, in
        every A, B and bias; through a FrozenWeight straight through, as if rounding were the identity.

    Raises:
        ValueError: shapes or dtypes that do not fit, a weight that requires grad, missing seeds.
    """
    recipe = recipe_of(x)
    tensors: list[Tensor | None] = [seeds, *(recipe.inputs if recipe else ())]
    settings: list[Any] = []
    for one in projections:
        _check(x, one, seeds)
        held = one.weight
        tensors += (held if isinstance(held, Tensor) else None, one.bias)
        for pair in one.adapters:
            tensors += (pair.A, pair.B, pair.bias)
        settings.append((one.transposed, tuple((pair.scale, pair.p, pair.salt, pair.A.dtype) for pair in one.adapters)))
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if x.dtype == torch.float64:
        dtype = None  # autocast leaves float64 alone
    triton = use_triton(x, backend)
    sparse = passes and dtype is None and not triton and seeds is not None and compiled.usable(x)
    layout = lay_out(tuple(settings), len(recipe.inputs) if recipe else 0, sparse)
    frozen = tuple(one.weight if isinstance(one.weight, FrozenWeight) else None for one in projections)
    quantised = tuple(one.weight if isinstance(one.weight, QuantisedWeight) else None for one in projections)
    plan = Plan(layout, recipe, dtype, triton, frozen, quantised)
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(plan, x, *tensors)
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def lora_linear(
    x: Tensor, projection: Projection, seeds: Tensor | None = None, *, backend: Backend = "auto", passes: bool = False
) -> Tensor:
    """One LoRA linear; see `lora_linears`."""
    return lora_linears(x, (projection,), seeds, backend=backend, passes=passes)[0]


def _check(x: Tensor, one: Projection, seeds: Tensor | None) -> None:
    out, features = one.weight.shape[::-1] if one.transposed else one.weight.shape
    coded = not isinstance(one.weight, Tensor)
    if one.transposed and coded:
        kind = type(one.weight).__name__
        raise ValueError(f"lora_linear: a {kind} is (N, K) always: turn the weight before it becomes codes.")
    if coded and not x.is_floating_point():
        raise ValueError(f"lora_linear: x must be floating point, got {x.dtype}.")
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
