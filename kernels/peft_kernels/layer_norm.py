"""LayerNorm: y = xhat ⊙ w + b, xhat = (x - mean)·rstd (Ba et al. 2016, eq. 4).

Saved for backward: x itself, one mean and one rstd per row. y is noted as makeable from them (`recompute.remember`), so
that the linear that reads y saves nothing. With t = dy ⊙ w:

    dx = rstd·(t - mean(t) - xhat·mean(t⊙xhat))
    dw = Σ_rows dy ⊙ xhat,  db = Σ_rows dy        only where they are trained

With a residual the op adds first, h = x + residual, and returns h as well.

Shapes: x (..., D), weight and bias (D,), mean and rstd (..., 1).
"""

import functools
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import Backend, compute_dtype, use_triton
from .recompute import remember


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""
    wide = x.to(compute_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


@torch.library.custom_op("peft_kernels::layer_norm_forward", mutates_args=())
def _launched_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .gpu.layer_norm import launch_forward

    return launch_forward(x, residual, weight, bias, eps)


@torch.library.custom_op("peft_kernels::layer_norm_apply", mutates_args=())
def _launched_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    from .gpu.layer_norm import launch_apply

    return launch_apply(x, mean, rstd, weight, bias)


@torch.library.custom_op("peft_kernels::layer_norm_backward", mutates_args=())
def _launched_backward(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .gpu.layer_norm import launch_backward

    return launch_backward(dy, dh, x, mean, rstd, weight, need_weight, need_bias)


@_launched_forward.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd, x.new_empty(0 if residual is None else x.shape)


@_launched_apply.register_fake
def _(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_launched_backward.register_fake
def _(
    dy: Tensor,
    dh: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dw, db = (x.new_empty(x.shape[-1] if need else 0, dtype=torch.float32) for need in (need_weight, need_bias))
    return x.new_empty(x.shape), dw, db


def _remake_torch(x: Tensor, *parameters: Tensor, has_weight: bool, eps: float) -> Tensor:
    """The whole forward again: torch's kernel is one pass, and on CPU it keeps bf16 statistics, too coarse for y."""
    weight = parameters[0] if has_weight else None
    bias = parameters[-1] if len(parameters) > has_weight else None
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)[0]


def _remake_triton(x: Tensor, mean: Tensor, rstd: Tensor, *parameters: Tensor, has_weight: bool) -> Tensor:
    weight = parameters[0] if has_weight else None
    bias = parameters[-1] if len(parameters) > has_weight else None
    return _launched_apply(x, mean, rstd, weight, bias)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if triton:
            y, mean, rstd, h = _launched_forward(x, residual, weight, bias, eps)
        else:
            h = x if residual is None else x + residual
            y, mean, rstd = torch.native_layer_norm(h, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x if residual is None else h, mean, rstd, weight, bias)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.triton = triton
        return y, mean, rstd, None if residual is None else h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None, __: None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        if dy is None:
            return dh if need_x else None, dh if need_residual else None, None, None, None, None
        if ctx.triton:
            dx, dw, db = _launched_backward(dy, dh, x, mean, rstd, weight, need_weight, need_bias)
        else:
            dx, dw, db = torch.ops.aten.native_layer_norm_backward(
                dy, x, x.shape[-1:], mean, rstd, weight, bias, (need_x or need_residual, need_weight, need_bias)
            )
            dx = dx if dh is None or dx is None else dx.add_(dh)
        dw = dw.to(weight.dtype) if need_weight else None
        db = db.to(bias.dtype) if need_bias else None
        return dx if need_x else None, dx if need_residual else None, dw, db, None, None


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
    if not x.is_floating_point() or x.dim() < 1 or not x.shape[-1]:
        raise ValueError(f"x must be floating point with at least one feature, got {tuple(x.shape)} {x.dtype}.")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[-1:])} as x has features, got {tuple(parameter.shape)}."
            )
        if parameter is not None and parameter.dtype not in (x.dtype, compute_dtype(x)):
            raise ValueError(
                f"{name} must have x's dtype {x.dtype} or {compute_dtype(x)}, got {parameter.dtype}: cast one of them."
            )
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise ValueError(f"weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must match x, {tuple(x.shape)} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}: cast it."
        )


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, backend: Backend = "auto"
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, residual: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Norm over the last dimension to mean 0 and variance 1, with the residual add before it if one is given.

    Args:
        x: (..., D), float16 | bfloat16 | float32 | float64.
        weight, bias: (D,) in x's dtype or float32; either may be None.
        eps: added to the variance.
        residual: (..., D) of x's dtype; h = x + residual (rounded to that dtype) is normed and returned too.
        backend: "triton", "torch", or "auto" (triton where `x` lives on CUDA).

    Returns:
        y (..., D) in x's dtype, or (y, h) with a residual; on "torch" the bits of `F.layer_norm`. Nothing is modified.
        Differentiable once in x, residual, weight and bias.

    Raises:
        ValueError: shapes, dtypes or the backend do not fit.
    """
    _check(x, residual, weight, bias)
    triton = use_triton(x, backend)
    y, mean, rstd, h = _LayerNorm.apply(x, residual, weight, bias, eps, triton)
    parameters = [p for p in (weight, bias) if p is not None]
    saved = x if residual is None else h
    if triton:
        remember(y, functools.partial(_remake_triton, has_weight=weight is not None), saved, mean, rstd, *parameters)
    else:
        remember(y, functools.partial(_remake_torch, has_weight=weight is not None, eps=eps), saved, *parameters)
    return y if residual is None else (y, h)
