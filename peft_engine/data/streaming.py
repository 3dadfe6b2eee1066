"""The splits of a run whose training data memory doesn't hold: `splitting`, by hashes of rows instead of rows.

The training rows lie on disk (`spooling`); given evaluation and test files are read into memory as ever. What differs
from `splitting` is told in the report's notes: made splits take the inputs whose seeded hash is smallest, so that they
depend on `data.seed` and on which inputs there are, not on their order, and are not in proportion to classes; rows of
`data.limit` are drawn plainly.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Config
from ..config_checks import LABELLED
from ..errors import DataError
from .class_names import told_of_names
from .cleaning import Dropped, counted
from .encoding import cache_folder
from .flatfiles import storage_faults
from .labels import Labels, find_labels
from .splitting import (
    HELD_OUT,
    SHOWN,
    Split,
    SplitReport,
    Splits,
    check_classes,
    digest_of,
    given_splits,
    label_type_of,
    limited,
    note_answers,
)
from .spooling import HASHES, Places, Spool, StoredExamples, hashes_of, spool

DRAWN_BY_HASH = "streamed: drawn by a hash of the input, not in proportion to the classes"

NEAR_ONLY = (
    "Near duplicates, streamed: those that differ in case, punctuation and spacing only; no others were looked for."
)


@dataclass
class StreamedSplit(Split):
    """Rows of one split on disk."""

    examples: StoredExamples
    where: Places
    home: Any = field(default=None, repr=False)
    """What removes a temporary store when nobody holds it any more."""

    def take(self, indices: Any) -> "StreamedSplit":
        chosen = self.examples.chosen[np.asarray(indices, np.int64)]
        where = Places(self.where.stream, self.where.numbers, chosen)
        return StreamedSplit(StoredExamples(self.examples.folder, chosen), where, home=self.home)

    def lines(self) -> Iterable[bytes]:
        return (self.examples.line(i) for i in range(len(self.examples)))


@dataclass(frozen=True)
class Hashes:
    """What tells rows apart, each uint64 (rows,); see `spooling.HASHES`."""

    inputs: np.ndarray
    rows: np.ndarray
    near: np.ndarray
    labels: np.ndarray

    def take(self, chosen: np.ndarray) -> "Hashes":
        return Hashes(self.inputs[chosen], self.rows[chosen], self.near[chosen], self.labels[chosen])

    @classmethod
    def of(cls, split: Split) -> "Hashes":
        columns = zip(*(hashes_of(example) for example in split.examples), strict=True)
        return cls(*(np.frombuffer(b"".join(column), "<u8") for column in columns))


def stream_splits(config: Config) -> Splits:
    """What `splitting.load_splits` gives, with the training split and the splits made of it on disk.

    Raises:
        ConfigError, DataError, StorageError: as there; StorageError also where the disk is full.
    """
    report = SplitReport()
    home, folder = _store_folder(config)
    stored = spool(config, folder)
    report.notes += told_of_names(stored.layout.columns, stored.stream.class_names, stored.stream.source)
    own = Hashes(*(stored.hashes(name) for name in HASHES))
    given = given_splits(config, stored.layout)
    theirs = {name: Hashes.of(split) for name, split in given.items()}
    labels = _labels(config, stored, own, np.arange(stored.rows), config.data.label_type)
    report.contradictory = _contradictory([own, *theirs.values()])
    note_answers(config, report)
    left, dropped = _without_leaked(config, stored, own, given, theirs, report)
    left, made = _make_splits(config, stored, own, left, given, labels, report)
    if labels is not None and (labels := _labels(config, stored, own, left, label_type_of(labels))) is not None:
        for split in given.values():
            for example, where in zip(split.examples, split.where, strict=True):
                labels.classes(example["label"], where)
    rows = {name: _drawn(config, name, chosen, report) for name, chosen in {"train": left, **made}.items()}
    given = limited(given, labels, config, report)
    parts: dict[str, Split] = {
        name: StreamedSplit(stored.examples(chosen), stored.places(chosen), home=home) for name, chosen in rows.items()
    } | given
    parts = {name: parts[name] for name in ("train", *HELD_OUT) if name in parts}
    if labels is not None and labels.kind != "regression":
        check_classes(_shown(stored, own, rows["train"], labels), labels, config, report)
    report.made = {name: name in made for name in HELD_OUT if name in parts}
    near = config.data.near_duplicates
    _describe(parts, {n: own.take(rows[n]) if n in rows else Hashes.of(p) for n, p in parts.items()}, near, report)
    held = {name: parts.get(name) for name in HELD_OUT}
    digest = digest_of(parts)
    return Splits(parts["train"], held["eval"], held["test"], stored.layout, labels, report, digest, dropped)


def _labels(config: Config, stored: Spool, own: Hashes, chosen: np.ndarray, label_type: str) -> Labels | None:
    """Type and names of the labels that the rows `chosen` show."""
    if config.task not in LABELLED:
        return None
    values = _values(stored, own, chosen)
    where = stored.places(values).__getitem__
    return find_labels(stored.examples(values), where, label_type, config.data.labels, rows=len(chosen))


def _values(stored: Spool, own: Hashes, chosen: np.ndarray) -> np.ndarray:
    """Rows that show every label of the rows `chosen`."""
    values = np.array(stored.values, np.int64)
    return values[np.isin(own.labels[values], own.labels[chosen])]


def _shown(stored: Spool, own: Hashes, chosen: np.ndarray, labels: Labels) -> set[str]:
    return {name for _, names in _classes(stored, _values(stored, own, chosen), labels) for name in names}


def _classes(stored: Spool, values: np.ndarray, labels: Labels) -> Iterable[tuple[int, list[str]]]:
    """Row and classes of each of `values`."""
    places = stored.places(values)
    for i, example in enumerate(stored.examples(values)):
        yield int(values[i]), labels.classes(example["label"], places[i])


def _contradictory(parts: list[Hashes]) -> int:
    """Inputs that stand there with more than one answer: of one input, rows differ in nothing else."""
    inputs, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "rows"))
    order = np.lexsort((rows, inputs))
    inputs, rows = inputs[order], rows[order]
    differ = (inputs[1:] == inputs[:-1]) & (rows[1:] != rows[:-1])
    return len(np.unique(inputs[1:][differ]))


def _without_leaked(
    config: Config, stored: Spool, own: Hashes, given: dict[str, Split], theirs: dict[str, Hashes], report: SplitReport
) -> tuple[np.ndarray, list[Dropped]]:
    """Rows whose input stands in no given split, and those that are removed; these are counted in the report."""
    hits = {name: np.isin(own.inputs, hashes.inputs) for name, hashes in theirs.items()}
    report.leaked = {name: int(hit.sum()) for name, hit in hits.items() if hit.any()}
    leaked = np.logical_or.reduce([np.zeros(stored.rows, bool), *hits.values()])
    pairs = _pairs(stored.places(np.arange(stored.rows)), own.inputs, hits, given, theirs, "inputs")
    report.leaked_where = [f"{row} = {other}" for row, other in pairs[:SHOWN]]
    dropped = [Dropped("train", row, "leaked", f"the input of {other}") for row, other in pairs]
    report.removed = counted(dropped)
    if leaked.all():
        raise DataError(
            f"All {stored.rows} rows of data.train {config.data.train} stand in data.eval or data.test as well "
            f"(first: {report.leaked_where[0]}), so that nothing is left to train on.",
            "Give other rows. If all rows share one prompt, name the completion's column as data.columns.text.",
        )
    if len(theirs) == 2 and (shared := len(np.intersect1d(theirs["eval"].inputs, theirs["test"].inputs))):
        report.notes.append(
            f"{shared} inputs stand in both data.eval and data.test; choosing on one tells on the other."
        )
    return np.flatnonzero(~leaked), dropped


def _pairs(
    places: Any,
    keys: np.ndarray,
    hits: dict[str, np.ndarray],
    held: dict[str, Split],
    theirs: Any,
    name: str,
    most: int | None = None,
) -> list[tuple[str, str]]:
    """The rows that stand in a held-out split too, each with the first such row: "train.csv, line 3", "test.csv, …"."""
    found = []
    firsts = {part: np.unique(getattr(theirs[part], name), return_index=True) for part in hits}
    for i in np.flatnonzero(np.logical_or.reduce([np.zeros(len(keys), bool), *hits.values()]))[:most]:
        part = next(part for part, hit in hits.items() if hit[i])
        distinct, first = firsts[part]
        other = int(first[np.searchsorted(distinct, keys[i])])
        found.append((places[int(i)], held[part].where[other]))
    return found


def _make_splits(
    config: Config,
    stored: Spool,
    own: Hashes,
    left: np.ndarray,
    given: dict[str, Split],
    labels: Labels | None,
    report: SplitReport,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Rows that stay in training, and rows of each split that is not given and has a share."""
    inputs = np.unique(own.inputs[left])
    total = len(inputs)
    inputs = np.setdiff1d(inputs, _first_of_classes(stored, own, left, labels))
    inputs = inputs[np.argsort(_mixed(inputs, config.data.seed), kind="stable")]
    made: dict[str, np.ndarray] = {}
    for name, share in (("test", config.data.split.test), ("eval", config.data.split.eval)):
        if name in given or not share:
            continue
        count = int(share * total + 0.5)
        if not 0 < count < len(inputs):
            raise DataError(
                f"No {name} split can be made: data.split.{name} = {share} of {total} different inputs "
                f"({len(left)} rows of {config.data.train}) is {count}, of {len(inputs)} that are left.",
                f"Give more rows, set data.split.{name}=0, or give data.{name}. Rows with one input stay on one side; "
                "if all share one prompt, name the completion's column as data.columns.text.",
            )
        drawn, inputs = inputs[:count], inputs[count:]
        made[name] = left[np.isin(own.inputs[left], drawn)]
        if labels is not None and labels.kind == "single":
            report.notes.append(f"{name} split: {DRAWN_BY_HASH}.")
    out = np.concatenate([np.zeros(0, np.int64), *made.values()])
    return np.setdiff1d(left, out), made


