"""Labels of classification: of which type they are, their names in order of their ids, and their encoding.

The order is the one given in `data.labels`, else sorted: whole numbers by value, other names by code point. It is saved
with the run and never depends on the order of the rows.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import ConfigError, DataError
from .formats import Example
from .text_layouts import WHOLE, is_printed, parsed

LabelType = Literal["single", "multi", "regression", "tags", "choice"]
MOST_CLASSES = 1000
NOT_LEARNED = -100  # class id of a word without a tag
NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


@dataclass(frozen=True)
class Labels:
    """How labels become numbers."""

    kind: LabelType
    """`tags` are a class per word, `choice` is the place of the right answer."""
    names: list[str]
    """Class names in order of their ids; empty for regression and choices."""
    pair: bool = False
    """Whether they are of pairs of texts."""
    places: bool = False
    """Whether a tag that is a number is the place of one in `names`: data.labels gave their order."""

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def encode(self, value: Any, where: str) -> int | float | list[float]:
        """The class id (single), 0.0 or 1.0 per class (multi), or the number (regression, choice).

        Args:
            value: the label as the row holds it.
            where: where the row stands, for the message.

        Raises:
            DataError: a class that is not among `names`, or a value of another type.
        """
        if self.kind == "regression":
            return _number(value, where)
        if self.kind == "choice":
            return int(value)
        if self.kind == "single":
            return self._id(_name(value, where), where)
        hot = [0.0] * len(self.names)
        for name in _listed_names(value, where):
            hot[self._id(name, where)] = 1.0
        return hot

    def encode_tags(self, tags: Sequence[str | int | None], where: str) -> list[int]:
        """Class ids of a row's words (tags), NOT_LEARNED where a word has none. Raises DataError as `encode` does."""
        return [NOT_LEARNED if tag is None else self._id(self._tag_name(tag), where) for tag in tags]

    def _tag_name(self, tag: str | int) -> str:
        """A tag's name; a number is the place of one in `names` that were given, unless they are numbers themselves."""
        name = str(tag)
        if self.places and name not in self._ids and WHOLE.fullmatch(name) and 0 <= int(name) < len(self.names):
            return self.names[int(name)]
        return name

    def classes(self, value: Any, where: str) -> list[str]:
        """Names of the classes that a label holds; none for numbers. Raises DataError as `encode` does."""
        if self.kind == "tags":
            return [self.names[i] for i in sorted(set(self.encode_tags(value, where))) if i != NOT_LEARNED]
        if self.kind == "choice":
            return []
        encoded = self.encode(value, where)
        if isinstance(encoded, list):
            return [name for name, hot in zip(self.names, encoded, strict=True) if hot]
        return [self.names[int(encoded)]] if self.kind == "single" else []

    def _id(self, name: str, where: str) -> int:
        if name not in self._ids:
            if self.kind == "tags" and WHOLE.fullmatch(name):
                raise DataError(
                    f"{where}: the tag {name} is a number, and those of the training split are names "
                    f"({_shortened(self.names)}).",
                    "Write names, or train with data.labels, whose order numbers then follow.",
                )
            raise DataError(
                f"{where}: label {name!r} is not among those of the training split ({_shortened(self.names)}).",
                "Mend the row, add training rows of this label, or set data.labels if it is one.",
            )
        return self._ids[name]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        told = {"kind": self.kind, "names": self.names}
        return told | {name: True for name in ("pair", "places") if getattr(self, name)}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Labels":
        """What `to_json` gave."""
        told = {name: bool(saved.get(name, False)) for name in ("pair", "places")}
        return cls(kind=saved["kind"], names=list(saved["names"]), **told)


def label_of(example: Example) -> Any:
    """What a labelled example holds for its classes: its label, or the tags of its words."""
    return example["tags"] if "tags" in example else example["label"]


