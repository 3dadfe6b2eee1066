"""From the bytes of a data file to its rows, one function per format.

Each parser returns the rows and, where the format has lines, the 1-based line on which each row begins. Nothing is
skipped but blank lines; whatever can't be read is a DataError that names the line. Where the caller gives a list for
faults, a row that can't be read is written there and left out; what is wrong with a whole file is still an error. The
functions `…_rows` are the same row by row, so that neither the file nor its rows need fit into memory.
"""

import contextlib
import csv
import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import DataError
from .class_names import names_in_schema, with_names

Row = dict[str, Any]
Parsed = tuple[list[Row], list[int] | None]
Numbered = Iterator[tuple[Row, int]]
"""Rows, each with the 1-based line on which it begins."""
Faults = list[tuple[str, str]]
"""Rows that were left out: where each stands, and what is wrong with it."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BATCH_ROWS = 1024  # rows of a columnar file that become Python objects at once
CSV_FIELD_LIMIT = 2**31 - 1  # characters; Python's own limit of 131,072 is less than a long document
HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LIST_IN_LINES = "One JSON object per line. A JSON list belongs in a .json file."


def decode(source: str, raw: bytes) -> str:
    """UTF-8 text, without the byte order mark. Raises DataError with line and byte offset."""
    mark = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        raise _not_utf8(source, raw[:2], raw.count(b"\n", 0, offset) + 1, offset, raw[offset]) from error


def decoded_lines(source: str, raw_lines: Iterable[bytes]) -> Iterator[str]:
    """What `decode` gives, line by line; each line keeps its end. Raises DataError with line and byte offset."""
    begins, first = 0, b""
    for number, raw in enumerate(raw_lines, start=1):
        first = first or raw[:2]
        mark = len(BYTE_ORDER_MARK) if number == 1 and raw.startswith(BYTE_ORDER_MARK) else 0
        try:
            yield raw[mark:].decode("utf-8")
        except UnicodeDecodeError as error:
            at = mark + error.start
            raise _not_utf8(source, first, number, begins + at, raw[at]) from error
        begins += len(raw)


def _not_utf8(source: str, first: bytes, line: int, offset: int, byte: int) -> DataError:
    encoding = "UTF-16" if first in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
    return DataError(
        f"{source}, line {line}: not UTF-8 (byte 0x{byte:02x} at offset {offset}).",
        f"Convert it from the encoding it has, for example: iconv -f {encoding} -t UTF-8 {source} > utf8-copy",
    )


def parse_delimited(source: str, text: str, delimiter: str, faults: Faults | None = None) -> Parsed:
    """CSV or TSV with a header; cells stay strings, an empty cell is "".

    With `faults`, reading goes on behind the line on which a row that can't be read begins.
    """
    return _unzipped(delimited_rows(source, io.StringIO(text, newline=""), delimiter, faults))


def _unzipped(numbered: Numbered) -> tuple[list[Row], list[int]]:
    rows: list[Row] = []
    lines: list[int] = []
    for row, line in numbered:
        rows.append(row)
        lines.append(line)
    return rows, lines


def delimited_rows(source: str, lines: Iterable[str], delimiter: str, faults: Faults | None = None) -> Numbered:
    """Rows of CSV or TSV, from lines that keep their ends."""
    pieces = (piece for line in lines for piece in _at_returns(line))
    taken: list[str] = []  # lines of the row being read, kept where reading may go on behind the first of them
    again: deque[str] = deque()  # lines to be read once more

    def handed_out() -> Iterator[str]:
        while (piece := again.popleft() if again else next(pieces, None)) is not None:
            if faults is not None:
                taken.append(piece)
            yield piece

    header: list[str] = []
    limit_before = csv.field_size_limit(CSV_FIELD_LIMIT)
    start = 0  # physical lines before those that the reader was given
    line = 1
    try:
        while True:
            reader = csv.reader(handed_out(), delimiter=delimiter, strict=True)
            try:
                for cells in reader:
                    taken.clear()
                    begins, line = line, start + reader.line_num + 1
                    if not cells:
                        continue
                    if not header:
                        header = _header(f"{source}, line {begins}", cells, delimiter)
                        continue
                    if len(cells) != len(header):
                        problem = f"{len(cells)} cells where the header has {len(header)}"
                        fix = "Quote cells that hold the delimiter or a line break."
                        _fault(faults, f"{source}, line {begins}", problem, fix)
                        continue
                    yield dict(zip(header, cells, strict=True)), begins
                break
            except csv.Error as error:
                problem = f"the row that begins here can't be read: {error}"
                fix = 'A cell that begins with " must end with one, and every " within it is doubled.'
                _fault(faults if header else None, f"{source}, line {line}", problem, fix, error)
                again.extendleft(reversed(taken[1:]))
                taken.clear()
                start, line = line, line + 1
    finally:
        csv.field_size_limit(limit_before)


def _at_returns(line: str) -> Iterable[str]:
    """The line, cut after each carriage return that stands alone: old Macs end lines so, and csv counts them."""
    return io.StringIO(line, newline="") if "\r" in line else (line,)


def _fault(faults: Faults | None, where: str, problem: str, fix: str, cause: Exception | None = None) -> None:
    """Write a row's fault down, or raise it where nobody collects them."""
    if faults is None:
        raise DataError(f"{where}: {problem}.", fix) from cause
    faults.append((where, problem))


