"""The report of a results folder: report.html, report.md, report.csv and report.json, all with the same numbers."""

import csv
import html
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..printing import counted
from .claims import told_claim
from .notes import notes
from .plots import plots
from .scoring import load
from .tables import table

SIGNS = {"met": "✓", "met on average": "~", "missed": "✗", "unknown": "?"}


def report_of(folder: Path) -> dict[str, Any]:
    """The content of report.json, from a results folder's records; nothing is written.

    Raises:
        ConfigError: no folder, or no finished cell in it. DataError: a record's items don't fit together.
    """
    found = table(load(folder))
    found["summary"] = [told_claim(line, found["reference"]) for line in found["claims"]]
    found["notes"] = notes(found)
    strict: dict[str, Any] = _strict(found)
    return strict


def write_report(folder: Path) -> dict[str, Any]:
    """Rebuild the four files of a results folder from its records.

    Returns:
        The content of report.json (see benchmarks/README.md).

    Raises:
        ConfigError, DataError: as `report_of` does. StorageError: a file can't be written.
    """
    found = report_of(folder)
    files = {
        "report.json": json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.csv": as_csv(found),
        "report.md": as_markdown(found),
        "report.html": as_html(found),
    }
    for name, content in files.items():
        _write(folder / name, content)
    return found


