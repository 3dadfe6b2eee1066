"""Norms, activations, gated MLPs and dropout: subclasses that run `peft_kernels` ops instead.

Each keeps its own children and parameters, so that adapters, hooks and state dicts see the module they know.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels.activation import activate
from peft_kernels.dropout import dropout
from peft_kernels.glu import glu
from peft_kernels.layer_norm import layer_norm
from peft_kernels.rms_norm import rms_norm

from ...errors import ConfigError
from .state import ATTRIBUTE, hooked, once_each, state_of


class DropoutForward:
    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        state = state_of(module)
        if not module.training or not 0 < module.p < 1 or x.dim() < 2:
            return super().forward(x)  # type: ignore[misc]
        seeds, passes = state.rows.of(x, state.salt), bool(state.extra.get("passes"))
        return dropout(x, module.p, seeds, state.salt, backend=state.backend, passes=passes)


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
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dtype != x.dtype:  # models differ in what they round to
            return super().forward(x)  # type: ignore[misc]
        passes = bool(state.extra.get("passes"))
        return rms_norm(x, weight, **state.extra["settings"], backend=state.backend, passes=passes)


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
        h = glu(gate, up, parts["activation"], backend=state.backend, passes=bool(state.extra.get("passes")))
        return getattr(module, parts["down"])(h)


class RefusingToSave:
    """Mixin of a transformers model whose linears hold codes: its file would look like one with weights."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self
        if ATTRIBUTE in model.__dict__ and state_of(model).extra.get("codes"):
            raise ConfigError(
                "save_pretrained: frozen linears of this model hold codes, which a file would give for weights.",
                "Save the adapter (PeftModel.save_pretrained), or unfuse(model) first: its weights come back rounded.",
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]


@once_each
def refusing_to_save(cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with that refusal, under its own name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (RefusingToSave, cls), names)


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
