"""What a reader must know before a report's numbers."""

from collections.abc import Callable
from statistics import median_low
from typing import Any

from ..printing import counted
from .likeness import told_commit


def notes(found: dict[str, Any]) -> list[str]:
    """Sentences; `found` is the content of report.json. First what makes cells incomparable."""
    lines = [*_otherwise(found), *_seeds(found)]
    first, reference, primary = found["results"][0], found["reference"], found["primary"]
    unsure = [row["name"] for row in found["results"][1:] if first["name"] in row["not_told_apart_from"]]
    if unsure:
        best = "the one placed first" if _lacking(found) else "the best by its mean"
        lines.append(f"Not told apart from {best}, {first['name']}: {', '.join(unsure)}. Their order says nothing.")
    if not any(row["name"] == reference for row in found["results"]):
        lines.append(f"The reference, {reference}, has no finished cell: differences and shares are missing.")
    least = min(len(row["run_info"]["seeds"]) for row in found["results"])
    if least < 10:
        lines.append(
            f"{counted(least, 'seed')}: an interval can't reach beyond the seeds that were run. Where seeds rather "
            "than test items make the noise it is too narrow (with 3 seeds it then holds the truth about 75 times in "
            "100, not 95)."
        )
    flat = [
        row["name"] for row in found["results"] if not row["train_info"]["metrics"].get(primary, {}).get("over_items")
    ]
    if flat:
        lines.append(
            f"No test items were kept of {', '.join(flat)}: their intervals of {primary} are over seeds alone."
        )
    for name in ("hardware", "versions", "data_digest", "weights_digest"):
        if len(found["meta_info"][name]) > 1:
            lines.append(f"Cells differ in {name}: compare them with care.")
    # what is swapped follows from the method; what it runs on should not
    if len(backends := {(one or {}).get("backend") for one in found["meta_info"]["kernels"]}) > 1:
        lines.append(f"Cells differ in the kernels' backend ({', '.join(sorted(map(str, backends)))}).")
    edge = [line["method"] for line in found["learning_rates"] if line["at_edge"]]
    if edge:
        lines.append(f"Learning rate at the edge of its grid, so perhaps not the best: {', '.join(edge)}.")
    fixed = [line["method"] for line in found["learning_rates"] if not line["tuned"]]
    if fixed:
        lines.append(f"Learning rate given, not tuned: {', '.join(fixed)}.")
    price = found["run_info"]["price"]
    if price and 0 < price["cells"] < len(found["cells"]):
        lines.append(
            f"Cost is by the suite's price in {price['cells']} of {len(found['cells'])} cells, "
            "by their own in the others."
        )
    return lines


def _otherwise(found: dict[str, Any]) -> list[str]:
    """Where cells of one report were not run alike."""
    lines = []
    for what, why, read in (
        ("git commit", "compare them with care", _commit),
        (
            "how many ran at once",
            "their times can't be compared",
            lambda cell: cell["run_info"].get("cells_at_once") or 1,
        ),
        ("command", "compare them with care", lambda cell: cell["run_info"].get("command") or "unknown"),
    ):
        groups = _by_value(found, read)
        if len(groups) > 1:
            lines.append(f"Cells differ in {what} ({_told(groups)}): {why}.")
    steps = {value: names for value, names in _by_value(found, _steps).items() if value is not None}
    rounding = 0 if (found["run_info"]["budget"] or {}).get("steps") else 1
    if steps and max(steps) - min(steps) > rounding:
        lines.append(f"Cells differ in steps trained ({_told(steps)}): they had other budgets.")
    elif odd := _odd_tokens(found):
        lines.append(f"Cells differ in tokens trained from others of their seed: {', '.join(odd)}.")
    return lines


def _commit(cell: dict[str, Any]) -> str:
    return told_commit((cell["meta_info"] or {}).get("git")) or "unknown"


def _steps(cell: dict[str, Any]) -> int | None:
    steps: int | None = cell["train_info"].get("steps")
    return steps


def _by_value(found: dict[str, Any], read: Callable[[dict[str, Any]], Any]) -> dict[Any, list[str]]:
    """Value → methods of which every cell has it, and single cells of the others; the most frequent value last."""
    each: dict[str, dict[str, Any]] = {}
    for cell in found["cells"]:
        run = cell["run_info"]
        each.setdefault(str(run["method"]), {})[f"{run['method']}/seed-{run['seed']}"] = read(cell)
    groups: dict[Any, list[str]] = {}
    sizes: dict[Any, int] = {}
    for method, of in each.items():
        alike = len(set(of.values())) == 1
        for name, value in of.items():
            sizes[value] = sizes.get(value, 0) + 1
            names = groups.setdefault(value, [])
            if (shown := method if alike else name) not in names:
                names.append(shown)
    return {value: groups[value] for value in sorted(groups, key=lambda value: sizes[value])}


def _told(groups: dict[Any, list[str]]) -> str:
    *few, last = groups
    return "; ".join([*(f"{value}: {', '.join(groups[value])}" for value in few), f"{last}: all others"])


def _odd_tokens(found: dict[str, Any]) -> list[str]:
    """Cells whose tokens are more than a step's away from what is usual at their seed: with one seed, all methods see
    the same rows."""
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for cell in found["cells"]:
        if cell["train_info"].get("tokens") is not None:
            by_seed.setdefault(cell["run_info"]["seed"], []).append(cell)
    odd = []
    for seed, cells in by_seed.items():
        usual = median_low(cell["train_info"]["tokens"] for cell in cells)
        for cell in cells:
            tokens = cell["train_info"]["tokens"]
            if abs(tokens - usual) > usual / max(1, _steps(cell) or 1):
                odd.append(f"{cell['run_info']['method']}/seed-{seed} {tokens:,} (usual {usual:,})")
    return odd


def _lacking(found: dict[str, Any]) -> dict[str, list[int]]:
    """Method → seeds that others ran and it did not."""
    every = {seed for row in found["results"] for seed in row["run_info"]["seeds"]}
    lacking = {row["name"]: sorted(every - set(row["run_info"]["seeds"])) for row in found["results"]}
    return {name: seeds for name, seeds in lacking.items() if seeds}


def _seeds(found: dict[str, Any]) -> list[str]:
    told = [f"{name} lacks {', '.join(map(str, seeds))}" for name, seeds in _lacking(found).items()]
    if not told:
        return []
    return [
        f"Methods ran other seeds: {'; '.join(told)}. Means are over a method's own seeds; differences, shares and "
        "places are from the seeds that two share."
    ]
