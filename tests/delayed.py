"""A lane whose copies happen as late as they may, for tests on a CPU: whoever waits too little sees NaN."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes


class _Place:
    """A tensor's place in memory, without holding on to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.rest = tensor.dtype, (tensor.storage_offset(), tensor.shape, tensor.stride())
        self.bytes = tensor.untyped_storage().nbytes()

    def tensor(self) -> Tensor:
        assert not self.storage.expired(), "memory was let go before its copy was waited for"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage.nbytes() == self.bytes, "memory was emptied before its copy was waited for"
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.rest)


class DelayedLane:
    """Copies happen in their order, when one of them, or a later one, is waited for.

    Attributes:
        hosts: identities of the storages that are host memory.
        out, back: copies to the host and from it.
    """

    def __init__(self) -> None:
        self.hosts: set[int] = set()
        self.out = self.back = 0
        self._queue: list[tuple[int, _Place, _Place]] = []
        self._count = 0

    def host(self, like: Tensor) -> Tensor:
        with _disable_current_modes():  # no memory of the card, for whoever counts that
            made = torch.empty_like(like)
        self.hosts.add(made.untyped_storage()._cdata)
        self._poison(made)
        return made

    def copy(self, source: Tensor, target: Tensor) -> int:
        self._poison(target)
        to_host = target.untyped_storage()._cdata in self.hosts
        self.out, self.back = self.out + to_host, self.back + (not to_host)
        self._count += 1
        self._queue.append((self._count, _Place(source), _Place(target)))
        return self._count

    def wait(self, ticket: Any) -> None:
        while self._queue and self._queue[0][0] <= ticket:
            _, source, target = self._queue.pop(0)
            with torch.no_grad():
                target.tensor().copy_(source.tensor())

    @staticmethod
    def _poison(tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)
