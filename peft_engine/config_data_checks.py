"""Rules between the settings of `data` and others."""

import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_faults import Fault, Tree, lookup
from peft_engine.config_frozen import PREFERENCE


def data_faults(values: Tree) -> Iterator[Fault]:
    """What contradicts itself.

    Args:
        values: all settings, defaults filled in; required ones may be missing.
    """
    for check in (_splits, _streaming, _labels, _sources, _class_weights, _augment, _packing):
        yield from check(values)


def _splits(values: Tree) -> Iterator[Fault]:
    if lookup(values, "task") == "image-classification" and lookup(values, "data.near_duplicates") == "drop":
        text = "got drop, and of images only equal ones are found, which never stay in train; write report"
        yield Fault(("data", "near_duplicates"), text)
    evaluation, test = lookup(values, "data.eval"), lookup(values, "data.test")
    for name, source in (("eval", evaluation), ("test", test)):
        if source is not None and _same(source) in map(_same, train_sources(values)):
            yield Fault(
                ("data", name),
                f"got {source}, the same as data.train: the result would be measured on what was learned; "
                f"leave data.{name} out to have it split off (data.split.{name})",
            )
    eval_share = lookup(values, "data.split.eval") if evaluation is None else 0.0
    test_share = lookup(values, "data.split.test") if test is None else 0.0
    if eval_share + test_share >= 1.0:
        text = f"eval {eval_share} and test {test_share} leave nothing to train on; their sum must be below 1"
        yield Fault(("data", "split"), text)
    if evaluation is None and eval_share == 0:
        for name in ("early_stopping", "restore_best", "eval_every"):
            if lookup(values, f"training.{name}") not in (None, False):
                text = "needs an evaluation split, and there is none; give data.eval, or a data.split.eval above 0"
                yield Fault(("training", name), text)


def _streaming(values: Tree) -> Iterator[Fault]:
    """What needs all rows at once, or is not looked at row by row."""
    if not lookup(values, "data.streaming"):
        return
    if isinstance(lookup(values, "data.train"), list):
        text = "reads one file, and data.train is a mixture; write its parts into one file, or set it to false"
        yield Fault(("data", "streaming"), text)
    if lookup(values, "data.subset") is not None:
        yield Fault(("data", "subset"), "is for hub data sets, and data.streaming reads files; remove it")
    for name, value in (lookup(values, "data.clean") or {}).items():
        if value not in ("refuse", "keep"):
            text = f"got {value}, which data.streaming does not do; clean the file first, or set streaming to false"
            yield Fault(("data", "clean", name), text)
    if lookup(values, "data.class_weights") not in (None, "none"):
        text = "counts the classes of all rows, which data.streaming does not; remove it, or set streaming to false"
        yield Fault(("data", "class_weights"), text)
    if any((lookup(values, "data.augment.text") or {}).values()):
        text = "changes rows that are held in memory, and data.streaming holds none; remove it, or set that to false"
        yield Fault(("data", "augment", "text"), text)
    if lookup(values, "data.near_duplicates") == "drop":
        text = "got drop, and data.streaming only reports near duplicates; set report or off, or streaming to false"
        yield Fault(("data", "near_duplicates"), text)


def train_sources(values: Tree) -> list[str]:
    """Paths of `data.train`: one, or those of a mixture."""
    train = lookup(values, "data.train")
    if isinstance(train, list):
        return [part["path"] for part in train if isinstance(part, Mapping) and "path" in part]
    return [train] if train is not None else []


def _same(source: Any) -> str:
    """A file or folder by its resolved path, however it is written; a hub name as it is."""
    path = os.path.expanduser(str(source))
    return os.path.realpath(path) if os.path.exists(path) else str(source)


def _labels(values: Tree) -> Iterator[Fault]:
    labels = lookup(values, "data.labels")
    if labels is None:
        return
    names = [str(label) for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Fault(("data", "labels"), f"got {', '.join(twice)} more than once; each class is named once")
    elif len(names) < 2 and lookup(values, "data.label_type") != "multi":
        yield Fault(
            ("data", "labels"), f"got {len(names)} class(es), expected two or more; null finds them in the data"
        )
    if lookup(values, "data.label_type") == "regression":
        yield Fault(("data", "labels"), "regression has no classes; remove it, or set data.label_type: single")


def _sources(values: Tree) -> Iterator[Fault]:
    train = lookup(values, "data.train")
    paths = train_sources(values) if isinstance(train, list) else []
    task = lookup(values, "task")
    for i, part in enumerate(train if isinstance(train, list) and task in PREFERENCE else []):
        if isinstance(part, Mapping) and part.get("weight", 1.0) != 1.0:
            told = f"applies to the tasks that train in our own loop, and the task is {task}; remove it"
            yield Fault(("data", "train", i, "weight"), told)
    for i, path in enumerate(paths):
        if _same(path) in map(_same, paths[:i]):
            text = f"got {path} a second time; name it once, with a weight"
            yield Fault(("data", "train", i, "path"), text)


def _class_weights(values: Tree) -> Iterator[Fault]:
    path, weights = ("data", "class_weights"), lookup(values, "data.class_weights")
    kind, labels = lookup(values, "data.label_type"), lookup(values, "data.labels")
    if weights == "none" or weights is None:
        return
    if kind in ("multi", "regression"):
        yield Fault(path, f"weighs rows of one class each, and data.label_type is {kind}; remove it")
    elif isinstance(weights, Mapping):
        names = [str(label) for label in labels or []]
        for name in weights:
            if names and name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:10])}"
                yield Fault((*path, name), f"is no class of data.labels; {hint}")


def _augment(values: Tree) -> Iterator[Fault]:
    text = lookup(values, "data.augment.text")
    if text and any(text.values()) and lookup(values, "data.packing"):
        told = "changes lengths, and data.packing lays sequences out by them; leave one of the two out"
        yield Fault(("data", "augment", "text"), told)


def _packing(values: Tree) -> Iterator[Fault]:
    packing = lookup(values, "data.packing")
    if lookup(values, "data.pack_tokens") is not None and not packing:
        yield Fault(("data", "pack_tokens"), "has no effect without data.packing: true; set that, or remove this")
