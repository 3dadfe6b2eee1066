"""Rotary position embedding of queries and keys (Su et al. 2021, RoFormer, eq. 34; halves as in Llama).

With x = [x₁ | x₂], cos = [c₁ | c₂], sin = [s₁ | s₂] along the head dimension:

    y₁ = x₁ c₁ - x₂ s₁          dx₁ = dy₁ c₁ + dy₂ s₂
    y₂ = x₂ c₂ + x₁ s₂          dx₂ = dy₂ c₂ - dy₁ s₁

Where the halves of sin are equal, as in Llama, the right side is the rotation by -sin. Nothing of q or k is kept.
Half precision is computed in fp32 and rounded once, so it lies closer to the truth than the eager formula.

Shapes: B samples, H query heads, Hkv key heads, T positions, D head dimension (even).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._launch import Backend, use_triton

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def rope_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: computed in fp32 (fp64 for fp64), rounded once at the end."""

    def rotate(x: Tensor) -> Tensor:
        result = torch.promote_types(x.dtype, cos.dtype)
        wide = torch.promote_types(result, torch.float32)
        first, second = x.to(wide).chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x.to(wide) * cos.to(wide)[:, None] + turned * sin.to(wide)[:, None]).to(result)

    return rotate(q), rotate(k)


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, dtype: torch.dtype, strides: list[int]) -> Tensor:
    """One full pass and two half ones, all into one buffer. addcmul rounds once per pass where it can (FMA)."""
    wide = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    y = torch.empty_strided(x.shape, strides, dtype=wide, device=x.device)
    x, cos, sin = x.to(wide), cos.to(wide)[:, None], sin.to(wide)[:, None]
    torch.mul(x, cos, out=y)
    half = x.shape[-1] // 2
    sin_first, sin_second = sin[..., :half], sin[..., half:]
    if inverse:
        y[..., :half].addcmul_(x[..., half:], sin_second)
        y[..., half:].addcmul_(x[..., :half], sin_first, value=-1)
    else:
        y[..., :half].addcmul_(x[..., half:], sin_first, value=-1)
        y[..., half:].addcmul_(x[..., :half], sin_second)
    return y.to(dtype)


# A registered op: FakeTensorMode and torch.compile see shapes, not kernels.
@torch.library.custom_op("peft_kernels::rope", mutates_args=())
def _rope_op(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    dtype: torch.dtype,
    q_strides: list[int],
    k_strides: list[int],
) -> tuple[Tensor, Tensor]:
    from .gpu.rope import launch_rope

    rotated = _empty(q, dtype, q_strides), _empty(k, dtype, k_strides)
    launch_rope(q, k, cos, sin, inverse, *rotated)
    return rotated


@_rope_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    dtype: torch.dtype,
    q_strides: list[int],
    k_strides: list[int],
) -> tuple[Tensor, Tensor]:
    return _empty(q, dtype, q_strides), _empty(k, dtype, k_strides)


def _empty(x: Tensor, dtype: torch.dtype, strides: list[int]) -> Tensor:
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)


def _dense_strides(x: Tensor) -> list[int]:
    """Strides of a dense tensor whose dimensions lie in memory in the order of x's, the last one innermost."""
    strides, step = [1] * 4, x.shape[-1]
    for dimension in sorted(range(3), key=lambda d: (x.stride(d), -d)):
        strides[dimension] = step
        step *= max(x.shape[dimension], 1)
    return strides


def _rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
    dtype: torch.dtype,
    strides: tuple[list[int], list[int]],
    triton: bool,
) -> tuple[Tensor, Tensor]:
    if triton:
        return _rope_op(q, k, cos, sin, inverse, dtype, *strides)
    q_rotated, k_rotated = (
        _rotate_torch(x, cos, sin, inverse, dtype, layout) for x, layout in zip((q, k), strides, strict=True)
    )
    return q_rotated, k_rotated


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, triton: bool) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.triton = q.dtype, triton
        ctx.strides = _dense_strides(q), _dense_strides(k)
        return _rotate(q, k, cos, sin, False, torch.promote_types(q.dtype, cos.dtype), ctx.strides, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotate(dq, dk, cos, sin, True, ctx.dtype, ctx.strides, ctx.triton), None, None, None


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions' angles, as transformers' Llama does.

    Args:
        q: (B, H, T, D) of any strides, float16 | bfloat16 | float32 | float64.
        k: (B, Hkv, T, D) of any strides, dtype of `q`.
        cos, sin: (B, T, D) or (1, T, D), of any dtype above; constants, they get no gradient.
        backend: "triton", "torch", or "auto" (triton where `q` lives on CUDA).

    Returns:
        (q', k') of the inputs' shapes, in the wider of q's and cos's dtypes. Their memory is dense, in the inputs'
        order of dimensions: (B, T, H, D) seen as (B, H, T, D) stays so. Differentiable once in q and k; nothing is
        modified, and only cos and sin are kept.

    Raises:
        ValueError: shapes or dtypes do not fit, D is odd, cos or sin requires grad, or "triton" cannot run here.
    """
    _check(q, k, cos, sin)
    triton = use_triton(q, backend)
    if triton and cos.dtype == torch.float64:
        raise ValueError("backend='triton' computes in float32, got cos of float64; use backend='torch'.")
    rotated: tuple[Tensor, Tensor] = _Rope.apply(q, k, cos, sin, triton)
    return rotated


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"q and k must be (B, H, T, D) and (B, Hkv, T, D), got {tuple(q.shape)} and {tuple(k.shape)}.")
    if q.shape[-1] % 2:
        raise ValueError(f"the head dimension must be even, got {q.shape[-1]}: a half is turned against the other.")
    batch, _, positions, head = q.shape
    if cos.shape != sin.shape or tuple(cos.shape) not in {(1, positions, head), (batch, positions, head)}:
        raise ValueError(
            f"cos and sin must be ({batch} or 1, {positions}, {head}), got {tuple(cos.shape)} and {tuple(sin.shape)}. "
            "Slice q and k to the rotated part first if only a part is."
        )
    if q.dtype != k.dtype or cos.dtype != sin.dtype or q.dtype not in _FLOATS or cos.dtype not in _FLOATS:
        raise ValueError(
            "q and k must share a floating dtype, and cos and sin another or the same, "
            f"got {q.dtype}, {k.dtype}, {cos.dtype} and {sin.dtype}."
        )
    if any(t.device != q.device for t in (k, cos, sin)):
        raise ValueError(f"q, k, cos and sin must be on one device, got {[str(t.device) for t in (q, k, cos, sin)]}.")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin require grad, but rope has no gradient for them: pass them detached.")