def find_labels(
    examples: Sequence[Example],
    where: Callable[[int], str],
    label_type: str,
    given: list[str | int] | None,
    rows: int | None = None,
) -> Labels:
    """Type and names of the examples' labels.

    Args:
        examples: the rows to learn from.
        where: where row i stands, for messages.
        label_type: `auto`: lists are multi, numbers that are not all whole are regression, all else is single.
        given: class names in order of their ids.
        rows: how many rows there are, where `examples` are only the first of each label; for messages.

    Raises:
        ConfigError: `given` names a class twice, or the labels are numbers.
        DataError: a label of another type, a class outside `given`, one class only, or more than 1000.
    """
    values, rows = [label_of(example) for example in examples], rows or len(examples)
    if "choices" in examples[0]:
        return _choice(label_type, given)
    if "tags" in examples[0]:
        return _tags(values, where, given, rows)
    pair = "text_pair" in examples[0]
    kind = _guessed_kind(values, where) if label_type == "auto" else label_type
    if kind == "regression":
        return replace(_regression(values, where, given, rows), pair=pair)
    listed = kind == "multi"
    if listed:
        _refuse_vectors(values, where)
    named = [_listed_names(v, where(i)) if listed else [_name(v, where(i))] for i, v in enumerate(values)]
    if len({frozenset(names) for names in named}) == 1:
        raise DataError(
            f"All {rows} labels are {values[0]!r} ({where(0)} is the first); at least two classes are needed.",
            "Check the label column, and whether the file is sorted and cut.",
        )
    first_seen: dict[str, int] = {}
    for i, names in enumerate(named):
        for name in names:
            first_seen.setdefault(name, i)
    _check_names(first_seen, where)
    if len(first_seen) > MOST_CLASSES and given is None and not listed:
        raise DataError(
            f"{len(first_seen)} different labels in {rows} rows, such as {_shortened(list(first_seen), 3)}; "
            f"more than {MOST_CLASSES} classes are not taken unasked.",
            "Check the label column; set data.label_type=regression for numbers, or name the classes in data.labels.",
        )
    if given is None:
        return Labels("multi" if listed else "single", _sorted_names(first_seen), pair)
    labels = Labels("multi" if listed else "single", [str(name) for name in given], pair)
    _check_given(labels, first_seen, where)
    return labels


def _check_given(labels: Labels, first_seen: dict[str, int], where: Callable[[int], str]) -> None:
    twice = sorted({name for name in labels.names if labels.names.count(name) > 1})
    if twice:
        raise ConfigError(f"data.labels names {twice} more than once.", "Name each class once.")
    for name, i in first_seen.items():
        if name not in labels.names:
            raise DataError(
                f"{where(i)}: label {name!r} is not in data.labels ({_shortened(labels.names)}).",
                "Add it there, or mend the rows.",
            )


def _choice(label_type: str, given: list[str | int] | None) -> Labels:
    for name, setting, nothing in (("label_type", label_type, "auto"), ("labels", given, None)):
        if setting != nothing:
            raise ConfigError(f"data.{name} = {setting} has no use with choices: each row has its own.", "Remove it.")
    return Labels("choice", [])


def _tags(values: list[Any], where: Callable[[int], str], given: list[str | int] | None, rows: int) -> Labels:
    """Tags by name; where they are numbers, `given` names them in their order."""
    first_seen: dict[str, int] = {}
    named = Labels("tags", [str(name) for name in given or ()], places=given is not None)
    for i, tags in enumerate(values):
        for tag in tags:
            if tag is not None:
                first_seen.setdefault(named._tag_name(tag), i)
    if len(first_seen) < 2:
        found = f"{next(iter(first_seen))!r} only" if first_seen else "none"
        raise DataError(f"The tags of all {rows} rows are {found}; at least two are needed.", "Check the tags' column.")
    _check_names(first_seen, where)
    if given is None:
        return Labels("tags", _sorted_names(first_seen))
    _check_given(named, first_seen, where)
    return named


