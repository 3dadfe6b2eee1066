"""Tokenised data as flat arrays, and its cache on disk.

A cache file is named by the sha256 of everything that decides its content: the rows, the tokenizer, the template, the
settings, this format's version (trap 19: a stale cache can't be found, because its name would differ).
"""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import DataError
from .formats import Example
from .mixing import Mixture
from .splitting import Split
from .stacking import Stack, note, open_mapped

FORMAT = 2


@dataclass(frozen=True)
class EncodedRow:
    """One sequence.

    Attributes:
        input_ids: token ids.
        units: what the row adds to the loss's denominator: its supervised targets, or 1 per classified row.
        columns: per token a list as long as `input_ids`, per row a number, a fixed-length list or an array (of
            one shape in all rows).
        truncated: something was cut off.
    """

    input_ids: list[int]
    units: int
    columns: dict[str, Any]
    truncated: bool = False


@dataclass(frozen=True)
class EncodedSet:
    """Sequences, flat: sequence i is `input_ids[offsets[i]:offsets[i + 1]]`.

    Attributes:
        input_ids: int32 (total_tokens,).
        offsets: int64 (sequences + 1,).
        units: int64 (sequences,), see `EncodedRow`; float64 where the training loss is weighted.
        rows: int64 (sequences,), index of the source row.
        columns: each (total_tokens,) or (sequences, ...).
        dropped: source rows that teach nothing after truncation, with the reason.
        truncated: number of source rows that lost tokens.
        mixture: of a training split from several sources; None where each row is seen once per epoch.
        change: augmentation of a training split (set, rows, seed of member and step) → a set of these rows alone, in
            this order; None changes nothing. It depends on nothing but its arguments, row by row.
    """

    input_ids: np.ndarray
    offsets: np.ndarray
    units: np.ndarray
    rows: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: list[tuple[int, str]] = field(default_factory=list)
    truncated: int = 0
    mixture: Mixture | None = None
    change: "Change | None" = None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self) -> np.ndarray:
        """Source rows that teach something, int64, rising."""
        return np.unique(self.rows)

    @property
    def largest(self) -> str:
        """What the largest row is, for a message about memory."""
        if "pixels" in self.columns:
            height, width = self.columns["pixels"].shape[1:3]
            return f"image(s) of {width} x {height} pixels"
        return f"sequence(s) of up to {int(self.lengths.max())} tokens"

    @property
    def length_setting(self) -> str:
        """The setting that makes rows smaller."""
        return "data.image_size" if "pixels" in self.columns else "data.max_length"

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per sequence, int64 (sequences,)."""
        return np.diff(self.offsets)

    @property
    def longest(self) -> int:
        """Positions that a model needs for it: those of the longest sequence. Where a sequence is read in parts (source
        and target, choices), the longest part's, which the task notes per sequence in the column `longest`."""
        positions = self.columns.get("longest", self.lengths)
        return int(positions.max()) if len(self) else 0

    def tokens(self, i: int) -> np.ndarray:
        """Token ids of sequence i, int32 (length,)."""
        return self.input_ids[self.offsets[i] : self.offsets[i + 1]]

    def token_column(self, name: str, i: int) -> np.ndarray:
        """A per-token column of sequence i, (length,)."""
        return self.columns[name][self.offsets[i] : self.offsets[i + 1]]

    def drawn(self, rows: np.ndarray, seed: int) -> "tuple[EncodedSet, np.ndarray]":
        """The rows as a step of training sees them: what `Task.collate` takes."""
        return (self, rows) if self.change is None else (self.change(self, rows, seed), np.arange(len(rows)))


Change = Callable[[EncodedSet, np.ndarray, int], EncodedSet]
Encode = Callable[[Example, str], "list[EncodedRow] | str"]


def encode_split(
    split: Split, encode: Encode, fingerprint: dict[str, Any], max_dropped: float | None, cache: Path | None
) -> EncodedSet:
    """Tokenise a split, or read it from the cache.

    Args:
        encode: example and its provenance → sequences, or the reason why the row teaches nothing.
        fingerprint: all that decides `encode`'s result, as JSON (tokenizer digest, settings).
        max_dropped: largest tolerated share of rows that teach nothing (trap 3); None refuses nothing.
        cache: folder, or None.

    Raises:
        DataError: more rows than `max_dropped` teach nothing, or all do (trap 2).
    """
    path = cache / f"{_key(split, fingerprint)}.safetensors" if cache else None
    encoded = _read(path) if path else None
    if encoded is None:
        encoded = _encode(split, encode, path)
        if path:
            _write(path, encoded)
    if max_dropped is not None:
        refuse_empty(split, encoded, max_dropped)
    return encoded


def cache_folder(setting: str | None) -> Path | None:
    """Folder for `data.cache`: None, a path, or the user's cache folder for "auto"."""
    if setting is None:
        return None
    if setting != "auto":
        return Path(setting).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "peft-engine" / "tokenised"


