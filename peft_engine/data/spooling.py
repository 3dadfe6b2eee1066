"""One pass over a file: its rows checked, as examples on disk, and 8 bytes per row of everything that compares rows.

The hashes (of the input, of input and answer, of the input without case and punctuation, of the label) are what
duplicates, leakage and contradictions are found by: 32 bytes per row instead of its text. Two different texts share a
hash with a probability of n²/2⁶⁵ among n rows, 3e-8 for a million.
"""

import hashlib
import inspect
import json
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..config import Config
from ..errors import DataError, EngineError
from . import class_names, duplicates, examples, flatfiles, formats, labels, parsing, rowstream, text_layouts
from . import messages as chat_shape
from .duplicates import input_key, label_key, near_key, row_key
from .examples import refused_rows, to_example
from .flatfiles import Writer, locked, mapped, read_exactly, read_notes
from .formats import Example, Layout, find_layout, first_value, told_by_value
from .labels import as_list
from .messages import Malformed
from .parsing import Row
from .reading import Rows
from .rowstream import RowStream

PIECE = 1024  # rows that are written at once
FIRST_ROWS = 1000  # rows that tell the columns, unless later ones bring more
MOST_VALUES = 20_000  # different labels that are remembered one by one
HASHES = ("inputs", "rows", "near", "labels")


