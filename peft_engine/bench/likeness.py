"""Whether two results folders are of one benchmark, and what else was otherwise."""

from collections.abc import Callable
from typing import Any

from ..errors import ConfigError
from .scoring import Record, Results

Read = Callable[[Record], Any]
SHOWN = 5
"""Settings that are named of a method; of more, how many."""
TOLD = ("training.learning_rate", "training.seed")


def refuse_another(ours: Results, theirs: Results, methods: list[str]) -> list[str]:
    """Notes on what can't be known. Raises ConfigError where task, budget, data, test rows or weights differ."""
    faults, unknown = [], []
    for what, read in (
        ("task", lambda record: (record["run_info"].get("config") or {}).get("task")),
        ("budget", _budget),
        ("data", meta("data_digest")),
        ("weights", meta("weights_digest")),
    ):
        got, expected = (known(found, methods, read) for found in (ours, theirs))
        if what == "budget":
            stated = [_stated(found) for found in (ours, theirs)]
            got, expected = stated if all(stated) and stated[0] != stated[1] else (got, expected)
        if got and expected and got != expected:
            faults.append(f"{what}: got {listed(got)}, expected {listed(expected)}")
        elif what in ("data", "weights") and not (got and expected):
            unknown.append(f"The digest of the {what} is not known of both: they are taken for the same.")
    if ours.rows is not None and theirs.rows is not None and ours.rows != theirs.rows:
        faults.append(f"test rows: {_other_rows(ours.rows, theirs.rows)}")
    if faults:
        lines = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(
            f"report --against: {ours.folder} and {theirs.folder} are not of one benchmark:{lines}",
            "Nothing was compared. Take two results of one suite with the same data and weights.",
        )
    return unknown


def other_conditions(ours: Results, theirs: Results, methods: list[str]) -> list[str]:
    """What differs and may be the reason of a change: versions, code, kernels, learning rates, steps."""
    lines = []
    every = [one for found in (ours, theirs) for one in known(found, methods, meta("versions"))]
    names = sorted({name for one in every for name in one})
    for what, reads in (
        ("versions", {name: _version(name) for name in names}),
        ("code", {"commit": _commit}),
        ("kernels", {"backend": _backend}),
        ("settings", {"precision": meta("precision")}),
    ):
        each = {name: [known(found, methods, read) for found in (ours, theirs)] for name, read in reads.items()}
        told = [f"{name} {listed(old)} → {listed(new)}" for name, (new, old) in each.items() if new != old]
        if told:
            lines.append(f"Other {what}: {', '.join(told)}.")
    for method in methods:
        after, before = (_settings(found, method) for found in (ours, theirs))
        if other := sorted(name for name in {*after, *before} if after.get(name) != before.get(name)):
            told = [f"{name} {before.get(name)} → {after.get(name)}" for name in other[:SHOWN]]
            told += [f"{len(other) - SHOWN} more"] if len(other) > SHOWN else []
            lines.append(f"{method}: other settings: {', '.join(told)}.")
    for what, one_read in (
        ("fused parts", _swapped),
        ("learning rate", lambda record: record["run_info"].get("learning_rate")),
        ("steps", lambda record: record["train_info"].get("steps")),
    ):
        for method in methods:
            new, old = (known(found, [method], one_read) for found in (ours, theirs))
            if new != old:
                lines.append(f"{method}: other {what}: {listed(old)} → {listed(new)}.")
    return lines


def known(found: Results, methods: list[str], read: Read) -> list[Any]:
    """Distinct values over these methods' records, sorted as text; unknown ones left out."""
    values: list[Any] = []
    for method in methods:
        for record in found.finals.get(method, {}).values():
            value = read(record)
            if value is not None and value not in values:
                values.append(value)
    return sorted(values, key=str)


def meta(name: str) -> Read:
    return lambda record: (record.get("meta_info") or {}).get(name)


def listed(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "unknown"


def _budget(record: Record) -> str | None:
    """What a record's own settings say of its length."""
    run = record["run_info"]
    training = (run.get("config") or {}).get("training") or {}
    own = {"steps": training.get("steps"), "epochs": training.get("epochs"), "tokens": run.get("budget_tokens")}
    return _said(own)


def _stated(found: Results) -> list[str]:
    """What the suite says."""
    budget = found.suite.get("budget")
    said = _said(budget) if isinstance(budget, dict) else None
    return [said] if said else []


def _said(budget: dict[str, Any]) -> str | None:
    return " ".join(f"{name} {value}" for name, value in budget.items() if value is not None) or None


def _other_rows(ours: list[Any], theirs: list[Any]) -> str:
    if len(ours) != len(theirs):
        return f"got {len(ours)} rows, expected {len(theirs)}"
    other, wanted = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return f"got other {len(ours)} rows (first {other}), expected those of the old results (first {wanted})"


def _version(name: str) -> Read:
    return lambda record: (meta("versions")(record) or {}).get(name)


def _commit(record: Record) -> str | None:
    return told_commit(meta("git")(record))


def told_commit(git: Any) -> str | None:
    """`0123abc`, with whether the tree had changes of its own."""
    if not isinstance(git, dict) or not git.get("commit"):
        return None
    return str(git["commit"])[:7] + (" with changes" if git.get("dirty") else "")


def _settings(found: Results, method: str) -> dict[str, Any]:
    """Setting → value of a method's config, without what is told by itself or differs between its seeds."""
    each = [_flat(record["run_info"].get("config") or {}) for record in found.finals.get(method, {}).values()]
    first = each[0] if each else {}
    return {
        name: value for name, value in first.items() if name not in TOLD and all(one.get(name) == value for one in each)
    }


def _flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _swapped(record: Record) -> str | None:
    """Which parts were swapped for fused ones."""
    kernels = meta("kernels")(record)
    if not isinstance(kernels, dict):
        return None
    return ", ".join(f"{name} {count}" for name, count in sorted((kernels.get("swapped") or {}).items())) or "none"


def _backend(record: Record) -> str:
    return str((meta("kernels")(record) or {}).get("backend", "off"))
