"""The chunks of `linear_cross_entropy`: logits, their loss and what every trained tensor gets from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._cross_entropy_codes import losses_and_gradient
from .frozen_weight import FrozenWeight

# On CPU the softmax walks blocks of rows that stay in a core's L2. Measured at M=512, H=576, V=49152, fp32, one thread:
# all that is not GEMM takes 27 ms where whole chunks took 37 (the GEMMs 390 to 406).
CACHE_BYTES = 2**20
VOCABULARY_BLOCK = 16384
# Rows of the Triton path start at multiples of so many elements, so that those of any vocabulary (GPT-2: 50257) can be
# read in vectors. The kernel zeroes the padding: torch's bf16 GEMM on CPU lets a NaN that stands there into its result.
ROW_ALIGN = 16


@dataclass(frozen=True)
class Plan:
    """Everything about a call that is not a tensor. `softcap` 0 means none; `dtype` is that of the head's GEMMs;
    `codes` is the head where its products run on int8 units."""

    ignore_index: int
    softcap: float
    z_loss: float
    logit_scale: float
    chunk_rows: int
    triton: bool
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    scales: tuple[float, ...]
    codes: FrozenWeight | None = None


# Registered, so that FakeTensorMode and torch.compile see a shape and not a kernel.
@torch.library.custom_op("peft_kernels::cross_entropy_rows", mutates_args=("logits",))
def _cross_entropy_rows(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    logit_scale: float,
    grad: bool,
) -> Tensor:
    """Loss of each row (R,) fp32; with `grad`, `logits` (R, V) becomes dlogit in place."""
    from .gpu.linear_cross_entropy import launch_rows

    return launch_rows(logits, targets, weights, ignore_index, softcap, z_loss, logit_scale, grad)


@_cross_entropy_rows.register_fake
def _(logits, targets, weights, ignore_index, softcap, z_loss, logit_scale, grad):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def _softmax_rows(
    z: Tensor, cap: Tensor | None, targets: Tensor, weights: Tensor | None, plan: Plan, grad: bool, normalise: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row; with `grad`, `z` (R, V) is turned into dlogit, or into dlogit without its row factor.

    Returns:
        The losses (R,) and the factor (R, 1) that the rows still want, None where `normalise` put it in.
    """
    if cap is not None:
        torch.mul(z, 1 / plan.softcap, out=cap).tanh_()
        torch.mul(cap, plan.softcap, out=z)
    ignored = targets == plan.ignore_index
    column = torch.where(ignored, 0, targets)[:, None]
    at_target = z.gather(1, column)
    top, total = z.new_empty(z.shape[0], 1), z.new_empty(z.shape[0], 1)
    block = max(z.shape[0], 1)
    if z.device.type == "cpu" and not torch.compiler.is_compiling():  # inductor plans its own passes
        block = max(CACHE_BYTES // (z.shape[1] * z.element_size()), 1)
    for part, high, sum_ in zip(z.split(block), top.split(block), total.split(block), strict=True):
        torch.amax(part, 1, keepdim=True, out=high)
        torch.sum(part.sub_(high).exp_(), 1, keepdim=True, out=sum_)
    lse = total.log().add_(top)
    loss = lse - at_target
    if plan.z_loss:
        loss.addcmul_(lse, lse, value=plan.z_loss)
    loss = loss[:, 0] if weights is None else loss[:, 0] * weights
    loss = torch.where(ignored, 0, loss)
    if not grad:
        return loss, None
    weight = (~ignored).to(z.dtype) if weights is None else torch.where(ignored, 0, weights)
    weight = weight[:, None] * plan.logit_scale
    row = torch.arange(z.shape[0], device=z.device)[:, None]
    factor = weight / total
    if normalise or plan.z_loss:
        z.mul_(torch.addcmul(factor, factor, lse, value=2 * plan.z_loss))
        z.index_put_((row, column), z.gather(1, column) - weight)
        rest = None
    else:
        rest = factor
        z.index_put_((row, column), z.gather(1, column) - total)
    if cap is not None:
        z.addcmul_(z, cap.mul_(cap), value=-1)
    return loss, rest


def _accumulate(into: Tensor, left: Tensor, wide: Tensor | None, right: Tensor) -> None:
    """into += leftᵀ·right, in `into`'s dtype; `wide` is `left` in that dtype where we have it."""
    full = left if left.dtype == into.dtype else wide
    if full is not None:
        into.addmm_(full.t(), right.to(into.dtype))
        return
    for start in range(0, into.shape[0], VOCABULARY_BLOCK):  # what is added exists for one block at a time
        block = slice(start, start + VOCABULARY_BLOCK)
        part = left[:, block].t()
        into[block] += torch.mm(part, right, out_dtype=into.dtype) if left.is_cuda else part @ right


class _Low(NamedTuple):
    """One adapter as a chunk sees it; `x` None reads hidden. Its gradients are grads[at : at + 3]."""

    A: Tensor
    B: Tensor
    x: Tensor | None
    scale: float
    at: int


class _Chunk(NamedTuple):
    """dlogit (n, V) of some rows, `wide` the same in fp32 where we have it, `factor` what its rows still want."""

    rows: slice
    dlogits: Tensor
    wide: Tensor | None
    factor: Tensor | None

    def scaled(self, t: Tensor) -> Tensor:
        return t if self.factor is None else t * self.factor


def _head_grads(grads: list[Tensor | None], chunk: _Chunk, h: Tensor, weight: Tensor) -> None:
    dh, dW, db = grads[:3]
    if dh is not None:
        torch.mm(chunk.dlogits, weight, out=dh[chunk.rows])
        if chunk.factor is not None:
            dh[chunk.rows].mul_(chunk.factor)
    if dW is not None:
        _accumulate(dW, chunk.dlogits, chunk.wide, chunk.scaled(h))
    if db is not None:
        full = chunk.dlogits if chunk.wide is None else chunk.wide
        db.add_(full.sum(0, dtype=db.dtype) if chunk.factor is None else full.t().mv(chunk.factor[:, 0]))


def _adapter_grads(grads: list[Tensor | None], chunk: _Chunk, low: _Low, x: Tensor, s: Tensor) -> None:
    """`x` (n, H) in the adapter's dtype, `s` = x·Aᵀ."""
    dA, dB, dx = grads[low.at : low.at + 3]
    dh = grads[0] if low.x is None else None
    if dB is not None:
        _accumulate(dB, chunk.dlogits, chunk.wide, chunk.scaled(s * low.scale))
    if dA is None and dx is None and dh is None:
        return
    dlogits = chunk.dlogits if low.B.dtype == chunk.dlogits.dtype else chunk.wide
    assert dlogits is not None
    ds = chunk.scaled((dlogits @ low.B).mul_(low.scale))
    if dA is not None:
        _accumulate(dA, ds, None, x)
    if dx is not None:
        torch.mm(ds, low.A, out=dx[chunk.rows])
    if dh is not None and dh.dtype == ds.dtype:
        dh[chunk.rows].addmm_(ds, low.A)
    elif dh is not None:
        dh[chunk.rows] += ds @ low.A


def _chunks(
    plan: Plan, targets: Tensor, weights: Tensor | None, inputs: Sequence[Tensor | None], wants: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Losses (M,) and, where wanted, the gradient of their sum for each of `inputs`.

    `inputs` are hidden, weight, bias, then A, B, x of each adapter. Gradients that are sums over tokens (weight, bias,
    A, B) come in fp32 or wider, gradients of rows (hidden, x) in the dtype of their GEMM.
    """
    dtype, wide_dtype, grad = plan.dtype, torch.promote_types(plan.dtype, torch.float32), any(wants)
    hidden, weight, bias = (t if t is None else t.to(dtype) for t in inputs[:3])
    assert hidden is not None
    assert weight is not None
    lows = []
    for k, (scale, kind) in enumerate(zip(plan.scales, plan.adapter_dtypes, strict=True)):
        A, B, x = inputs[3 * k + 3 : 3 * k + 6]
        assert A is not None
        assert B is not None
        lows.append(_Low(A.to(kind), B.to(kind), x, scale, 3 * k + 3))
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, (t, wanted) in enumerate(zip(inputs, wants, strict=True)):
        kind = dtype if i < 3 else plan.adapter_dtypes[i // 3 - 1]
        if t is not None and wanted and i in (0, *range(5, len(inputs), 3)):
            grads[i] = t.new_empty(t.shape, dtype=kind)
        elif t is not None and wanted:
            grads[i] = t.new_zeros(t.shape, dtype=wide_dtype)

    M, V, u = hidden.shape[0], weight.shape[0], plan.logit_scale
    R, narrow = max(min(plan.chunk_rows, M), 1), dtype != wide_dtype
    pitch = -(-V // ROW_ALIGN) * ROW_ALIGN if plan.triton else V
    buffer = hidden.new_empty(R, pitch)[:, :V]
    in_wide = narrow and (not plan.triton or wide_dtype in plan.adapter_dtypes)
    wide_buffer = hidden.new_empty(R, V, dtype=wide_dtype) if in_wide else None
    cap_buffer = hidden.new_empty(R, V, dtype=wide_dtype) if plan.softcap and not plan.triton else None
    losses = hidden.new_empty(M, dtype=wide_dtype)
    for start in range(0, M, R):
        rows = slice(start, min(start + R, M))
        h, logits = hidden[rows], buffer[: rows.stop - start]
        wide, cap = (None if b is None else b[: rows.stop - start] for b in (wide_buffer, cap_buffer))
        # beta=0 reads nothing of its first operand, and alpha scales inside the GEMM
        torch.addmm(logits if bias is None else bias, h, weight.t(), beta=0 if bias is None else u, alpha=u, out=logits)
        xs = [(h if low.x is None else low.x[rows]).to(low.A.dtype) for low in lows]
        s = [x @ low.A.t() for x, low in zip(xs, lows, strict=True)]
        for each, low in zip(s, lows, strict=True):
            if low.B.dtype == dtype:
                logits.addmm_(each, low.B.t(), alpha=low.scale * u)
        z = logits if wide is None else wide.copy_(logits)
        for each, low in zip(s, lows, strict=True):
            if low.B.dtype != dtype:
                z.addmm_(each, low.B.t(), alpha=low.scale * u)
        w, factor = None if weights is None else weights[rows], None
        if plan.triton:
            if wide is not None:
                logits.copy_(wide)
            losses[rows] = _cross_entropy_rows(
                logits, targets[rows], w, plan.ignore_index, plan.softcap, plan.z_loss, u, grad
            )
            if grad and wide is not None:
                wide.copy_(logits)
        else:
            losses[rows], factor = _softmax_rows(z, cap, targets[rows], w, plan, grad, normalise=narrow)
            if grad and wide is not None:
                logits.copy_(wide)
        if grad:
            chunk = _Chunk(rows, logits, wide, factor)
            _head_grads(grads, chunk, h, weight)
            for low, x, each in zip(lows, xs, s, strict=True):
                _adapter_grads(grads, chunk, low, x, each)
    return losses, grads


def run(
    plan: Plan, targets: Tensor, weights: Tensor | None, inputs: Sequence[Tensor | None], wants: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """`_chunks`, out of reach of autograd and of autocast, which `plan.dtype` has heard already."""
    with torch.no_grad(), torch.autocast(targets.device.type, enabled=False):
        if plan.codes is None:
            return _chunks(plan, targets, weights, inputs, wants)
        hidden = inputs[0]
        assert hidden is not None
        losses, dh = losses_and_gradient(
            hidden, plan.codes, targets, weights, plan.ignore_index, plan.logit_scale, plan.chunk_rows, wants[0]
        )
        return losses, [dh, *[None] * (len(inputs) - 1)]
