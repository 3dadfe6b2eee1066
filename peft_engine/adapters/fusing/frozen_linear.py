"""Linears whose weight is codes: one byte a weight (two for bf16), multiplied on the units of their format.

The module keeps its class and name; its `weight` is a Parameter of the codes' bits, as integers in one dimension: no
cast of the model to another dtype touches them, and whoever takes them for a weight (peft's merges and starts, a model
that isn't fused loading them) fails on the shape instead of computing with codes.
"""

from dataclasses import replace
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
DTYPE = "dtype"


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
    if weight.dtype != BITS[held.codes.element_size()] or weight.shape != (held.codes.numel(),):
        raise ConfigError(
            f"{state.extra['name']}: its weight held {held.format} codes and is a {weight.dtype} tensor of shape "
            f"{tuple(weight.shape)} now.",
            "Unfuse before changing weights.",
        )
    moved = held.moved(
        weight.detach().view(held.codes.dtype).view(held.shape)
    )  # to another device, or copied with the model
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
    bits = frozen.codes.view(BITS[frozen.codes.element_size()]).view(-1)
    module.weight = nn.Parameter(bits, requires_grad=False)
    for name, tensor in frozen.tensors().items():
        module.register_buffer(PREFIX + name, tensor, persistent=False)
    # holds nothing, and follows every cast
    module.register_buffer(PREFIX + DTYPE, torch.empty(0, dtype=frozen.dtype, device=bits.device), persistent=False)


def take_back(module: nn.Module) -> bool:
    """Give the module a plain weight again, with the rounding that it computed with and in the dtype that the model was
    cast to since. False where it had one."""
    frozen = frozen_of(module)
    if frozen is None:
        return False
    weight = frozen.dequantised().to(module.get_buffer(PREFIX + DTYPE).dtype)
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        held = frozen_of(self)  # type: ignore[arg-type]
        for name, tensor in held.tensors().items() if held is not None else ():
            destination[prefix + PREFIX + name] = tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        """Codes come only with all that belongs to them; a plain weight is refused."""
        module: Any = self
        held = frozen_of(module)
        assert held is not None
        own = {PREFIX + name: tensor for name, tensor in held.tensors().items()}
        wanted = {"weight": module.weight, **({} if module.bias is None else {"bias": module.bias}), **own}
        given = {key[len(prefix) :]: t for key, t in state_dict.items() if key.startswith(prefix)}
        weight = given.get("weight")
        if weight is not None and (weight.dtype, weight.shape) != (module.weight.dtype, module.weight.shape):
            errors.append(
                f"{prefix}weight is {weight.dtype} {tuple(weight.shape)}, and this layer holds codes; unfuse before "
                "loading weights."
            )
            return
        codes = {name for name in given if name == "weight" or name.startswith(PREFIX)}
        if codes and codes != {"weight", *own}:
            errors.append(
                f"{prefix}weight: these codes come with {', '.join(sorted(codes - {'weight'})) or 'nothing'}, this "
                f"layer's with {', '.join(sorted(own)) or 'nothing'}: they were rounded in another way."
            )
            return
        for name, to in wanted.items():
            if name not in given:
                missing.extend([prefix + name] if strict else [])
            elif given[name].shape != to.shape:
                errors.append(f"{prefix}{name} has shape {tuple(given[name].shape)}, expected {tuple(to.shape)}.")
            else:
                with torch.no_grad():
                    to.copy_(given[name])
        unexpected.extend(prefix + name for name in given if strict and name not in wanted)
        state_of(module).extra[KEY] = replace(held)  # what others remember of the old codes is stale


def refuse_numbers(layer: nn.Module, base: nn.Module, what: str) -> None:
    """Raise where peft would read the codes of `base`, or of any linear of this model, as numbers."""
    state = state_of(layer)
    if frozen_of(base) is not None or state.extra.get("codes"):
        raise ConfigError(
            f"{what}: linears of this model are rounded codes (frozen_compute), which peft would take for numbers; "
            f"{state.extra['name']} is the first that was met.",
            "Load the adapter on the model's own weights, or unfuse(model) first, whose weights come back rounded.",
        )
