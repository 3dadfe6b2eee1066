"""RMSNorm: y = xhat ⊙ (offset + w), xhat = x·rstd, rstd = 1/sqrt(mean(x²) + eps) (Zhang and Sennrich 2019, eq. 4).

Saved for backward: x itself and one rstd per row. y is noted as makeable from them (`recompute.remember`), so that the
linear that reads y saves nothing. With t = dy ⊙ (offset + w):

    dx = rstd·t - x·rstd³·mean(t⊙x)
    dw = Σ_rows dy ⊙ xhat               only where w is trained

`cast="llama"` rounds xhat to x's dtype before it meets the weight (T5, Llama, Qwen, Mistral); `cast="gemma"` rounds
once, at the end. With a residual the op adds first, h = x + residual, and returns h as well.

Shapes: x (..., D), weight (D,), rstd (..., 1) in fp32 (fp64 for fp64).
"""

import functools
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _compiled as compiled
from ._launch import Backend, compute_dtype, use_triton
from .recompute import remember

Cast = Literal["llama", "gemma"]


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, cast: Cast = "llama"
) -> Tensor:
    """The definition, in the order of roundings of `cast`."""
    wide = x.to(compute_dtype(x))
    xhat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return xhat.to(x.dtype)
    if cast == "gemma":
        return (xhat * (offset + weight.to(wide.dtype))).to(x.dtype)
    return (offset + weight if offset else weight) * xhat.to(x.dtype)


@torch.library.custom_op("peft_kernels::rms_norm_forward", mutates_args=())
def _launched_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .gpu.rms_norm import launch_forward

    return launch_forward(x, residual, weight, eps, offset, llama)


@torch.library.custom_op("peft_kernels::rms_norm_apply", mutates_args=())
def _launched_apply(x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, llama: bool) -> Tensor:
    from .gpu.rms_norm import launch_apply

    return launch_apply(x, rstd, weight, offset, llama)


@torch.library.custom_op("peft_kernels::rms_norm_backward", mutates_args=())
def _launched_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, trained: bool
) -> tuple[Tensor, Tensor]:
    from .gpu.rms_norm import launch_backward

    return launch_backward(dy, dh, x, rstd, weight, offset, trained)


@_launched_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, llama: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return (
        x.new_empty(x.shape, dtype=_result_dtype(x, weight, llama)),
        rstd,
        x.new_empty(0 if residual is None else x.shape),
    )


@_launched_apply.register_fake
def _(x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, llama: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=_result_dtype(x, weight, llama))


@_launched_backward.register_fake
def _(
    dy: Tensor, dh: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, trained: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if trained else 0, dtype=torch.float32)


def _result_dtype(x: Tensor, weight: Tensor | None, llama: bool) -> torch.dtype:
    return torch.promote_types(x.dtype, weight.dtype) if llama and weight is not None else x.dtype


def _apply(
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    offset: float,
    llama: bool,
    triton: bool,
    passes: bool = False,
) -> Tensor:
    """y from what is saved: the second half of the forward, and the recipe of its result."""
    if triton:
        return _launched_apply(x, rstd, weight, offset, llama)
    if passes and weight is not None and compiled.usable(x, rstd, weight):
        return _norm_compiled(x, rstd, weight, -1.0, offset)
    xhat = x * rstd  # a narrow x is widened by rstd's dtype
    if weight is None:
        return xhat.to(x.dtype)
    if not llama:
        return xhat.mul_(_shifted(weight, offset, xhat.dtype)).to(x.dtype)
    xhat, shifted = xhat.to(x.dtype), offset + weight if offset else weight
    return xhat.mul_(shifted) if _result_dtype(x, weight, llama) == x.dtype else xhat * shifted


def _shifted(weight: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype)
    return offset + weight if offset else weight


def _norm_compiled(x: Tensor, rstd: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """y; makes `rstd` where eps is not negative."""
    flat, y = x.reshape(-1, x.shape[-1]), torch.empty(x.shape)
    shifted = _shifted(weight, offset, x.dtype)
    compiled.call("rms_norm", flat, compiled.pitch(flat), shifted, *flat.shape, eps, rstd, y)
    return y


def _back_compiled(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    flat, rows, dx = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1]), torch.empty(x.shape)
    shifted = _shifted(weight, offset, x.dtype)
    compiled.call(
        "rms_norm_back", rows, compiled.pitch(rows), flat, compiled.pitch(flat), rstd, shifted, *flat.shape, dx
    )
    return dx


