"""bitsandbytes' 8-bit linears with one product, in training and in evaluation: that of the dequantised weight.

Its own takes the dequantised weight in training on a CPU, and rounds x row by row in evaluation and on CUDA (Dettmers
et al. 2022, LLM.int8()): what is evaluated is then not what was trained.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Product(torch.autograd.Function):
    """x·Wᵀ, (..., in) → (..., out) in x's dtype; W is made numbers for each of the two products and kept by nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return functional.linear(x, _numbers(codes, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, None, None]:
        codes, scale = ctx.saved_tensors
        return dy[0] @ _numbers(codes, scale, dy[0].dtype), None, None


def _numbers(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W (out, in): computed in float32, rounded to `dtype` once, as the fused layers have it."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    found: Tensor = int8_vectorwise_dequant(codes, scale)
    return found.to(dtype)


class Unrounded:
    """Mixin of Linear8bitLt whose x is not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out), in the dtype that autocast or else x has."""
        module: Any = self
        scale = module.state.SCB if module.state.SCB is not None else module.weight.SCB
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: Tensor = _Product.apply(x.to(dtype), module.weight.data, scale.to(x.device))
        return y if module.bias is None else y + module.bias.to(dtype)


@cache
def _subclass(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (Unrounded, cls), names)


def is_unrounded(cls: type[nn.Module]) -> bool:
    """Whether this is the class that `unround` gives, and not one that somebody made of it."""
    return Unrounded in cls.__bases__


def unround(linear: nn.Module) -> None:
    """Let a Linear8bitLt multiply x as it is. In place; the class keeps its name."""
    if not isinstance(linear, Unrounded):
        cls: Any = type(linear)
        linear.__class__ = _subclass(cls)
