"""The chunks of `linear_cross_entropy` over a frozen head whose weight is int8 codes, both products on int8 units.

    z    = logit_scale·(q(h)·Wqᵀ)·s_h ⊙ s_V,    p = softmax(z)
    dh_i = w_i·logit_scale·(Σ_b (q(p_b ⊙ s_V,b)·Wq,b)·s_i,b + (p_t − 1)·s_t·Wq,t)

One scale for a whole row of p would round all but its largest entries to zero. So the target's entry, the largest of
the gradient, is left out of the rounding and multiplied exactly, and the others have a scale for each row and block of
the vocabulary. The vocabulary is walked by blocks, each with all rows of a chunk, so that its weights are read once a
chunk; what stands in dh shrinks as the largest logit of a row grows (Milakov and Gimelshein 2018). Neither logits nor p
are kept: the compiled pass turns the int32 products of a block into codes of p.

Shapes: M tokens, H hidden size, V vocabulary, R rows of a chunk.
"""

import torch
from torch import Tensor

from . import _compiled as compiled
from . import _passes as passes
from .frozen_weight import FrozenWeight

BLOCK = 1024
"""Columns of the vocabulary with one scale. Blocks four times as long take half as long again: their products leave the
caches."""
ROWS = 1024
"""Rows of a chunk: fewer read the head's weights more often. Products of a block then take 4 MB."""


def losses_and_gradient(
    hidden: Tensor,
    head: FrozenWeight,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    logit_scale: float,
    chunk_rows: int,
    grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Losses (M,) float32 and, with `grad`, the gradient of their sum (M, H) in hidden's dtype.

    Args:
        hidden: (M, H) floating. head: int8 codes (V, H) without outlier columns.
        targets: int64 (M,). weights: float32 (M,) or None.
    """
    M, V = hidden.shape[0], head.shape[0]
    assert head.scale is not None
    ignored = targets == ignore_index
    if targets.device.type == "cpu" and not bool((ignored | ((targets >= 0) & (targets < V))).all()):
        raise IndexError(f"linear_cross_entropy: targets must be {ignore_index} or from 0 to {V - 1}.")
    clean = torch.where(ignored, -1, targets)
    weight = (~ignored).to(torch.float32) if weights is None else torch.where(ignored, 0, weights.to(torch.float32))
    codes, scale = head.units.quantise([hidden], [hidden.shape[1]], [head.factor])
    assert scale is not None
    losses = hidden.new_empty(M, dtype=torch.float32)
    dh = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if grad else None
    rows = max(1, min(chunk_rows, M))
    for start in range(0, M, rows):
        part = slice(start, min(start + rows, M))
        own = None if dh is None else dh[part]
        top, total, at = _blocks(codes[part], scale[part] * logit_scale, head, clean[part], own)
        losses[part] = (total.log() + top - at) * weight[part]
        losses[part].masked_fill_(ignored[part], 0)
        if own is not None:
            factor, row = weight[part] * logit_scale, clean[part].clamp(0, V - 1)
            share = ((at - top).exp() / total - 1) * factor
            own.mul_((factor / total).unsqueeze(1))
            own.addcmul_(head.codes[row].to(torch.float32), (share * head.scale[row]).unsqueeze(1))
    if dh is None:
        return losses, None
    if head.factor is not None:
        dh.mul_(head.factor)
    return losses, dh.to(hidden.dtype)


def _blocks(
    codes: Tensor, row_scale: Tensor, head: FrozenWeight, targets: Tensor, dh: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """max z, Σ e^(z − max), z at the target, each (R,), of codes (R, H); dh (R, H) becomes Σ e^(z − max)·W without the
    targets' own entries."""
    R, V = len(codes), head.shape[0]
    assert head.scale is not None
    top = row_scale.new_full((R,), -torch.inf)
    total, shrink = torch.zeros_like(top), torch.empty_like(top)
    at = torch.where(targets == -1, 0.0, torch.nan).to(top.dtype)
    for first in range(0, V, BLOCK):
        own, column_scale = head.codes[first : first + BLOCK], head.scale[first : first + BLOCK]
        products = head.units.product(codes, own)
        place = targets - first
        found = _softmax_block(products, row_scale, column_scale, place, top, total, at, shrink, dh is not None)
        if dh is None or found is None:
            continue
        p, steps = found
        products = head.units.product_back(p, own)
        if first == 0:
            dh.copy_(passes.rescale(products, steps, None, None, torch.float32))
        elif products.dtype == torch.int32 and compiled.usable(dh, steps):
            compiled.call(
                "rescale_add", products, compiled.pitch(products), *dh.shape, steps, shrink, dh, compiled.pitch(dh)
            )
        else:
            dh.mul_(shrink.unsqueeze(1)).add_(passes.rescale(products, steps, None, None, torch.float32))
    return top, total, at


def _softmax_block(
    products: Tensor,
    row_scale: Tensor,
    column_scale: Tensor,
    targets: Tensor,
    top: Tensor,
    total: Tensor,
    at: Tensor,
    shrink: Tensor,
    grad: bool,
) -> tuple[Tensor, Tensor] | None:
    """Takes a block of logits into `top`, `total`, `at` and says in `shrink` how much smaller e^(z − top) of the blocks
    before became. With `grad`: the codes (R, n) of this one's, times column_scale and without the target's entry, and
    their scales (R,)."""
    R, n = products.shape
    if products.dtype == torch.int32 and R and compiled.usable(row_scale, column_scale):
        codes = torch.empty(R, n, dtype=torch.int8) if grad else None
        scales, scratch = torch.empty(R), torch.empty(torch.get_num_threads(), n)
        compiled.call(
            "softmax_block", products.contiguous(), R, n, row_scale, column_scale, targets, top, total, at, shrink,
            codes, scales, scratch,
        )  # fmt: skip
        return None if codes is None else (codes, scales)
    z = products.to(torch.float32).mul_(row_scale.unsqueeze(1)).mul_(column_scale)
    here, column = (targets >= 0) & (targets < n), targets.clamp(0, n - 1).unsqueeze(1)
    at.copy_(torch.where(here, z.gather(1, column)[:, 0], at))
    higher = torch.maximum(top, z.amax(1))
    shrink.copy_((top - higher).exp_())
    top.copy_(higher)
    e = z.sub_(top.unsqueeze(1)).exp_()
    total.mul_(shrink).add_(e.sum(1))
    if not grad:
        return None
    e.mul_(column_scale)
    e.scatter_(1, column, e.gather(1, column).masked_fill_(here.unsqueeze(1), 0))
    return passes.quantise_plain(e, torch.int8)
