"""Copies between a card and pinned host memory, beside the computation.

Who starts a copy must hold on to its tensor on the card until `wait` was called with its ticket: memory that is let go
earlier would be given to the next kernel while the copy still reads or writes it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """Copies that happen one after another, in the order in which they were asked for."""

    def host(self, like: Tensor) -> Tensor:
        """Host memory of a tensor's shape and dtype (and strides, where these are dense)."""

    def copy(self, source: Tensor, target: Tensor) -> Any:
        """Copy behind all that was computed so far, and in front of nothing. Returns a ticket."""

    def wait(self, ticket: Any) -> None:
        """What is computed from here on comes behind that copy."""


class CudaLane:
    """A stream of its own beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def host(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(ticket)
