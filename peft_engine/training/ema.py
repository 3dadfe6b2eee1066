"""Exponential moving average of the trained weights: what is evaluated and saved instead of the last weights.

    a_t = a_{t-1} + (1 - d) / (1 - d^t) · (w_t - a_{t-1}),   a_0 arbitrary

    w_t   weights after update t        d   decay

This is the average of w_1 … w_t with weights proportional to d^(t - i): the usual recursion with its start corrected
(Kingma and Ba 2015, section 3), so that a short run does not end near the weights it began with.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.group import Member


@dataclass
class Average:
    """Averages of a member's tensors.

    Attributes:
        decay: d, 0 < d < 1.
        tensors: by the member's names; fp32 like what they average, on the same device.
    """

    decay: float
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, member: Member, decay: float) -> "Average":
        """Begins at the member's weights; the first update replaces them."""
        return cls(decay, {name: tensor.detach().clone() for name, tensor in member.tensors.items()})

    @torch.no_grad()
    def update(self, member: Member, count: int) -> None:
        """Take in the weights after update number `count` (from 1)."""
        share = (1 - self.decay) / (1 - self.decay**count)
        names = list(self.tensors)
        torch._foreach_lerp_(
            [self.tensors[name] for name in names], [member.tensors[name].detach() for name in names], share
        )


@contextmanager
def averaged(member: Member, average: Average | None) -> Iterator[None]:
    """The member holds its average inside, and its own weights again afterwards, bit for bit."""
    if average is None:
        yield
        return
    _exchange(member.tensors, average.tensors)
    try:
        yield
    finally:
        _exchange(member.tensors, average.tensors)


@torch.no_grad()
def _exchange(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """Swap values in place, tensor by tensor: no more than one of them is held twice."""
    for name, tensor in one.items():
        kept = tensor.detach().clone()
        tensor.copy_(other[name])
        other[name].copy_(kept)