def _torch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, llama: bool, passes: bool
) -> tuple[Tensor, Tensor, Tensor]:
    h = x if residual is None else x + residual
    if passes and weight is not None and compiled.usable(h, weight):
        rstd = torch.empty(*h.shape[:-1], 1)
        return _norm_compiled(h, rstd, weight, eps, offset), rstd, h
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=compute_dtype(x))  # one read, no temporary
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return _apply(h, rstd, weight, offset=offset, llama=llama, triton=False), rstd, h


def _torch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor | None, offset: float, trained: bool
) -> tuple[Tensor, Tensor | None]:
    wide, features = compute_dtype(x), x.shape[-1]
    dy, wide_x = dy.to(wide).contiguous(), x.to(wide).contiguous()
    shifted = None if weight is None else _shifted(weight, offset, wide)
    # LayerNorm's fused kernel with mean 0 is the formula above less rstd·mean(t), which is put back. That is one pass
    # that writes and one in place, where the formula takes four and a second buffer.
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dy, wide_x, (features,), torch.zeros_like(rstd), rstd, shifted, None, (True, False, False)
    )
    rows = dy.view(-1, features)
    with torch.autocast(x.device.type, enabled=False):  # autocast would round the sums
        total = rows.sum(-1) if shifted is None else rows.mv(shifted)
        dx.add_(total.view(rstd.shape).mul_(rstd), alpha=1 / features)
        dw = (rows * wide_x.view(-1, features)).t().mv(rstd.view(-1)) if trained else None
    return (dx if dh is None else dx.add_(dh)).to(x.dtype), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        eps: float,
        offset: float,
        llama: bool,
        triton: bool,
        passes: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if triton:
            y, rstd, h = _launched_forward(x, residual, weight, eps, offset, llama)
        else:
            y, rstd, h = _torch_forward(x, residual, weight, eps, offset, llama, passes)
        ctx.save_for_backward(x if residual is None else h, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.triton, ctx.passes = offset, triton, passes
        return y, rstd, None if residual is None else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        need_x, need_residual, trained = ctx.needs_input_grad[:3]
        dx, dw = dh, None
        if dy is not None and ctx.passes and not trained and weight is not None and compiled.usable(dy, x, weight):
            dx = _back_compiled(dy, x, rstd, weight, ctx.offset)
            dx = dx if dh is None else dx.add_(dh)
        elif dy is not None:
            backward = _launched_backward if ctx.triton else _torch_backward
            dx, dw = backward(dy, dh, x, rstd, weight, ctx.offset, trained)
        dw = dw.to(weight.dtype) if trained and dw is not None else None
        return dx if need_x else None, dx if need_residual else None, dw, None, None, None, None, None


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, cast: str) -> None:
    if cast not in get_args(Cast):
        raise ValueError(f"cast must be one of {get_args(Cast)}, got {cast!r}.")
    if not x.is_floating_point() or x.dim() < 1 or not x.shape[-1]:
        raise ValueError(f"x must be floating point with at least one feature, got {tuple(x.shape)} {x.dtype}.")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[-1:])} as x has features, got {tuple(weight.shape)}.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must match x, {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}: cast it."
        )


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    backend: Backend = "auto",
    passes: bool = False,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    residual: Tensor,
    backend: Backend = "auto",
    passes: bool = False,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    residual: Tensor | None = None,
    backend: Backend = "auto",
    passes: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square norm over the last dimension, with the residual add before it if one is given.

    Args:
        x: (..., D), float16 | bfloat16 | float32 | float64.
        weight: (D,) of any floating dtype, or None for plain xhat.
        eps: added to the mean square.
        offset: added to the weight: 1.0 for Gemma, whose weights are stored around 0.
        cast: "llama" rounds xhat to x's dtype, then multiplies: the result has the promoted dtype of x and weight;
            "gemma" computes in fp32 and rounds once to x's dtype.
        residual: (..., D) of x's dtype; h = x + residual (rounded to that dtype) is normed and returned too.
        backend: "triton", "torch", or "auto" (triton where `x` lives on CUDA).
        passes: let compiled passes compute fp32 on a CPU, where they run: one pass each way, other rounding.

    Returns:
        y (..., D), or (y, h) with a residual. Nothing is modified. Differentiable once in x, residual and weight.

    Raises:
        ValueError: shapes, dtypes, `cast` or the backend do not fit.
    """
    _check(x, residual, weight, cast)
    triton, llama = use_triton(x, backend), cast == "llama"
    y, rstd, h = _RMSNorm.apply(x, residual, weight, eps, offset, llama, triton, passes)
    saved = (x if residual is None else h, rstd)
    make = functools.partial(_apply, offset=offset, llama=llama, triton=triton, passes=passes)
    remember(y, make, *saved, *(() if weight is None else (weight,)))
    return y if residual is None else (y, h)
