"""Linears whose weight is codes: one byte a weight (two for bf16), multiplied on the units of their format.

The module keeps its class and name; its `weight` is a Parameter of the codes' bits, as integers, so that no cast of the
model to another dtype touches them and nobody takes them for a model's floating-point dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.frozen_weight import FrozenWeight
from peft_kernels.lora_linear import Projection
from peft_kernels.quantised_weight import QuantisedWeight

from ...errors import ConfigError
from .quantised import quantised_of
from .sharing import ProjectionForward
from .state import ATTRIBUTE, Fused, original_class, state_of

KEY = "frozen"
BITS = {1: torch.int8, 2: torch.int16}
PREFIX = "frozen_"  # of the buffers that hold what else belongs to the codes


def frozen_of(module: nn.Module) -> FrozenWeight | None:
    """The module's weight as codes, on its device; None for a module that holds a plain weight."""
    state = module.__dict__.get(ATTRIBUTE)
    if not isinstance(state, Fused) or KEY not in state.extra:
        return None
    held: FrozenWeight = state.extra[KEY]
    if torch.compiler.is_compiling():
        return held
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.device == held.device and (weight.device.type == "meta" or weight.data_ptr() == held.codes.data_ptr()):
        return held
    if weight.dtype != BITS[held.codes.element_size()] or weight.shape != held.shape:
        raise ConfigError(
            f"{state.extra['name']}: its weight held {held.format} codes and is a {weight.dtype} tensor of shape "
            f"{tuple(weight.shape)} now.",
            "Unfuse before changing weights.",
        )
    moved = held.moved(weight.detach().view(held.codes.dtype))  # to another device, or copied with the model
    if not getattr(module, "_is_replica", False):
        state.extra[KEY] = moved
    return moved


def weight_of(module: nn.Module) -> Tensor | FrozenWeight | QuantisedWeight:
    """What multiplies x in this linear."""
    found = frozen_of(module) or quantised_of(module)
    return module.weight if found is None else found  # type: ignore[return-value]


def put(module: nn.Module, frozen: FrozenWeight) -> None:
    """Let the module's weight be codes, in place; the old weight is let go. Its state must be there."""
    state_of(module).extra[KEY] = frozen
    bits = frozen.codes.view(BITS[frozen.codes.element_size()])
    module.weight = nn.Parameter(bits, requires_grad=False)
    for name, tensor in frozen.tensors().items():
        module.register_buffer(PREFIX + name, tensor, persistent=False)


def take_back(module: nn.Module) -> bool:
    """Give the module a plain weight again, with the rounding that it computed with. False where it had one."""
    frozen = frozen_of(module)
    if frozen is None:
        return False
    weight = frozen.dequantised().to(frozen.dtype)
    if issubclass(original_class(module), Conv1D):
        weight = weight.t().contiguous()
    module.weight = nn.Parameter(weight, requires_grad=False)
    del state_of(module).extra[KEY]
    return True


class FrozenForward(ProjectionForward):
    """Mixin of nn.Linear and Conv1D: also of the base layers of peft's, for the paths that stay peft's own."""

    def plain_projection(self) -> Projection:
        module: Any = self
        return Projection(weight_of(module), module.bias)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: Any, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        given, own = state_dict.get(prefix + "weight"), self.weight  # type: ignore[attr-defined]
        if given is not None and given.dtype != own.dtype:
            errors.append(
                f"{prefix}weight is {given.dtype}, and this layer holds codes; unfuse before loading weights."
            )
            return
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing, unexpected, errors
        )


def refuse_numbers(layer: nn.Module, base: nn.Module, what: str) -> None:
    """Raise where peft would read the codes of `base` as numbers."""
    frozen = frozen_of(base)
    if frozen is not None:
        raise ConfigError(
            f"{what}: the weight below {state_of(layer).extra['name']} is {frozen.format} codes, which peft would take "
            "for numbers.",
            "Load the adapter on the model's own weights, or unfuse(model) first, whose weights come back rounded.",
        )
