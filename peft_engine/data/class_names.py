"""Names of classes that the `datasets` library keeps beside a table's numbers (ClassLabel), and rows that hold them."""

import json
from collections.abc import Mapping
from typing import Any

LISTS = ("Sequence", "List", "LargeList")


def names_in_schema(schema: Any) -> dict[str, list[str]]:
    """Names by column, of classes and of lists of classes; none where the pyarrow schema tells none.

    Parquet and Arrow files that `datasets` wrote hold its features as JSON under the key "huggingface".
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: names for name, feature in features.items() if (names := _names(feature))}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def names_in_features(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The same of a loaded data set's `features`."""
    return {
        name: list(names)
        for name, feature in features.items()
        if (names := getattr(getattr(feature, "feature", feature), "names", None))
    }


def with_names(row: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """A row with names in the place of class numbers. In `datasets`, -1 says that a row has no class; other numbers
    outside of the names stay as they are."""
    if not names:
        return row
    return {key: _named(value, names[key]) if key in names else value for key, value in row.items()}


def told_of_names(columns: Mapping[str, str], names: dict[str, list[str]], source: str) -> list[str]:
    """A note for each part of the rows whose numbers were read as names.

    Args:
        columns: part to column.
    """
    found = [(column, names[column]) for column in columns.values() if column in names]
    return [
        f"{column}: the classes have the names that {source} gives its numbers: {', '.join(own[:5])}"
        f"{', …' if len(own) > 5 else ''}."
        for column, own in found
    ]


def _names(feature: Any) -> list[str] | None:
    if isinstance(feature, list) and len(feature) == 1:  # as older versions wrote lists
        return _names(feature[0])
    if feature.get("_type") == "ClassLabel":
        return [str(name) for name in feature["names"]] if feature.get("names") else None
    return _names(feature["feature"]) if feature.get("_type") in LISTS else None


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [names[v] if _is_place(v, names) else v for v in value]
    if value == -1:
        return None
    return names[value] if _is_place(value, names) else value


def _is_place(value: Any, names: list[str]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names)