def _header(where: str, cells: list[str], delimiter: str) -> list[str]:
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{where}: the header names {repeated} more than once.", "Give each column a name of its own.")
    other = next((mark for mark in (";", "\t", "|", ",") if mark != delimiter and mark in cells[0]), None)
    if len(cells) == 1 and other:
        raise DataError(
            f"{where}: one column, {cells[0]!r}, that looks separated by {other!r}; {delimiter!r} was expected.",
            "Convert it (tab-separated files are named .tsv).",
        )
    return cells


def parse_json_lines(source: str, text: str, faults: Faults | None = None) -> Parsed:
    """One JSON object per line."""
    lines = text.split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    return _unzipped(json_rows(source, lines, faults))


def json_rows(source: str, lines: Iterable[str], faults: Faults | None = None) -> Numbered:
    """Rows of JSON objects, from lines without their ends; a file that ends with a line end gives "" last."""
    broken: tuple[int, str, Exception] | None = None  # a line of which is not yet known whether it is the last
    number = 0
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if not line:
            continue
        if broken:
            _broken_line(source, *broken, False, faults)
            broken = None
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            broken = number, line, error
            continue
        if not isinstance(row, dict):
            _fault(faults, where, f"not a JSON object: {start_of(line)}", LIST_IN_LINES)
        elif not HALF_SURROGATE.search(line) or _surrogates_paired(where, row, faults):
            yield without_nulls(row, deep=False), number
    if broken:
        cut = broken[0] == number or not broken[1].endswith("}")
        _broken_line(source, *broken, cut, faults)


def _broken_line(source: str, number: int, line: str, error: Exception, cut: bool, faults: Faults | None) -> None:
    problem, fix = f"not valid JSON ({error}): {start_of(line)}", LIST_IN_LINES
    if cut:
        problem = f"this last line breaks off: {start_of(line)}; the file looks truncated"
        fix = "Copy or download it again, or remove the broken line."
    _fault(faults, f"{source}, line {number}", problem, fix, error)


def parse_json(source: str, text: str, faults: Faults | None = None) -> Parsed:
    """A JSON list of objects, or {"data": that list}. Rows have numbers for lines where some are left out."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "A list of objects was expected."
        if isinstance(error, json.JSONDecodeError):
            if error.msg == "Extra data":
                fix = "A file with one object per line is named .jsonl."
            elif error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
                fix = "The file looks truncated: copy or download it again."
        raise DataError(f"{source}: not valid JSON ({error}).", fix) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if not isinstance(document, list):
        raise DataError(
            f"{source}: the JSON is {start_of(text)}; a list of objects was expected.",
            'Take the form [{…}, …] or {"data": [{…}, …]}; a file with one object per line is named .jsonl.',
        )
    suspect = HALF_SURROGATE.search(text) is not None
    rows: list[Row] = []
    numbers: list[int] = []
    for number, row in enumerate(document, start=1):
        where = f"{source}, row {number}"
        if not isinstance(row, dict):
            _fault(faults, where, f"not an object: {shown(row)}", "Each row is a JSON object.")
        elif not suspect or _surrogates_paired(where, row, faults):
            rows.append(without_nulls(row, deep=False))
            numbers.append(number)
    return rows, numbers if faults else None


def _surrogates_paired(where: str, row: Row, faults: Faults | None) -> bool:
    """False for half of a surrogate pair (an emoji cut in two): no tokenizer takes it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        problem = f"half of a surrogate pair, {half} (an emoji cut in two)"
        _fault(faults, where, problem, "Remove it where the file is made.", error)
        return False
    return True


