"""The rows of a file, one after another, for data that memory doesn't hold: what `reading` does, row by row.

A fault has the message that `reading` gives it. Only the first fault of a file is met, where `reading` may meet one
further down first (it decodes the whole file before it parses any of it).
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from ..errors import ConfigError, DataError
from .parsing import Row, columnar_names, columnar_rows, decoded_lines, delimited_rows, json_rows, text_rows
from .reading import arrow_folder, file_errors, known_suffix, local_path, refuse_folder, undecompressed

PIECE = 2**20  # bytes read at once


class RowStream:
    """A local file or a folder of Arrow files. Every iteration reads it anew from its beginning.

    Args:
        source: as the user gave it.

    Raises:
        ConfigError: it is not there, or can't be read row by row (a hub data set, a JSON document).
        DataError: it is empty.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        path = local_path(source)
        if path is None:
            raise ConfigError(
                f"data.streaming reads files, and {source} is not there: it would be a hub data set.",
                "Save it with datasets' save_to_disk and name that folder, or set data.streaming: false.",
            )
        parts = arrow_folder(source, path)
        if parts is None:
            refuse_folder(source, path)
        self.parts = [path] if parts is None else parts
        with file_errors(source, path):
            empty = not sum(os.path.getsize(part) for part in self.parts)
        self.suffix = ".arrow" if parts is not None else known_suffix(source, path)
        if self.suffix.removesuffix(".gz") == ".json":
            raise ConfigError(
                f"data.streaming: {source} is one JSON document, which has to be read whole.",
                "Convert it to .jsonl (one object per line), or set data.streaming: false.",
            )
        if empty:
            raise DataError(f"{source} is empty (0 bytes).", "Give a file that holds rows.")

    @property
    def has_lines(self) -> bool:
        """Whether the numbers that rows come with are lines, else the rows are counted."""
        return self.suffix not in (".parquet", ".arrow")

    def where(self, number: int) -> str:
        """Where the row of this number stands: "train.jsonl, line 7" or "train.parquet, row 8"."""
        return f"{self.source}, {'line' if self.has_lines else 'row'} {number}"

    @property
    def class_names(self) -> dict[str, list[str]]:
        """By column, names that stand in the rows for the numbers of the file."""
        import pyarrow as pa

        if self.has_lines:
            return {}
        with file_errors(self.source, self.parts[0]), pa.OSFile(str(self.parts[0])) as file:
            return columnar_names(self.source, self.suffix, file)

    def digest(self) -> str:
        """sha256 of the bytes and of the format."""
        digest = hashlib.sha256(self.suffix.encode())
        for part in self.parts:
            with file_errors(self.source, part), part.open("rb") as file:
                while piece := file.read(PIECE):
                    digest.update(piece)
        return digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[Row, int]]:
        """Rows, each with its 1-based line, or its 1-based number in a file without lines.

        Raises:
            DataError: what can't be read; the message names the line.
            StorageError: the operating system refuses to read on.
        """
        return self._lines() if self.has_lines else self._columnar()

    def _columnar(self) -> Iterator[tuple[Row, int]]:
        import pyarrow as pa

        number = 0
        for part in self.parts:
            with file_errors(self.source, part), pa.OSFile(str(part)) as file:
                for row in columnar_rows(self.source, self.suffix, file):
                    number += 1
                    yield row, number

    def _lines(self) -> Iterator[tuple[Row, int]]:
        (path,) = self.parts
        suffix = self.suffix.removesuffix(".gz")
        with file_errors(self.source, path), path.open("rb") as file:
            lines = decoded_lines(self.source, self._raw_lines(file))
            if suffix in (".csv", ".tsv"):
                yield from delimited_rows(self.source, lines, "," if suffix == ".csv" else "\t")
            elif suffix == ".txt":
                yield from text_rows(self.source, _without_ends(lines))
            else:
                yield from json_rows(self.source, _without_ends(lines))

    def _raw_lines(self, file: IO[bytes]) -> Iterator[bytes]:
        if not self.suffix.endswith(".gz"):
            yield from file
            return
        try:
            yield from gzip.GzipFile(fileobj=file)
        except (OSError, EOFError, zlib.error) as error:
            raise undecompressed(self.source, error) from error


def _without_ends(lines: Iterable[str]) -> Iterator[str]:
    """Lines as `text.split("\\n")` gives them."""
    ended = True
    for line in lines:
        ended = line.endswith("\n")
        yield line.removesuffix("\n")
    if ended:
        yield ""
