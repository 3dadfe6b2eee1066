"""Cross-entropy straight from hidden states: the (M, V) logits never exist, only a chunk of their rows does.

    z      = cap(logit_scale·(h·Wᵀ + b + Σ scale·(x·Aᵀ)·Bᵀ)),   cap(u) = c·tanh(u/c) (Gemma 2) or u
    lse    = log Σ exp z
    loss_i = w_i·(lse − z_t + z_loss·lse²),                     0 where t = ignore_index
    dz     = w_i·(softmax(z)·(1 + 2·z_loss·lse) − onehot_t)
    dlogit = logit_scale·(1 − (z/c)²)·dz

The gradient is taken in forward: a chunk of logits is turned in place into dlogit, from which dh = dlogit·W and, for
whatever is trained, dW += dlogitᵀ·h, db, dA, dB, dx follow before the next chunk overwrites it. Backward multiplies
them by grad_output. Saved: one gradient for each input that wants one. With reduction="none" each row has a
grad_output of its own, so backward computes the logits a second time and the inputs are saved instead.

The torch path in fp32 leaves the softmax unnormalised in the chunk (E = exp(z − max), E_t −= ΣE) and scales the rows of
the GEMMs' small operands by w/ΣE: four passes over the chunk beside its GEMMs. bf16 and fp16 logits get a float32
copy of the chunk for the softmax, and softcap one more buffer; the Triton path needs neither.

Shapes: M tokens, H hidden size, V vocabulary, r rank, R rows of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._cross_entropy_chunks import Plan, run
from ._cross_entropy_codes import ROWS
from ._launch import Backend, compute_dtype, use_triton
from .frozen_weight import FrozenWeight

Reduction = Literal["sum", "mean", "none"]

# Rows (least, most) and bytes of a chunk. Measured on CPU (H=576, V=49152, fp32): GEMMs by 64 rows take 1.15 to 1.3
# times as long as by 128, by 256 they save 3 to 7%; but glibc gives blocks above 32 MB back to the system each time,
# and every page has to be faulted in again.
CPU_ROWS, CPU_BYTES = (64, 256), 2**25
CUDA_ROWS, CUDA_BYTES = (1024, 8192), 2**28


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """A LoRA on the head: adds `scale·(x·Aᵀ)·Bᵀ` to the logits.

    Attributes:
        A: (r, H).
        B: (V, r).
        scale: alpha / r.
        hidden: (M, H), what the low-rank branch reads (after dropout); None reads the head's own input.
    """

    A: Tensor
    B: Tensor
    scale: float
    hidden: Tensor | None = None


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Sequence[HeadAdapter] = (),
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The definition, with all logits at once: loss per token (M,)."""
    logits = F.linear(hidden, weight, bias)
    for adapter in lora:
        x = hidden if adapter.hidden is None else adapter.hidden
        low = F.linear(F.linear(x.to(adapter.A.dtype), adapter.A), adapter.B) * adapter.scale
        logits = (logits + low).to(logits.dtype)
    logits = (logits * logit_scale).to(compute_dtype(logits))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    loss = loss + z_loss * torch.where(targets == ignore_index, 0, torch.logsumexp(logits, -1) ** 2)
    return loss if token_weights is None else loss * token_weights


