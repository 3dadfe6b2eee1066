"""DoRA: the norm of the adapted weight and its magnitude (Liu et al. 2024, eq. 5 and section 4.3).

With V = W + s·B·A, g = magnitude / norm and norm the length of each row of V, held constant:

    without dropout   y = bias + g ⊙ z,                        z = x·Vᵀ without bias      (`magnify`)
    with dropout      y = base + (g-1)⊙base_dropped + g⊙low,   low = s·S·Bᵀ               (`magnify_dropped`)

The norm never makes B·A, an (N, K) matrix:

    norm² = ‖W‖² + 2s·rowsum((W·Aᵀ)⊙B) + s²·rowsum((B·(A·Aᵀ))⊙B)

Backward, sums over rows: dz = g⊙dy, dmagnitude = Σ(dy⊙z)/norm, dbias = Σdy; with dropout dbase = dy,
dbase_dropped = (g-1)⊙dy, dlow = g⊙dy, dmagnitude = Σ(dy⊙(base_dropped+low))/norm. Saved: z (or base_dropped+low, only
where the magnitude is trained), magnitude, norm.

Shapes: W (N, K), A (r, K), B (N, r), magnitude and norm (N,), the rest (..., N).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import Backend, compute_dtype, use_triton
from .frozen_weight import FrozenWeight
from .quantised_weight import QuantisedWeight

CHUNK_ROWS = 1024
"""Rows of a narrow weight widened to fp32 at a time: bounds the temporary of `weight_norm`."""


def weight_norm_reference(weight: Tensor, A: Tensor, B: Tensor, scale: float, transposed: bool = False) -> Tensor:
    """The definition, with B·A made."""
    wide = compute_dtype(weight)
    W = (weight.T if transposed else weight).to(wide)
    return torch.linalg.vector_norm(W + scale * (B.to(wide) @ A.to(wide)), dim=1)


def magnify_reference(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""
    wide = compute_dtype(z)
    y = magnitude.to(wide) / norm.to(wide) * z.to(wide)
    return (y if bias is None else bias.to(wide) + y).to(z.dtype)


def magnify_dropped_reference(
    base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor
) -> Tensor:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""
    wide = compute_dtype(base)
    g = magnitude.to(wide) / norm.to(wide)
    return (base.to(wide) + (g - 1) * base_dropped.to(wide) + g * low.to(wide)).to(base.dtype)


@torch.no_grad()
def squared_norm(weight: Tensor | FrozenWeight | QuantisedWeight, *, transposed: bool = False) -> Tensor:
    """‖W‖² of each output row, (N,) in fp32 (fp64 for fp64). Constant while W is frozen: make it once and keep it.

    Args:
        weight: (N, K), or (K, N) where `transposed`; or codes, which count with their rounding.
    """
    if isinstance(weight, FrozenWeight | QuantisedWeight):
        return torch.cat([squared_norm(rows) for rows in weight.pieces(CHUNK_ROWS)])
    wide = compute_dtype(weight)
    return torch.linalg.vector_norm(weight, dim=0 if transposed else 1, dtype=wide).square_()


@torch.no_grad()
def weight_norm(
    weight: Tensor | FrozenWeight | QuantisedWeight,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    squared: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Length of each row of W + scale·B·A, without making B·A. A constant to autograd, as in PEFT.

    In fp32 throughout, so its error is a few roundings of (‖W‖² + ‖scale·BA‖²) / norm: as good as the direct sum unless
    the adapter cancels the weight.

    Args:
        weight: (N, K), or (K, N) where `transposed` (GPT-2's Conv1D). Any floating dtype, or codes (N, K), which count
            with their rounding.
        A: (r, K).
        B: (N, r).
        scale: alpha / r.
        squared: `squared_norm(weight)`, if at hand: saves one read of the weight.

    Returns:
        (N,), float32 (float64 for a float64 weight).

    Raises:
        ValueError: the shapes do not fit.
    """
    flat = len(weight.shape) == 2
    outputs, inputs = (weight.shape[::-1] if transposed else weight.shape) if flat else (0, 0)
    if not flat or A.dim() != 2 or A.shape[1] != inputs or B.shape != (outputs, A.shape[0]):
        raise ValueError(
            "weight_norm needs weight (N, K) (or (K, N) with transposed=True), A (r, K) and B (N, r), got "
            f"{tuple(weight.shape)}, {tuple(A.shape)} and {tuple(B.shape)} with transposed={transposed}."
        )
    if squared is not None and squared.shape != (outputs,):
        raise ValueError(f"squared must have shape ({outputs},), got {tuple(squared.shape)}: see squared_norm.")
    wide = torch.float32 if isinstance(weight, FrozenWeight | QuantisedWeight) else compute_dtype(weight)
    A, B = A.to(wide), B.to(wide)
    with torch.autocast(weight.device.type, enabled=False):
        pieces: Iterable[Tensor]
        if isinstance(weight, FrozenWeight | QuantisedWeight):
            pieces = weight.pieces(CHUNK_ROWS)
        else:
            rows = weight.T if transposed else weight
            pieces = (rows,) if weight.dtype == wide else rows.split(CHUNK_ROWS)
        # 2s·W·Aᵀ + s²·B·(A·Aᵀ), then one product with B: (N, r), small
        cross = torch.cat([piece.to(wide) @ A.T for piece in pieces]).mul_(2 * scale)
        cross.addmm_(B, A @ A.T, alpha=scale**2).mul_(B)
    total = squared_norm(weight, transposed=transposed) if squared is None else squared.to(wide)
    return (total + cross.sum(1)).clamp_(min=0).sqrt_()


