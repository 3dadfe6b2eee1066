"""bitsandbytes' linears of 4 and 8 bits, with and without an adapter on them, run by `peft_kernels.lora_linear`.

The module keeps its class's name, its parameters and its state dict; the weight is read where it lies, at every call.
int8 is the weight format of LLM.int8() alone: the product is that of the unpacked weight, activations are not rounded.

With AVX-512 bitsandbytes 0.50 itself unpacks 4 bits wrongly, a fifth of their size off, where in_features is a multiple
of 16 but not of the blocksize; fused layers unpack them right.
"""

import sys
import weakref
from typing import Any

import torch
from torch import nn

from peft_kernels._launch import Backend
from peft_kernels._quantised_products import release
from peft_kernels.lora_linear import Projection
from peft_kernels.quantised_weight import QuantisedWeight

from ...int8_linear import is_unrounded
from .modules import subclass
from .sharing import ProjectionForward
from .state import ATTRIBUTE, Fused, RowSeeds, hooked, original_class, salt_of, state_of, swap

KEY = "quantised"


def _classes(module: str, *names: str) -> tuple[type[nn.Module], ...]:
    """Classes of a module that somebody has imported already: else there is no object of theirs."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def base_classes() -> tuple[type[nn.Module], ...]:
    """bitsandbytes' linears."""
    return _classes("bitsandbytes.nn", "Linear4bit", "LinearNF4", "LinearFP4", "Linear8bitLt")


def lora_classes() -> tuple[type[nn.Module], ...]:
    """peft's LoRA layers on them."""
    return _classes("peft.tuners.lora.bnb", "Linear4bit", "Linear8bitLt")


def is_quantised(module: nn.Module) -> bool:
    """Whether this is a linear of bitsandbytes, fused or not."""
    cls = original_class(module)
    return cls in base_classes() or is_unrounded(cls)


def quantised_of(module: nn.Module) -> QuantisedWeight | None:
    """The weight of a fused linear of bitsandbytes, as it lies there now; None for any other module."""
    state = module.__dict__.get(ATTRIBUTE)
    if not isinstance(state, Fused) or KEY not in state.extra:
        return None
    kept: QuantisedWeight
    key, kept = state.extra[KEY]
    if torch.compiler.is_compiling():
        return kept
    if key != _key(module.weight):  # another weight (peft's merge), moved, or written to
        kept = _put(module)
    return kept


def _key(weight: Any) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version


def _put(module: nn.Module) -> QuantisedWeight:
    found = _read(module)
    state_of(module).extra[KEY] = (_key(module.weight), found)
    return found


def _read(module: Any) -> QuantisedWeight:
    if hasattr(module, "state"):  # Linear8bitLt takes the scales of a new weight to itself when it runs
        own = getattr(module.weight, "SCB", None)
        return QuantisedWeight.from_parameter(module.weight, scale=module.state.SCB if own is None else own)
    lost = getattr(module.weight, "quant_state", None) is None and module.quant_state is not None
    if lost and module.weight.shape[-1] == 1:  # Module.to may lose it, and codes are a column
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(module)
    return QuantisedWeight.from_parameter(module.weight, module.compute_dtype if module.compute_type_is_set else None)


def why_not_quantised(module: Any) -> str | None:
    """Why a linear of bitsandbytes can't be fused, None where it can."""
    if module.weight.requires_grad:
        return "its weight trains"
    if hooked(module):
        return "hooks stand on it"
    try:
        shape = _read(module).shape
    except ValueError:
        return "its weight is not quantised yet"
    if shape != (module.out_features, module.in_features):
        return f"its weight was quantised as {tuple(shape)}, not as (out, in)"
    return None


class QuantisedForward(ProjectionForward):
    """Mixin of bitsandbytes' linears: also of the base layers of peft's, for the paths that stay peft's own."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Scales may be copied where the old ones lay: what was made of them is made anew."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]
        if KEY in state_of(self).extra:  # type: ignore[arg-type]
            _put(self)  # type: ignore[arg-type]

    def plain_projection(self) -> Projection:
        module: Any = self
        held = quantised_of(module)
        assert held is not None
        return Projection(held, module.bias)


def apply(model: nn.Module, backend: Backend, rows: RowSeeds) -> tuple[dict[str, str], dict[str, str]]:
    """Give bitsandbytes' linears their class: name → kind, and name → reason for those that stay as they are."""
    kinds: dict[str, str] = {}
    kept: dict[str, str] = {}
    for full_name, module in model.named_modules():
        if not is_quantised(module):
            continue
        name = full_name.removeprefix("base_model.model.").removesuffix(".base_layer")
        reason = why_not_quantised(module)
        if reason:
            kept[full_name] = reason
            continue
        cls = original_class(module)
        state = Fused(cls, "quantised_linear", backend, rows, salt_of(name), {"name": name})
        swap(module, subclass(cls, QuantisedForward), state)
        kinds[name] = _put(module).kind
    if kinds:  # the numbers of the largest weight need not outlive the model
        weakref.finalize(model, release).atexit = False
    return kinds, kept
