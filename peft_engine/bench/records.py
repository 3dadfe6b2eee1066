"""Records of cells: one JSON file each, with its own checksum."""

import hashlib
import json
from pathlib import Path
from typing import Any

SCHEMA = "peft-engine cell 1"


def digest(record: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a record without its own `sha256`."""
    content = {name: value for name, value in record.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fault_of(path: Path) -> str | None:
    """Why a record's file can't be trusted; None where it can."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"can't be read ({type(error).__name__})"
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return f"is not a record of schema {SCHEMA!r}"
    return None if record.get("sha256") == digest(record) else "doesn't match its checksum"


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Records under folder/cells that check, by file name. Those that don't: `faulty`."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in _files(folder) if fault_of(path) is None]


def faulty(folder: Path) -> dict[str, str]:
    """File name → reason, of the records under folder/cells that don't check."""
    found = {path.name: fault_of(path) for path in _files(folder)}
    return {name: reason for name, reason in found.items() if reason is not None}


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "cells").glob("*.json"))
