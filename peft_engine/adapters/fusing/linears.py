"""LoRA layers of peft, run by `peft_kernels.lora_linear`."""

import warnings
from typing import TYPE_CHECKING, Any

from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.dora import magnify, magnify_dropped, squared_norm, weight_norm
from peft_kernels.dropout import dropout
from peft_kernels.lora_linear import Adapter, Projection, lora_linear

from .frozen_linear import frozen_of, refuse_numbers, weight_of
from .quantised import is_quantised, lora_classes, why_not_quantised
from .sharing import group_of
from .state import ATTRIBUTE, hooked, once_each, original_class, state_of

if TYPE_CHECKING:
    _Layer = PeftLinear  # the layers on bitsandbytes' linears have the same parts
else:
    _Layer = object


class FusedLoraLinear(_Layer):
    """Mixin of peft's `lora.Linear`, `lora.Linear4bit` and `lora.Linear8bitLt`. Whatever is not the plain trained path
    is peft's own forward: disabled or merged adapters, mixed batches, variants other than DoRA, children with hooks."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if ATTRIBUTE not in self.__dict__:  # unfused, while Accelerate kept this method of the instance
            return type(self).forward(self, x, *args, **kwargs)
        state = state_of(self)
        group = group_of(self)
        if group is not None:
            held = group.take(self, x)
            if held is not None:
                return held
        if args or any(kwargs.get(key) is not None for key in kwargs) or self.disable_adapters or self.merged:
            return self._pefts(x, *args, **kwargs)
        dora = self._dora_adapter()
        if dora is not None:
            base: Any = self.get_base_layer()
            plain = base.weight.requires_grad or not self._free_of_hooks()
            return self._pefts(x, **kwargs) if plain else self._dora(x, dora)
        projection = self.plain_projection()
        if projection is None:
            return self._pefts(x, *args, **kwargs)
        if group is not None:
            return group.run(self, x, projection)
        seeds = state.rows.of(x, state.salt) if any(a.p for a in projection.adapters) else None
        return lora_linear(x, projection, seeds, backend=state.backend, passes=bool(state.extra.get("passes")))

    def _pefts(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """peft's own forward, which calls the base layer; only its variants read the base layer's weight."""
        reads = any(name in self.lora_variant for name in self.active_adapters)
        if not self.disable_adapters and reads and frozen_of(self.get_base_layer()) is not None:
            refuse_numbers(self, self.get_base_layer(), "This adapter has no fused form here")
        return super().forward(x, *args, **kwargs)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As peft's, where all weights of the model are numbers: else some layers would be merged and others not."""
        refuse_numbers(self, self.get_base_layer(), "merge")
        super().merge(*args, **kwargs)

    def plain_projection(self) -> Projection | None:
        """The frozen linear with its active LoRA pairs; None where peft's own forward must run."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged or base.weight.requires_grad or not self._free_of_hooks():
            return None
        pairs: list[Adapter] = []
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            if name in self.lora_variant:
                return None
            pair = self._pair(name, len(pairs))
            if pair is None:
                return None
            pairs.append(pair)
        held = weight_of(base)
        turned = isinstance(base, Conv1D) and isinstance(held, Tensor)
        return Projection(held, base.bias, tuple(pairs), turned)

    def _pair(self, name: str, place: int) -> Adapter | None:
        """One adapter's tensors; None for a dropout that is none of torch's."""
        p = rate_of(self.lora_dropout[name])
        if p is None:
            return None
        salt = state_of(self).salt + place
        up: Any = self.lora_B[name]
        return Adapter(self.lora_A[name].weight, up.weight, float(self.scaling[name]), p, salt, up.bias)  # type: ignore[arg-type]

    def _free_of_hooks(self) -> bool:
        own = self.lora_A, self.lora_B, self.lora_dropout
        parts = [self.base_layer, *(d[n] for n in self.active_adapters for d in own if n in d)]
        if not any(map(hooked, parts)):
            return True
        state = state_of(self)
        if not state.extra.get("warned"):
            state.extra["warned"] = True
            warnings.warn(
                f"peft_engine.fuse: a part of {state.extra['name']} got hooks after it was fused; "
                "it runs unfused, as peft does.",
                stacklevel=3,
            )
        return False

    def _dora_adapter(self) -> str | None:
        """The one active adapter, if it is a DoRA adapter that can be fused."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or rate_of(self.lora_dropout[active[0]]) is None:
            return None
        return active[0] if is_dora(self.lora_variant.get(active[0])) else None

    def _dora(self, x: Tensor, name: str) -> Tensor:
        """y = b + g ⊙ (x·Wᵀ + s·S·Bᵀ) with g = magnitude / ‖W + s·B·A‖; with dropout W's own product keeps the whole x
        beside (g - 1) times that of the dropped x, as in peft (Liu et al. 2024, eq. 5 and section 4.3)."""
        state = state_of(self)
        base: Any = self.get_base_layer()
        scales: Any = self.lora_magnitude_vector[name]
        pair, transposed = self._pair(name, 0), isinstance(base, Conv1D)
        assert pair is not None
        magnitude = scales.weight
        held = weight_of(base)
        transposed = transposed and isinstance(held, Tensor)
        norm = weight_norm(held, pair.A, pair.B, pair.scale, squared=self._squared(base), transposed=transposed)
        if pair.p == 0:
            z = lora_linear(x, Projection(held, None, (pair,), transposed), backend=state.backend)
            return magnify(z, magnitude, norm, base.bias, backend=state.backend)
        dropped = dropout(x, pair.p, state.rows.of(x, state.salt), pair.salt, backend=state.backend)
        low = (
            nn.functional.linear(nn.functional.linear(dropped.to(pair.A.dtype), pair.A), pair.B, pair.bias) * pair.scale
        )
        if not isinstance(held, Tensor):
            whole = lora_linear(x, Projection(held, base.bias), backend=state.backend)
            part = lora_linear(dropped, Projection(held), backend=state.backend)
        else:
            weight = held.t() if transposed else held
            whole, part = nn.functional.linear(x, weight, base.bias), nn.functional.linear(dropped, weight)
        return magnify_dropped(whole, part, low, magnitude, norm, backend=state.backend).to(whole.dtype)

    def _squared(self, base: nn.Module) -> Tensor | None:
        """‖W‖² of each row of a weight that is codes: made once, as it costs a pass of its own over them."""
        held = weight_of(base)
        if isinstance(held, Tensor):
            return None
        kept = state_of(self).extra.get("squared")
        if kept is None or kept[0] is not held:
            kept = (held, squared_norm(held))
            state_of(self).extra["squared"] = kept
        return kept[1]


