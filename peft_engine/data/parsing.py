"""From the bytes of a data file to its rows, one function per format.

Each parser returns the rows and, where the format has lines, the 1-based line on which each row begins. Nothing is
skipped but blank lines; whatever can't be read is a DataError that names the line. Where the caller gives a list for
faults, a row that can't be read is written there and left out; what is wrong with a whole file is still an error.
"""

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

from ..errors import DataError

Row = dict[str, Any]
Parsed = tuple[list[Row], list[int] | None]
Faults = list[tuple[str, str]]
"""Rows that were left out: where each stands, and what is wrong with it."""
CSV_FIELD_LIMIT = 2**31 - 1  # characters; Python's own limit of 131,072 is less than a long document
HALF_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LIST_IN_LINES = "One JSON object per line. A JSON list belongs in a .json file."


def decode(source: str, raw: bytes) -> str:
    """UTF-8 text, without the byte order mark. Raises DataError with line and byte offset."""
    mark = 3 if raw.startswith(b"\xef\xbb\xbf") else 0
    try:
        return raw[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        line = raw.count(b"\n", 0, offset) + 1
        encoding = "UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{source}, line {line}: not UTF-8 (byte 0x{raw[offset]:02x} at offset {offset}).",
            f"Convert it from the encoding it has, for example: iconv -f {encoding} -t UTF-8 {source} > utf8-copy",
        ) from error


def parse_delimited(source: str, text: str, delimiter: str, faults: Faults | None = None) -> Parsed:
    """CSV or TSV with a header; cells stay strings, an empty cell is "".

    With `faults`, reading goes on behind the line on which a row that can't be read begins.
    """
    physical = list(io.StringIO(text, newline=""))
    header: list[str] = []
    rows: list[Row] = []
    lines: list[int] = []
    limit_before = csv.field_size_limit(CSV_FIELD_LIMIT)
    start = 0  # physical lines before those that the reader was given
    line = 1
    try:
        while True:
            reader = csv.reader(iter(physical[start:]), delimiter=delimiter, strict=True)
            try:
                for cells in reader:
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
                    rows.append(dict(zip(header, cells, strict=True)))
                    lines.append(begins)
                break
            except csv.Error as error:
                problem = f"the row that begins here can't be read: {error}"
                fix = 'A cell that begins with " must end with one, and every " within it is doubled.'
                _fault(faults if header else None, f"{source}, line {line}", problem, fix, error)
                start, line = line, line + 1
    finally:
        csv.field_size_limit(limit_before)
    return rows, lines


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
    rows: list[Row] = []
    lines: list[int] = []
    raw_lines = text.split("\n")  # not splitlines(): U+2028 may stand inside a JSON string
    for number, line in enumerate(raw_lines, start=1):
        line = line.strip()
        if not line:
            continue
        where = f"{source}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problem, fix = f"not valid JSON ({error}): {start_of(line)}", LIST_IN_LINES
            last = not any(rest.strip() for rest in raw_lines[number:])
            if last and (number == len(raw_lines) or not line.endswith("}")):
                problem = f"this last line breaks off: {start_of(line)}; the file looks truncated"
                fix = "Copy or download it again, or remove the broken line."
            _fault(faults, where, problem, fix, error)
            continue
        if not isinstance(row, dict):
            _fault(faults, where, f"not a JSON object: {start_of(line)}", LIST_IN_LINES)
            continue
        if HALF_SURROGATE.search(line) and not _surrogates_paired(where, row, faults):
            continue
        rows.append(without_nulls(row, deep=False))
        lines.append(number)
    return rows, lines


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
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), start=1)]
    kept = [(number, line) for number, line in numbered if line.strip()]
    return [{"text": line} for _, line in kept], [number for number, _ in kept]


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
    import pyarrow.parquet

    buffer = pa.BufferReader(raw)
    try:
        if suffix == ".parquet":
            table = pa.parquet.ParquetFile(buffer).read()
        elif raw.startswith(b"ARROW1"):
            table = pa.ipc.open_file(buffer).read_all()
        else:
            table = pa.ipc.open_stream(buffer).read_all()
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        problem = f"{source} can't be read as {suffix[1:]}: {start_of(str(error), 200)}."
        raise DataError(problem, "Copy or download it again.") from error
    return [without_nulls(row, deep=True) for row in rows], None


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


def shown(value: Any, most: int = 60) -> str:
    """The beginning of a value as Python writes it, for a message."""
    text = repr(value)
    return text if len(text) <= most else text[:most] + "…"


def start_of(text: str, most: int = 60) -> str:
    """The quoted beginning of a text, for a message."""
    text = " ".join(text[: most * 2].split())
    return repr(text if len(text) <= most else text[:most] + "…")
