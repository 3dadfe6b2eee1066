"""Arrays of one shape, one per row (the pixels of images): in memory, or in a mapped file once they are many."""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

MAPPED_FROM = 256 * 2**20  # bytes


class Stack:
    """Collects arrays and gives them back as one, (rows, …).

    Args:
        path: the file that they go to from `MAPPED_FROM` bytes on; None keeps them in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.part = path.with_name(f".{path.name}.{os.getpid()}") if path else None
        self.items: list[np.ndarray] = []
        self.written = 0

    def append(self, array: np.ndarray, where: str) -> None:
        """Add a row's array. Raises ValueError where its shape is not that of the first one."""
        if not self.items and not self.written:
            self.shape, self.dtype = array.shape, array.dtype
        if (array.shape, array.dtype) != (self.shape, self.dtype):
            raise ValueError(f"{where}: an array of shape {array.shape}, the first one has {self.shape}")
        self.items.append(np.ascontiguousarray(array))
        if self.part and len(self.items) * array.nbytes >= MAPPED_FROM:
            self._spill()

    def finish(self) -> np.ndarray:
        """All of them, (rows, …); a read-only map of `path` where they are many. Call it once."""
        if self.written:
            self._spill()
        if not self.written:
            return np.stack(self.items) if self.items else np.zeros((0,))
        assert self.part is not None
        assert self.path is not None
        os.replace(self.part, self.path)
        return np.memmap(self.path, self.dtype, "r", shape=(self.written, *self.shape))

    def _spill(self) -> None:
        """Append what is held in memory to the file; where that fails, all goes back to memory."""
        assert self.part is not None
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with self.part.open("ab" if self.written else "wb") as file:
                for array in self.items:
                    file.write(array.data)
        except OSError as error:
            logging.getLogger(__name__).warning("Pixels are not cached in %s: %s", self.part.parent, error)
            if self.written:
                held = np.fromfile(self.part, self.dtype, self.written * int(np.prod(self.shape)))
                self.items = [*held.reshape(self.written, *self.shape), *self.items]
            with contextlib.suppress(OSError):
                self.part.unlink()
            self.part, self.written = None, 0
            return
        self.written += len(self.items)
        self.items = []


def note(mapped: dict[str, np.memmap]) -> str:
    """What `open_mapped` needs to know of each map, as JSON."""
    return json.dumps(
        {name: [list(v.shape), v.dtype.str, _sha256(Path(str(v.filename)))] for name, v in mapped.items()}
    )


def open_mapped(stated: str, paths: Any) -> dict[str, np.ndarray] | None:
    """The maps that `note` described; None where one is missing or damaged.

    Args:
        paths: name → file.
    """
    found: dict[str, np.ndarray] = {}
    for name, (shape, dtype, digest) in json.loads(stated).items():
        path = paths(name)
        try:
            if _sha256(path) != digest:
                return None
            found[name] = np.memmap(path, np.dtype(dtype), "r", shape=tuple(shape))
        except (OSError, ValueError):
            return None
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