def _strict(content: Any) -> Any:
    """As JSON has it: numbers that are not finite become null."""
    if isinstance(content, dict):
        return {key: _strict(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _write(path: Path, content: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise StorageError(f"{path}: can't be written: {error}", "Free the disk, or mend the rights.") from error


def tried_by(found: dict[str, Any]) -> str:
    """The metric that learning rates are chosen by: the report's, where evaluations while training have it."""
    curves = [curve for row in found["results"] for curve in row["train_info"]["eval_curves"].values() if curve]
    return found["primary"] if not curves or any(found["primary"] in curve[-1] for curve in curves) else "loss"


def number(value: float | None, digits: int = 4) -> str:
    """For people: `–` where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def spread(one: dict[str, Any] | None, digits: int = 4, middle: str = "mean") -> str:
    """`0.9012 [0.8876, 0.9143]`."""
    if not one:
        return "–"
    return f"{number(one[middle], digits)} [{number(one['low'], digits)}, {number(one['high'], digits)}]"


def lines_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The main table: per method and column the text, and the number that it is sorted by."""
    lines = []
    primary = found["primary"]
    for row in found["results"]:
        facts, run = row["train_info"], row["run_info"]
        difference, kept = facts["difference"].get(primary), facts["gain_kept"].get(primary)
        low, high = row["places"]
        cells = [
            ("place", str(low) if low == high else f"{low}–{high}", row["place"]),
            ("method", row["name"], row["name"]),
            (primary, *_pair(facts["metrics"].get(primary), 4)),
            (f"minus {found['reference']}", _apart(difference), difference["mean"] if difference else None),
            ("gain kept", *_pair(kept, 3)),
            ("step, ms", *_measured(facts, "step_seconds", 1e3, 1)),
            ("× step", *_share(facts, "step_seconds")),
            ("peak, MiB", *_measured(facts, "peak_bytes", 2**-20, 0)),
            ("× peak", *_share(facts, "peak_bytes")),
            ("training, s", *_measured(facts, "train_seconds", 1, 1)),
            ("× training", *_share(facts, "train_seconds")),
            ("cost, USD", *_measured(facts, "cost_usd", 1, 5)),
            ("trained", *_measured(facts, "trainable_parameters", 1, 0)),
            ("file, MiB", *_measured(facts, "adapter_file_bytes", 2**-20, 2)),
            ("forgotten", *_measured(facts, "forgetting", 1, 4)),
            ("learning rate", ", ".join(f"{rate:g}" for rate in run["learning_rate"]), run["learning_rate"][0]),
            ("seeds", str(len(run["seeds"])), len(run["seeds"])),
        ]
        lines.append({"name": row["name"], "cells": cells})
    empty = {i for i in range(len(lines[0]["cells"])) if all(line["cells"][i][1] == "–" for line in lines)}
    for line in lines:
        line["cells"] = [cell for i, cell in enumerate(line["cells"]) if i not in empty]
    return lines


def _pair(one: dict[str, Any] | None, digits: int) -> tuple[str, float | None]:
    return spread(one, digits), one["mean"] if one else None


def _apart(one: dict[str, Any] | None) -> str:
    """A difference, marked where it is told apart from none."""
    if not one:
        return "–"
    text = f"{one['mean']:+.4f} [{number(one['low'])}, {number(one['high'])}]"
    return text + (" *" if one["distinguishable"] else "")


def _measured(facts: dict[str, Any], name: str, scale: float, digits: int) -> tuple[str, float | None]:
    one = facts[name]
    return (number(one["median"] * scale, digits), one["median"]) if one else ("–", None)


def _share(facts: dict[str, Any], name: str) -> tuple[str, float | None]:
    one = facts["shares"][name]
    return (f"{one['ratio']:.2f} [{one['low']:.2f}, {one['high']:.2f}]", one["ratio"]) if one else ("–", None)


PUBLISHED = ("method", "number", "published", "ours", "ours − published")
NAMED = {  # of a report's rows: heading, scale, digits
    "train_seconds": ("training, s", 1.0, 1),
    "peak_bytes": ("peak, MiB", 2**-20, 0),
    "cost_usd": ("cost, USD", 1.0, 2),
    "forgetting": ("forgotten", 1.0, 4),
    "trainable_parameters": ("trained", 1.0, 0),
    "adapter_file_bytes": ("file, MiB", 2**-20, 2),
}


def published_lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Published figures beside ours, as the columns of PUBLISHED; none where the suite names none."""
    lines: list[tuple[str, ...]] = []
    for row in (found["published"] or {"rows": []})["rows"]:
        name, scale, digits = NAMED.get(row["number"], (row["number"], 1.0, 4))
        published, ours, low, high, difference = (
            None if row[key] is None else row[key] * scale for key in ("published", "ours", "low", "high", "difference")
        )
        theirs = number(published, digits) + (f" ± {row['spread']:g}" if row["spread"] is not None else "")
        mine = number(ours, digits) + ("" if low is None else f" [{number(low, digits)}, {number(high, digits)}]")
        apart = "–" if difference is None else f"{difference:+,.{digits}f}"
        apart += {True: " (inside our interval)", False: " (outside)", None: ""}[row["inside"]]
        lines.append((row["method"], name, theirs, mine, apart))
    return lines


def published_words(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Where they come from, as lines of name and value."""
    told = found["published"]
    source = told["source"]
    lines = [
        ("Source", ", ".join(source[name] for name in ("what", "table") if name in source)),
        ("Address", source.get("url", "")),
        ("Commit", source.get("commit", "")),
        ("Read", told["verified"]),
        ("Model", told["model"]),
        ("Hardware", told["hardware"]),
        ("Settings", told["setup"]),
        ("Otherwise here", told["differs"]),
    ]
    return [(name, " ".join(value.split())) for name, value in lines if value]


LEGEND = (
    "Square brackets: 95% bootstrap interval over seeds and test items for scores, range over seeds for shares "
    "(×: ours by the reference's, median over seeds). * the difference is told apart from none. place: where paired "
    "intervals leave several places open, all of them. "
    "forgotten: rise of the loss on general text, nats per token."
)


def as_html(found: dict[str, Any]) -> str:
    """One page that asks for nothing else; every text in it is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("peft_engine.bench")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "spread": spread, "shown": _shown}
    drawn = [{**one, "svg": Markup(one["svg"])} for one in plots(found)]
    page = environment.get_template("report.html.jinja")
    metrics = list(dict.fromkeys(name for row in found["results"] for name in row["train_info"]["metrics"]))
    return page.render(
        found=found,
        plots=drawn,
        lines=lines_of(found),
        metrics=metrics,
        legend=LEGEND,
        signs=SIGNS,
        facts=_facts(found),
        tried_by=tried_by(found),
        published=published_lines(found),
        published_words=published_words(found) if found["published"] else [],
        published_columns=PUBLISHED,
    )


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What ran, as lines of name and value."""
    run, meta = found["run_info"], found["meta_info"]
    before = spread(found["before"]["metrics"].get(found["primary"]))
    finals = sum(len(row["run_info"]["seeds"]) for row in found["results"])
    lines = [
        ("When", f"{run['first']} to {run['last']}"),
        ("Hardware", _shown(meta["hardware"])),
        ("Versions", _shown(meta["versions"])),
        ("Kernels", _kernels(found["results"])),
        ("Code", _shown(meta["git"])),
        ("Command", "; ".join(str(one) for one in run["commands"])),
        ("Cells", f"{finals} final ({len(found['results'])} methods, seeds {', '.join(map(str, run['seeds']))})"),
        ("Budget", _shown([run["budget"]] if run["budget"] else [])),
        ("Cost", _cost(found)),
        ("Test rows", "–" if run["test_rows"] is None else f"{run['test_rows']:,}"),
        ("Data, weights", f"{_shown(meta['data_digest'])}; {_shown(meta['weights_digest'])}"),
        (
            "Before training",
            f"{found['primary']} {before}, from {found['before']['from']}",
        ),
    ]
    return [(name, value) for name, value in lines if value]


def _cost(found: dict[str, Any]) -> str:
    """What the costs are made of; empty where there are none."""
    price = found["run_info"]["price"]
    told = (
        f"runs, from loading to saving, at {price['usd_per_hour']:g} USD an hour ({price['source']})"
        if price and price["cells"]
        else ""
    )
    recorded = sum(cell["train_info"].get("cost_usd") is not None for cell in found["cells"])
    own = f"{counted(recorded, 'cell')} as recorded, by config.budget.usd_per_hour" if recorded else ""
    return "; ".join(part for part in (told, own) if part)


def _kernels(rows: list[dict[str, Any]]) -> str:
    """Which parts were swapped for fused ones, by methods that are alike in it."""
    alike: dict[str, list[str]] = {}
    for row in rows:
        told = row["meta_info"]["kernels"] or {}
        left = f", {counted(len(told['skipped']), 'part')} left as they are" if told.get("skipped") else ""
        text = f"{told['backend']} ({_shown(told.get('swapped') or {}) or 'nothing'}{left})" if told else "off"
        if told.get("frozen") is not None:
            above = len(set(told.get("frozen_errors") or {}) & set(told.get("kept_full") or {}))
            text += f", frozen products {_shown(told['frozen']) or 'in full'}, {above} linears above the bound"
        alike.setdefault(text, []).append(row["name"])
    return "; ".join(f"{', '.join(names)}: {text}" for text, names in alike.items())


def _shown(values: Any) -> str:
    """Plain data in one line: `cpu Some CPU, cpu_threads 1`."""
    if isinstance(values, dict):
        return ", ".join(f"{name} {_shown(value)}" for name, value in values.items() if value not in (None, {}, []))
    if isinstance(values, list):
        return "; ".join(_shown(value) for value in values)
    return f"{values:g}" if isinstance(values, float) else str(values)


def as_markdown(found: dict[str, Any]) -> str:
    """The same numbers for a repository's page."""
    lines = lines_of(found)
    names = [name for name, _, _ in lines[0]["cells"]]
    text = [f"# {_plain(found['title'])}", ""]
    text += [_plain(found["description"]), ""] if found["description"] else []
    text += [f"- {SIGNS[c['verdict']]} {_plain(t)}" for c, t in zip(found["claims"], found["summary"], strict=True)]
    text += [f"- {SIGNS['unknown']} {_plain(found['unclaimed'])}"] if found["unclaimed"] else []
    text += [f"- {_plain(line)}" for line in found["notes"]]
    text += [f"- failed: {_plain(one['cell'])}: {_plain(one['reason'])}" for one in found["failed"]]
    text += [f"- missing: {_plain(one)}" for one in found["missing"]]
    text += [f"- left out: {_plain(one['cell'])}: {_plain(one['reason'])}" for one in found["left_out"]]
    text += ["", *_rows([names] + [[shown for _, shown, _ in line["cells"]] for line in lines]), "", LEGEND, ""]
    if found["published"]:
        text += [f"## Published: {_plain(found['published']['title'])}", ""]
        text += [*_rows([list(PUBLISHED), *map(list, published_lines(found))]), ""]
        text += [*(f"- {name}: {_plain(value)}" for name, value in published_words(found)), ""]
    metrics = list(dict.fromkeys(name for row in found["results"] for name in row["train_info"]["metrics"]))
    body = [
        [row["name"], *(spread(row["train_info"]["metrics"].get(name)) for name in metrics)] for row in found["results"]
    ]
    text += ["## All metrics", "", *_rows([["method", *metrics], *body]), "", "## Learning rates", ""]
    rates = [
        [
            line["method"],
            ", ".join(f"{rate:g}" for rate in line["chosen"]),
            "; ".join(f"{one['learning_rate']:g}: {number(one['eval'])}" for one in line["tried"]) or "–",
            "at the edge" if line["at_edge"] else "" if line["tuned"] else "given",
        ]
        for line in found["learning_rates"]
    ]
    text += [*_rows([["method", "chosen", f"tried: last eval {tried_by(found)}", ""], *rates]), "", "## What ran", ""]
    text += [f"- {name}: {_plain(value)}" for name, value in _facts(found)]
    return "\n".join(text) + "\n"


def _rows(rows: list[list[str]]) -> list[str]:
    listed = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in rows]
    return [listed[0], "|" + "---|" * len(rows[0]), *listed[1:]]


def _plain(text: Any) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def as_csv(found: dict[str, Any]) -> str:
    """One line per method, number and statistic: a long table, for programs.

    Columns: method, number, unit-less statistic (mean, low, high, median, ratio, seed-N), value.
    """
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(["method", "group", "number", "statistic", "value"])
    for row in found["results"]:
        facts = row["train_info"]
        groups = {name: facts[name] for name in ("metrics", "difference", "gain_kept", "shares")}
        groups["measured"] = {k: v for k, v in facts.items() if isinstance(v, dict) and "median" in v}
        groups["memory"] = {name: {"median": value} for name, value in facts["memory"].items()}
        for group, numbers in groups.items():
            for name, one in numbers.items():
                flat = {k: v for k, v in (one or {}).items() if k != "by_seed"}
                flat |= {f"seed-{seed}": value for seed, value in (one or {}).get("by_seed", {}).items()}
                for statistic, value in flat.items():
                    shown = int(value) if isinstance(value, bool) else "" if value is None else repr(value)
                    writer.writerow([_cell(row["name"]), group, _cell(name), statistic, shown])
    return written.getvalue()


def _cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
