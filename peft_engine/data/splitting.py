"""The training, evaluation and test split of a run: given as files, or made; and what is to be known about them.

One side per input (trap 26): made splits divide the distinct inputs, and what stands in a given evaluation or test
split is removed from training. The same data and `data.seed` give the same splits in every process, whatever
`training.seed` is. Of a mixture the union is divided, in proportion to the sources.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config import CleanConfig, Config, SourceConfig
from ..config_checks import LABELLED
from ..errors import DataError
from .class_names import told_of_names
from .cleaning import Dropped, counted, refuse_nothing_left, usable, without_contradictory, without_repeated
from .drawing import draw, hold_out
from .duplicates import contradictory, input_key, repeated
from .formats import Example, Layout, find_layout
from .image_sources import read_images
from .labels import Labels, find_labels, label_of
from .mixing import describe_sources, name_of, sources_of
from .near_duplicates import Near, find_near, method_for
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
    sources: list[int] = field(default_factory=list)
    """Of `data.train`'s rows: which of its sources each comes from."""
    dropped: list[Dropped] = field(default_factory=list)
    """Rows that `data.clean` let go when this split was read."""

    def take(self, indices: Sequence[int]) -> "Split":
        """The rows at these indices, in that order."""
        sources = [self.sources[i] for i in indices] if self.sources else []
        return Split([self.examples[i] for i in indices], [self.where[i] for i in indices], sources)

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
    """Rows of each split that repeat an earlier row of it, answer included. They are kept, but for data.clean."""
    leaked: dict[str, int] = field(default_factory=dict)
    """Training rows removed because their input stands in the given "eval" or "test"; one in both counts in both."""
    leaked_where: list[str] = field(default_factory=list)
    """The first five of them: "train.csv, line 3 = test.csv, line 9"."""
    near: dict[str, int] = field(default_factory=dict)
    """Training rows that nearly repeat an "eval" or "test" row. Kept, or with data.near_duplicates drop removed."""
    near_where: list[str] = field(default_factory=list)
    """The first five of them."""
    near_method: str = "off"
    """`minhash`; `normalised`: equal but for case, punctuation and spacing; `exact`: images; `off`: not looked for."""
    near_dropped: bool = False
    """Near duplicates were removed from training."""
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Rows that were left out before or after splitting, by split and kind; `dropped.jsonl` names each."""
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Of a mixture: path, weight, rows read, rows of the training split and rows seen per epoch."""
    contradictory: int = 0
    """Inputs that stand in the data as it was read, in any split, with more than one answer."""
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
    """Of tasks with classes."""
    report: SplitReport
    digest: str
    """sha256 of all splits' examples in their order; file names don't enter."""
    dropped: list[Dropped] = field(default_factory=list)
    """All rows that were left out."""


def load_one(source: str, config: Config, *, need_label: bool, default_split: str) -> tuple[Split, Rows]:
    """The examples of one file or hub split, and its rows. Raises ConfigError, DataError or StorageError."""
    split, rows, _ = _load(SourceConfig(path=source, columns=config.data.columns), config, need_label, default_split)
    return split, rows


def _load(
    source: SourceConfig, config: Config, need_label: bool, default_split: str, name: str = "test"
) -> tuple[Split, Rows, Layout]:
    """One source. Rows to be predicted are all needed, so none is dropped then."""
    clean = config.data.clean if need_label else CleanConfig()
    skip = clean.malformed == "drop"
    subset = config.data.subset
    rows = read_images(source.path, config.task, need_label)
    rows = rows or read_rows(source.path, subset=subset, default_split=default_split, skip_malformed=skip)
    columns: dict[str, str] = dict(source.columns.items())
    layout = find_layout(rows, config.task, columns, need_label=need_label)
    examples, where, dropped = usable(rows, layout, clean, name)
    if not examples:
        refuse_nothing_left(0, dropped, source.path, "data.clean")
    return Split(examples, where, dropped=dropped), rows, layout


def _load_train(config: Config, report: SplitReport) -> tuple[Split, Layout]:
    """All sources of `data.train`, one after the other; the layout is the first one's."""
    examples: list[Example] = []
    where: list[str] = []
    whole, layouts, read = Split(examples, where), [], []
    for number, source in enumerate(sources_of(config)):
        part, rows, layout = _load(source, config, True, HUB_SPLITS["train"], "train")
        report.notes += told_of_names(layout.columns, rows.class_names, source.path)
        layouts.append(layout)
        if layout.kind != layouts[0].kind:
            raise DataError(
                f"data.train: {sources_of(config)[0].path} holds {layouts[0].kind}, {source.path} {layout.kind}.",
                "Give all sources in one format, or name the columns of each.",
            )
        read.append(len(part.examples))
        examples += part.examples
        where += part.where
        whole.dropped += part.dropped
        whole.sources += [number] * len(part.examples)
    report.sources = [{"rows": n} for n in read]
    return whole, layouts[0]


