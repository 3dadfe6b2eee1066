"""Find a file or a hub data set and read it into rows, each of which knows where it stands.

Rows are held in memory as plain dicts. What isn't there is a ConfigError, what holds something faulty a DataError, what
the system won't let us read a StorageError.
"""

import contextlib
import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, DataError, StorageError
from .class_names import names_in_features, with_names
from .parsing import TEXT_PARSERS, Faults, Row, columnar_names, decode, parse_columnar, without_nulls

SUFFIXES = (*TEXT_PARSERS, ".parquet", ".arrow", *(suffix + ".gz" for suffix in TEXT_PARSERS))


@dataclass(frozen=True)
class Rows:
    """Rows of one source, in order."""

    source: str
    """File path or hub name, as the user gave it."""
    rows: list[Row]
    lines: list[int] | None = None
    """1-based line on which each row begins, for files that have lines."""
    skipped: Faults = field(default_factory=list)
    """Rows that can't be read and were left out: where each stands, and what is wrong with it."""
    unit: str = "line"
    """What `lines` counts: "row" in a JSON list of which rows were left out."""
    places: list[str] | None = None
    """Where each row stands in full, for sources whose rows are files."""
    class_names: dict[str, list[str]] = field(default_factory=dict)
    """By column, names that stand in the rows for the numbers of the source."""

    def where(self, i: int) -> str:
        """Where row `i` (from 0) stands, in words: "train.jsonl, line 7" or "train.parquet, row 8"."""
        if self.places is not None:
            return self.places[i]
        return f"{self.source}, row {i + 1}" if self.lines is None else f"{self.source}, {self.unit} {self.lines[i]}"

    @property
    def columns(self) -> list[str]:
        """All keys, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def read_rows(
    source: str, *, subset: str | None = None, default_split: str = "train", skip_malformed: bool = False
) -> Rows:
    """Rows of a local file, or of a hub data set given as `name` or `name:split`.

    Args:
        source: what ends like a data file, begins with `.`, `/` or `~`, or exists is a file; all else is a hub name.
        subset: configuration name of a hub data set.
        default_split: split of a hub data set whose name has none.
        skip_malformed: leave out rows of a text format that can't be read, and list them; else they are an error.

    Raises:
        ConfigError: there is no such file or hub data set, or its format is not known.
        DataError: the content can't be read, or there is none.
        StorageError: the operating system refuses to read it.
    """
    path = local_path(source)
    if path is not None:
        if subset:
            raise ConfigError(
                f"data.subset: {subset!r} is for hub data sets, and {source} is a file.", "Remove data.subset."
            )
        rows = _read_file(source, path, skip_malformed)
    else:
        rows = _read_hub(source, subset, default_split)
    if not rows.rows:
        if rows.skipped:
            where, problem = rows.skipped[0]
            raise DataError(f"No row of {source} can be read ({where}: {problem}).", "Check the format of the file.")
        raise DataError(f"{source} holds no rows.", "Give a file or split that holds some.")
    return rows


def local_path(source: str) -> Path | None:
    """The file or folder that `source` names; None where it is a hub name."""
    path = Path(source).expanduser() if source.startswith("~/") else Path(source)
    is_local = suffix_of(path.name) or source.startswith((".", "/", "~")) or path.is_absolute() or os.path.exists(path)
    return path if is_local else None


def suffix_of(name: str) -> str:
    """The known suffix that a file name ends with, or ""."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def _read_file(source: str, path: Path, skip_malformed: bool) -> Rows:
    if (parts := arrow_folder(source, path)) is not None:
        found = [_columnar(source, ".arrow", _read_bytes(str(part), part)) for part in parts]
        names = found[0].class_names if found else {}
        return Rows(source, [row for part in found for row in part.rows], class_names=names)
    raw = _read_bytes(source, path)
    suffix = known_suffix(source, path)
    if not raw:
        raise DataError(f"{source} is empty (0 bytes).", "Give a file that holds rows.")
    if suffix in (".parquet", ".arrow"):
        return _columnar(source, suffix, raw)
    if suffix.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise undecompressed(source, error) from error
    kind, faults = suffix.removesuffix(".gz"), Faults()
    rows, lines = TEXT_PARSERS[kind](source, decode(source, raw), faults if skip_malformed else None)
    return Rows(source, rows, lines, faults, "row" if kind == ".json" else "line")


def undecompressed(source: str, error: Exception) -> DataError:
    """What is told of a damaged .gz file."""
    return DataError(f"{source} can't be decompressed: {error}.", "Copy or download it again.")


