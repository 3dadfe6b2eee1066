"""LoRA layers of peft, run by `peft_kernels.lora_linear`; siblings that read one x run together."""

import warnings
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_kernels.dora import magnify, magnify_dropped, weight_norm
from peft_kernels.dropout import dropout
from peft_kernels.lora_linear import Adapter, Projection, lora_linear, lora_linears

from .state import ATTRIBUTE, hooked, state_of


@dataclass
class _Held:
    x: Tensor | None = None
    mode: tuple[Any, ...] = ()
    outputs: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class SharedInput:
    """Siblings that their parent calls with one x. The first one called computes all; the others take theirs.

    The parent's source says that they get the same variable; that it is the same tensor, in the same mode, is checked
    at every call. What does not fit is computed by itself. Nothing is shared outside of one call of the parent.
    """

    members: list[nn.Module]
    held: dict[int, "_Held"] = field(default_factory=dict)  # by thread, while its parent runs there

    def begin(self) -> None:
        self.held[get_ident()] = _Held()

    def end(self) -> None:
        self.held.pop(get_ident(), None)

    def serves(self, member: nn.Module) -> bool:
        """Whether its parent runs now, and `member` is one of ours (DataParallel's replicas are not)."""
        return get_ident() in self.held and any(m is member for m in self.members)

    def take(self, member: nn.Module, x: Tensor) -> Tensor | None:
        """What was computed for `member` from this very x, None where nothing was."""
        held = self.held[get_ident()]
        if held.x is not x or held.mode != _mode(x):
            self.begin()
            return None
        return held.outputs.pop(id(member), None)

    def run(self, member: "FusedLoraLinear", x: Tensor, projection: Projection) -> Tensor:
        """Outputs of all members that can run; returns `member`'s and keeps the others."""
        state = state_of(member)
        # hooks of a sibling may bring its weights (FSDP, offloading) or another input
        siblings = [m for m in self.members if m is not member and isinstance(m, FusedLoraLinear) and not hooked(m)]
        partners = [member, *siblings]
        found = [projection, *(m.plain_projection() for m in partners[1:])]
        ready = [(m, p) for m, p in zip(partners, found, strict=True) if p is not None]
        seeds = state.rows.of(x, state.salt) if any(a.p for _, p in ready for a in p.adapters) else None
        mine, *others = lora_linears(x, [p for _, p in ready], seeds, backend=state.backend)
        outputs = {id(m): y for (m, _), y in zip(ready[1:], others, strict=True)}
        self.held[get_ident()] = _Held(x, _mode(x), outputs) if outputs else _Held()
        return mine


class SharingForward:
    """Mixin of a parent of such siblings: what they compute for each other lives as long as one call of it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        groups: list[SharedInput] = state_of(self).extra["groups"]  # type: ignore[arg-type]
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        for group in groups:
            group.begin()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            for group in groups:
                group.end()


def _mode(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return torch.is_grad_enabled(), autocast, x._version if not torch.compiler.is_compiling() else 0


class FusedLoraLinear(PeftLinear):
    """peft's `lora.Linear` on one instance. Whatever is not the plain trained path is peft's own forward:
    disabled or merged adapters, mixed batches, variants other than DoRA, children with hooks."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if ATTRIBUTE not in self.__dict__:  # unfused, while Accelerate kept this method of the instance
            return PeftLinear.forward(self, x, *args, **kwargs)
        state = state_of(self)
        group: SharedInput | None = state.extra.get("group")
        group = group if group is not None and group.serves(self) else None
        if group is not None:
            held = group.take(self, x)
            if held is not None:
                return held
        if args or any(kwargs.get(key) is not None for key in kwargs) or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        dora = self._dora_adapter()
        if dora is not None:
            base: Any = self.get_base_layer()
            plain = base.weight.requires_grad or not self._free_of_hooks()
            return super().forward(x, **kwargs) if plain else self._dora(x, dora)
        projection = self.plain_projection()
        if projection is None:
            return super().forward(x, *args, **kwargs)
        if group is not None:
            return group.run(self, x, projection)
        seeds = state.rows.of(x, state.salt) if any(a.p for a in projection.adapters) else None
        return lora_linear(x, projection, seeds, backend=state.backend)

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
        return Projection(base.weight, base.bias, tuple(pairs), isinstance(base, Conv1D))

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
        norm = weight_norm(base.weight, pair.A, pair.B, pair.scale, transposed=transposed)
        if pair.p == 0:
            z = lora_linear(x, Projection(base.weight, None, (pair,), transposed), backend=state.backend)
            return magnify(z, magnitude, norm, base.bias, backend=state.backend)
        weight = base.weight.t() if transposed else base.weight
        dropped = dropout(x, pair.p, state.rows.of(x, state.salt), pair.salt, backend=state.backend)
        low = (
            nn.functional.linear(nn.functional.linear(dropped.to(pair.A.dtype), pair.A), pair.B, pair.bias) * pair.scale
        )
        whole, part = nn.functional.linear(x, weight, base.bias), nn.functional.linear(dropped, weight)
        return magnify_dropped(whole, part, low, magnitude, norm, backend=state.backend).to(whole.dtype)


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
    if type(module) is not PeftLinear:
        return f"peft's {type(module).__name__} has no fused form"
    base: Any = module.get_base_layer()
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}"
    if base.weight.requires_grad:
        return "its base weight trains"
    if getattr(base, "_hf_tp_plan", None) is not None:
        return "it is tensor-parallel"
    if not getattr(module, "cast_input_dtype_enabled", True):
        return "casting of its input is switched off"
    others = {type(v).__name__ for v in module.lora_variant.values() if not is_dora(v)}
    if others:
        return f"peft's variant {', '.join(sorted(others))} has no fused form"
    if any(hooked(m) for m in module.modules() if m is not module):
        return "hooks stand on its parts"
    return None