def load_splits(config: Config) -> Splits:
    """Read, check, clean and divide the data of a run.

    Raises:
        ConfigError: a file or hub data set that isn't there, or settings that don't fit it.
        DataError: rows that can't be used, a split that would be empty, or a label that training never shows.
        StorageError: a file that may not be read.
    """
    report = SplitReport()
    train, layout = _load_train(config, report)
    held = given_splits(config, layout)
    dropped = [row for split in (train, *held.values()) for row in split.dropped]
    labels = None
    if config.task in LABELLED:
        labels = find_labels(train.examples, train.where.__getitem__, config.data.label_type, config.data.labels)
    whole = [*train.examples] + [example for split in held.values() for example in split.examples]
    report.contradictory = contradictory(whole)
    note_answers(config, report)
    train = _without_leaked(train, held, config, report, dropped)
    train, made = _make_splits(train, held, labels, config, report)
    held |= made
    train = _cleaned(train, held, config, report, dropped)
    if labels is not None:
        labels = _labels_of_training(train, held, labels, config)
    parts = {"train": train} | {name: held[name] for name in HELD_OUT if name in held}
    parts = limited(parts, labels, config, report)
    if labels is not None:
        train = parts["train"]
        shown = {name for i in range(len(train.examples)) for name in _classes(train, i, labels)}
        check_classes(shown, labels, config, report)
    report.made = {name: name in made for name in HELD_OUT if name in parts}
    _describe(parts, config, report)
    report.removed = counted(dropped)
    splits = Splits(parts["train"], parts.get("eval"), parts.get("test"), layout, labels, report, digest_of(parts))
    splits.dropped = dropped
    return splits


def note_answers(config: Config, report: SplitReport) -> None:
    """Tell how many prompts have several answers: no fault where text is learned."""
    if report.contradictory and config.task not in LABELLED:
        when = "" if config.data.clean.contradictory == "keep" else " before data.clean.contradictory"
        report.notes.append(f"{report.contradictory} prompts have several answers{when}.")


def _cleaned(
    train: Split, held: dict[str, Split], config: Config, report: SplitReport, dropped: list[Dropped]
) -> Split:
    """The training split without what `data.clean` and `data.near_duplicates` take; `held` is changed in place."""
    clean = config.data.clean
    kept, gone = without_contradictory(train.examples, train.where, clean.contradictory)
    refuse_nothing_left(len(kept), gone, "train", "data.clean.contradictory")
    dropped += gone
    train = train.take(kept) if gone else train
    if clean.duplicates == "drop":
        kept, gone = without_repeated(train.examples, train.where, "train")
        train = train.take(kept)
        for name, split in list(held.items()):
            kept, more = without_repeated(split.examples, split.where, name)
            held[name] = split.take(kept)
            gone += more
        dropped += gone
    if config.data.near_duplicates == "drop":
        near = {n.row: n for n in reversed(_near(train, held, config, report))}
        gone = [
            Dropped("train", train.where[i], "near duplicate", _pair_in_words(near[i], held[near[i].split]))
            for i in sorted(near)
        ]
        kept = [i for i in range(len(train.examples)) if i not in near]
        refuse_nothing_left(len(kept), gone, "train", "data.near_duplicates")
        dropped += gone
        report.near_dropped = True
        train = train.take(kept)
    return train


def _near(train: Split, held: dict[str, Split], config: Config, report: SplitReport) -> list[Near]:
    """Near duplicates of the training split, told in the report."""
    if config.data.near_duplicates == "off":
        return []
    examples = {name: held[name].examples for name in HELD_OUT if name in held}
    report.near_method, note = method_for(train.examples, examples, config.data.near_duplicates)
    report.notes += [note] if note else []
    found = find_near(train.examples, examples, config.data.near_threshold, fuzzy=report.near_method == "minhash")
    for near in found:
        report.near[near.split] = report.near.get(near.split, 0) + 1
    first = {near.row: near for near in reversed(found)}
    report.near_where = [
        f"{train.where[row]} {_pair_in_words(first[row], held[first[row].split])}" for row in sorted(first)[:SHOWN]
    ]
    return found


