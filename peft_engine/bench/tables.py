"""From records to one table: every number that a report shows, as plain data."""

import json
import math
from dataclasses import asdict
from statistics import median
from typing import Any

from .claims import claims, unclaimed
from .published import FILE, beside, read_publication
from .scoring import MEASURED, Record, Results, info, unplaced
from .statistics import Interval, class_scores, gain_kept, interval, paired, ratio, totals
from .suite import Published

MEMORY = ("weights", "gradients", "optimizer", "activations")
_ID_FIELDS = ("hardware", "versions", "git", "data_digest", "weights_digest", "kernels")
SHARES = ("step_seconds", "train_seconds", "peak_bytes", "cost_usd")


def table(found: Results) -> dict[str, Any]:
    """Everything that the report shows. Times in seconds, sizes in bytes; intervals as mean, low, high."""
    suite, primary = found.suite, found.primary
    rows = [_row(found, method) for method in found.finals]
    sign = -1 if found.maximize else 1
    rows.sort(key=lambda row: sign * row["train_info"]["metrics"].get(primary, {"mean": -sign * math.inf})["mean"])
    _rank(found, rows)
    records = [record for of in found.finals.values() for record in of.values()]
    failed = _failed(found)
    return {
        "schema": "peft-engine report 1",
        "name": suite.get("name") or found.folder.name,
        "title": suite.get("title") or suite.get("name") or found.folder.name,
        "description": suite.get("description") or "",
        "primary": primary,
        "maximize": found.maximize,
        "reference": found.reference,
        "before": _before(found),
        "claims": claims(found, rows),
        "unclaimed": unclaimed(found, rows),
        "results": rows,
        "published": _published(found, rows),
        "cells": [_cell(record) for record in records],
        "learning_rates": _learning_rates(found),
        "failed": failed,
        "missing": _missing(found, failed),
        "left_out": found.left_out,
        "run_info": {
            "first": min(str(record["run_info"]["created_at"]) for record in records),
            "last": max(str(record["run_info"]["created_at"]) for record in records),
            "total_seconds": sum(record["run_info"].get("total_seconds") or 0 for record in [*records, *found.tunings]),
            "commands": _distinct([record["run_info"].get("command") for record in records]),
            "budget": suite.get("budget"),
            "price": _price(found, records),
            "seeds": sorted({seed for of in found.finals.values() for seed in of}),
            "test_rows": len(found.rows) if found.rows else None,
        },
        "meta_info": {
            name: _distinct([(record.get("meta_info") or {}).get(name) for record in records]) for name in _ID_FIELDS
        },
    }


def _row(found: Results, method: str) -> dict[str, Any]:
    of, samples = found.finals[method], found.samples[method]
    whole = found.samples.get(found.reference, {})
    facts: dict[str, Any] = {"status": "success", "metrics": {}, "difference": {}, "gain_kept": {}}
    for name, one in samples.items():
        by_seed = {str(seed): float(value) for seed, value in zip(one.seeds, one.values, strict=True)}
        facts["metrics"][name] = asdict(interval(one)) | {"over_items": one.over_items, "by_seed": by_seed}
        if name in whole and method != found.reference:
            facts["difference"][name] = told(paired(one, whole[name]))
            before = found.before.get(name)
            facts["gain_kept"][name] = bounds(gain_kept(one, whole[name], before)) if before else None
    for name in MEASURED:
        values = found.measured(method, name)
        facts[name] = None
        if values:
            facts[name] = {"median": median(values.values()), "low": min(values.values()), "high": max(values.values())}
            facts[name]["by_seed"] = {str(seed): value for seed, value in values.items()}
    facts["shares"] = {name: share(found, method, name) for name in SHARES}
    parts = {part: [info("memory", part)(record) for record in of.values()] for part in MEMORY}
    facts["memory"] = {
        part: median(v for v in values if v is not None) if any(v is not None for v in values) else None
        for part, values in parts.items()
    }
    facts["train_curves"] = {str(seed): record["train_info"].get("train_curve") or [] for seed, record in of.items()}
    facts["eval_curves"] = {str(seed): record["train_info"].get("eval_curve") or [] for seed, record in of.items()}
    facts["per_class"] = _per_class(found, method)
    first = next(iter(of.values()))
    run = {
        "experiment_name": method,
        "method": method,
        "seeds": sorted(of),
        "learning_rate": _distinct([record["run_info"].get("learning_rate") for record in of.values()]),
        "config": first["run_info"].get("config"),
        "created_at": min(str(record["run_info"]["created_at"]) for record in of.values()),
        "total_seconds": sum(record["run_info"].get("total_seconds") or 0 for record in of.values()),
        "error_msg": None,
    }
    meta = {name: (first.get("meta_info") or {}).get(name) for name in ("hardware", "versions", "kernels")}
    return {"name": method, "run_info": run, "train_info": facts, "meta_info": meta}


