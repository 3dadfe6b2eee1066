"""What a cell keeps of each test row, as columns whose sums give every metric."""

from typing import Any

import numpy as np

from ..errors import DataError
from .statistics import Sums

PER_ROW = ("bytes", "right")  # of items of kind "tokens"


def columns_of(items: dict[str, Any], class_names: list[str] | None = None) -> Sums:
    """Columns of one cell's `train_info.items` (see benchmarks/README.md), each (items,) or (items, classes).

    Raises:
        DataError: lists of unequal length, or a kind that is unknown.
    """
    count = len(items["rows"])
    for name in ("label", "predicted", "loss", "units", *PER_ROW, "exact"):
        if _length(items, name) not in (0, count):
            raise DataError(f"items.{name}: got {_length(items, name)} values for {count} rows.", "Run the cell again.")
    found: Sums = {"rows": np.ones(count)}
    for name in ("loss", "units", *PER_ROW):
        values = items.get(name)
        if values and all(value is not None for value in values):
            found["tokens_right" if name == "right" else name] = np.asarray(values, dtype=np.float64)
    judged = [value is not None for value in items.get("exact") or ()]
    if any(judged):  # answers were generated for some of the rows
        found["judged"] = np.asarray(judged, dtype=np.float64)
        found["exact"] = np.asarray([value or 0.0 for value in items["exact"]], dtype=np.float64)
    if "units" not in found:
        found.pop("loss", None)
    if not _length(items, "label") or not _length(items, "predicted"):
        return found
    kind = items["kind"]
    if kind == "classes":
        return found | _classes(items["label"], items["predicted"], class_names)
    if kind == "values":
        return found | _values(items["label"], items["predicted"])
    if kind == "tags":
        return found | _tags(items["label"], items["predicted"], class_names)
    if kind == "tokens":
        return found
    raise DataError(f"items.kind: got {kind!r}, expected classes, values, tokens or tags.", "Run the cell again.")


def _length(items: dict[str, Any], name: str) -> int:
    return len(items.get(name) or ())


def _classes(label: list[Any], predicted: list[Any], names: list[str] | None) -> Sums:
    """One class per row (an id or a name), or 0/1 for each class. Without names (choices) only what is right."""
    several = isinstance(label[0], list)
    if several:
        true, said = np.asarray(label, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
        return {"hit": true * said, "said": said, "true": true, "right": (true == said).all(1).astype(np.float64)}
    wanted, given = _ids(label, names), _ids(predicted, names)
    right = (wanted == given).astype(np.float64)
    if not names:
        return {"right": right}
    true, said = np.eye(len(names))[wanted], np.eye(len(names))[given]
    return {"hit": true * said, "said": said, "true": true, "right": right, "single": np.ones(len(right))}


def _values(label: list[float], predicted: list[float]) -> Sums:
    """Moments round the labels' mean, where sums of squares lose nothing."""
    wanted = np.asarray(label, dtype=np.float64)
    x, y = wanted - wanted.mean(), np.asarray(predicted, dtype=np.float64) - wanted.mean()
    return {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y, "gap": abs(x - y)}


def _tags(label: list[list[Any]], predicted: list[list[Any]], names: list[str] | None) -> Sums:
    """Words by tag, and whole entities where the tags mark some, as seqeval counts them."""
    wanted, given = [_ids(row, names) for row in label], [_ids(row, names) for row in predicted]
    size = len(names) if names else 1 + max(int(row.max(initial=0)) for row in (*wanted, *given))
    true = np.stack([np.bincount(row, minlength=size) for row in wanted]).astype(np.float64)
    said = np.stack([np.bincount(row, minlength=size) for row in given]).astype(np.float64)
    hit = np.stack([np.bincount(a[a == b], minlength=size) for a, b in zip(wanted, given, strict=True)])
    found: Sums = {"hit": hit.astype(np.float64), "said": said, "true": true}
    found |= {"words": true.sum(1), "words_right": found["hit"].sum(1)}
    from ..tasks.tag_metrics import marks_entities

    if names and marks_entities(names):
        pairs = [(_entities(a, names), _entities(b, names)) for a, b in zip(wanted, given, strict=True)]
        found["entity_hit"] = np.array([len(a & b) for a, b in pairs], dtype=np.float64)
        found["entity_true"] = np.array([len(a) for a, _ in pairs], dtype=np.float64)
        found["entity_said"] = np.array([len(b) for _, b in pairs], dtype=np.float64)
    return found


def _entities(row: np.ndarray, names: list[str]) -> set[Any]:
    from seqeval.metrics.sequence_labeling import get_entities

    from ..tasks.tag_metrics import SEQEVAL

    tags = [names[i] for i in row]
    return set(get_entities([SEQEVAL.get(tag[0], tag[0]) + tag[1:] for tag in tags]))


def _ids(values: list[Any], names: list[str] | None) -> np.ndarray:
    if values and isinstance(values[0], str):
        if names is None:
            raise DataError("items: labels are names, but class_names is missing.", "Run the cell again.")
        values = [names.index(value) for value in values]
    return np.asarray(values, dtype=np.int64)
