"""What a fused module remembers, and the names of its dropout masks."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from peft_kernels._launch import Backend

ATTRIBUTE = "_peft_engine_fused"
CALLS_APART = 0x5851F42D4C957F2D  # between the seeds of two calls of one module
P = ParamSpec("P")
R = TypeVar("R")


class RowSeeds:
    """Seeds of the samples in the batch, one holder per fused model.

    Attributes:
        seeds: int64 (samples,), set before each forward by a training loop that can name its samples; a sample's masks
            then depend on nothing else. None: every layer draws seeds by row from torch's generator, as
            `F.dropout` would.
        batch: how often `seeds` was set.
        repeating: the last call of each module is being made again (logits that somebody asks for after the loss).
    """

    def __init__(self, seeds: Tensor | None = None) -> None:
        self.batch, self.repeating = 0, False
        self.seeds = seeds

    @property
    def seeds(self) -> Tensor | None:
        return self._seeds

    @seeds.setter
    def seeds(self, seeds: Tensor | None) -> None:
        self._seeds, self._calls = seeds, dict[int, list[int]]()
        self.batch += 1

    def of(self, x: Tensor, salt: int) -> Tensor:
        """Seeds for the first dimension of `x`, on its device, for a call of the module with this salt.

        A module that a model calls again in one pass (ALBERT's layers) gets other masks each time. Which call it is, is
        told by a number drawn from torch's generator, which checkpointing puts back before it replays a call.
        """
        if self._seeds is None or self._seeds.shape[0] != x.shape[0]:
            # checkpointing restores the generator, so a replay draws them again
            return torch.randint(-(2**63), 2**63 - 1, (x.shape[0],), device=x.device)
        calls = self._calls.setdefault(salt, [])
        if not (self.repeating and calls):
            ticket = int(torch.randint(2**62, ()))
            if ticket not in calls:
                calls.append(ticket)
            place = calls.index(ticket)
        else:
            place = len(calls) - 1
        return self._seeds if place == 0 else self._seeds + place * CALLS_APART


@dataclass
class Fused:
    """Why this module's class is not its own.

    Attributes:
        original: the class that `unfuse` gives back.
        op: what it runs now, as the report names it.
        salt: of its dropout masks, from its name.
        extra: what only some kinds of module need.
        given: the class that `swap` gave.
    """

    original: type[nn.Module]
    op: str
    backend: Backend
    rows: RowSeeds
    salt: int
    extra: dict[str, Any] = field(default_factory=dict)
    given: type[nn.Module] | None = None


def once_each(function: Callable[P, R]) -> Callable[P, R]:
    """Remember results by arguments; a type of its own because type checkers take classes of modules for unhashable."""
    return cast(Callable[P, R], cache(function))


def salt_of(name: str) -> int:
    """40 bits from a module's name; adapters of one layer add small numbers."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:5], "big") << 8


def state_of(module: nn.Module) -> Fused:
    found: Fused = module.__dict__[ATTRIBUTE]
    return found


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, before it was fused if it is."""
    found = module.__dict__.get(ATTRIBUTE)
    return found.original if isinstance(found, Fused) else type(module)


def swap(module: nn.Module, cls: type[nn.Module], state: Fused) -> None:
    """Give this instance another class. Its hooks, parameters and `forward` set by others stay."""
    module.__dict__[ATTRIBUTE] = state
    state.given = cls
    module.__class__ = cls


def changed_since(module: nn.Module) -> bool:
    """Whether somebody gave a fused module yet another class (FSDP2 does), so that it can't be given back its own."""
    return type(module) is not state_of(module).given


def give_back(module: nn.Module) -> None:
    module.__class__ = state_of(module).original
    del module.__dict__[ATTRIBUTE]


def hooked(module: nn.Module) -> bool:
    """Whether calling this module does more than its class's forward, so that it must not be bypassed."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