class _SummedLoss(torch.autograd.Function):
    """Σ losses; the gradient is ready when forward returns."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, targets: Tensor, weights: Tensor | None, *inputs: Tensor | None) -> Tensor:
        losses, grads = run(plan, targets, weights, inputs, ctx.needs_input_grad[3:])
        ctx.dtypes = [None if g is None or t is None else t.dtype for g, t in zip(grads, inputs, strict=True)]
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        # A 1-element factor, unlike a 0-dim one, multiplies in fp32: a loss scale of 65536 is no fp16 number.
        out = [
            None if g is None else torch.mul(g, dloss.reshape(1), out=torch.empty_like(g, dtype=dtype))
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, None, *out


class _RowLosses(torch.autograd.Function):
    """Losses (M,), each with a gradient of its own to come: backward runs the chunks again with it as row weight."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, targets: Tensor, weights: Tensor | None, *inputs: Tensor | None) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(targets, weights, *inputs)
        return run(plan, targets, weights, inputs, [False] * len(inputs))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        targets, weights, *inputs = ctx.saved_tensors
        weights = dlosses if weights is None else weights * dlosses
        _, grads = run(ctx.plan, targets, weights, inputs, ctx.needs_input_grad[3:])
        return None, None, None, *(None if g is None else g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


def _default_rows(M: int, V: int, bytes_per_logit: int, cuda: bool) -> int:
    """Rows of a chunk: within bytes and rows of the table, and the chunks of equal size."""
    (least, most), limit = (CUDA_ROWS, CUDA_BYTES) if cuda else (CPU_ROWS, CPU_BYTES)
    R = min(max(limit // (V * bytes_per_logit), least), most)
    count = max(-(-M // R), 1)
    return -(-M // count // 16) * 16


def _validate(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: Sequence[HeadAdapter],
    rows: Tensor | None,
    token_weights: Tensor | None,
    settings: tuple[float | None, str, int | None],
    autocast: bool,
) -> None:
    """Raises one ValueError that names every fault."""
    softcap, reduction, chunk_rows = settings
    faults = []
    if weight.dim() != 2 or not weight.shape[0] or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        faults.append(
            f"hidden (..., H) and weight (V, H) expected, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1] or targets.dtype != torch.int64:
        faults.append(f"targets must be int64 {tuple(hidden.shape[:-1])}, got {targets.dtype} {tuple(targets.shape)}")
    if not autocast and weight.dtype != hidden.dtype:
        faults.append(f"weight must have hidden's dtype {hidden.dtype} outside autocast, got {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not (autocast or bias.dtype == hidden.dtype)):
        faults.append(f"bias must be {hidden.dtype} ({weight.shape[0]},), got {bias.dtype} {tuple(bias.shape)}")
    for a in lora:
        rank = a.A.shape[0]
        if a.A.shape != (rank, weight.shape[-1]) or a.B.shape != (weight.shape[0], rank) or a.A.dtype != a.B.dtype:
            faults.append(
                f"an adapter wants A (r, {weight.shape[-1]}) and B ({weight.shape[0]}, r) of one dtype, "
                f"got {tuple(a.A.shape)} {a.A.dtype} and {tuple(a.B.shape)} {a.B.dtype}"
            )
        if a.hidden is not None and a.hidden.shape != hidden.shape:
            faults.append(f"an adapter's hidden must be {tuple(hidden.shape)}, got {tuple(a.hidden.shape)}")
    if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64):
        faults.append(f"rows must be a 1-D int64 tensor of row indices, got {rows.dtype} {tuple(rows.shape)}")
    if token_weights is not None and (token_weights.shape != targets.shape or token_weights.requires_grad):
        faults.append(
            f"token_weights must be {tuple(targets.shape)} without gradient, got {tuple(token_weights.shape)} "
            f"with requires_grad={token_weights.requires_grad}; to differentiate weights, multiply reduction='none'"
        )
    if softcap is not None and not softcap > 0:
        faults.append(f"softcap must be positive or None, got {softcap}")
    if reduction not in get_args(Reduction):
        faults.append(f"reduction must be one of {get_args(Reduction)}, got {reduction!r}")
    if chunk_rows is not None and chunk_rows < 1:
        faults.append(f"chunk_rows must be at least 1, got {chunk_rows}")
    if faults:
        raise ValueError("linear_cross_entropy: " + "; ".join(faults) + ".")


def _validate_codes(codes: FrozenWeight, weight: Tensor, more: bool) -> None:
    """Raises one ValueError for codes that do not fit the head, or a head that is more than a product."""
    if codes.format != "int8" or codes.columns is not None or codes.shape != weight.shape:
        raise ValueError(
            f"linear_cross_entropy: codes must be int8 {tuple(weight.shape)} without outlier columns, got "
            f"{codes.format} {tuple(codes.shape)}."
        )
    if weight.requires_grad or more:
        raise ValueError(
            "linear_cross_entropy: codes are for a frozen head without bias, adapters, softcap, z_loss and reduction "
            "none; leave them out."
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: Sequence[HeadAdapter] = (),
    rows: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "sum",
    logit_scale: float = 1.0,
    chunk_rows: int | None = None,
    codes: FrozenWeight | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of `softmax(head(hidden))` against `targets`, without keeping logits (module docstring).

    Args:
        hidden: (..., H), M rows in all. Its dtype is that of the logits' GEMM, or autocast's where that is enabled.
        weight: (V, H), the head; costs no gradient GEMM when frozen.
        targets: (...) int64, class index or `ignore_index`. Other values raise on CPU, give a NaN loss on Triton.
        bias: (V,).
        lora: adapters of the head. In another dtype than hidden's (PEFT's fp32 over a bf16 base) their GEMMs run in
            fp32; under autocast in its dtype.
        rows: int64 indices, without repetition, of the rows of flattened `hidden` that count. The others have no loss,
            a zero gradient and cost no GEMM.
        ignore_index: target of tokens without loss; they do cost GEMM.
        softcap: c of c·tanh(logits/c), after `logit_scale`.
        z_loss: factor of logsumexp², per token and weighted like it.
        token_weights: (...) factor of each token's loss. Not differentiable.
        reduction: "sum"; "mean", the sum divided by the sum of `token_weights` (or the count) over tokens that are not
            ignored, NaN where there are none; "none", which computes the logits again in backward.
        logit_scale: factor of the logits (Cohere's multiplier, the inverse of Granite's divisor).
        chunk_rows: rows of logits at a time. Default: 64 to 256 rows, at most 32 MB where that leaves 64, on CPU;
            1024 to 8192 rows, at most 256 MB where that leaves 1024, on CUDA; 1024 with `codes`.
        codes: int8 codes of a frozen `weight`: both products run on int8 units (`_cross_entropy_codes`). For a plain
            head: no bias, adapters, softcap or z_loss, and no reduction "none".
        backend: "triton", "torch", or "auto" (triton where `hidden` lives on CUDA).

    Returns:
        fp32 (fp64 for fp64 GEMMs) scalar, or for "none" one loss per row in the shape of `targets`. Differentiable once
        in hidden, weight, bias and the adapters' A, B and hidden; nothing is modified.

    Raises:
        ValueError: shapes, dtypes or settings do not fit, or "triton" was asked for where it cannot run.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    _validate(hidden, weight, targets, bias, lora, rows, token_weights, (softcap, reduction, chunk_rows), autocast)
    if codes is not None:
        _validate_codes(codes, weight, bool(bias is not None or lora or softcap or z_loss or reduction == "none"))
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    triton = use_triton(hidden, backend)

    def flat(t: Tensor) -> Tensor:
        t = t.reshape(-1, *t.shape[targets.dim() :])
        return t if rows is None else t.index_select(0, rows)

    h, chosen = flat(hidden), flat(targets)
    weights = None if token_weights is None else flat(token_weights).to(wide)
    inputs: list[Tensor | None] = [h, weight, bias]
    for a in lora:
        inputs += [a.A, a.B, None if a.hidden is None else flat(a.hidden)]
    (M, _), V = h.shape, weight.shape[0]
    kinds = tuple(dtype if autocast or a.A.dtype == dtype else wide for a in lora)
    in_wide = dtype != wide and (not triton or wide in kinds)
    bytes_per_logit = dtype.itemsize + wide.itemsize * (in_wide + bool(softcap and not triton))
    plan = Plan(
        ignore_index=ignore_index,
        softcap=softcap or 0.0,
        z_loss=z_loss,
        logit_scale=logit_scale,
        chunk_rows=chunk_rows or (ROWS if codes else _default_rows(M, V, bytes_per_logit, hidden.is_cuda)),
        triton=triton,
        dtype=dtype,
        adapter_dtypes=kinds,
        scales=tuple(a.scale for a in lora),
        codes=codes,
    )
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if reduction == "none":
        losses = (
            _RowLosses.apply(plan, chosen, weights, *inputs)
            if trained
            else run(plan, chosen, weights, inputs, [False] * len(inputs))[0]
        )
        if rows is not None:
            losses = losses.new_zeros(targets.numel()).index_add(0, rows, losses)
        return losses.view(targets.shape)
    if trained:
        loss = _SummedLoss.apply(plan, chosen, weights, *inputs)
    else:
        loss = run(plan, chosen, weights, inputs, [False] * len(inputs))[0].sum()
    if reduction == "sum":
        return loss
    counted = (chosen != ignore_index).to(wide)
    total = (counted if weights is None else counted * weights).sum()
    # The inner where keeps the gradient of 0/0 at zero, as F.cross_entropy does.
    nothing = total == 0
    return torch.where(nothing, float("nan"), loss / torch.where(nothing, 1, total))
