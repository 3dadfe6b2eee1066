"""Records of cells on disk, checked when read."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import StorageError

SCHEMA = "peft-engine cell 1"


def read_record(path: Path) -> dict[str, Any]:
    """A record that checks.

    Raises:
        StorageError: it can't be read, is no record, or its content is not what was written.
    """
    fix = "Run the same bench again: it makes this cell anew."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} can't be read: {error}.", fix) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise StorageError(f"{path} is no record of a cell ({SCHEMA}).", fix)
    rest = {name: value for name, value in record.items() if name != "sha256"}
    content = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        raise StorageError(f"{path} is damaged: its content does not have the checksum that it names.", fix)
    return record


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