def _read_bytes(source: str, path: Path) -> bytes:
    refuse_folder(source, path)
    with file_errors(source, path):
        return path.read_bytes()


def refuse_folder(source: str, path: Path) -> None:
    """Raise ConfigError where a folder stands in the place of a file."""
    if os.path.isdir(path):  # Path.is_dir() raises where the folder may not be entered
        names = _data_files(path)
        held = f"It holds {', '.join(names)}" if names else f"Files are taken that end in {', '.join(SUFFIXES)}"
        raise ConfigError(f"{source} is a folder, a file was expected.", f"{held}; name one file.")


def known_suffix(source: str, path: Path) -> str:
    """The suffix of a data file; raises ConfigError where it is none of those known."""
    suffix = suffix_of(path.name)
    if not suffix:
        raise ConfigError(f"{source} is no data file of a known kind.", f"Convert it to one of {', '.join(SUFFIXES)}.")
    return suffix


@contextlib.contextmanager
def file_errors(source: str, path: Path) -> Iterator[None]:
    """What the operating system says of a file, as ConfigError (there is none) or StorageError (it may not be read)."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"There is no file {source}.", _near_files(path)) from None
    except OSError as error:
        problem = f"{source} can't be read: {error.strerror or error}."
        raise StorageError(problem, "Check who may read the file, and the disk.") from error


def arrow_folder(source: str, path: Path) -> list[Path] | None:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, in order; None for anything else.

    Raises:
        ConfigError: the folder holds several splits.
        DataError: its list of files can't be read.
    """
    if os.path.isfile(path / "dataset_dict.json"):
        names = [name for name in _names(path) if os.path.isdir(path / name)] or ["none"]
        raise ConfigError(
            f"{source} holds the splits {', '.join(names)}.", f"Name one of them, for example {path / names[0]}."
        )
    state = path / "state.json"
    if not os.path.isfile(state):
        return None
    with file_errors(str(state), state):
        text = state.read_text(encoding="utf-8")
    try:
        return [path / part["filename"] for part in json.loads(text)["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} lists no Arrow files ({error!r}).", "Save the data set again.") from error


def _columnar(source: str, suffix: str, raw: bytes) -> Rows:
    import pyarrow as pa

    names = columnar_names(source, suffix, pa.BufferReader(raw))
    return Rows(source, *parse_columnar(source, suffix, raw), class_names=names)


def _near_files(path: Path) -> str:
    folder = path.parent
    if not os.path.isdir(folder):
        return f"There is no folder {folder} either; relative paths start at {Path.cwd()}."
    near = difflib.get_close_matches(path.name, _names(folder), n=3, cutoff=0.5)
    if near:
        return f"Near names in {folder.resolve()}: {', '.join(near)}."
    return f"Data files in {folder.resolve()}: {', '.join(_data_files(folder)) or 'none'}."


def _data_files(folder: Path, most: int = 8) -> list[str]:
    names = [name for name in _names(folder) if suffix_of(name)]
    return names[:most] + ([f"and {len(names) - most} more"] if len(names) > most else [])


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted; none of one that may not be listed."""
    return sorted(os.listdir(folder)) if os.access(folder, os.R_OK) else []


def _read_hub(source: str, subset: str | None, default_split: str) -> Rows:
    import datasets

    name, _, split = source.partition(":")
    split = split or default_split
    what = f"hub data set {name!r} (split {split!r}{f', subset {subset!r}' if subset else ''})"
    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except datasets.exceptions.DatasetGenerationError as error:
        problem = f"The files of {what} can't be read: {error.__cause__ or error}."
        raise DataError(problem, "Give a local file.") from error
    except (ConnectionError, FileNotFoundError, RuntimeError) as error:
        fix = "Check the name and the network, or give a local file."
        if datasets.config.HF_HUB_OFFLINE:
            fix = "HF_HUB_OFFLINE is set: unset it, or give a local file."
        raise ConfigError(f"There is no file {source}, and {what} did not load: {error}.", fix) from error
    except ValueError as error:  # unknown split or subset: the library's message lists those there are
        problem = f"There is no {what}: {str(error).rstrip('.')}."
        raise ConfigError(problem, "Name a split as `name:split`, a subset as `data.subset`.") from error
    except OSError as error:
        raise StorageError(f"{what} can't be stored: {error}.", "Check the disk and HF_HOME's folder.") from error
    names = names_in_features(loaded.features)
    rows = [with_names(without_nulls(row, deep=True), names) for row in loaded.to_list()]
    return Rows(source, rows, class_names=names)