def _key(split: Split, fingerprint: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, fingerprint], sort_keys=True, default=str).encode())
    for example in split.examples:
        digest.update(
            json.dumps(example, sort_keys=True, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")
        )
        digest.update(b"\n")
    return digest.hexdigest()


def _encode(split: Split, encode: Encode, path: Path | None) -> EncodedSet:
    rows: list[EncodedRow] = []
    stacks: dict[str, Stack] = {}
    index: list[int] = []
    dropped: list[tuple[int, str]] = []
    truncated = 0
    for i, (example, where) in enumerate(zip(split.examples, split.where, strict=True)):
        found = encode(example, where)
        if isinstance(found, str):
            dropped.append((i, found))
            continue
        rows += [_stacked(row, stacks, path, where) for row in found]
        index += [i] * len(found)
        truncated += any(row.truncated for row in found)
    lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
    columns = {}
    for name in rows[0].columns if rows else ():
        per_token = (
            isinstance(rows[0].columns[name], list)
            and all(
                isinstance(row.columns[name], list) and len(row.columns[name]) == len(row.input_ids) for row in rows
            )
            and name != "label"
        )
        values = [row.columns[name] for row in rows]
        columns[name] = np.concatenate([np.asarray(v) for v in values]) if per_token else np.asarray(values)
    return EncodedSet(
        input_ids=np.concatenate(
            [np.asarray(row.input_ids, dtype=np.int32) for row in rows] or [np.zeros(0, np.int32)]
        ),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        units=np.array([row.units for row in rows], dtype=np.int64),
        rows=np.array(index, dtype=np.int64),
        columns=columns | {name: stack.finish() for name, stack in stacks.items()},
        dropped=dropped,
        truncated=truncated,
    )


def _stacked(row: EncodedRow, stacks: dict[str, Stack], path: Path | None, where: str) -> EncodedRow:
    """The row without its arrays, which go to their stacks."""
    arrays = {name: value for name, value in row.columns.items() if isinstance(value, np.ndarray)}
    for name, array in arrays.items():
        stacks.setdefault(name, Stack(_mapped_file(path, name) if path else None)).append(array, where)
    return replace(row, columns={n: v for n, v in row.columns.items() if n not in arrays}) if arrays else row


def _mapped_file(path: Path, name: str) -> Path:
    return path.with_suffix(f".{name}")


def refuse_empty(split: Split, encoded: EncodedSet, max_dropped: float) -> None:
    share = len(encoded.dropped) / max(1, len(split.examples))
    if encoded.dropped and (share > max_dropped or not len(encoded)):
        first, reason = encoded.dropped[0]
        raise DataError(
            f"{len(encoded.dropped)} of {len(split.examples)} rows ({share:.1%}) would teach nothing, more than "
            f"data.max_dropped = {max_dropped:.1%}. First: {split.where[first]}: {reason}.",
            "Raise data.max_length, mend the rows, or raise data.max_dropped. "
            "`peft-engine data CONFIG` shows the mask.",
        )


def _write(path: Path, encoded: EncodedSet) -> None:
    arrays = {"input_ids": encoded.input_ids, "offsets": encoded.offsets, "units": encoded.units, "rows": encoded.rows}
    mapped = {name: values for name, values in encoded.columns.items() if isinstance(values, np.memmap)}
    held = {name: values for name, values in encoded.columns.items() if name not in mapped}
    arrays |= {f"column.{name}": np.ascontiguousarray(values) for name, values in held.items()}
    notes = {"dropped": json.dumps(encoded.dropped), "truncated": str(encoded.truncated)}
    if mapped:
        notes["mapped"] = note(mapped)
    notes["digest"] = _digest(arrays, notes)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, part, notes)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:  # the run does not need the cache
        logging.getLogger(__name__).warning("Tokenised data was not cached in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):
            part.unlink()


def _digest(arrays: dict[str, np.ndarray], notes: dict[str, str]) -> str:
    """sha256 of a cache file's content: a damaged one is never trained on."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}{values.dtype}{values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _read(path: Path) -> EncodedSet | None:
    """The cached set, or None where there is none or it can't be read (it is then written anew)."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            notes = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    if notes.pop("digest", None) != _digest(arrays, notes):
        return None
    columns = {name.removeprefix("column."): arrays.pop(name) for name in list(arrays) if name.startswith("column.")}
    mapped = open_mapped(notes.get("mapped", "{}"), partial(_mapped_file, path))
    if mapped is None:
        return None
    columns |= mapped
    dropped = [(int(i), str(reason)) for i, reason in json.loads(notes["dropped"])]
    return EncodedSet(**arrays, columns=columns, dropped=dropped, truncated=int(notes["truncated"]))
