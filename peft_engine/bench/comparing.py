"""Two results folders of one benchmark against each other: what got worse, slower or larger beyond noise.

Quality and forgetting: new − old on the same seeds and test rows moved beyond what noise makes of all comparisons
together (see noise.py), and by more than ROUNDING. With one seed in common there is no noise of seeds to hold it
against: then the paired 95% interval over test items decides, and a note says so.

Times: a whole machine is slower in some hours than in others. What all methods share, the median of their ratios of
step times, is told by itself, and each method is held against it. Times, and memory by itself, are worse where the
ratio of medians over seeds is beyond BOUNDS, and the ranges over seeds don't touch.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ConfigError
from .likeness import known, listed, meta, other_conditions, refuse_another
from .noise import FAMILY, moves
from .scoring import Results, load
from .statistics import paired
from .tables import bounds

ROUNDING = 1e-4
BOUNDS = {"step_seconds": 1.10, "train_seconds": 1.10, "peak_bytes": 1.05, "optimizer_state_bytes": 1.05}
ALL = 1.25
"""Bound of what all methods share, and of a method that has no other beside it."""
TIMES = ("step_seconds", "train_seconds")
FORGETTING = "forgetting"


def compare(new: Path, old: Path) -> dict[str, Any]:
    """Method by method, for the methods of both.

    Returns:
        `methods`: name → number → {verdict: better, worse or same, …}; `all_methods`: the ratio of step times that
        all share, or None; `regressions`: sentences, empty where nothing got worse; `notes`: what could not be
        compared, and why, and what else was otherwise.

    Raises:
        ConfigError: one of them has no results, they have no method in common, or other test metrics; or they are of
            other tasks, budgets, data, test rows or weights.
    """
    ours, theirs = load(new), load(old)
    common = [method for method in ours.finals if method in theirs.finals]
    if not common or ours.primary != theirs.primary:
        raise ConfigError(
            f"report --against: {new} and {old} have no method in common, or different metrics ({ours.primary}, "
            f"{theirs.primary}).",
            "Compare two results of the same suite.",
        )
    notes = refuse_another(ours, theirs, common)
    found: dict[str, Any] = {
        "schema": "peft-engine comparison 1",
        "new": str(new),
        "old": str(old),
        "primary": ours.primary,
        "bounds": BOUNDS | {"rounding": ROUNDING, "all_methods": ALL, "family_wise": FAMILY},
        "all_methods": None,
        "methods": {method: {} for method in common},
        "regressions": [],
        "notes": notes,
    }
    notes += other_conditions(ours, theirs, common)
    _seeds(found, ours, theirs)
    _quality(found, ours, theirs)
    _costs(found, ours, theirs)
    for method, lines in found["methods"].items():
        for name in (name for name, line in lines.items() if line["verdict"] == "worse"):
            found["regressions"].append(f"{method}: {_sentence(name, lines[name])}")
        notes += _one_sided(ours, theirs, method)
    notes += [f"{one['cell']}: left out, {one['reason']}." for one in (*ours.left_out, *theirs.left_out)]
    return found


def _seeds(found: dict[str, Any], ours: Results, theirs: Results) -> None:
    """Methods and seeds that only one of the two has."""
    for method, of in theirs.finals.items():
        lost = sorted(set(of) - set(ours.finals.get(method, {})))
        if method not in ours.finals:
            found["regressions"].append(f"{method}: has no finished cell any more")
        elif lost:
            found["regressions"].append(f"{method}: {_numbered(lost)} no finished cell any more")
    for method, of in ours.finals.items():
        if method not in theirs.finals:
            found["notes"].append(f"{method}: new, nothing to compare with.")
        elif more := sorted(set(of) - set(theirs.finals[method])):
            found["notes"].append(f"{method}: {_numbered(more)} nothing to be compared with.")


def _numbered(seeds: list[int]) -> str:
    return f"seed {seeds[0]} has" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))} have"


def _one_sided(ours: Results, theirs: Results, method: str) -> list[str]:
    """Numbers of a method that only one of the two has."""
    new, old = (
        {name for name in (*BOUNDS, FORGETTING) if of.measured(method, name)} | set(of.samples[method])
        for of in (ours, theirs)
    )
    sides = (("new", sorted(new - old)), ("old", sorted(old - new)))
    return [
        f"{method}: {', '.join(names)}: only in the {side} results, not compared." for side, names in sides if names
    ]


def _quality(found: dict[str, Any], ours: Results, theirs: Results) -> None:
    """Lines of the primary metric and of forgetting."""
    primary = {method: [_by_seed(of, method) for of in (ours, theirs)] for method in found["methods"]}
    forgotten = {method: [of.measured(method, FORGETTING) for of in (ours, theirs)] for method in found["methods"]}
    pairs = {ours.primary: _paired(primary), FORGETTING: _paired(forgotten)}
    judged = moves({name: {m: new - old for m, (_, new, old) in of.items()} for name, of in pairs.items()})
    single = []
    for name, of in pairs.items():
        sign = -1 if name == FORGETTING or not ours.maximize else 1
        for method, (seeds, new, old) in of.items():
            line: dict[str, Any] = {"old": float(old.mean()), "new": float(new.mean()), "seeds": seeds}
            move = judged[name][method]
            if move is None:
                interval = _over_items(ours, theirs, method) if name == ours.primary else None
                if interval is None:
                    found["notes"].append(f"{method}: {name}: one seed in common, no noise is known: not compared.")
                    continue
                single.append(method)
                mean, beyond = interval.mean, interval.excludes_zero
                line |= {"by": "items", "difference": bounds(interval)}
            else:
                mean, beyond = move.mean, abs(move.mean) > move.margin
                low, high = move.mean - move.margin, move.mean + move.margin
                line |= {"by": "seeds", "difference": {"mean": mean, "low": low, "high": high}}
            scale = 1.0 if name == FORGETTING else abs(line["old"])  # a change by forgetting may start from none
            moved = beyond and abs(mean) > ROUNDING * scale
            line["verdict"] = "same" if not moved else "better" if sign * mean > 0 else "worse"
            found["methods"][method][name] = line
    if single:
        found["notes"].append(
            f"One seed in common of {', '.join(single)}: quality is held against the 95% interval over test items. "
            "Noise of seeds is not in it, and each method has a chance of its own, 5%, to seem otherwise."
        )
    for method in found["methods"]:
        if primary[method][0] and primary[method][1] and method not in pairs[ours.primary]:
            found["notes"].append(f"{method}: no seed in common: quality is not compared.")


def _by_seed(found: Results, method: str) -> dict[int, float]:
    one = found.samples[method].get(found.primary)
    return dict(zip(one.seeds, map(float, one.values), strict=True)) if one else {}


def _paired(sides: dict[str, list[dict[int, float]]]) -> dict[str, tuple[list[int], np.ndarray, np.ndarray]]:
    """method → seeds in common, new and old values; without methods that have none."""
    found = {}
    for method, (new, old) in sides.items():
        if seeds := sorted(set(new) & set(old)):
            found[method] = (seeds, np.array([new[s] for s in seeds]), np.array([old[s] for s in seeds]))
    return found


def _over_items(ours: Results, theirs: Results, method: str) -> Any:
    """new − old with its interval over test items; None where items were not kept."""
    one, other = (of.samples[method][of.primary] for of in (ours, theirs))
    return paired(one, other) if one.over_items and other.over_items else None


def _costs(found: dict[str, Any], ours: Results, theirs: Results) -> None:
    """Lines of times and memory, and what all methods share of the times."""
    methods, notes, sides = list(found["methods"]), found["notes"], (ours, theirs)
    timed = True
    for what, read in (
        ("hardware", meta("hardware")),
        ("numbers of cells at once", lambda record: record["run_info"].get("cells_at_once") or 1),
    ):
        new, old = (known(of, methods, read) for of in sides)
        if new != old:
            told = "" if what == "hardware" else f" ({listed(old)} → {listed(new)})"
            notes.append(f"Other {what}{told}: times are not compared.")
            timed = False
    meant = [known(of, methods, lambda record: record["train_info"].get("peak_bytes_meaning")) for of in sides]
    sized = meant[0] == meant[1] or not all(meant)
    if not sized:
        notes.append(f"Peak memory is {listed(meant[1])} → {listed(meant[0])}: not compared.")
    ratios = [
        ratio for method in methods
        if (ratio := _ratio(ours.measured(method, TIMES[0]), theirs.measured(method, TIMES[0])))
    ]  # fmt: skip
    shared = median(ratios) if timed and len(ratios) > 1 else None
    found["all_methods"] = shared
    if shared and shared > ALL:
        found["regressions"].append(f"all methods are {shared:.2f}× slower (bound {ALL:.2f}×), by their step times")
    elif shared and not 1 / 1.10 <= shared <= 1.10:
        word = f"{shared:.2f}× slower" if shared > 1 else f"{1 / shared:.2f}× faster"
        notes.append(f"All methods are {word}: so may the machine be. Each is held against that.")
    for method in methods:
        for name, bound in BOUNDS.items():
            if not (timed if name in TIMES else sized or name != "peak_bytes"):
                continue
            sizes = ours.measured(method, name), theirs.measured(method, name)
            if name not in TIMES:
                line = _cost(*sizes, bound, 1.0)
            else:
                line = _cost(*sizes, bound if shared else ALL, shared or 1.0)
            if line is not None:
                found["methods"][method][name] = line


def _ratio(new: dict[int, float], old: dict[int, float]) -> float | None:
    if not new or not old or min(old.values()) <= 0:
        return None
    return median(new.values()) / median(old.values())


def _cost(new: dict[int, float], old: dict[int, float], bound: float, shared: float) -> dict[str, Any] | None:
    """Held against what all methods share. One that is no slower than it was is no regression, though, where the
    others got faster; nor a gain where they got slower."""
    ratio = _ratio(new, old)
    if ratio is None:
        return None
    slower, faster = max(shared, 1.0), min(shared, 1.0)
    verdict = "same"
    if ratio / slower > bound and min(new.values()) / slower > max(old.values()):
        verdict = "worse"
    elif ratio / faster < 1 / bound and max(new.values()) / faster < min(old.values()):
        verdict = "better"
    line = {"verdict": verdict, "ratio": ratio, "bound": bound, "all_methods": shared}
    for name, values in (("old", old), ("new", new)):
        line[name] = {"median": median(values.values()), "low": min(values.values()), "high": max(values.values())}
    return line


def _sentence(name: str, line: dict[str, Any]) -> str:
    if "difference" not in line:
        beside = "" if line["all_methods"] == 1 else f", all methods {line['all_methods']:.2f}×"
        return f"{name} {line['ratio']:.2f}× (bound {line['bound']:.2f}×{beside}, ranges over seeds apart)"
    mean, low, high = (line["difference"][key] for key in ("mean", "low", "high"))
    text = f"{name} {line['old']:.4f} → {line['new']:.4f}"
    if line["by"] == "items":
        return f"{text} (difference's 95% interval over test items {low:+.4f} to {high:+.4f})"
    return f"{text} ({mean:+.4f}; noise stays within ±{high - mean:.4f})"


def told_comparison(found: dict[str, Any]) -> list[str]:
    """What a person wants to know: changes first, then what was not compared."""
    lines = [
        f"{line['verdict']:<7}{method}: {_sentence(name, line) if line['verdict'] != 'same' else name}"
        for verdict in ("better", "same")
        for method, of in found["methods"].items()
        for name, line in of.items()
        if line["verdict"] == verdict
    ]
    return [*(f"worse  {text}" for text in found["regressions"]), *lines, *found["notes"]]
