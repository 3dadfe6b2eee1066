"""Attention with dropout of its probabilities, for CPUs, where torch has no kernel for it that keeps no probabilities.

    Z = scale·Q·Kᵀ + mask,  P = softmax(Z),  Y = (P ⊙ keep / rate)·V

Backward makes P again from Z and the logsumexp L of its rows, and the mask from the seeds (Dao et al. 2022,
FlashAttention, algorithms 2 and 4, without their tiles):

    P  = exp(Z − L)                    dV = (P ⊙ keep / rate)ᵀ·dY
    D  = Σ_d dY ⊙ Y                    dP = (dY·Vᵀ) ⊙ keep / rate
    dZ = P ⊙ (dP − D)                  dQ = scale·dZ·K,  dK = scale·dZᵀ·Q

Samples are taken a few at a time, so that what has T×S numbers stays in the cores' caches. Saved: Q, K, V, Y, L, the
mask and the seeds; torch's own path keeps P and P ⊙ keep.

Shapes: B samples, H heads, T queries, S keys, E features of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _compiled as compiled
from .dropout import check, dropped, keep_rate

CACHE_BYTES = 2**21
"""Of scores that are worked on at a time."""


def dropped_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keep: Tensor, scale: float
) -> Tensor:
    """The definition. `keep` (B, H, T, S): 0 or 1/rate; a row that may look nowhere gives zeros."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(torch.ops.aten._safe_softmax(scores, -1) * keep, value)


def _parts(query: Tensor, key: Tensor) -> int:
    """Samples at a time."""
    size = query.shape[1] * query.shape[2] * key.shape[2] * query.element_size()
    return max(1, CACHE_BYTES * max(1, torch.get_num_threads()) // max(1, size))


def _scores(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Z, from a query that is scaled already."""
    scores = torch.matmul(query, key.transpose(2, 3))
    if mask is None:
        return scores
    return scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)


def _of(mask: Tensor | None, part: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[0] == 1 else mask[part]


def _drop(whole: Tensor, samples: int, places: Tensor, passes: bool) -> None:
    """Zeros at `places` of so many samples; `whole` has one element more than they have together."""
    if passes:
        compiled.call("zero_places", places, samples, len(places) // samples, (len(whole) - 1) // samples, whole)
    else:
        whole.index_fill_(0, places, 0)


class _DroppedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        p: float,
        seeds: Tensor,
        salt: int,
        passes: bool,
    ) -> Tensor:
        B, H, T, _ = query.shape
        S, step = key.shape[2], _parts(query, key)
        fast = passes and compiled.usable(query, key, value)
        out = query.new_empty(B, T, H, value.shape[3]).transpose(1, 2)
        lse = query.new_empty(B, H, T, 1)
        for start in range(0, B, step):
            part = slice(start, min(start + step, B))
            scores = _scores(query[part] * scale, key[part], _of(mask, part))
            buffer = scores.new_empty(scores.numel() + 1)
            kept = buffer[:-1].view(scores.shape)
            if fast:
                kept.copy_(scores)
                compiled.call("softmax_rows", kept, len(kept) * H * T, S, lse[part])
            else:
                torch.logsumexp(scores, -1, keepdim=True, out=lse[part])
                lse[part].masked_fill_(lse[part] == -torch.inf, 0)
                torch.sub(scores, lse[part], out=kept).exp_()
            _drop(buffer, len(kept), dropped(seeds[part], salt, H * T * S, p, passes), fast)
            out[part] = torch.matmul(kept, value[part]).mul_(1 / keep_rate(p, False))
        ctx.save_for_backward(query, key, value, mask, out, lse, seeds)
        ctx.settings = scale, p, salt, passes
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, out, lse, seeds = ctx.saved_tensors
        scale, p, salt, passes = ctx.settings
        B, H, T, _ = query.shape
        S, step, rate = key.shape[2], _parts(query, key), keep_rate(p, False)
        fast = passes and compiled.usable(query, key, value, lse)
        dq, dk, dv = (_like(t) for t in (query, key, value))
        for start in range(0, B, step):
            part = slice(start, min(start + step, B))
            q, k, v, g = query[part] * scale, key[part], value[part], dy[part]
            P = _scores(q, k, _of(mask, part))
            if fast:
                compiled.call("softmax_again", P, len(P) * H * T, S, lse[part])
            else:
                P.sub_(lse[part]).exp_()
            places = dropped(seeds[part], salt, H * T * S, p, passes)
            buffer = P.new_empty(P.numel() + 1)
            other = buffer[:-1].view(P.shape)
            other.copy_(P)
            _drop(buffer, len(P), places, fast)
            g = g * (1 / rate)
            dv[part] = torch.matmul(other.transpose(2, 3), g)
            torch.matmul(g, v.transpose(2, 3), out=other)
            _drop(buffer, len(P), places, fast)
            shares = (g * out[part]).sum(-1, keepdim=True).mul_(rate)
            if fast:
                compiled.call("softmax_back", other, P, shares, len(P) * H * T, S)
            else:
                other.sub_(shares).mul_(P)
            dq[part] = torch.matmul(other, k).mul_(scale)
            dk[part] = torch.matmul(other.transpose(2, 3), q)
        return dq, dk, dv, None, None, None, None, None, None


def _like(t: Tensor) -> Tensor:
    """A buffer (B, H, T, E) laid out as (B, T, H, E), as its reader wants it."""
    return t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2)


def dropped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    p: float,
    seeds: Tensor,
    salt: int,
    *,
    scale: float,
    passes: bool = False,
) -> Tensor:
    """softmax(scale·Q·Kᵀ + mask) with dropout, times V (Vaswani et al. 2017, eq. 1). On CPU tensors.

    Args:
        query: (B, H, T, E) float32 | float64; key, value: (B, H, S, E).
        mask: bool (True attends) or additive, (B or 1, H or 1, T or 1, S), without gradient; None.
        p: rate of dropout, 0 < p < 1.
        seeds: int64 (B,); salt: the layer's number. They name the mask of (H, T, S) numbers of each sample.
        passes: let compiled passes do the softmax and the dropping, where they run: other rounding.

    Returns:
        (B, H, T, E), laid out as (B, T, H, E). Differentiable once in query, key and value; nothing is modified. A row
        that may look nowhere gives zeros.

    Raises:
        ValueError: a rate or seeds that do not fit.
    """
    check(query, p, seeds)
    out: Tensor = _DroppedAttention.apply(query, key, value, mask, scale, p, seeds, salt, passes)
    return out
