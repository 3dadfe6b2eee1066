"""Tensors that can be made again: norms and activations tell their readers how, so that nobody saves a copy.

A LoRA linear needs its input x in backward (dA = dSᵀ·x). Where x is the output of a norm or an activation whose own
input is saved anyway, x costs one cheap elementwise pass to make again, against M×K elements to keep.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ATTRIBUTE = "_peft_kernels_recipe"


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made from tensors that are saved anyway.

    Attributes:
        make: gives the tensor again from `inputs`, bit for bit; called without autograd.
        inputs: detached tensors; their version counters are those of the originals, so that a change in place is
            refused by autograd and not computed with.
        version: of the tensor itself when it was made; one that was changed in place since can't be made again.
    """

    make: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def remember(y: Tensor, make: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Note on `y` that `make(*inputs)` gives it again. Returns `y`. Compiled graphs plan recomputation themselves."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(y, _ATTRIBUTE, Recipe(make, tuple(t.detach() for t in inputs), y._version))
    return y


def recipe_of(x: Tensor) -> Recipe | None:
    """How to make `x` again, None where it must be saved."""
    if torch.compiler.is_compiling():
        return None
    found: Recipe | None = getattr(x, _ATTRIBUTE, None)
    return found if found is not None and found.version == x._version else None
