"""Siblings that their parent calls with one x run together: x is read, saved and rounded once for all of them."""

from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from peft_kernels.lora_linear import Projection, lora_linear, lora_linears

from .state import hooked, state_of


class Projects(Protocol):
    """A module that can say what it computes as one `Projection`."""

    def plain_projection(self) -> Projection | None:
        """None where its own forward must run."""


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

    def run(self, member: nn.Module, x: Tensor, projection: Projection) -> Tensor:
        """Outputs of all members that can run; returns `member`'s and keeps the others."""
        state = state_of(member)
        # hooks of a sibling may bring its weights (FSDP, offloading) or another input
        siblings = [m for m in self.members if m is not member and hasattr(m, "plain_projection") and not hooked(m)]
        if x.is_inference():  # it keeps no count of changes in place, so each linear reads it for itself
            siblings = []
        found = [projection, *(cast(Projects, m).plain_projection() for m in siblings)]
        ready = [(m, p) for m, p in zip([member, *siblings], found, strict=True) if p is not None]
        seeds = state.rows.of(x, state.salt) if any(a.p for _, p in ready for a in p.adapters) else None
        mine, *others = lora_linears(
            x, [p for _, p in ready], seeds, backend=state.backend, passes=bool(state.extra.get("passes"))
        )
        outputs = {id(m): y for (m, _), y in zip(ready[1:], others, strict=True)}
        self.held[get_ident()] = _Held(x, _mode(x), outputs) if outputs else _Held()
        return mine


class ProjectionForward:
    """Mixin of a linear without an adapter that has a `plain_projection`: alone, or with its siblings."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        group = group_of(module)
        if group is not None:
            held = group.take(module, x)
            if held is not None:
                return held
        projection = module.plain_projection()
        if group is not None:
            return group.run(module, x, projection)
        return lora_linear(x, projection, backend=state_of(module).backend)


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


def group_of(member: nn.Module) -> SharedInput | None:
    """The siblings that `member` runs with in this call, None where it runs alone."""
    group: SharedInput | None = state_of(member).extra.get("group")
    return group if group is not None and group.serves(member) else None


def _mode(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    counted = not torch.compiler.is_compiling() and not x.is_inference()
    return torch.is_grad_enabled(), autocast, x._version if counted else 0
