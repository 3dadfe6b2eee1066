"""Results folders, read and checked: which records count, and their scores under each draw."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..meters.cost import cost_usd
from .columns import columns_of
from .records import read_records
from .statistics import Sample, Sums, flat_sample, resample, sample
from .suite import SMALLER_IS_BETTER, metrics_in, recorded

Record = dict[str, Any]


def info(*path: str) -> Callable[[Record], float | None]:
    def read(record: Record) -> float | None:
        found: Any = record["train_info"]
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found if isinstance(found, int | float) and math.isfinite(found) else None

    return read


def _forgotten(record: Record) -> float | None:
    before, after = info("forgetting", "before")(record), info("forgetting", "after")(record)
    return None if before is None or after is None else after - before


MEASURED: dict[str, Callable[[Record], float | None]] = {
    "step_seconds": info("step_seconds", "p50"),
    "load_seconds": info("seconds", "load"),
    "train_seconds": info("seconds", "train"),
    "evaluate_seconds": info("seconds", "evaluate"),
    "save_seconds": info("seconds", "save"),
    "wall_seconds": info("wall_seconds"),
    "tokens_per_second": info("tokens_per_second"),
    "peak_bytes": info("peak_bytes"),
    "peak_rss_bytes": info("peak_rss_bytes"),
    "optimizer_state_bytes": info("optimizer_state_bytes"),
    "trainable_parameters": info("trainable_parameters"),
    "total_parameters": info("total_parameters"),
    "adapter_file_bytes": info("adapter_file_bytes"),
    "flops_per_step": info("flops_per_step"),
    "mfu": info("mfu"),
    "energy_joules": info("energy_joules"),
    "cost_usd": info("cost_usd"),
    "forgetting": _forgotten,
}


@dataclass
class Results:
    """What a results folder holds, checked.

    finals: method → seed → record. samples: method → metric → Sample. before: metric → Sample of the untouched model.
    left_out: records that are in no number, with the reason. rows: the test rows that all scores are over.
    """

    folder: Path
    suite: dict[str, Any]
    finals: dict[str, dict[int, Record]] = field(default_factory=dict)
    tunings: list[Record] = field(default_factory=list)
    baseline: Record | None = None
    columns: dict[str, dict[int, Sums]] = field(default_factory=dict)
    samples: dict[str, dict[str, Sample]] = field(default_factory=dict)
    before: dict[str, Sample] = field(default_factory=dict)
    before_from: str = ""
    left_out: list[dict[str, str]] = field(default_factory=list)
    rows: list[Any] | None = None

    @property
    def reference(self) -> str:
        return str(self.suite.get("reference", "full"))

    @property
    def primary(self) -> str:
        """The suite's, or the task's own."""
        return str(self.suite.get("primary") or self._any()["train_info"]["primary"])

    @property
    def maximize(self) -> bool:
        own = self._any()["train_info"]
        return bool(own["maximize"]) if self.primary == own["primary"] else self.primary not in SMALLER_IS_BETTER

    def _any(self) -> Record:
        return next(iter(next(iter(self.finals.values())).values()))

    @property
    def usd_per_hour(self) -> float | None:
        """The suite's price of its machine. Raises ConfigError where it is none."""
        price = self.suite.get("usd_per_hour")
        if price is None:
            return None
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
            raise ConfigError(
                f"{self.folder / 'suite.yaml'}: usd_per_hour: got {price!r}, expected dollars above 0, or null.",
                "Mend it there, and in the suite itself.",
            )
        return float(price)

    def priced(self, record: Record) -> bool:
        """Whether a record says nothing of cost itself, so that the suite's price counts."""
        return info("cost_usd")(record) is None and self.usd_per_hour is not None

    def measured(self, method: str, name: str) -> dict[int, float]:
        """seed → number, of the seeds that have one. Cost: of the whole run, by the suite's price where a
        record has none."""
        each = {seed: MEASURED[name](record) for seed, record in self.finals.get(method, {}).items()}
        if name == "cost_usd":
            for seed, record in self.finals.get(method, {}).items():
                seconds = MEASURED["wall_seconds"](record)
                if self.priced(record) and seconds is not None:
                    each[seed] = cost_usd(seconds, self.usd_per_hour)
        return {seed: value for seed, value in each.items() if value is not None}


def load(folder: Path) -> Results:
    """Read and check a results folder; draw its resamples.

    Raises:
        ConfigError: no such folder, no finished final cell in it, or no metric that the suite ranks by.
    """
    if not (folder / "cells").is_dir():
        raise ConfigError(f"{folder}: no results here, expected {folder / 'cells'}.", "Run `peft-engine bench` first.")
    good, bad = read_records(folder)
    suite, problem = _suite(folder)
    found = Results(folder, _as_recorded(list(good.values())) | suite)
    found.left_out = [{"cell": name, "reason": unplaced(reason, folder).rstrip(".")} for name, reason in bad.items()]
    if problem:
        reason = f"{unplaced(problem, folder)}; without it the reference is taken to be {found.reference}"
        found.left_out.append({"cell": "suite.yaml", "reason": reason})
    for record in sorted(good.values(), key=lambda one: str(one["run_info"].get("created_at"))):
        _place(found, record)
    if not found.finals:
        raise ConfigError(f"{folder}: no finished cell of kind `final`, so nothing to report.", "Go on with the bench.")
    _score(found)
    if suite.get("primary") and not any(found.primary in samples for samples in found.samples.values()):
        known = sorted({name for samples in found.samples.values() for name in samples})
        raise ConfigError(
            f"{folder / 'suite.yaml'}: primary: got {found.primary}, expected one of {', '.join(known)}.",
            "Correct it there, and in the suite that `peft-engine bench` is given.",
        )
    return found


