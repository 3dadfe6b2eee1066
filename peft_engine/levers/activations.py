"""What forward saves for backward, kept in host memory in between.

A saved tensor is copied out while forward goes on, and back a few tensors ahead of the one that backward asks for.
Weights, buffers, small tensors and views that repeat their numbers stay on the card. What several nodes save is copied
once.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .lane import Lane

LEAST = 2**18
"""Bytes of a tensor from which on it is moved: a copy takes about 10 µs to start, in which PCIe moves as much."""
LEAVING = 2
"""Tensors whose copies may be under way before forward waits for the oldest; they stay on the card as long."""
AHEAD = 4
"""Tensors that are fetched before backward asks for them."""


class _Away:
    """A saved tensor in host memory.

    Attributes:
        place: how many went before it.
        uses: how often it was saved and not asked for yet.
        back: the tensor on the card, from the start of its copy until its last use.
        ticket: of that copy, None once it was waited for.
    """

    def __init__(self, host: Tensor, device: torch.device, place: int) -> None:
        self.host, self.device, self.place = host, device, place
        self.uses = 1
        self.back: Tensor | None = None
        self.ticket: Any = None


class ActivationOffload:
    """Keeps a model's saved tensors on the host.

    Args:
        model: its weights and buffers are left where they are.
        lane: copies between card and host.
        least: bytes of a tensor from which on it is moved.
    """

    def __init__(self, model: nn.Module, lane: Lane, least: int = LEAST) -> None:
        self.model, self.lane, self.least = model, lane, least
        self.moved_bytes = 0
        self._clear()

    def _clear(self) -> None:
        self._order: list[weakref.ref[_Away]] = []
        self._seen: dict[Any, tuple[StorageWeakRef, weakref.ref[_Away]]] = {}
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._coming: dict[int, _Away] = {}

    @contextmanager
    def during(self) -> Iterator[None]:
        """Around the forward pass of one micro-batch, whose backward pass is over before the next begins."""
        self._arrive(*self._coming.values())  # of a backward pass that broke off
        self._clear()
        self._held = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers())}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            while self._leaving:
                self._let_go()

    def _pack(self, tensor: Tensor) -> Tensor | _Away:
        storage = tensor.untyped_storage()
        size = tensor.numel() * tensor.element_size()
        repeats = size > storage.nbytes()
        if size < self.least or repeats or not tensor.is_floating_point() or storage._cdata in self._held:
            return tensor
        key = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version
        alive, known = self._seen.get(key, (None, None))
        found = known() if alive is not None and known is not None and not alive.expired() else None
        if found is not None:
            found.uses += 1
            return found
        away = _Away(self.lane.host(tensor), tensor.device, len(self._order))
        self._leaving.append((tensor, self.lane.copy(tensor, away.host)))
        self._order.append(weakref.ref(away))
        self._seen[key] = StorageWeakRef(storage), weakref.ref(away)
        self.moved_bytes += size
        if len(self._leaving) > LEAVING:
            self._let_go()
        return away

    def _let_go(self) -> None:
        """The oldest of those that leave: its memory on the card is free behind its copy."""
        tensor, ticket = self._leaving.popleft()
        self.lane.wait(ticket)
        del tensor

    def _unpack(self, saved: Tensor | _Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._fetch(saved)
        for place in range(saved.place - 1, max(-1, saved.place - 1 - AHEAD), -1):
            other = self._order[place]() if place < len(self._order) else None
            if other is not None and other.uses:
                self._fetch(other)
        self._arrive(saved)
        back = saved.back
        assert back is not None
        saved.uses -= 1
        if not saved.uses:
            saved.back = None
        return back

    def _fetch(self, away: _Away) -> None:
        if away.back is None:
            away.back = torch.empty_like(away.host, device=away.device)
            away.ticket = self.lane.copy(away.host, away.back)
            self._coming[away.place] = away

    def _arrive(self, *aways: _Away) -> None:
        for away in aways:
            if self._coming.pop(away.place, None) is not None:
                self.lane.wait(away.ticket)
                away.ticket = None
