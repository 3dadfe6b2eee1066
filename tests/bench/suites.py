"""Suites for tests, and what helps to look at their results."""

import json
from pathlib import Path
from typing import Any

import yaml

SUITE: dict[str, Any] = {
    "name": "tiny",
    "title": "Tiny",
    "config": {
        "task": "text-classification",
        "device": "cpu",
        "model": {"path": "model"},
        "data": {"train": "rows.jsonl", "cache": None},
        "training": {"batch_size": 8, "log_every": 1},
    },
    "budget": {"steps": 6},
    "seeds": [0, 1],
    "tuning": {"learning_rates": [1e-4, 1e-3, 1e-2]},
    "methods": {
        "full": {"adapter": {"method": "full"}, "learning_rates": [1e-4]},
        "lora": {"adapter": {"method": "lora", "rank": 2}},
    },
    "minutes": 5,
}


def write_suite(path: Path, **changes: Any) -> Path:
    """`SUITE` with other settings at its first level."""
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


def titles(folder: Path, place: str = "cells") -> list[str]:
    """What stands in a results folder, without rates and keys."""
    return sorted("-".join(path.stem.split("-")[:3]) for path in (folder / place).glob("*.json"))


def content(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "cells").glob("*.json"))}
