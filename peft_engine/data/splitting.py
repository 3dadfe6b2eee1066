"""The training, evaluation and test split of a run: given as files, or made; and what is to be known about them.

One side per input (trap 26): made splits divide the distinct inputs, and what stands in a given evaluation or test
split is removed from training. The same data and `data.seed` give the same splits in every process, whatever
`training.seed` is.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import Config
from ..config_checks import CLASSES
from ..errors import DataError
from .drawing import draw, hold_out
from .duplicates import contradictory, input_key, near_key, repeated
from .formats import Example, Layout, find_layout, to_examples
from .labels import Labels, find_labels
from .reading import Rows, read_rows

HUB_SPLITS = {"train": "train", "eval": "validation", "test": "test"}
HELD_OUT = ("eval", "test")
SHOWN = 5


@dataclass
class Split:
    """Rows of one split, in the order of their source."""

    examples: Sequence[Example]
    where: Sequence[str]
    """Provenance of each row: "train.jsonl, line 7"."""

    def take(self, indices: Sequence[int]) -> "Split":
        """The rows at these indices, in that order."""
        return Split([self.examples[i] for i in indices], [self.where[i] for i in indices])

    def lines(self) -> Iterable[bytes]:
        """The examples as sorted JSON, each with its line end."""
        return (json.dumps(example, sort_keys=True, default=str).encode() + b"\n" for example in self.examples)


@dataclass
class SplitReport:
    """What was done to the rows, and what a reader of the metrics should know."""

    counts: dict[str, int] = field(default_factory=dict)
    """Rows of each split there is, after everything."""
    made: dict[str, bool] = field(default_factory=dict)
    """Of the evaluation and test split there is: made from the training data, not given."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Rows of each split that repeat an earlier row of it, answer included. They are kept."""
    leaked: dict[str, int] = field(default_factory=dict)
    """Training rows removed because their input stands in the given "eval" or "test"; one in both counts in both."""
    leaked_where: list[str] = field(default_factory=list)
    """The first five of them: "train.csv, line 3 = test.csv, line 9"."""
    near: dict[str, int] = field(default_factory=dict)
    """Training rows whose input is that of an "eval" or "test" row but for case, punctuation and spacing. Kept."""
    near_where: list[str] = field(default_factory=list)
    """The first five of them."""
    contradictory: int = 0
    """Inputs that stand in the data, in any split, with more than one label."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


@dataclass
class Splits:
    """All data of a run."""

    train: Split
    eval: Split | None
    test: Split | None
    layout: Layout
    """Of the training data."""
    labels: Labels | None
    """Text classification only."""
    report: SplitReport
    digest: str
    """sha256 of all splits' examples in their order; file names don't enter."""


def load_one(source: str, config: Config, *, need_label: bool, default_split: str) -> tuple[Split, Rows]:
    """The examples of one file or hub split, and its rows. Raises ConfigError, DataError or StorageError."""
    split, rows, _ = _load(source, config, need_label, default_split)
    return split, rows


def _load(source: str, config: Config, need_label: bool, default_split: str) -> tuple[Split, Rows, Layout]:
    rows = read_rows(source, subset=config.data.subset, default_split=default_split)
    columns: dict[str, str] = dict(config.data.columns.items())
    layout = find_layout(rows, config.task, columns, need_label=need_label)
    return Split(to_examples(rows, layout), [rows.where(i) for i in range(len(rows.rows))]), rows, layout


def load_splits(config: Config) -> Splits:
    """Read, check and divide the data of a run.

    Raises:
        ConfigError: a file or hub data set that isn't there, or settings that don't fit it.
        DataError: rows that can't be used, a split that would be empty, or a label that training never shows.
        StorageError: a file that may not be read.
    """
    report = SplitReport()
    train, _, layout = _load(config.data.train, config, True, HUB_SPLITS["train"])
    held = given_splits(config, layout)
    labels = None
    if config.task in CLASSES:
        labels = find_labels(train.examples, train.where.__getitem__, config.data.label_type, config.data.labels)
    whole = [*train.examples] + [example for split in held.values() for example in split.examples]
    report.contradictory = contradictory(whole)
    train = _without_leaked(train, held, config, report)
    train, made = _make_splits(train, held, labels, config, report)
    held |= made
    if labels is not None:
        labels = _labels_of_training(train, held, labels, config)
    parts = {"train": train} | {name: held[name] for name in HELD_OUT if name in held}
    parts = limited(parts, labels, config, report)
    if labels is not None:
        train = parts["train"]
        shown = {name for i in range(len(train.examples)) for name in _classes(train, i, labels)}
        check_classes(shown, labels, config, report)
    report.made = {name: name in made for name in HELD_OUT if name in parts}
    _describe(parts, report)
    return Splits(parts["train"], parts.get("eval"), parts.get("test"), layout, labels, report, digest_of(parts))


def given_splits(config: Config, layout: Layout) -> dict[str, Split]:
    given = {}
    for name, source in (("eval", config.data.eval), ("test", config.data.test)):
        if source is not None:
            given[name], _, other = _load(source, config, True, HUB_SPLITS[name])
            if other.kind != layout.kind:
                raise DataError(
                    f"data.train {config.data.train} holds {layout.kind}, data.{name} {source} {other.kind}.",
                    "Give both in one format, or name their columns in data.columns.",
                )
    return given


def _without_leaked(train: Split, given: dict[str, Split], config: Config, report: SplitReport) -> Split:
    """Training rows whose input stands in no given split; what is removed is counted in the report."""
    keys = [input_key(example) for example in train.examples]
    stands = {name: _first_where(split) for name, split in given.items()}
    kept = []
    for i, key in enumerate(keys):
        hits = [name for name in stands if key in stands[name]]
        for name in hits:
            report.leaked[name] = report.leaked.get(name, 0) + 1
        if not hits:
            kept.append(i)
        elif len(report.leaked_where) < SHOWN:
            report.leaked_where.append(f"{train.where[i]} = {stands[hits[0]][key]}")
    if not kept:
        raise DataError(
            f"All {len(keys)} rows of data.train {config.data.train} stand in data.eval or data.test as well "
            f"(first: {report.leaked_where[0]}), so that nothing is left to train on.",
            "Give other rows. If all rows share one prompt, name the completion's column as data.columns.text.",
        )
    if len(stands) == 2 and (shared := len(stands["eval"].keys() & stands["test"].keys())):
        report.notes.append(
            f"{shared} inputs stand in both data.eval and data.test; choosing on one tells on the other."
        )
    return train.take(kept)


def _first_where(split: Split) -> dict[str, str]:
    first: dict[str, str] = {}
    for example, where in zip(split.examples, split.where, strict=True):
        first.setdefault(input_key(example), where)
    return first


def _make_splits(
    train: Split, given: dict[str, Split], labels: Labels | None, config: Config, report: SplitReport
) -> tuple[Split, dict[str, Split]]:
    """Divide the distinct inputs of `train`: what is left of it, and the splits that are not given and have a share."""
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(train.examples):
        groups.setdefault(input_key(example), []).append(i)
    inputs = list(groups.values())
    classes = [[name for i in rows for name in _classes(train, i, labels)] for rows in inputs]
    strata = [names[0] for names in classes] if labels is not None and labels.kind == "single" else None
    left = list(range(len(inputs)))
    made: dict[str, Split] = {}
    for name, share in (("test", config.data.split.test), ("eval", config.data.split.eval)):
        if name in given or not share:
            continue
        count = int(share * len(inputs) + 0.5)
        drawn: list[int] = []
        if 0 < count < len(left):
            drawn, notes = hold_out(left, count, strata, classes, config.data.seed)
            report.notes += [f"{name} split: {note}." for note in notes]
        if not drawn:
            raise DataError(
                f"No {name} split can be made: data.split.{name} = {share} of {len(inputs)} different inputs "
                f"({len(train.examples)} rows of {config.data.train}) is {count}, of {len(left)} that are left.",
                f"Give more rows, set data.split.{name}=0, or give data.{name}. Rows with one input stay on one side; "
                "if all share one prompt, name the completion's column as data.columns.text.",
            )
        left = sorted(set(left).difference(drawn))
        made[name] = train.take(sorted(i for group in drawn for i in inputs[group]))
    return train.take(sorted(i for group in left for i in inputs[group])), made


def _classes(split: Split, i: int, labels: Labels | None) -> list[str]:
    return [] if labels is None else labels.classes(split.examples[i]["label"], split.where[i])


def _labels_of_training(train: Split, held: dict[str, Split], found: Labels, config: Config) -> Labels:
    """Labels of the training split alone, having checked that the other splits hold no others."""
    labels = find_labels(train.examples, train.where.__getitem__, found.kind, config.data.labels)
    for split in held.values():
        for example, where in zip(split.examples, split.where, strict=True):
            labels.encode(example["label"], where)
    return labels


def limited(parts: dict[str, Split], labels: Labels | None, config: Config, report: SplitReport) -> dict[str, Split]:
    """The splits with at most `data.limit` rows each."""
    limits = config.data.limit.model_dump()
    limited = {}
    for name, split in parts.items():
        limit, rows = limits[name], list(range(len(split.examples)))
        if limit is not None and limit < len(rows):
            single = labels is not None and labels.kind == "single"
            strata = [_classes(split, i, labels)[0] for i in rows] if single else None
            left_out, stratified = draw(rows, len(rows) - limit, strata, config.data.seed)
            if strata is not None and not stratified:
                report.notes.append(f"data.limit.{name} = {limit} can't hold all classes in proportion: drawn plainly.")
            split = split.take(sorted(set(rows).difference(left_out)))
        limited[name] = split
    return limited


def check_classes(shown: set[str], labels: Labels, config: Config, report: SplitReport) -> None:
    """Which classes the final training split shows: refuse one class alone, note the ones that are missing."""
    if labels.kind == "single" and len(shown) == 1:
        raise DataError(
            f"data.limit.train = {config.data.limit.train} leaves only rows of the class {next(iter(shown))!r}.",
            "Raise it: at least two classes are needed.",
        )
    missing = [name for name in labels.names if name not in shown]
    if missing:
        named = ", ".join(map(repr, missing[:SHOWN])) + (", …" if len(missing) > SHOWN else "")
        report.notes.append(
            f"{len(missing)} of {len(labels.names)} classes have no row in the training split: {named}."
        )


def _describe(parts: dict[str, Split], report: SplitReport) -> None:
    report.counts = {name: len(split.examples) for name, split in parts.items()}
    report.duplicates = {name: repeated(split.examples) for name, split in parts.items()}
    stands = {
        name: {near_key(key): where for key, where in _first_where(parts[name]).items()}
        for name in HELD_OUT
        if name in parts
    }
    train = parts["train"]
    for example, where in zip(train.examples, train.where, strict=True) if stands else ():
        key = near_key(input_key(example))
        hits = [name for name in stands if key in stands[name]]
        for name in hits:
            report.near[name] = report.near.get(name, 0) + 1
        if hits and len(report.near_where) < SHOWN:
            report.near_where.append(f"{where} = {stands[hits[0]][key]}")


def digest_of(parts: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name, split in parts.items():
        digest.update(f"{name} {len(split.examples)}\n".encode())
        for line in split.lines():
            digest.update(line)
    return digest.hexdigest()
