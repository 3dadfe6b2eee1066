"""The chunks of `linear_cross_entropy` over a frozen head whose weight is int8 codes, both products on int8 units.

    z    = logit_scale·(q(h)·Wqᵀ)·s_h ⊙ s_V,    p = softmax(z)
    dh_i = w_i·logit_scale·(Σ_b (q(p_b ⊙ s_V,b)·Wq,b)·s_i,b + (p_t − 1)·s_t·Wq,t)

One scale for a whole row of p would round all but its largest entries to zero. So the target's entry, the largest of
the gradient, is left out of the rounding and multiplied exactly, and the others have a scale for each row and block of
the vocabulary. Neither logits nor p are kept: the compiled pass turns the int32 products into codes of p, row by row.

Shapes: M tokens, H hidden size, V vocabulary, R rows of a chunk.
"""

import torch
from torch import Tensor

from . import _compiled as compiled
from . import _passes as passes
from .frozen_weight import FrozenWeight

BLOCK = 4096
"""Columns of the vocabulary with one scale."""


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
    clean = torch.where(ignored, -1, targets)
    weight = (~ignored).to(torch.float32) if weights is None else torch.where(ignored, 0, weights.to(torch.float32))
    codes, scale = head.units.quantise([hidden], [hidden.shape[1]], [head.factor])
    assert scale is not None
    losses = hidden.new_empty(M, dtype=torch.float32)
    dh = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if grad else None
    rows = max(1, min(chunk_rows, M))
    blocks = -(-V // BLOCK)
    buffer = torch.empty(blocks, rows, BLOCK, dtype=torch.int8, device=hidden.device) if grad else None
    for start in range(0, M, rows):
        part = slice(start, min(start + rows, M))
        count = part.stop - start
        products = head.units.product(codes[part], head.codes)
        own = None if buffer is None else buffer.view(-1)[: blocks * count * BLOCK].view(blocks, count, BLOCK)
        top, total, at, steps = _softmax(products, scale[part] * logit_scale, head.scale, clean[part], own)
        del products
        losses[part] = (total.log() + top - at) * weight[part]
        losses[part].masked_fill_(ignored[part], 0)
        if dh is not None and own is not None and steps is not None:
            factor = weight[part] * logit_scale
            _gradient(dh[part], own, steps * (factor / total), head)
            share = ((at - top).exp() / total - 1) * factor
            rows_of = head.codes[clean[part].clamp_min(0)].to(torch.float32)
            dh[part].addcmul_(rows_of, (share * head.scale[clean[part].clamp_min(0)]).unsqueeze(1))
    if dh is None:
        return losses, None
    if head.factor is not None:
        dh.mul_(head.factor)
    return losses, dh.to(hidden.dtype)


def _gradient(dh: Tensor, codes: Tensor, steps: Tensor, head: FrozenWeight) -> None:
    """dh (R, H) = Σ_b (codes_b·Wq,b)·steps_b, codes (blocks, R, BLOCK), steps (blocks, R)."""
    V = head.shape[0]
    for b in range(len(codes)):
        width = min(BLOCK, V - b * BLOCK)
        own = codes[b] if width == BLOCK else codes[b][:, :width].contiguous()
        products = head.units.product_back(own, head.codes[b * BLOCK : b * BLOCK + width])
        if b == 0:
            dh.copy_(passes.rescale(products, steps[b], None, None, torch.float32))
        elif products.dtype == torch.int32 and compiled.usable(dh, steps):
            compiled.call(
                "rescale_add", products, compiled.pitch(products), *dh.shape, steps[b], dh, compiled.pitch(dh)
            )
        else:
            dh.add_(passes.rescale(products, steps[b], None, None, torch.float32))


def _softmax(
    products: Tensor, row_scale: Tensor, column_scale: Tensor, targets: Tensor, codes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """max z, Σ e^(z − max), z at the target (each (R,)), and the scales (blocks, R) of `codes`, which are filled in."""
    R, V = products.shape
    blocks = -(-V // BLOCK)
    if products.dtype == torch.int32 and R and compiled.usable(row_scale, column_scale):
        top, total, at = (torch.empty(R) for _ in range(3))
        scales = None if codes is None else torch.empty(blocks, R)
        scratch = torch.empty(torch.get_num_threads(), V)
        compiled.call(
            "softmax_codes", products.contiguous(), R, V, row_scale.contiguous(), column_scale, targets, top, total, at,
            BLOCK, codes, scales, scratch,
        )  # fmt: skip
        return top, total, at, scales
    z = products.to(torch.float32).mul_(row_scale.unsqueeze(1)).mul_(column_scale)
    top = z.amax(1)
    at = torch.where(targets < 0, 0, z.gather(1, targets.clamp_min(0).unsqueeze(1))[:, 0])
    e = z.sub_(top.unsqueeze(1)).exp_()
    total = e.sum(1)
    if codes is None:
        return top, total, at, None
    e.mul_(column_scale)
    e.scatter_(1, targets.clamp_min(0).unsqueeze(1), torch.where(targets < 0, e[:, 0], 0).unsqueeze(1))
    e = torch.nn.functional.pad(e, (0, blocks * BLOCK - V)).view(R * blocks, BLOCK)
    found, scales = passes.quantise_plain(e, torch.int8)
    codes.copy_(found.view(R, blocks, BLOCK).transpose(0, 1))
    return top, total, at, scales.view(R, blocks).t()
