"""What shapes and settings decide about a call of `lora_linears`: where tensors stand, which adapters go together."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .frozen_weight import FrozenWeight
from .quantised_weight import QuantisedWeight
from .recompute import Recipe

SPARSE = 0.2
"""Up to this rate the compiled passes take dropped elements out one by one, behind a product of the whole x."""


@dataclass(frozen=True)
class Pair:
    """Where one adapter stands: `at` of its A (then B, bias) among the tensors, its projection, its mask."""

    projection: int
    at: int
    scale: float
    salt: int


@dataclass(frozen=True)
class Bundle:
    """Adapters that are one product with x: all without dropout, and all whose dropped elements are taken out behind
    it (`sparse`); any other with dropout is alone."""

    p: float
    pairs: tuple[Pair, ...]
    sparse: bool = False

    @property
    def salt(self) -> int:
        return self.pairs[0].salt


@dataclass(frozen=True)
class Layout:
    """Tensors stand as: seeds, the recipe's inputs, then per projection weight (None where it is codes), bias,
    (A, B, bias)…; `linears` holds (place of the weight, transposed)."""

    linears: tuple[tuple[int, bool], ...]
    bundles: tuple[Bundle, ...]


@lru_cache(maxsize=4096)
def lay_out(settings: tuple[Any, ...], inputs: int, sparse: bool) -> Layout:
    """`settings`: per projection (transposed, ((scale, p, salt, dtype), …)); `inputs`: tensors of the recipe; `sparse`:
    whether the compiled passes may take dropped elements out of fp32 adapters."""
    at, linears = 1 + inputs, []
    bundles: dict[Any, list[Pair]] = {}
    for place, (transposed, adapters) in enumerate(settings):
        linears.append((at, transposed))
        at += 2
        for scale, p, salt, dtype in adapters:
            together = p == 0 or (sparse and p <= SPARSE and dtype == torch.float32)
            key = (p, together, dtype if together else at)
            bundles.setdefault(key, []).append(Pair(place, at, scale, salt))
            at += 3
    found = [Bundle(p, tuple(pairs), together and p > 0) for (p, together, _), pairs in bundles.items()]
    return Layout(tuple(linears), tuple(found))


@dataclass(frozen=True)
class Plan:
    """A call's layout, how x is made again, autocast's dtype (None outside), the backend, and per projection the codes
    of its weight, frozen or quantised (None where it is a tensor)."""

    layout: Layout
    recipe: Recipe | None
    dtype: torch.dtype | None
    triton: bool
    frozen: tuple[FrozenWeight | None, ...]
    quantised: tuple[QuantisedWeight | None, ...]

    def cast(self, t: Any) -> Any:
        return t if t is None or self.dtype is None else t.to(self.dtype)

    def stacked(self, bundle: Bundle, tensors: Any) -> Tensor:
        """The A's of a bundle above each other (R, K)."""
        rows = [self.cast(tensors[pair.at]) for pair in bundle.pairs]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def region(self, x: Tensor) -> AbstractContextManager[Any]:
        """Autocast is done by hand inside: it knows nothing of `out=` and in-place products."""
        return nullcontext() if self.dtype is None else torch.autocast(x.device.type, enabled=False)

    def bare(self) -> "Plan":
        """For backward: the recipe without its inputs, which are saved tensors and may be elsewhere by then."""
        return self if self.recipe is None else replace(self, recipe=replace(self.recipe, inputs=()))

    def input_again(self, x: Tensor | None, tensors: Any) -> Tensor:
        if self.recipe is None:
            assert x is not None
            return x
        return self.recipe.make(*tensors[1 : self.layout.linears[0][0]])
