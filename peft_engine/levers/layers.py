"""Frozen layers that live in host memory and are on the card only while they run, one ahead of their use.

In forward layer i runs while i + 1 is fetched; in backward while i - 1 is. A layer's weights keep their storages,
which are emptied and filled again: whatever autograd saved of them (the weight, a view of it) finds them filled when
the layer's gradient arrives. One-dimensional weights, buffers and all that trains stay on the card. A layer may run
several times in a pass, as those of ALBERT do.
"""

from collections.abc import Collection, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from .lane import Lane


class _Layer:
    """The storages of a layer that come and go.

    Attributes:
        pairs: (storage on the card, its bytes on the host).
        there: filled, or being filled.
        ticket: of the copy that fills it, None once it was waited for.
        trains: a gradient will come for what its last forward gave.
        open: of its runs in forward those whose backward pass has begun and is not over.
    """

    def __init__(self) -> None:
        self.pairs: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.there = True
        self.ticket: Any = None
        self.trains = False
        self.open: set[int] = set()


class StreamedLayers:
    """Streams the frozen weights of some modules of a model.

    Args:
        blocks: the modules, in the order in which they run; they are moved to `device` one by one.
        kept: tensors that stay on the card.
        lane: copies between host and card.

    Attributes:
        host_bytes: of the weights that live on the host.
    """

    def __init__(self, blocks: Sequence[nn.Module], kept: Collection[Tensor], lane: Lane, device: torch.device) -> None:
        self.lane, self.device = lane, device
        self.layers: list[_Layer] = []
        self.host_bytes = 0
        self._runs, self._run = count(), 0
        owners: dict[int, int] = {}
        for parameter in (p for block in blocks for p in dict.fromkeys(block.parameters())):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        held = {id(tensor) for tensor in kept} | {key for key, count in owners.items() if count > 1}
        for block in blocks:
            block.to(device)
            self.layers.append(self._moved(block, held))
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            block.register_forward_hook(partial(self._after, number))

    def _moved(self, block: nn.Module, held: set[int]) -> _Layer:
        layer, storages = _Layer(), dict[int, torch.UntypedStorage]()
        for parameter in block.parameters():
            if parameter.ndim > 1 and not parameter.requires_grad and id(parameter) not in held:
                if not parameter.untyped_storage().resizable():  # mapped from a file
                    parameter.data = parameter.data.clone()
                storage = parameter.untyped_storage()
                storages[storage._cdata] = storage
        for storage in storages.values():
            here = _bytes(storage)
            host = self.lane.host(here)
            layer.ticket = self.lane.copy(here, host)
            layer.pairs.append((storage, host))
            self.host_bytes += storage.nbytes()
        self._release(layer)
        return layer

    def _start(self, layer: _Layer) -> None:
        """Begin to fill a layer."""
        if layer.there:
            return
        for storage, host in layer.pairs:
            storage.resize_(host.numel())
            layer.ticket = self.lane.copy(host, _bytes(storage))
        layer.there = True

    def _ready(self, layer: _Layer) -> None:
        """What is computed from here on finds the layer filled."""
        self._start(layer)
        if layer.ticket is not None:
            self.lane.wait(layer.ticket)
            layer.ticket = None

    def _release(self, layer: _Layer) -> None:
        if layer.there:
            self._ready(layer)  # its memory is let go behind the copy
            for storage, _ in layer.pairs:
                storage.resize_(0)
            layer.there = False

    def _before(self, number: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        for other in (*self.layers[:number], *self.layers[number + 1 :]):
            self._release(other)  # what an earlier pass left behind
            other.open.clear()
        self._run = next(self._runs)
        self._ready(self.layers[number])
        if number + 1 < len(self.layers):
            self._start(self.layers[number + 1])
        given = next((t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad), None)
        if given is not None and torch.is_grad_enabled():
            given.register_hook(partial(self._went, number, self._run))

    def _after(self, number: int, block: nn.Module, args: Any, output: Any) -> None:
        layer = self.layers[number]
        made = [t for t in tree_iter(output) if isinstance(t, Tensor) and t.requires_grad]
        layer.trains = bool(made)
        for tensor in made:
            tensor.register_hook(partial(self._came, number, self._run))
        if not (layer.trains and number == len(self.layers) - 1):  # backward begins with the last
            self._release(layer)

    def _came(self, number: int, run: int, gradient: Tensor) -> None:
        """The gradient of a layer's output is there: its backward pass begins."""
        self.layers[number].open.add(run)
        self._ready(self.layers[number])
        if number == len(self.layers) - 1:
            self._ahead(number - 1)

    def _went(self, number: int, run: int, gradient: Tensor) -> None:
        """The gradient of a layer's input is whole: this run of it is over, and what ran before it begins."""
        layer = self.layers[number]
        layer.open.discard(run)
        if not layer.open:
            self._release(layer)
            self._ahead(number - 2)

    def _ahead(self, number: int) -> None:
        if number >= 0 and self.layers[number].trains:
            self._start(self.layers[number])


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """The storage as a tensor uint8 (bytes,) with a version counter of its own: filling it is no change to autograd."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