def parse_text(source: str, text: str, faults: Faults | None = None) -> Parsed:
    """One document per line, as {"text": line}. There is nothing that can't be read."""
    return _unzipped(text_rows(source, text.split("\n")))


def text_rows(source: str, lines: Iterable[str]) -> Numbered:
    """Rows of plain text, from lines without their ends."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield {"text": line.removesuffix("\r")}, number


TEXT_PARSERS: dict[str, Callable[[str, str, Faults | None], Parsed]] = {
    ".csv": lambda source, text, faults: parse_delimited(source, text, ",", faults),
    ".tsv": lambda source, text, faults: parse_delimited(source, text, "\t", faults),
    ".jsonl": parse_json_lines,
    ".ndjson": parse_json_lines,
    ".json": parse_json,
    ".txt": parse_text,
}


def parse_columnar(source: str, suffix: str, raw: bytes) -> Parsed:
    """Parquet, or Arrow as an IPC file or stream."""
    import pyarrow as pa

    return list(columnar_rows(source, suffix, pa.BufferReader(raw))), None


def columnar_rows(source: str, suffix: str, file: Any) -> Iterator[Row]:
    """Rows of Parquet or Arrow, some at a time; classes by their names, where the file tells them.

    Args:
        file: an open pyarrow file.
    """
    with _columnar_errors(source, suffix):
        schema, batches = _opened(suffix, file)
        names = names_in_schema(schema)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(start, BATCH_ROWS).to_pylist()
                yield from (with_names(without_nulls(row, deep=True), names) for row in rows)


def columnar_names(source: str, suffix: str, file: Any) -> dict[str, list[str]]:
    """Names of classes by column, as `columnar_rows` puts them into the rows."""
    with _columnar_errors(source, suffix):
        return names_in_schema(_opened(suffix, file)[0])


def _opened(suffix: str, file: Any) -> tuple[Any, Iterable[Any]]:
    """The schema, and the record batches one after another."""
    import pyarrow as pa
    import pyarrow.parquet

    if suffix == ".parquet":
        table = pa.parquet.ParquetFile(file)
        return table.schema_arrow, table.iter_batches(BATCH_ROWS)
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        opened = pa.ipc.open_file(file)
        return opened.schema, (opened.get_batch(i) for i in range(opened.num_record_batches))
    stream = pa.ipc.open_stream(file)
    return stream.schema, stream


@contextlib.contextmanager
def _columnar_errors(source: str, suffix: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"{source} can't be read as {suffix[1:]}: {start_of(str(error), 200)}."
        raise DataError(problem, "Copy or download it again.") from error


def without_nulls(row: Row, *, deep: bool) -> Row:
    """The row without None-valued keys in the dicts that stand in its lists (chat messages, tools).

    Args:
        deep: at all depths. Columnar files fill the keys that a message doesn't have with null; in JSON a null further
            down, such as in a tool call's arguments, was written by somebody and stays.
    """
    return {key: _pruned(value, deep, 0) if isinstance(value, list) else value for key, value in row.items()}


def _pruned(value: Any, deep: bool, depth: int) -> Any:
    if isinstance(value, list) and (deep or depth == 0):
        return [_pruned(item, deep, depth + 1) for item in value]
    if isinstance(value, dict) and (deep or depth == 1):
        return {key: _pruned(item, deep, depth + 1) for key, item in value.items() if item is not None}
    return value


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, NaN, or a blank text."""
    return (
        value is None or (isinstance(value, float) and value != value) or (isinstance(value, str) and not value.strip())
    )


def shown(value: Any, most: int = 60) -> str:
    """The beginning of a value as Python writes it, for a message."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"


def start_of(text: str, most: int = 60) -> str:
    """The quoted beginning of a text, for a message."""
    text = " ".join(text[: most * 2].split())
    return repr(text if len(text) <= most else text[:most] + "…")