def _published(found: Results, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Published figures beside ours; None where the suite names none."""
    if not found.suite.get("published"):
        return None
    return beside(read_publication(found.folder / FILE), Published(**found.suite["published"]), rows)


def _price(found: Results, records: list[Record]) -> dict[str, Any] | None:
    """The suite's price, where its source is, and how many cells have their cost from it; None without one."""
    if found.usd_per_hour is None:
        return None
    source = str(found.suite.get("price_source") or "no source named")
    return {"usd_per_hour": found.usd_per_hour, "source": source, "cells": sum(map(found.priced, records))}


def share(found: Results, method: str, name: str) -> dict[str, Any] | None:
    """Of the reference's median, with the range over seeds."""
    one = ratio(found.measured(method, name), found.measured(found.reference, name))
    return None if one is None else {"ratio": one.mean, "low": one.low, "high": one.high}


def told(one: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON has it, with whether it excludes 0."""
    if one is None:
        return None
    return (bounds(one) or {}) | {"distinguishable": one.excludes_zero}


def bounds(one: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON has it."""
    return None if one is None else {k: v if math.isfinite(v) else None for k, v in asdict(one).items()}


def _per_class(found: Results, method: str) -> dict[str, dict[str, float]] | None:
    """Class → precision, recall, f1 (means over seeds), rows."""
    of = found.columns.get(method, {})
    if not of or any("hit" not in columns for columns in of.values()):
        return None
    each = [class_scores(totals(columns)) for columns in of.values()]
    names = next(iter(found.finals[method].values()))["train_info"].get("class_names")
    names = names or [str(i) for i in range(min(len(one["f1"]) for one in each))]
    return {
        str(name): {key: float(sum(one[key][i] for one in each) / len(each)) for key in each[0]}
        for i, name in enumerate(names)
    }


def _rank(found: Results, rows: list[dict[str, Any]]) -> None:
    """The places that paired intervals leave open, and whom none tells apart; puts the rows in order.

    The order is that of the means. Where methods ran different seeds, one that beats another on the seeds they share
    stands before it, whatever the means over their own seeds say.
    """
    samples = {row["name"]: found.samples[row["name"]].get(found.primary) for row in rows}
    names, sign = list(samples), 1 if found.maximize else -1

    def better(name: str, than: str) -> bool:
        one, other = samples[name], samples[than]
        between = paired(one, other) if one and other else None
        return between is not None and between.excludes_zero and sign * between.mean > 0

    beaten = {name: [other for other in names if other != name and better(name, other)] for name in names}
    for row in rows:
        name = row["name"]
        above = [other for other in names if name in beaten[other]]
        row["places"] = [1 + len(above), len(rows) - len(beaten[name])]
        row["not_told_apart_from"] = [one for one in names if one not in (name, *above, *beaten[name])]
    ordered: list[dict[str, Any]] = []
    for row in rows:
        behind = (at for at, other in enumerate(ordered) if other["name"] in beaten[row["name"]])
        ordered.insert(next(behind, len(ordered)), row)
    rows[:] = ordered
    for i, row in enumerate(rows):
        row["place"] = i + 1


def _before(found: Results) -> dict[str, Any]:
    return {
        "from": found.before_from,
        "metrics": {name: asdict(interval(one)) for name, one in found.before.items()},
    }


def _cell(record: Record) -> dict[str, Any]:
    """One record without its items and curves."""
    info = {k: v for k, v in record["train_info"].items() if k not in ("items", "train_curve", "eval_curve")}
    return {"key": record["key"], "run_info": record["run_info"], "train_info": info, "meta_info": record["meta_info"]}


def _learning_rates(found: Results) -> list[dict[str, Any]]:
    """Per method: the chosen rate, what was tried with the last eval score, and whether the choice is at the edge."""
    lines = []
    for method, of in found.finals.items():
        tried: dict[float, float | None] = dict.fromkeys(_grid(found.suite, method))
        for record in found.tunings:
            if record["run_info"]["method"] == method:
                curve = record["train_info"].get("eval_curve") or [{}]
                tried[float(record["run_info"]["learning_rate"])] = curve[-1].get(found.primary, curve[-1].get("loss"))
        chosen = _distinct([record["run_info"].get("learning_rate") for record in of.values()])
        edges = {min(tried), max(tried)} if len(tried) > 1 else set()
        lines.append(
            {
                "method": method,
                "chosen": chosen,
                "tried": [{"learning_rate": rate, "eval": tried[rate]} for rate in sorted(tried)],
                "tuned": len(tried) > 1,
                "at_edge": any(rate in edges for rate in chosen),
            }
        )
    return lines


def _grid(suite: dict[str, Any], method: str) -> list[float]:
    entry = (suite.get("methods") or {}).get(method) or {}
    rates = entry.get("learning_rates") or (suite.get("tuning") or {}).get("learning_rates") or []
    return [float(rate) for rate in rates]


def _failed(found: Results) -> list[dict[str, Any]]:
    """Cells that failed and did not succeed later."""
    done = {path.stem for path in (found.folder / "cells").glob("*.json")}
    lines = []
    for path in sorted((found.folder / "failed").glob("*.json")):
        if path.stem in done:
            continue
        try:
            told_by = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            told_by = {"reason": f"its record can't be read ({type(error).__name__})"}
        if not isinstance(told_by, dict):
            told_by = {"reason": "its record is no JSON object"}
        log = told_by.get("log_tail") or ""
        log = "\n".join(map(str, log)) if isinstance(log, list) else str(log)
        line = {
            "cell": path.stem,
            "reason": unplaced(str(told_by.get("reason")), found.folder),
            "exit_code": told_by.get("exit_code"),
        }
        line |= {name: told_by.get(name) for name in ("kind", "method", "seed", "learning_rate", "fix")}
        lines.append(line | {"log_tail": unplaced(log[-2000:], found.folder)})
    return lines


def _missing(found: Results, failed: list[dict[str, Any]]) -> list[str]:
    """Final cells of the suite without a record, and without a failure that says why."""
    known = {(line["method"], line["seed"]) for line in failed if line["kind"] == "final"}
    return [
        f"{method}/seed-{seed}"
        for method in found.suite.get("methods") or {}
        for seed in found.suite.get("seeds") or []
        if seed not in found.finals.get(str(method), {}) and (method, seed) not in known
    ]


def _distinct(values: list[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if value is not None and value not in found:
            found.append(value)
    return found
