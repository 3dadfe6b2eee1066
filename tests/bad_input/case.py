"""A case of bad input, and ways to prepare one.

The folder of a case holds these configs and their data, and those of the runs that its words name.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny import class_rows

Models = Callable[[str], Path]  # family → folder of a tiny model
Make = Callable[[Path, Models], object]
Change = Callable[[Path], object]

CONFIGS = {  # task, tiny model, data
    "c.yaml": ("text-classification", "bert", "rows.jsonl"),
    "m.yaml": ("causal-lm", "llama", "chats.jsonl"),
    "p.yaml": ("causal-lm", "gpt2", "pairs.jsonl"),
}
RUNS = {  # output: the command that makes it, and its exit code
    "run-c": ("train c.yaml --set output=run-c", 0),
    "run-m": ("train m.yaml --set output=run-m", 0),
    "run-p": ("train p.yaml --set output=run-p", 0),
    "run-head": ("train c.yaml --set output=run-head --set 'adapter={method: head}'", 0),
    "run-paused": ("train c.yaml --set output=run-paused --set budget.max_hours=1e-9", 6),
}


@dataclass(frozen=True)
class Case:
    """A command and what must come of it.

    Attributes:
        words: after `peft-engine`.
        got: what the message must hold of the offending value, row or line.
        fix: what it must hold of the remedy.
        files: written beforehand.
        make: prepares what files alone can't.
        cold: a process from the start, not a fork.
        limits: of `processes.Engine`.
        stdout: where its output goes, instead of being collected.
        written: what is there to be written anew.
    """

    words: str
    code: int
    got: tuple[str, ...]
    fix: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    make: Make | None = None
    cold: bool = False
    limits: dict[str, Any] = field(default_factory=dict)
    stdout: str | None = None
    written: tuple[str, ...] = ()


def lines(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def rows_with(index: int, **changes: object) -> str:
    """Rows of the classification data, one of them changed; `...` takes a key out."""
    rows = [dict(row) for row in class_rows(24)]
    rows[index] = {key: value for key, value in (rows[index] | changes).items() if value is not ...}
    return lines(*rows)


def model(family: str, *changes: Change) -> Make:
    """Copy a tiny model to `model/` and change it there."""

    def make(folder: Path, models: Models) -> None:
        shutil.copytree(models(family), folder / "model")
        for change in changes:
            change(folder / "model")

    return make


def inside(place: str, *changes: Change) -> Make:
    return lambda folder, _: [change(folder / place) for change in changes]


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut_short(name: str) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def edit(name: str, **changes: object) -> Change:
    """Change keys of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))


def template(text: str) -> Change:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def swell(name: str, size: int) -> Change:
    """Add a tensor of `size` zero bytes to a safetensors file."""

    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header, end = json.loads(raw[8:start]), len(raw) - start
        header["unused"] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        head = json.dumps(header).encode()
        (folder / name).write_bytes(len(head).to_bytes(8, "little") + head + raw[start:])
        os.truncate(folder / name, 8 + len(head) + end + size)

    return change