def _guessed_kind(values: list[Any], where: Callable[[int], str]) -> LabelType:
    lists = [as_list(value) is not None for value in values]
    if any(lists):
        if not all(lists):
            raise DataError(
                f"{where(lists.index(False))}: the label {values[lists.index(False)]!r} is no list, while that of "
                f"{where(lists.index(True))} is.",
                "Write lists everywhere, or set data.label_type.",
            )
        return "multi"
    if all(_is_number(value) for value in values) and not all(_is_whole(value) for value in values):
        return "regression"
    return "single"


def _refuse_vectors(values: list[Any], where: Callable[[int], str]) -> None:
    """Refuse labels that are all vectors of zeros and ones, two or more long and of one length."""
    vectors = [as_list(value) or [] for value in values]
    if len(vectors[0]) < 2 or len(set(map(len, vectors))) > 1:
        return
    if all(isinstance(item, int | float) and item in (0, 1) for vector in vectors for item in vector):
        one_hot = all(sum(vector) == 1 for vector in vectors)
        raise DataError(
            f"{where(0)}: the label {values[0]!r} is a {'one-hot vector' if one_hot else 'vector of zeros and ones'}, "
            "and so are all others; a list is read as the names of classes.",
            "Write the class, such as the place of the 1, as one number per row."
            if one_hot
            else "Write the names of the classes that apply, such as the places of the ones.",
        )


def _regression(values: list[Any], where: Callable[[int], str], given: list[str | int] | None, rows: int) -> Labels:
    if given is not None:
        raise ConfigError(f"data.labels = {given} names classes, but the labels are numbers.", "Remove it.")
    numbers = [_number(value, where(i)) for i, value in enumerate(values)]
    if len(set(numbers)) == 1:
        raise DataError(
            f"All {rows} labels are {numbers[0]} ({where(0)} is the first).",
            "There is nothing to learn; check the label column.",
        )
    return Labels("regression", [])


def _check_names(first_seen: dict[str, int], where: Callable[[int], str]) -> None:
    for name, i in first_seen.items():
        other = first_seen.get(name.strip(), i)
        if other != i:
            raise DataError(
                f"{where(i)}: label {name!r} differs from {name.strip()!r} ({where(other)}) by blanks only.",
                "Write them alike.",
            )


def _sorted_names(names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    return sorted(ordered, key=int) if all(WHOLE.fullmatch(name) for name in ordered) else ordered


def _name(value: Any, where: str) -> str:
    """A class by its name: whole numbers without a decimal point, so that 1.0 and 1 are one class."""
    name = class_name(value)
    if name is None:
        raise DataError(f"{where}: label {value!r} is no string or number.", "One class per row, or lists everywhere.")
    if is_printed(value) and as_list(value) is None:
        raise DataError(
            f"{where}: the label {value!r} looks like a list that was printed.", 'Write it as JSON: ["a", "b"].'
        )
    return name


def class_name(value: Any) -> str | None:
    """The name of a class, None of what names none."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, str | int | float) else None


def _listed_names(value: Any, where: str) -> list[str]:
    listed = as_list(value)
    if listed is None:
        raise DataError(f"{where}: label {value!r} is no list.", 'Several classes are a list: ["a", "b"]; none is [].')
    names = [_name(item, where) for item in listed]
    if len(set(names)) < len(names):
        raise DataError(
            f"{where}: the label {value!r} names a class twice.",
            "Write the names of the classes that apply; a vector of zeros and ones is not taken.",
        )
    return names


def as_list(value: Any) -> list[Any] | None:
    """Several classes: a list, or the list that a text (a CSV cell) holds, written as JSON or as Python prints it."""
    value = parsed(value)
    return value if isinstance(value, list) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) or float(number).is_integer()


def _number(value: Any, where: str) -> float:
    try:
        number = float(value) if _is_number(value) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        problem = f"{where}: label {value!r} is no finite number."
        raise DataError(problem, "Mend the row, or set data.label_type=single.")
    return number


def _shortened(names: list[str], most: int = 10) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + rest