def unplaced(text: str, folder: Path) -> str:
    """`text` without where the results and the working directory lie on this machine: reports are published."""
    for place in (folder / "cells", folder.resolve(), Path.cwd()):
        text = text.replace(f"{place}{os.sep}", "")
    return text


def _suite(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The folder's suite, and what is wrong with it; sections that are wrong are not in it."""
    path = folder / "suite.yaml"
    if not path.is_file():
        return {}, None
    try:
        suite, wrong = recorded(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        return {}, "can't be read: " + " ".join(str(getattr(error, "problem", error)).rstrip(".").split())
    if suite is None:
        return {}, "holds no settings"
    kept = {
        name: value for name, value in suite.items() if not any(re.match(rf"{re.escape(name)}\b", w) for w in wrong)
    }
    return kept, f"has something else than a suite's {', '.join(wrong)}" if wrong else None


def _as_recorded(records: list[Record]) -> dict[str, Any]:
    """What the records tell of a suite that can't be read."""
    names = {str(record["run_info"].get("suite")) for record in records}
    return {"name": names.pop()} if len(names) == 1 else {}


def _place(found: Results, record: Record) -> None:
    """Where a record belongs; of two for one cell, the newer."""
    run = record["run_info"]
    if run["kind"] == "tuning":
        found.tunings.append(record)
    elif run["kind"] == "baseline":
        found.baseline = record
    else:
        cells = found.finals.setdefault(str(run["method"]), {})
        if run["seed"] in cells:
            reason = f"older than another record of the same cell, of {run['created_at']}"
            found.left_out.append(
                {"cell": f"{run['experiment_name']} ({cells[run['seed']]['key'][:8]})", "reason": reason}
            )
        cells[run["seed"]] = record


def _score(found: Results) -> None:
    """Columns and resamples of all cells over the same test rows."""
    cells = [(method, seed, record) for method, of in found.finals.items() for seed, record in sorted(of.items())]
    cells.sort(key=lambda cell: (cell[0] != found.reference, cell[1]))  # whose rows count: the reference's
    kept: list[tuple[str, int, Sums]] = []
    for method, seed, record in cells:
        columns = _ordered(found, record)
        if columns is None and _has_items(record):
            reason = "tested on other rows than the rest: not comparable"
            found.left_out.append({"cell": record["run_info"]["experiment_name"], "reason": reason})
            del found.finals[method][seed]
        elif columns is not None:
            kept.append((method, seed, columns))
    found.finals = {method: of for method, of in found.finals.items() if of}
    base = _ordered(found, found.baseline) if found.baseline and _has_items(found.baseline) else None
    drawn = resample([columns for _, _, columns in kept] + ([base] if base else []))
    pairs: dict[str, dict[int, tuple[Sums, Sums]]] = {}
    for (method, seed, columns), one in zip(kept, drawn, strict=False):
        pairs.setdefault(method, {})[seed] = (columns, one)
        found.columns.setdefault(method, {})[seed] = columns
    for method, of in found.finals.items():
        whole = len(pairs.get(method, {})) == len(of)
        found.samples[method] = sample(pairs[method]) if whole else {}
        for name in _numbers(of):
            if name not in found.samples[method]:
                values = {seed: _metric(record, "metrics_after", name) for seed, record in of.items()}
                if all(value is not None for value in values.values()):
                    found.samples[method][name] = flat_sample({s: v for s, v in values.items() if v is not None})
    _untouched(found, base, drawn[-1] if base else None)


def _has_items(record: Record) -> bool:
    return bool((record["train_info"].get("items") or {}).get("rows"))


def _ordered(found: Results, record: Record | None) -> Sums | None:
    """A record's columns, by row id; None where it has none, or where its rows are not those of the others."""
    if record is None or not _has_items(record):
        return None
    info = record["train_info"]
    rows = info["items"]["rows"]
    order = sorted(range(len(rows)), key=lambda i: str(rows[i]))
    ids = [rows[i] for i in order]
    if found.rows is None:
        found.rows = ids
    if ids != found.rows:
        return None
    try:
        columns = columns_of(info["items"], info.get("class_names"))
    except DataError as error:
        raise DataError(f"{record['run_info']['experiment_name']}: {error.problem}", error.fix) from error
    return {name: column[order] for name, column in columns.items()}


def _untouched(found: Results, base: Sums | None, drawn: Sums | None) -> None:
    """Scores before training: of the baseline cell on its items; else what the reference's cells measured."""
    found.before_from = "the reference's cells, before their first step"
    if base is not None and drawn is not None:
        found.before = sample({0: (base, drawn)})
        found.before_from = "the baseline cell, on the same test items"
    for method in (found.reference, *found.finals):
        of = found.finals.get(method, {})
        for name in _numbers(of, "metrics_before"):
            values = {seed: _metric(record, "metrics_before", name) for seed, record in of.items()}
            if name not in found.before and all(value is not None for value in values.values()):
                found.before[name] = flat_sample({s: v for s, v in values.items() if v is not None})


def _numbers(of: dict[int, Record], when: str = "metrics_after") -> list[str]:
    return list(dict.fromkeys(name for one in of.values() for name in metrics_in(one["train_info"].get(when))))


def _metric(record: Record, when: str, name: str) -> float | None:
    value = (record["train_info"].get(when) or {}).get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
