"""How long the open cells of a suite will take: by those that have run, or by a probe."""

import math
from collections.abc import Iterable
from typing import Any

from .cells import TUNING_TEST_ROWS, Cell, Kind
from .results import Results


def forecast(results: Results, cells: Iterable[Cell], waiting: dict[str, int], jobs: int = 1) -> dict[str, Any]:
    """Seconds that cells will take.

    A method that has a record is as fast as its latest; one that has none is taken to be as slow as the slowest that
    has. A search run trains `tuning.share` of a final one's steps; all else of a run takes as long.

    Args:
        waiting: final cells that wait for their learning rate, by method.
        jobs: cells at once; they are taken not to slow each other down.

    Returns:
        {"seconds", "of"}: None, and why, until a method has run.
    """
    trained = [r for r in results.records.values() if r["run_info"]["kind"] != "baseline"]
    if not trained:
        return {"seconds": None, "of": "unknown until the first cell has run"}
    share = results.suite.tuning.share
    latest: dict[str, dict[str, Any]] = {}
    for record in sorted(trained, key=lambda one: one["run_info"]["created_at"]):
        latest[record["run_info"]["method"]] = record
    slowest = max(latest.values(), key=lambda record: _seconds(record, "final", share))
    without = sorted({*(cell.method for cell in cells), *waiting} - set(latest) - {"baseline"})
    total = 0.0
    for cell in cells:
        total += _seconds(latest.get(cell.method, slowest), cell.kind, share)
    for method, count in waiting.items():
        total += count * _seconds(latest.get(method, slowest), "final", share)
    of = f"by the recorded cells of {', '.join(sorted(latest))}"
    if without:
        slow = slowest["run_info"]["method"]
        of += f"; {', '.join(without)}, not run yet, taken to be as slow as {slow}, the slowest so far"
    return {"seconds": total / jobs, "of": of}


def by_probe(
    results: Results,
    cells: Iterable[Cell],
    waiting: dict[str, int],
    record: dict[str, Any],
    wall: float,
    jobs: int = 1,
) -> dict[str, Any]:
    """The same where nothing is recorded: every method is taken to be as slow as the one that was probed.

    Args:
        record: of the probe, see `trying.tried`.
        wall: seconds that its process took.

    Returns:
        {"seconds", "of", "probe"}; `probe` has the parts that `seconds` is made of, see `parts_of`, with "method" and
        "steps" (of a final cell).
    """
    parts, whole, share = parts_of(record, wall), record["train_info"]["whole"], results.suite.tuning.share
    seconds = {kind: cell_seconds(parts, whole, kind, share) for kind in ("baseline", "tuning", "final")}
    total = sum(seconds[cell.kind] for cell in cells) + sum(waiting.values()) * seconds["final"]
    method = record["run_info"]["method"]
    of = (
        f"by a probe of {method}, {record['train_info']['tried']['steps']} steps: {parts['load']:.1f} s to start, load "
        f"and save, {parts['step']:.3g} s a step, {parts['row']:.2g} s an evaluated row; "
        f"every method taken to be as slow as {method}"
    )
    return {"seconds": total / jobs, "of": of, "probe": {"method": method, "steps": whole["steps"], **parts}}


def parts_of(record: dict[str, Any], wall: float) -> dict[str, float]:
    """Seconds of a cell's parts, by a probe of `wall` seconds.

    Returns:
        `load`: process, imports, data, model, saving and what the first steps take beyond a step; `reopen`: the trained
        run opened again, and the machine measured; `step`; and for one row each `row` (evaluated), `item` (judged once
        more by itself), `answer` (generated), `window` (of general text).
    """
    info = record["train_info"]
    spent, judging, tried = info["seconds"], info["judging_seconds"], info["tried"]
    # by tokens, because the few timed steps need not be of mean length
    speed = info["tokens_per_second"] or (info["tokens"] / spent["train"] if spent["train"] else None)
    plain = info["tokens"] / speed if speed else 0.0
    evaluated = len(info["eval_curve"]) * tried["eval"] + 2 * tried["test"]
    apart = info["extra_seconds"] + plain + spent["evaluate"] + sum(judging.values())
    return {
        "load": max(0.0, wall - apart),
        "reopen": judging["reopen"] + judging["machine"],
        "step": info["whole"]["tokens_per_step"] / speed if speed else 0.0,
        "row": _each(spent["evaluate"], evaluated),
        "item": _each(judging["items"], tried["test"]),
        "answer": _each(judging["answers"], tried["answers"]),
        "window": _each(judging["forgetting"], tried["windows"]),
    }


def cell_seconds(parts: dict[str, float], whole: dict[str, Any], kind: Kind, share: float) -> float:
    """What a cell of this kind takes, by `parts_of` a probe and what the suite asks for (`trying.tried`)."""
    steps = max(1, round(whole["steps"] * share)) if kind == "tuning" else whole["steps"]
    tests = min(TUNING_TEST_ROWS, whole["test"]) if kind == "tuning" else whole["test"]
    evaluations = math.ceil(steps / whole["eval_every"])
    judged = whole["test"] * parts["item"] + whole["answers"] * parts["answer"] + whole["windows"] * parts["window"]
    if kind == "baseline":
        return parts["load"] + tests * parts["row"] + judged
    training = parts["load"] + steps * parts["step"] + (evaluations * whole["eval"] + 2 * tests) * parts["row"]
    return training if kind == "tuning" else training + parts["reopen"] + judged


def _each(seconds: float, count: int) -> float:
    return seconds / count if count else 0.0


def _seconds(record: dict[str, Any], kind: str, share: float) -> float:
    """What a cell of this kind takes, by a record of its method."""
    whole, training = record["run_info"]["total_seconds"], record["train_info"]["seconds"]["train"]
    if kind == "baseline":
        return float(whole - training)
    ratio = 1.0
    if record["run_info"]["kind"] != kind:
        ratio = share if kind == "tuning" else 1 / share
    return float(whole - training + training * ratio)