def _pair_in_words(near: Near, held: Split) -> str:
    return f"{'=' if near.similarity == 1.0 else f'~ {near.similarity:.2f}'} {held.where[near.other]}"


def given_splits(config: Config, layout: Layout) -> dict[str, Split]:
    given = {}
    for name, source in (("eval", config.data.eval), ("test", config.data.test)):
        if source is not None:
            part = SourceConfig(path=source, columns=config.data.columns)
            given[name], _, other = _load(part, config, True, HUB_SPLITS[name], name)
            if other.kind != layout.kind:
                raise DataError(
                    f"data.train {name_of(config)} holds {layout.kind}, data.{name} {source} {other.kind}.",
                    "Give both in one format, or name their columns in data.columns.",
                )
    return given


def _without_leaked(
    train: Split, given: dict[str, Split], config: Config, report: SplitReport, dropped: list[Dropped]
) -> Split:
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
            continue
        other = stands[hits[0]][key]
        dropped.append(Dropped("train", train.where[i], "leaked", f"the input of {other}"))
        if len(report.leaked_where) < SHOWN:
            report.leaked_where.append(f"{train.where[i]} = {other}")
    if not kept:
        raise DataError(
            f"All {len(keys)} rows of data.train {name_of(config)} stand in data.eval or data.test as well "
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
    single = labels is not None and labels.kind == "single"
    strata = [names[0] for names in classes] if single else None
    mixed = len(set(train.sources)) > 1
    if mixed:
        sides = zip(inputs, strata or [""] * len(inputs), strict=True)
        strata = [f"{train.sources[rows[0]]} {name}" for rows, name in sides]
    left = list(range(len(inputs)))
    made: dict[str, Split] = {}
    for name, share in (("test", config.data.split.test), ("eval", config.data.split.eval)):
        if name in given or not share:
            continue
        count = int(share * len(inputs) + 0.5)
        drawn: list[int] = []
        if 0 < count < len(left):
            drawn, notes = hold_out(left, count, strata, classes, config.data.seed)
            kinds = "classes and sources in proportion" if mixed else "classes in proportion"
            report.notes += [f"{name} split: {note.replace('classes in proportion', kinds)}." for note in notes]
        if not drawn:
            raise DataError(
                f"No {name} split can be made: data.split.{name} = {share} of {len(inputs)} different inputs "
                f"({len(train.examples)} rows of {name_of(config)}) is {count}, of {len(left)} that are left.",
                f"Give more rows, set data.split.{name}=0, or give data.{name}. Rows with one input stay on one side; "
                "if all share one prompt, name the completion's column as data.columns.text.",
            )
        left = sorted(set(left).difference(drawn))
        made[name] = train.take(sorted(i for group in drawn for i in inputs[group]))
    return train.take(sorted(i for group in left for i in inputs[group])), made


def _classes(split: Split, i: int, labels: Labels | None) -> list[str]:
    return [] if labels is None else labels.classes(label_of(split.examples[i]), split.where[i])


def _labels_of_training(train: Split, held: dict[str, Split], found: Labels, config: Config) -> Labels:
    """Labels of the training split alone, having checked that the other splits hold no others."""
    labels = find_labels(train.examples, train.where.__getitem__, label_type_of(found), config.data.labels)
    for split in held.values():
        for example, where in zip(split.examples, split.where, strict=True):
            labels.classes(label_of(example), where)
    return labels


def label_type_of(labels: Labels) -> str:
    """The setting `data.label_type` that finds labels of this type again."""
    return labels.kind if labels.kind in ("single", "multi", "regression") else "auto"


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


def _describe(parts: dict[str, Split], config: Config, report: SplitReport) -> None:
    report.counts = {name: len(split.examples) for name, split in parts.items()}
    report.duplicates = {name: repeated(split.examples) for name, split in parts.items()}
    read = [part["rows"] for part in report.sources]
    mixed = isinstance(config.data.train, list)
    report.sources = describe_sources(config, read, parts["train"].sources) if mixed else []
    if not report.near_dropped:
        _near(parts["train"], {name: parts[name] for name in HELD_OUT if name in parts}, config, report)


def digest_of(parts: dict[str, Split]) -> str:
    digest = hashlib.sha256()
    for name, split in parts.items():
        digest.update(f"{name} {len(split.examples)}\n".encode())
        for line in split.lines():
            digest.update(line)
    return digest.hexdigest()