class StoredExamples(Sequence[Example]):
    """Examples that lie on disk, read one by one.

    Args:
        folder: of the store.
        chosen: int64 (examples,), which of its rows.
    """

    def __init__(self, folder: Path, chosen: np.ndarray) -> None:
        self.folder, self.chosen = folder, chosen
        self._ends = mapped(folder / "ends", "<i8")
        self._file = os.open(folder / "examples.jsonl", os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example: Example = json.loads(self.line(index))
        return example

    def line(self, index: int) -> bytes:
        """An example as sorted JSON with its line end."""
        row = int(self.chosen[index])
        begins = int(self._ends[row - 1]) if row else 0
        return read_exactly(self._file, begins, int(self._ends[row]) - begins)


class Places(Sequence[str]):
    """Where rows stand, in words, made when they are asked for."""

    def __init__(self, stream: RowStream, numbers: np.ndarray, chosen: np.ndarray) -> None:
        self.stream, self.numbers, self.chosen = stream, numbers, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.stream.where(int(self.numbers[self.chosen[index]]))


@dataclass(frozen=True)
class Spool:
    """All rows of a file as examples on disk.

    Attributes:
        values: rows that show every label there is, in order; see `LabelValues`.
    """

    folder: Path
    stream: RowStream
    layout: Layout
    rows: int
    values: list[int]

    def examples(self, chosen: np.ndarray) -> StoredExamples:
        """Those of the rows `chosen`, int64."""
        return StoredExamples(self.folder, chosen)

    def places(self, chosen: np.ndarray) -> Places:
        """Where the rows `chosen` stand."""
        return Places(self.stream, mapped(self.folder / "numbers", "<i8"), chosen)

    def hashes(self, name: str) -> np.ndarray:
        """One of `HASHES` of every row, uint64 (rows,)."""
        return mapped(self.folder / name, "<u8")


def hashed(text: str) -> bytes:
    """8 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def hashes_of(example: Example) -> tuple[bytes, bytes, bytes, bytes]:
    """One for each of `HASHES`."""
    key = input_key(example)
    return hashed(key), hashed(row_key(example)), hashed(near_key(key)), hashed(label_key(example))


def spool(config: Config, place: Path) -> Spool:
    """The rows of `data.train` on disk: as an earlier pass left them, else from one pass over the file.

    Raises:
        ConfigError, DataError, StorageError: as `reading.read_rows` and `examples.to_examples` do; also StorageError
            where the disk is full. What was written is removed then.
    """
    assert isinstance(config.data.train, str)
    stream = RowStream(config.data.train)
    columns: dict[str, str] = dict(config.data.columns.items())
    named = json.dumps([_code(), stream.digest(), config.task, columns], sort_keys=True)
    folder = place / "streamed" / hashlib.sha256(named.encode()).hexdigest() / "rows"
    with locked(folder):
        notes = read_notes(folder)
        if notes is None:
            layout = _layout(stream, config.task, columns)
            writer = Writer(folder)
            try:
                while True:
                    found = _pass(stream, layout, writer)
                    complete = find_layout(_sample(stream, found.columns, config.task), config.task, columns)
                    if complete == layout:
                        break
                    layout = complete  # a column further down changed what the rows mean
                    writer.abandon()
                    writer = Writer(folder)
                if found.fault:
                    raise refused_rows(*found.fault, found.faults)
                notes = {"kind": layout.kind, "columns": layout.columns, "rows": found.rows, "values": found.values}
                writer.finish(notes)
            except BaseException:
                writer.abandon()
                raise
    layout = Layout(notes["kind"], notes["columns"], folder=os.path.dirname(os.path.expanduser(stream.source)))
    return Spool(folder, stream, layout, notes["rows"], notes["values"])


@cache
def _code() -> str:
    """sha256 of the code that decides what a store holds: one that another version wrote is not read."""
    data = (class_names, duplicates, examples, flatfiles, formats, labels, parsing, rowstream, text_layouts)
    modules = (chat_shape, *data)
    text = "".join(inspect.getsource(module) for module in modules) + inspect.getsource(_Pieces)
    return hashlib.sha256(text.encode()).hexdigest()


def _layout(stream: RowStream, task: str, columns: dict[str, str]) -> Layout:
    """By the first rows if these tell it, else by all."""
    if next(iter(stream), None) is None:
        raise DataError(f"{stream.source} holds no rows.", "Give a file or split that holds some.")
    try:
        return find_layout(_sample(stream, _columns(islice(stream, FIRST_ROWS)), task), task, columns)
    except EngineError:
        return find_layout(_sample(stream, _columns(stream), task), task, columns)


def _columns(rows: Iterable[tuple[Row, int]]) -> list[str]:
    return list(dict.fromkeys(key for row, _ in rows for key in row))


def _sample(stream: RowStream, columns: Sequence[str], task: str) -> Rows:
    """The first row, with the columns of all: as much of the rows as their layout is told by."""
    first, _ = next(iter(stream))
    values = {column: first_value((row for row, _ in stream), column) for column in told_by_value(task, columns)}
    return Rows(stream.source, [dict.fromkeys(columns) | first | values])


@dataclass
class _Found:
    """What a pass saw: the columns of all rows, the rows written, the first row that can't be used and their number."""

    columns: list[str]
    rows: int
    values: list[int]
    fault: tuple[str, Malformed] | None
    faults: int


def _pass(stream: RowStream, layout: Layout, writer: Writer) -> _Found:
    seen: dict[str, None] = {}
    fault, faults, rows = None, 0, 0
    values, pieces = LabelValues(), _Pieces(writer)
    for row, number in stream:
        seen.update(dict.fromkeys(row))
        try:
            example = to_example(row, layout)
        except Malformed as error:
            fault, faults = fault or (stream.where(number), error), faults + 1
            continue
        if not faults:
            pieces.add(example, number, stream)
            values.note(rows, example)
            rows += 1
    pieces.flush()
    return _Found(list(seen), rows, values.rows, fault, faults)


class _Pieces:
    """Rows on their way to disk."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.end = 0
        self.lines: list[bytes] = []
        self.ends: list[int] = []
        self.numbers: list[int] = []
        self.hashes: list[tuple[bytes, ...]] = []

    def add(self, example: Example, number: int, stream: RowStream) -> None:
        try:
            line = json.dumps(example, sort_keys=True).encode() + b"\n"
        except TypeError as error:
            raise DataError(
                f"{stream.where(number)}: {error}, so that streaming can't keep the row.",
                "Write it as a string or number, or set data.streaming: false.",
            ) from error
        self.end += len(line)
        self.lines.append(line)
        self.ends.append(self.end)
        self.numbers.append(number)
        self.hashes.append(hashes_of(example))
        if len(self.lines) == PIECE:
            self.flush()

    def flush(self) -> None:
        self.writer.append("examples.jsonl", b"".join(self.lines))
        self.writer.append("ends", np.array(self.ends, "<i8"))
        self.writer.append("numbers", np.array(self.numbers, "<i8"))
        for name, column in zip(HASHES, zip(*self.hashes, strict=True), strict=False):
            self.writer.append(name, b"".join(column))
        for held in (self.lines, self.ends, self.numbers, self.hashes):
            held.clear()


class LabelValues:
    """Rows that show every different label: the first row of each.

    After 20,000 different values a row is kept only if it shows a class or a type of value that no row has shown: of a
    million different numbers these tell as much about the labels as all of them.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._seen: set[str] = set()
        self._kinds: set[str] = set()

    def note(self, row: int, example: Example) -> None:
        if "label" not in example:
            return
        key, items = label_key(example), as_list(example["label"])
        if key in self._seen:
            return
        kinds = {_kind(example["label"])} if items is None else {"list", *(f"item {item!r}" for item in items)}
        if len(self._seen) < MOST_VALUES:
            self._seen.add(key)
        elif kinds <= self._kinds:
            return
        self._kinds |= kinds
        self.rows.append(row)


def _kind(value: Any) -> str:
    """What of a label decides how it is understood, apart from its name."""
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return "text"
    if not isinstance(number, int | float):
        return type(value).__name__
    finite = abs(number) < float("inf")
    return f"{type(value).__name__} {finite} {finite and number == int(number)}"
