"""Norms, activations, gated MLPs, dropout and rotary attention: subclasses that run `peft_kernels` ops instead.

Each keeps its own children and parameters, so that adapters, hooks and state dicts see the module they know.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels._launch import Backend
from peft_kernels.activation import activate
from peft_kernels.dropout import dropout
from peft_kernels.glu import glu
from peft_kernels.layer_norm import layer_norm
from peft_kernels.rms_norm import rms_norm
from peft_kernels.rope import rope

from .probing import is_half_rotation
from .state import ATTRIBUTE, hooked, once_each, original_class, state_of

ROTATION = "apply_rotary_pos_emb"


class DropoutForward:
    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        state = state_of(module)
        if not module.training or not 0 < module.p < 1 or x.dim() < 2:
            return super().forward(x)  # type: ignore[misc]
        return dropout(x, module.p, state.rows.of(x), state.salt, backend=state.backend)


class LayerNormForward:
    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if hooked(module):  # its weight may be there only now (FSDP), and who makes y again would read freed memory
            return super().forward(x)  # type: ignore[misc]
        if _autocast_widens(x):
            x = x.float()
        if module.weight is not None and module.weight.dtype != x.dtype:
            return super().forward(x)  # type: ignore[misc]
        return layer_norm(x, module.weight, module.bias, module.eps, backend=state_of(module).backend)


class RMSNormForward:
    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if hooked(module):  # as above
            return super().forward(x)  # type: ignore[misc]
        state = state_of(module)
        if isinstance(module, nn.RMSNorm) and _autocast_widens(x):
            x = x.float()
        return rms_norm(x, getattr(module, "weight", None), **state.extra["settings"], backend=state.backend)


class ActivationForward:
    def forward(self, x: Tensor) -> Tensor:
        state = state_of(self)  # type: ignore[arg-type]
        return activate(x, state.extra["kind"], backend=state.backend)


class GatedMLPForward:
    """down(act(gate(x)) * up(x)); keeps gate's and up's outputs, not their product."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        state = state_of(module)
        parts = state.extra["parts"]
        if any(hooked(child) for name, child in module.named_children() if name not in parts.values()):
            return super().forward(x)  # type: ignore[misc]
        if "packed" in parts:
            gate, up = getattr(module, parts["packed"])(x).chunk(2, -1)
        else:
            gate, up = getattr(module, parts["gate"])(x), getattr(module, parts["up"])(x)
        return getattr(module, parts["down"])(glu(gate, up, parts["activation"], backend=state.backend))


def _autocast_widens(x: Tensor) -> bool:
    """On CUDA, autocast runs layer_norm and rms_norm in float32."""
    return x.device.type == "cuda" and torch.is_autocast_enabled("cuda") and x.dtype in (torch.float16, torch.bfloat16)


@once_each
def subclass(cls: type[nn.Module], mixin: Any) -> type[nn.Module]:
    """`cls` with the mixin's forward, under its own name and signature: transformers and Accelerate look at both."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ATTRIBUTE not in self.__dict__:  # unfused, while TRL or Accelerate kept this method of the instance
            return cls.forward(self, *args, **kwargs)
        return mixin.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    names = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (mixin, cls), names)


def rotary_class(module: nn.Module, backend: Backend) -> type[nn.Module] | None:
    """The attention's class with its own forward, in which the rotation is the fused one; None where it has none.

    transformers' attention calls a function of its module. The subclass runs the same code with another value for that
    one name, after the function was found to rotate halves as ours does; the library itself is left alone.
    """
    cls = original_class(module)
    forward = cls.forward
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        return None
    rotation = forward.__globals__.get(ROTATION)
    if rotation is None or ROTATION not in forward.__code__.co_names or not is_half_rotation(rotation):
        return None
    return _rotary(cls, backend)


def calls_rotation(module: nn.Module) -> bool:
    """Whether a module's forward rotates queries and keys."""
    code = getattr(inspect.unwrap(original_class(module).forward), "__code__", None)
    return code is not None and any("rotary_pos_emb" in name for name in code.co_names)


@once_each
def _rotary(cls: type[nn.Module], backend: Backend) -> type[nn.Module]:
    forward: Any = cls.forward
    plain: Callable[..., Any] = forward.__globals__[ROTATION]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim != 1 or q.dim() != 4 or cos.dim() != 3 or cos.requires_grad or sin.requires_grad:
            result: tuple[Tensor, Tensor] = plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
            return result
        return rope(q, k, cos, sin, backend=backend)

    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, ROTATION: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__

    def fused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the compiler looks names up in the module, and fuses the rotation itself
            return forward(self, *args, **kwargs)
        return own(self, *args, **kwargs)

    fused.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    names = {"forward": fused, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,), names)