@once_each
def fused_class(cls: type[Any]) -> type[nn.Module]:
    """`cls`, a LoRA layer of peft, with the fused forward, under its own name."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (FusedLoraLinear, cls), names)


def is_dora(variant: Any) -> bool:
    return variant is DoraLinearVariant or isinstance(variant, DoraLinearVariant)


def rate_of(module: nn.Module) -> float | None:
    """The rate at which a dropout module drops now; None for what is none of torch's."""
    if isinstance(module, nn.Identity):
        return 0.0
    if isinstance(module, nn.Dropout):
        return float(module.p) if module.training else 0.0
    return None


def why_not(module: nn.Module) -> str | None:
    """Why a LoRA layer of peft can't be fused; None if it can."""
    if type(module) not in (PeftLinear, *lora_classes()):
        return f"peft's {type(module).__name__} has no fused form"
    layer: Any = module
    base = layer.get_base_layer()
    if original_class(base) not in (nn.Linear, Conv1D) and not is_quantised(base):
        return f"its base layer is a {type(base).__name__}"
    if is_quantised(base) and (reason := why_not_quantised(base)):
        return f"its base layer is a {type(base).__name__}: {reason}"
    if base.weight.requires_grad:
        return "its base weight trains"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "it is tensor-parallel"
    if not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting of its input is switched off"
    others = {type(v).__name__ for v in layer.lora_variant.values() if not is_dora(v)}
    if others:
        return f"peft's variant {', '.join(sorted(others))} has no fused form"
    if any(hooked(m) for m in module.modules() if m is not module):
        return "hooks stand on its parts"
    return None
