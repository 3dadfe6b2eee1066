"""Two results folders of one benchmark against each other: what got worse, slower or larger beyond noise.

Quality and forgetting: new − old on the same seeds and test rows moved beyond what noise makes of all comparisons
together (see noise.py), by more than ROUNDING, and the paired 95% interval over seeds and test items excludes 0. The
metrics of ALSO are a family of their own. With one seed in common there is no noise of seeds to hold it against: then
the interval over test items decides, and a note says so. What fell and isn't told from noise is a note.

Times: a whole machine is slower in some hours than in others. What all methods share is told by itself, and each
method is held against it: the median of their ratios of step times where these are alike, else the least of them.
Times, and sizes by themselves, are worse where the ratio of medians over seeds is beyond BOUNDS, and the ranges don't
touch.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ConfigError
from .likeness import known, listed, meta, other_conditions, refuse_another
from .noise import FAMILY, Move, moves
from .scoring import Results, load
from .statistics import Interval, Sample, paired
from .suite import SMALLER_IS_BETTER
from .tables import bounds

ROUNDING = 1e-4
BOUNDS = {
    "step_seconds": 1.10,
    "train_seconds": 1.10,
    "evaluate_seconds": 1.25,
    "peak_bytes": 1.05,
    "optimizer_state_bytes": 1.05,
    "adapter_file_bytes": 1.05,
}
ALL = 1.25
"""Bound of what all methods share, and of a method that has no other beside it."""
ALIKE = 1.10
"""All methods are slower where the largest ratio is at most this many times the smallest."""
TIMES = ("step_seconds", "train_seconds", "evaluate_seconds")
ALSO = ("accuracy", "f1", "exact_match", "pearson", "loss")
"""Metrics that are compared beside the primary one; the others are functions of these, or go with them."""
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
    """Lines of the primary metric and of forgetting, and of ALSO, each family judged by itself."""
    methods, sides = list(found["methods"]), (ours, theirs)
    metrics = [ours.primary, *(name for name in ALSO if name != ours.primary)]
    values = {name: {method: [_by_seed(of, method, name) for of in sides] for method in methods} for name in metrics}
    values[FORGETTING] = {method: [of.measured(method, FORGETTING) for of in sides] for method in methods}
    pairs = {name: _paired(of) for name, of in values.items()}
    single: list[str] = []
    for family in ((ours.primary, FORGETTING), metrics[1:]):
        judged = moves({name: {m: (new, old) for m, (_, new, old) in pairs[name].items()} for name in family})
        for name in family:
            for method, (seeds, new, old) in pairs[name].items():
                drawn = _drawn(ours, theirs, method, name)
                line = _line(name, seeds, new, old, judged[name][method], drawn, ours.maximize, ours.primary)
                if line is None:
                    if name in (ours.primary, FORGETTING):
                        found["notes"].append(f"{method}: {name}: one seed in common, no noise is known: not compared.")
                    continue
                if line["by"] == "items" and method not in single:
                    single.append(method)
                found["methods"][method][name] = line
                if name == ours.primary and line["verdict"] == "same":
                    found["notes"] += _unsure(
                        method, line, new - old, judged[name][method], [of.samples[method][name] for of in sides]
                    )
    if single:
        found["notes"].append(
            f"One seed in common of {', '.join(single)}: quality is held against the 95% interval over test items. "
            "Noise of seeds is not in it, and each method has a chance of its own, 5%, to seem otherwise."
        )
    for method in methods:
        if all(values[ours.primary][method]) and method not in pairs[ours.primary]:
            found["notes"].append(f"{method}: no seed in common: quality is not compared.")


def _line(
    name: str,
    seeds: list[int],
    new: np.ndarray,
    old: np.ndarray,
    move: Move | None,
    drawn: Interval | None,
    maximize: bool,
    primary: str,
) -> dict[str, Any] | None:
    """One number of one method; `drawn`: its paired interval where items were kept. None where nothing tells noise."""
    line: dict[str, Any] = {"old": float(old.mean()), "new": float(new.mean()), "seeds": seeds}
    if move is None:
        if drawn is None:
            return None
        mean, beyond = drawn.mean, drawn.excludes_zero
        line |= {"by": "items", "difference": bounds(drawn)}
    else:
        mean, beyond = move.mean, abs(move.mean) > move.margin and (drawn is None or drawn.excludes_zero)
        line |= {"by": "seeds", "difference": {"mean": mean, "low": mean - move.margin, "high": mean + move.margin}}
    up = maximize if name == primary else name not in (*SMALLER_IS_BETTER, FORGETTING)
    scale = 1.0 if name == FORGETTING else abs(line["old"])  # a change by forgetting may start from none
    moved = beyond and abs(mean) > ROUNDING * scale
    line["higher_is_better"] = up
    line["verdict"] = "same" if not moved else "better" if (mean > 0) == up else "worse"
    return line


def _beyond_items(samples: list[Sample], seed: int) -> bool:
    """Whether one seed's difference excludes 0 under draws of test items; True where none were kept."""
    if not all(one.over_items for one in samples):
        return True
    between = paired(*(one.only([seed]) for one in samples))
    return between is not None and between.excludes_zero


