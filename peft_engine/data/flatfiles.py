"""Flat files on disk that are written piece by piece and read by the piece: arrays larger than memory.

A store is a folder of such files that grow together. `progress.json` says up to where all of them are complete, so
that a killed writer goes on from there; `manifest.json`, written last, holds the sha256 of each file: a store without
it is not finished, one that doesn't match it is damaged, and both are never read.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ..errors import StorageError

PIECE = 2**20  # bytes, or values, handled at once
MANIFEST, PROGRESS = "manifest.json", "progress.json"


class FlatArray:
    """A one-dimensional array in a file, of which only what is asked for is read, never mapped: it holds no memory.

    It takes what the engine does with token columns: `array[a:b]`, `array[i]`, `len`, `sum`, `dtype`, and as a whole
    `np.asarray`.

    Args:
        stored: dtype in the file.
        dtype: dtype of what is given.
    """

    def __init__(self, path: Path, stored: np.dtype[Any], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._stored = stored
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._length = os.fstat(self._file).st_size // stored.itemsize

    def __len__(self) -> int:
        return self._length

    shape = property(lambda self: (self._length,))
    ndim = 1

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return np.asarray(self)[index] if isinstance(index, np.ndarray) else self[index : index + 1][0]
        start, stop, step = index.indices(self._length)
        assert step == 1, "read in order"
        raw = read_exactly(self._file, start * self._stored.itemsize, max(0, stop - start) * self._stored.itemsize)
        return np.frombuffer(raw, self._stored).astype(self.dtype)

    def sum(self) -> Any:
        """Sum over the whole file, some of it at a time."""
        return sum((self[i : i + PIECE].sum() for i in range(0, self._length, PIECE)), self.dtype.type(0).sum())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return cast(np.ndarray, self[:]).astype(dtype or self.dtype)


def read_exactly(file: int, begins: int, size: int) -> bytes:
    """`size` bytes of an open file. Raises StorageError where it has become shorter."""
    pieces = []
    while size:
        piece = os.pread(file, size, begins)
        if not piece:
            raise StorageError("A file of the streamed data has become shorter.", "Run it again: it is built anew.")
        pieces.append(piece)
        begins, size = begins + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A small column as a read-only map of its file."""
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)


class Writer:
    """Writes a store, from its beginning or from where an earlier writer was lost.

    Attributes:
        state: what the last `commit` was given; None at the beginning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._digests: dict[str, Any] = {}
        with storage_faults(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self._go_on():
                shutil.rmtree(folder)
                folder.mkdir()

    def _go_on(self) -> bool:
        """Cut every file to where all are complete. False where that can't be."""
        try:
            progress = json.loads((self.folder / PROGRESS).read_bytes())
            sizes = progress["sizes"]
        except (FileNotFoundError, ValueError, KeyError):
            return False
        paths = [self.folder / name for name in sizes]
        if not all(path.is_file() and path.stat().st_size >= sizes[path.name] for path in paths):
            return False
        for path in paths:
            name = path.name
            os.truncate(path, sizes[name])
            self._digests[name] = _digest(path)
            self._files[name] = path.open("ab")
        self.state = progress["state"]
        return True

    def append(self, name: str, content: bytes | np.ndarray) -> None:
        """Add to the end of a file."""
        with storage_faults(self.folder):
            if name not in self._files:
                self._files[name] = (self.folder / name).open("wb")
                self._digests[name] = hashlib.sha256()
            raw = content if isinstance(content, bytes) else content.tobytes()
            self._files[name].write(raw)
            self._digests[name].update(raw)

    def commit(self, state: dict[str, Any]) -> None:
        """All files are complete up to here; `state` (JSON) comes back to who goes on."""
        with storage_faults(self.folder):
            sizes = {}
            for name, file in self._files.items():
                file.flush()
                os.fsync(file.fileno())
                sizes[name] = file.tell()
            self._put(PROGRESS, {"sizes": sizes, "state": state})

    def finish(self, notes: dict[str, Any]) -> None:
        """The store is whole; `notes` (JSON) come back from `read_notes`."""
        with storage_faults(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
            self._put(MANIFEST, {"sha256": digests, "notes": notes})
            (self.folder / PROGRESS).unlink(missing_ok=True)

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, name: str, content: dict[str, Any]) -> None:
        part = self.folder / f".{name}"
        part.write_text(json.dumps(content), encoding="utf-8")
        os.replace(part, self.folder / name)


def read_notes(folder: Path) -> dict[str, Any] | None:
    """What `finish` was given; None where there is no finished store, or a damaged one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        whole = all(_digest(folder / name).hexdigest() == was for name, was in manifest["sha256"].items())
        return manifest["notes"] if whole else None
    except (OSError, ValueError, KeyError):
        return None


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time builds a store; the others wait, and find it finished."""
    with storage_faults(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder.with_name(f".{folder.name}.lock"), os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def storage_faults(folder: Path) -> Iterator[None]:
    """A full, read-only or forbidden disk as a StorageError: streaming can't do without its store."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"data.streaming keeps rows and tokens on disk, and {folder} can't be written: {error.strerror or error}.",
            "Free space there, or name another place as data.cache.",
        ) from error


def _digest(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")
