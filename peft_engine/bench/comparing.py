"""Two results folders against each other: what got worse, slower or larger beyond noise.

Quality: the paired 95% interval of new − old, on the same seeds and test rows, excludes 0 on the bad side, and the mean
moved by more than ROUNDING of the old value. Times and memory: the ratio of medians over seeds is beyond BOUNDS, and
the ranges over seeds don't touch. Times are only compared on the same hardware.
"""

from pathlib import Path
from statistics import median
from typing import Any

from ..errors import ConfigError
from .scoring import Results, load
from .statistics import paired
from .tables import bounds

ROUNDING = 1e-4
BOUNDS = {"step_seconds": 1.10, "train_seconds": 1.10, "peak_bytes": 1.05, "optimizer_state_bytes": 1.05}
TIMES = ("step_seconds", "train_seconds")


def compare(new: Path, old: Path) -> dict[str, Any]:
    """Method by method, for the methods of both.

    Returns:
        `methods`: name → number → {verdict: better, worse or same, …}; `regressions`: sentences, empty where nothing
        got worse; `notes`: what could not be compared, and why.

    Raises:
        ConfigError: one of them has no results, they have no method in common, or other test metrics.
    """
    ours, theirs = load(new), load(old)
    common = [method for method in ours.finals if method in theirs.finals]
    if not common or ours.primary != theirs.primary:
        raise ConfigError(
            f"report --against: {new} and {old} have no method in common, or different metrics ({ours.primary}, "
            f"{theirs.primary}).",
            "Compare two results of the same suite.",
        )
    found: dict[str, Any] = {
        "schema": "peft-engine comparison 1",
        "new": str(new),
        "old": str(old),
        "primary": ours.primary,
        "bounds": BOUNDS | {"rounding": ROUNDING},
        "methods": {},
        "regressions": [],
        "notes": [],
    }
    same_rows = ours.rows == theirs.rows and _meta(ours, "data_digest") == _meta(theirs, "data_digest")
    same_machine = _meta(ours, "hardware") == _meta(theirs, "hardware")
    if not same_rows:
        found["notes"].append("Other data or test rows: quality is not compared.")
    if not same_machine:
        found["notes"].append("Other hardware: times are not compared.")
    for method in common:
        lines = found["methods"][method] = {}
        if same_rows:
            lines[ours.primary] = _quality(ours, theirs, method)
        for name, bound in BOUNDS.items():
            if same_machine or name not in TIMES:
                lines[name] = _cost(ours.measured(method, name), theirs.measured(method, name), bound)
        for name, line in list(lines.items()):
            if line is None:
                del lines[name]
                found["notes"].append(f"{method}: {name} is not in both on common seeds: not compared.")
            elif line["verdict"] == "worse":
                found["regressions"].append(f"{method}: {_sentence(name, line)}")
    for method in theirs.finals:
        if method not in ours.finals:
            found["regressions"].append(f"{method}: has no finished cell any more")
    found["notes"] += [
        f"{method}: new, nothing to compare with." for method in ours.finals if method not in theirs.finals
    ]
    found["notes"] += [f"{one['cell']}: left out, {one['reason']}." for one in (*ours.left_out, *theirs.left_out)]
    return found


def _meta(found: Results, name: str) -> list[Any]:
    values: list[Any] = []
    for of in found.finals.values():
        for record in of.values():
            value = (record.get("meta_info") or {}).get(name)
            if value not in values:
                values.append(value)
    return sorted(values, key=str)


def _quality(ours: Results, theirs: Results, method: str) -> dict[str, Any] | None:
    one, other = (found.samples[method].get(found.primary) for found in (ours, theirs))
    difference = paired(one, other) if one and other else None
    if one is None or other is None or difference is None:
        return None
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    old = float(other.only(seeds).values.mean())
    sign = 1 if ours.maximize else -1
    verdict = "same"
    if difference.excludes_zero and abs(difference.mean) > ROUNDING * abs(old):
        verdict = "better" if sign * difference.mean > 0 else "worse"
    return {
        "verdict": verdict,
        "old": old,
        "new": old + difference.mean,
        "seeds": seeds,
        "difference": bounds(difference),
    }


def _cost(new: dict[int, float], old: dict[int, float], bound: float) -> dict[str, Any] | None:
    if not new or not old or min(old.values()) <= 0:
        return None
    ratio = median(new.values()) / median(old.values())
    verdict = "same"
    if ratio > bound and min(new.values()) > max(old.values()):
        verdict = "worse"
    elif ratio < 1 / bound and max(new.values()) < min(old.values()):
        verdict = "better"
    line = {"verdict": verdict, "ratio": ratio, "bound": bound}
    for name, values in (("old", old), ("new", new)):
        line[name] = {"median": median(values.values()), "low": min(values.values()), "high": max(values.values())}
    return line


def _sentence(name: str, line: dict[str, Any]) -> str:
    if "difference" in line:
        low, high = line["difference"]["low"], line["difference"]["high"]
        return f"{name} {line['old']:.4f} → {line['new']:.4f} (difference's 95% interval {low:+.4f} to {high:+.4f})"
    return f"{name} {line['ratio']:.2f}× (bound {line['bound']:.2f}×, ranges over seeds apart)"


def told_comparison(found: dict[str, Any]) -> list[str]:
    """What a person wants to know: changes first, then what was not compared."""
    lines = [
        f"{line['verdict']:<7}{method}: {_sentence(name, line) if line['verdict'] != 'same' else name}"
        for verdict in ("worse", "better", "same")
        for method, of in found["methods"].items()
        for name, line in of.items()
        if line["verdict"] == verdict
    ]
    lost = [f"worse  {text}" for text in found["regressions"] if text.endswith("any more")]
    return [*lost, *lines, *found["notes"]]
