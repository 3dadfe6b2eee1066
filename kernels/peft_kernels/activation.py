"""Pointwise activations that keep only their input.

    gelu        x · Φ(x), Φ the normal distribution's cdf, by erf      (Hendrycks & Gimpel 2016)
    gelu_tanh   x · ½(1 + tanh(√(2/π)(x + 0.044715 x³)))               (the same paper's approximation)
    silu        x · sigmoid(x)
    quick_gelu  x · sigmoid(1.702 x) = silu(1.702 x) / 1.702, so its slope is silu's slope at 1.702 x
    relu        max(x, 0)

Backward computes the slope from x. The output notes how to make it again, so that the linear that reads it
saves nothing either (see `recompute`).

Shapes: any; the op is elementwise.
"""

from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import Backend, compute_dtype, use_triton
from .recompute import remember

Kind = Literal["gelu", "gelu_tanh", "silu", "quick_gelu", "relu"]
QUICK = 1.702
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_aten = torch.ops.aten


def activation_reference(x: Tensor, kind: Kind) -> Tensor:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""
    wide = x.to(compute_dtype(x))
    if kind == "quick_gelu":
        y = wide * torch.sigmoid(QUICK * wide)
    elif kind == "relu":
        y = torch.relu(wide)
    elif kind == "silu":
        y = F.silu(wide)
    else:
        y = F.gelu(wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    return y.to(x.dtype)


def activation_value(x: Tensor, kind: Kind) -> Tensor:
    """The activation in the fewest passes. aten's kernels widen half precision inside, so x is not copied."""
    if kind == "silu":
        return F.silu(x)
    if kind == "relu":
        return torch.relu(x)
    if kind == "quick_gelu":
        return (x.to(compute_dtype(x)) * QUICK).sigmoid_().mul_(x).to(x.dtype)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activation_gradient(dy: Tensor, x: Tensor, kind: Kind, *, out: Tensor | None = None) -> Tensor:
    """dy · slope(x). `out`, if given, is overwritten and may be `dy` itself where the caller owns it."""
    if kind == "quick_gelu":
        wide = x.to(compute_dtype(x)) * QUICK  # ours, and big enough to take the result
        wide = _aten.silu_backward.grad_input(dy.to(wide.dtype), wide, grad_input=wide)
        return wide.to(x.dtype) if out is None else out.copy_(wide)
    # contiguous, or a spread-out gradient (that of a sum) would hand its strides on
    target = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    if kind == "silu":
        return _aten.silu_backward.grad_input(dy, x, grad_input=target)
    if kind == "relu":
        return _aten.threshold_backward.grad_input(dy, x, 0, grad_input=target)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return _aten.gelu_backward.grad_input(dy, x, approximate=approximate, grad_input=target)


# Registered ops: FakeTensorMode and torch.compile see shapes, not kernels.
@torch.library.custom_op("peft_kernels::activation_forward", mutates_args=())
def _forward_op(x: Tensor, kind: str) -> Tensor:
    from .gpu.activation import launch_forward

    return launch_forward(x, kind)


@torch.library.custom_op("peft_kernels::activation_backward", mutates_args=())
def _backward_op(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    from .gpu.activation import launch_backward

    return launch_backward(dy, x, kind)


@_forward_op.register_fake
def _(x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape)


def _make(x: Tensor, *, kind: Kind, triton: bool) -> Tensor:
    return _forward_op(x, kind) if triton else activation_value(x, kind)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Kind, triton: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind, ctx.triton = kind, triton
        return _make(x, kind=kind, triton=triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        dx = _backward_op(dy, x, ctx.kind) if ctx.triton else activation_gradient(dy, x, ctx.kind)
        return dx, None, None


def activate(x: Tensor, kind: Kind, *, backend: Backend = "auto") -> Tensor:
    """Apply an activation, keeping only `x` for backward.

    Args:
        x: any shape, float16 | bfloat16 | float32 | float64.
        kind: "gelu" (erf) | "gelu_tanh" | "silu" | "quick_gelu" | "relu".
        backend: "triton", "torch", or "auto" (triton where `x` lives on CUDA).

    Returns:
        Shape and dtype of `x`, contiguous on the triton path. Differentiable once; `x` is not modified. It carries
        the recipe by which it can be made again from `x`.

    Raises:
        ValueError: unknown `kind`, `x` is not of a floating dtype named above, or "triton" cannot run here.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, got {kind!r}.")
    if x.dtype not in _FLOATS:
        raise ValueError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}. Convert it first.")
    triton = use_triton(x, backend)
    y: Tensor = _Activate.apply(x, kind, triton)
    return remember(y, partial(_make, kind=kind, triton=triton), x)
