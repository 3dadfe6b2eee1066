"""Figures that others published for a suite's methods, put beside what was measured here."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from .suite import Published

FILE = "published.yaml"
"""The figures' copy in a results folder: its report needs nothing else."""
NUMBERS = ("train_seconds", "peak_bytes", "cost_usd", "forgetting", "trainable_parameters", "adapter_file_bytes")
"""What a figure may say beside `metrics`; named, and with the units, of a report's rows."""


class Figure(BaseModel):
    """What was published of one method on one task."""

    model_config = ConfigDict(extra="allow")
    task: str
    method: str
    metrics: dict[str, float] = {}
    """By the publication's names."""
    spread: dict[str, float] = {}
    """What stands behind its ±."""


class Publication(BaseModel):
    """A file of figures with where they come from."""

    model_config = ConfigDict(extra="allow")
    title: str
    source: dict[str, str]
    """what, url, table, and the commit where there is one."""
    verified: str
    hardware: str
    model: str
    setup: str
    differs: str = ""
    """What is otherwise here."""
    figures: list[Figure] = Field(min_length=1)


def read_publication(path: Path) -> Publication:
    """A file of figures.

    Raises:
        ConfigError: it can't be read, or something is missing in it.
    """
    try:
        return Publication.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        places = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg'].lower()}" for one in error.errors()]
        problem = "; ".join(places[:5])
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(getattr(error, "strerror", None) or error).split())
    raise ConfigError(
        f"{path}: no published figures can be read from it: {problem}.",
        "Write it as benchmarks/published/*.yaml are, or take `published` out of the suite.",
    )


def figures_of(publication: Publication, wanted: Published) -> list[Figure]:
    """Those of the suite's task. Raises ConfigError where there are none."""
    chosen = [one for one in publication.figures if wanted.task in (None, one.task)]
    if not chosen:
        known = ", ".join(dict.fromkeys(one.task for one in publication.figures))
        raise ConfigError(
            f"published.task: {wanted.path} has no figures of {wanted.task}, only of {known}.", "Name one of these."
        )
    return chosen


def beside(publication: Publication, wanted: Published, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Each published figure with ours.

    Args:
        rows: the report's rows.

    Returns:
        The publication's own words, and `rows`: method, number (the publication's name), published, spread (or None),
        ours, low, high (an interval for metrics, the range over seeds for all else; None where nothing was
        measured), difference (ours − published), inside (the published figure lies within low to high; None unless a
        metric has an interval).
    """
    measured = {row["name"]: row["train_info"] for row in rows}
    lines = []
    for figure in figures_of(publication, wanted):
        facts = measured.get(figure.method)
        for name, value in figure.metrics.items():
            ours = facts and _metric(facts, wanted.metrics.get(name, name))
            lines.append(_line(figure, name, value, ours or {}, "mean"))
        for name, value in (figure.model_extra or {}).items():
            if name in NUMBERS and isinstance(value, int | float):
                lines.append(_line(figure, name, value, (facts and facts[name]) or {}, "median"))
    words = publication.model_dump(include={"title", "source", "verified", "hardware", "model", "setup", "differs"})
    return words | {"rows": lines}


def _metric(facts: dict[str, Any], name: str) -> dict[str, Any] | None:
    """A metric of a report's row; `per_class.CLASS.NUMBER` has no interval."""
    if not name.startswith("per_class."):
        found: dict[str, Any] | None = facts["metrics"].get(name)
        return found
    _, label, number = name.split(".", 2)
    value = ((facts["per_class"] or {}).get(label) or {}).get(number)
    return None if value is None else {"mean": value}


def _line(figure: Figure, name: str, value: float, ours: dict[str, Any], middle: str) -> dict[str, Any]:
    low, high, mean = ours.get("low"), ours.get("high"), ours.get(middle)
    inside = None if middle != "mean" or low is None or high is None else bool(low <= value <= high)
    return {
        "method": figure.method,
        "number": name,
        "published": value,
        "spread": figure.spread.get(name),
        "ours": mean,
        "low": low,
        "high": high,
        "difference": None if mean is None else mean - value,
        "inside": inside,
    }
