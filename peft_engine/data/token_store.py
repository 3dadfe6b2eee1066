"""Tokens of a streamed split on disk, in the form of an `EncodedSet`.

Sequences are written as they are made and read by the piece, so that neither making them nor training on them holds
them in memory: 24 bytes per sequence (offset, units, source row) are mapped, the lengths are held. A writer that was
killed goes on from its last complete piece.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..errors import DataError, StorageError
from .encoding import Encode, EncodedRow, EncodedSet
from .flatfiles import FlatArray, Writer, locked, mapped, read_notes, stored_bytes
from .streaming import StreamedSplit

FORMAT = 1
PIECE = 4096  # source rows between two points from which a lost writer can go on


def encode_streamed(split: StreamedSplit, encode: Encode, fingerprint: dict[str, Any]) -> EncodedSet:
    """What `encoding.encode_split` makes, from disk to disk; found again where it was made before.

    Args:
        encode, fingerprint: see there.

    Raises:
        DataError: what `encode` raises.
        StorageError: the disk is full or read-only. What was written is removed then.
    """
    chosen = hashlib.sha256(split.examples.chosen.tobytes()).hexdigest()
    named = json.dumps([FORMAT, chosen, fingerprint], sort_keys=True, default=str)
    folder = split.examples.folder.with_name(f"tokens-{hashlib.sha256(named.encode()).hexdigest()}")
    with locked(folder):
        notes = read_notes(folder)
        if notes is None:
            writer = Writer(folder)
            try:
                notes = _write(split, encode, writer)
            except (DataError, StorageError):
                writer.abandon()
                raise
    return _open(folder, notes)


def store_facts(split: Any) -> dict[str, Any]:
    """For run.json: whether the data is streamed, and how many bytes its rows and tokens take on disk."""
    if not isinstance(split, StreamedSplit):
        return {"streaming": False}
    return {"streaming": True, "store_bytes": stored_bytes(split.examples.folder.parent)}


def _write(split: StreamedSplit, encode: Encode, writer: Writer) -> dict[str, Any]:
    state = writer.state or {"done": 0, "tokens": 0, "truncated": 0, "columns": None}
    if writer.state is None:
        for name, content in (("offsets", b"\0" * 8), ("dropped.jsonl", b""), ("input_ids", b"")):
            writer.append(name, content)
        for name in ("units", "rows"):
            writer.append(name, b"")
    while state["done"] < len(split.examples):
        state = _write_piece(split, encode, writer, state)
        writer.commit(state)
    writer.finish(state)
    return state


def _write_piece(split: StreamedSplit, encode: Encode, writer: Writer, state: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the next source rows and add them to the store."""
    rows: list[EncodedRow] = []
    index: list[int] = []
    truncated = state["truncated"]
    end = min(state["done"] + PIECE, len(split.examples))
    for i in range(state["done"], end):
        found = encode(split.examples[i], split.where[i])
        if isinstance(found, str):
            writer.append("dropped.jsonl", json.dumps([i, found]).encode() + b"\n")
            continue
        rows += found
        index += [i] * len(found)
        truncated += any(row.truncated for row in found)
    ends = state["tokens"] + np.cumsum([len(row.input_ids) for row in rows], dtype=np.int64)
    writer.append("offsets", ends)
    writer.append("units", np.array([row.units for row in rows], np.int64))
    writer.append("rows", np.array(index, np.int64))
    writer.append("input_ids", _flat([row.input_ids for row in rows], np.dtype(np.int32)))
    columns = state["columns"]
    if rows:
        columns = _columns(rows) if columns is None else columns
        for name, about in columns.items():
            values = [row.columns[name] for row in rows]
            stored = np.dtype(about["stored"])
            raw = _flat(values, stored) if about["per_token"] else np.asarray(values, stored)
            writer.append(f"column.{name}", raw)
    tokens = int(ends[-1]) if len(ends) else state["tokens"]
    return {"done": end, "tokens": tokens, "truncated": truncated, "columns": columns}


def _columns(rows: list[EncodedRow]) -> dict[str, dict[str, Any]]:
    """Of each column of the first rows: whether it has a value per token, its dtype, and that of its file.

    Whole numbers per token are stored in four bytes; NumPy refuses one that needs more.
    """
    found = {}
    for name in rows[0].columns:
        values = [row.columns[name] for row in rows]
        lengths = [len(row.input_ids) for row in rows]
        per_token = name != "label" and [len(v) if isinstance(v, list) else -1 for v in values] == lengths
        dtype = np.concatenate([np.asarray(v) for v in values]).dtype if per_token else np.asarray(values).dtype
        stored = np.dtype(np.int32) if per_token and dtype == np.int64 else dtype
        width = list(np.asarray(values[0]).shape) if not per_token else []
        found[name] = {"per_token": per_token, "dtype": dtype.str, "stored": stored.str, "width": width}
    return found


def _flat(values: list[list[Any]], dtype: np.dtype[Any]) -> np.ndarray:
    return np.array([item for value in values for item in value], dtype)


def _open(folder: Path, notes: dict[str, Any]) -> EncodedSet:
    columns: dict[str, Any] = {}
    for name, about in (notes["columns"] or {}).items():
        path, stored = folder / f"column.{name}", np.dtype(about["stored"])
        if about["per_token"]:
            columns[name] = FlatArray(path, stored, np.dtype(about["dtype"]))
        else:
            columns[name] = mapped(path, about["stored"]).reshape(-1, *about["width"])
    dropped = [tuple(json.loads(line)) for line in (folder / "dropped.jsonl").read_text().splitlines()]
    return EncodedSet(
        input_ids=cast(np.ndarray, FlatArray(folder / "input_ids", np.dtype(np.int32), np.dtype(np.int32))),
        offsets=mapped(folder / "offsets", "<i8"),
        units=mapped(folder / "units", "<i8"),
        rows=mapped(folder / "rows", "<i8"),
        columns=columns,
        dropped=dropped,
        truncated=notes["truncated"],
    )