def _first_of_classes(stored: Spool, own: Hashes, left: np.ndarray, labels: Labels | None) -> np.ndarray:
    """Inputs that stay in training so that every class has a row there: one for each class."""
    if labels is None or labels.kind == "regression":
        return np.zeros(0, np.uint64)
    shown: set[str] = set()
    wanted = []
    for row, names in _classes(stored, _values(stored, own, left), labels):
        if not shown.issuperset(names):
            shown.update(names)
            wanted.append(own.labels[row])
    of_left, first = np.unique(own.labels[left], return_index=True)
    return own.inputs[left[first[np.isin(of_left, wanted)]]]


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Other 64-bit numbers, one for each and different for each seed (splitmix64's finalizer)."""
    mixed = keys ^ np.random.SeedSequence(seed % 2**32).generate_state(1, np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def _drawn(config: Config, name: str, rows: np.ndarray, report: SplitReport) -> np.ndarray:
    """At most `data.limit` of the rows, in order."""
    limit = config.data.limit.model_dump()[name]
    if limit is None or limit >= len(rows):
        return rows
    if config.task in LABELLED:
        report.notes.append(f"data.limit.{name} = {limit}: streamed, so drawn plainly, not in proportion to classes.")
    rng = np.random.default_rng([config.data.seed % 2**32, len(rows)])
    return rows[np.sort(rng.choice(len(rows), limit, replace=False))]


def _describe(parts: dict[str, Split], hashes: dict[str, Hashes], near: str, report: SplitReport) -> None:
    report.counts = {name: len(split.examples) for name, split in parts.items()}
    report.duplicates = {name: len(one.rows) - len(np.unique(one.rows)) for name, one in hashes.items()}
    if near == "off":
        return
    report.near_method = "normalised"
    hits = {name: np.isin(hashes["train"].near, hashes[name].near) for name in HELD_OUT if name in parts}
    if hits:
        report.notes.append(NEAR_ONLY)
    report.near = {name: int(hit.sum()) for name, hit in hits.items() if hit.any()}
    pairs = _pairs(parts["train"].where, hashes["train"].near, hits, parts, hashes, "near", SHOWN)
    report.near_where = [f"{row} = {other}" for row, other in pairs]


def _store_folder(config: Config) -> tuple[Any, Path]:
    """`data.cache`, or a folder in the run directory that goes with what is returned first."""
    cache = cache_folder(config.data.cache)
    if cache is not None:
        return None, cache
    output = Path(config.output).expanduser()
    with storage_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        with _lock(output, wait=True):
            for old in output.glob(".stream-*"):  # of a run that was killed
                with _lock(old, wait=False) as free:
                    if free:
                        shutil.rmtree(old, ignore_errors=True)
            home = tempfile.TemporaryDirectory(prefix=".stream-", dir=output, ignore_cleanup_errors=True)
            lock = os.open(home.name, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
    weakref.finalize(home, os.close, lock)
    return home, Path(home.name)


@contextlib.contextmanager
def _lock(folder: Path, wait: bool) -> Any:
    """Hold a folder's lock; gives whether it was free."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(held)
