"""Peak memory: the CUDA allocator's maximum, counted live tensor bytes on CPU, peak resident set size."""

import resource
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live tensor storages while active; `peak` is their maximum.

    Every storage that an operator returns is counted once, until it is freed. Buffers that an operator takes and gives
    back inside itself are not seen. Counting slows a step by 40-70% on a tiny model, so it is done on a step of its
    own, which `step_seconds` leaves out.

    Args:
        resident: tensors that live before the mode is entered (weights, optimizer state, inputs).
        emptied: storages may be emptied while they live, as FSDP2 does with a layer's weights, behind every operator's
            back; they are looked at again wherever there seems to be a new maximum.
    """

    def __init__(self, resident: Iterable[torch.Tensor] = (), emptied: bool = False) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._emptied = emptied
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in resident:
            self._count(tensor)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor what is here
        key, size = storage._cdata, storage.nbytes()
        if self._sizes.get(key) == size:
            return
        if key not in self._sizes:
            weakref.finalize(storage, self._free, key)
            if self._emptied:
                self._storages[key] = weakref.ref(storage)
        self._resize(key, size)
        if self._emptied and self.now > self.peak:
            for other, place in list(self._storages.items()):
                alive = place()
                if alive is not None:
                    self._resize(other, alive.nbytes())
        self.peak = max(self.peak, self.now)

    def _resize(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._storages.pop(key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_iter(out):
            if isinstance(item, torch.Tensor):
                self._count(item)
        return out


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far (bytes)."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under these tensors, each counted once."""
    storages = {}
    for tensor in tensors:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a DTensor what is here
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