@torch.library.custom_op("peft_kernels::dora_magnify", mutates_args=())
def _launched_magnify(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    from .gpu.dora import launch_magnify

    return launch_magnify(z, magnitude, norm, bias)


@torch.library.custom_op("peft_kernels::dora_magnify_dropped", mutates_args=())
def _launched_dropped(
    base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    from .gpu.dora import launch_magnify_dropped

    return launch_magnify_dropped(base, base_dropped, low, magnitude, norm, trained)


@torch.library.custom_op("peft_kernels::dora_magnify_backward", mutates_args=())
def _launched_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, dropped: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .gpu.dora import launch_backward

    return launch_backward(dy, z, magnitude, norm, dropped, need_bias)


@_launched_magnify.register_fake
def _(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
    return z.new_empty(z.shape)


@_launched_dropped.register_fake
def _(
    base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor, trained: bool
) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), base.new_empty(base.shape if trained else 0)


@_launched_backward.register_fake
def _(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, dropped: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = dy.shape[-1]
    dmagnitude = dy.new_empty(0 if z is None else features, dtype=torch.float32)
    dbias = dy.new_empty(features if need_bias else 0, dtype=torch.float32)
    return dy.new_empty(dy.shape), dy.new_empty(dy.shape if dropped else 0), dmagnitude, dbias


def _factor(magnitude: Tensor, norm: Tensor, wide: torch.dtype) -> Tensor:
    return magnitude.to(wide) / norm.to(wide)


def _torch_backward(
    dy: Tensor, z: Tensor | None, magnitude: Tensor, norm: Tensor, dropped: bool, need_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    wide, features = compute_dtype(dy), dy.shape[-1]
    g, wide_dy = _factor(magnitude, norm, wide), dy.to(wide)
    dbias = wide_dy.reshape(-1, features).sum(0) if need_bias else None
    dmagnitude = None
    if z is None:
        dz = wide_dy * g
    else:
        product = wide_dy * z  # the buffer of dz afterwards: a fresh one of this size costs more than the arithmetic
        dmagnitude = product.reshape(-1, features).sum(0).div_(norm.to(wide))
        dz = torch.mul(wide_dy, g, out=product)
    return dz.to(dy.dtype), (wide_dy * (g - 1)).to(dy.dtype) if dropped else None, dmagnitude, dbias


class _Magnify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, triton: bool) -> Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.triton, ctx.bias_dtype = triton, None if bias is None else bias.dtype
        if triton:
            return _launched_magnify(z, magnitude, norm, bias)
        wide = compute_dtype(z)
        g = _factor(magnitude, norm, wide)
        y = z * g if bias is None else torch.addcmul(bias.to(wide), z.to(wide), g)
        return y.to(z.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, magnitude, norm = ctx.saved_tensors
        backward = _launched_backward if ctx.triton else _torch_backward
        dz, _, dmagnitude, dbias = backward(dy, z, magnitude, norm, False, ctx.needs_input_grad[3])
        return (
            dz if ctx.needs_input_grad[0] else None,
            None if z is None or dmagnitude is None else dmagnitude.to(magnitude.dtype),
            None,
            dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[3] and dbias is not None else None,
            None,
        )


class _MagnifyDropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor, triton: bool
    ) -> Tensor:
        trained = ctx.needs_input_grad[3]
        if triton:
            y, together = _launched_dropped(base, base_dropped, low, magnitude, norm, trained)
        else:
            wide = compute_dtype(base)
            g = _factor(magnitude, norm, wide)
            y = torch.addcmul(base.to(wide), base_dropped.to(wide), g - 1).addcmul_(low.to(wide), g).to(base.dtype)
            together = base_dropped + low if trained else None
        ctx.save_for_backward(together if trained else None, magnitude, norm)
        ctx.triton = triton
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        together, magnitude, norm = ctx.saved_tensors
        backward = _launched_backward if ctx.triton else _torch_backward
        need = ctx.needs_input_grad
        dlow, ddropped, dmagnitude, _ = backward(dy, together, magnitude, norm, need[1], False)
        dmagnitude = None if together is None or dmagnitude is None else dmagnitude.to(magnitude.dtype)
        return dy if need[0] else None, ddropped if need[1] else None, dlow if need[2] else None, dmagnitude, None, None


def _check(z: Tensor, vectors: dict[str, Tensor | None], like: dict[str, Tensor] | None = None) -> None:
    if not z.is_floating_point() or z.dim() < 1:
        raise ValueError(f"Expected a floating-point tensor (..., N), got {tuple(z.shape)} {z.dtype}.")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != z.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {tuple(z.shape[-1:])}, one per output, got {tuple(vector.shape)}."
            )
    for name, other in (like or {}).items():
        if other.shape != z.shape or other.dtype != z.dtype:
            raise ValueError(
                f"{name} must match base, {tuple(z.shape)} {z.dtype}, got {tuple(other.shape)} {other.dtype}."
            )


def magnify(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> Tensor:
    """y = bias + (magnitude / norm) ⊙ z: DoRA's output where the adapter reads the same x as the base layer.

    Args:
        z: (..., N), x·Wᵀ + s·S·Bᵀ without bias.
        magnitude: (N,), trained.
        norm: (N,), `weight_norm`; a constant.
        bias: (N,) of the base layer, or None.
        backend: "triton", "torch", or "auto" (triton where `z` lives on CUDA).

    Returns:
        (..., N) in z's dtype, computed in fp32 and rounded once. Nothing is modified. Differentiable once in z,
        magnitude and bias.

    Raises:
        ValueError: the shapes or the backend do not fit.
    """
    _check(z, {"magnitude": magnitude, "norm": norm, "bias": bias})
    return _Magnify.apply(z, magnitude, norm.detach(), bias, use_triton(z, backend))


def magnify_dropped(
    base: Tensor, base_dropped: Tensor, low: Tensor, magnitude: Tensor, norm: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """y = base + (g-1) ⊙ base_dropped + g ⊙ low, g = magnitude / norm: DoRA's output where the adapter drops inputs.

    Args:
        base: (..., N), x·Wᵀ + bias.
        base_dropped: (..., N), dropout(x)·Wᵀ without bias.
        low: (..., N), s·S·Bᵀ of the dropped input.
        magnitude: (N,), trained.
        norm: (N,), `weight_norm`; a constant.
        backend: "triton", "torch", or "auto" (triton where `base` lives on CUDA).

    Returns:
        (..., N) in base's dtype, computed in fp32 and rounded once. Nothing is modified. Differentiable once in base,
        base_dropped, low and magnitude.

    Raises:
        ValueError: the shapes, dtypes or the backend do not fit.
    """
    _check(base, {"magnitude": magnitude, "norm": norm}, {"base_dropped": base_dropped, "low": low})
    return _MagnifyDropped.apply(base, base_dropped, low, magnitude, norm.detach(), use_triton(base, backend))
