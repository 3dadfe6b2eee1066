"""Records of cells on disk: written whole, checked when read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..run_directory import plain, storage_errors, write_whole
from .cells import SCHEMA, canonical

PARTS = ("key", "run_info", "train_info", "meta_info")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record with its checksum; a reader never sees half of it. Numbers that are not finite become null."""
    record = {"schema": SCHEMA} | json.loads(json.dumps(plain(record)))  # as it will be read
    record.pop("sha256", None)
    record["sha256"] = hashlib.sha256(canonical(record)).hexdigest()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record, ensure_ascii=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record that checks.

    Raises:
        StorageError: it can't be read, is no record, or its content is not what was written.
    """
    fix = "Run the same bench again: it makes this cell anew."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        written = record.pop("sha256", None) if isinstance(record, dict) else None
        found = hashlib.sha256(canonical(record)).hexdigest()
    except (OSError, ValueError, RecursionError) as error:  # also what no record can hold: NaN, half a character
        raise StorageError(f"{path} can't be read: {error}.", fix) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise StorageError(f"{path} is no record of a cell ({SCHEMA}).", fix)
    if found != written:
        raise StorageError(f"{path} is damaged: its content does not have the checksum that it names.", fix)
    if missing := [name for name in PARTS if name not in record]:
        raise StorageError(f"{path} lacks {', '.join(missing)}.", fix)
    return {**record, "sha256": written}


def read_records(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All records of a results folder.

    Returns:
        The good ones and the faults of the others, by file name without its ending. None of the latter is to be used.
    """
    good, bad = {}, {}
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            good[path.stem] = read_record(path)
        except StorageError as error:
            bad[path.stem] = error.problem
    return good, bad