def _unsure(
    method: str, line: dict[str, Any], moved: np.ndarray, move: Move | None, samples: list[Sample]
) -> list[str]:
    """What fell, and is not told from noise: the mean by the interval of draws, a seed by the other methods' noise."""
    drawn = paired(*samples) if all(one.over_items for one in samples) else None
    sign = 1 if line["higher_is_better"] else -1
    text = f"{method}: {line['old']:.4f} → {line['new']:.4f} is not told from its own noise over seeds"
    if move is None:
        return []
    fallen = [
        f"seed {seed} moved by {change:+.4f}"
        for seed, change in zip(line["seeds"], moved, strict=True)
        if sign * change < -max(move.single or 0.0, ROUNDING) and _beyond_items(samples, seed)
    ]
    if fallen:
        return [f"{text}, but {', '.join(fallen)}, farther than test items and other methods explain: look at it."]
    if drawn is not None and drawn.excludes_zero and sign * drawn.mean < 0 and abs(drawn.mean) > ROUNDING:
        return [f"{text} (±{move.margin:.4f}), but all draws of seeds and test items fell: more seeds would tell."]
    return []


def _by_seed(found: Results, method: str, name: str) -> dict[int, float]:
    one = found.samples[method].get(name)
    return dict(zip(one.seeds, map(float, one.values), strict=True)) if one else {}


def _paired(sides: dict[str, list[dict[int, float]]]) -> dict[str, tuple[list[int], np.ndarray, np.ndarray]]:
    """method → seeds in common, new and old values; without methods that have none."""
    found = {}
    for method, (new, old) in sides.items():
        if seeds := sorted(set(new) & set(old)):
            found[method] = (seeds, np.array([new[s] for s in seeds]), np.array([old[s] for s in seeds]))
    return found


def _drawn(ours: Results, theirs: Results, method: str, name: str) -> Interval | None:
    """new − old with its interval over seeds and test items; None where items were not kept."""
    one, other = (of.samples[method].get(name) for of in (ours, theirs))
    if one is None or other is None:
        return None
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
    shared, alike = None, True
    if timed and len(ratios) > 1:
        alike = max(ratios) <= ALIKE * min(ratios)
        shared = median(ratios) if alike else min(ratios)
    found["all_methods"] = shared
    if shared and shared > ALL:
        least = "" if alike else "at least "
        found["regressions"].append(
            f"all methods are {least}{shared:.2f}× slower (bound {ALL:.2f}×), by their step times"
        )
    elif shared and not 1 / 1.10 <= shared <= 1.10:
        word = f"{shared:.2f}× slower" if shared > 1 else f"{1 / shared:.2f}× faster"
        least = "" if alike else ", the least of them" if shared > 1 else ", the most of them"
        notes.append(f"All methods are {word}{least}: so may the machine be. Each is held against that.")
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
