"""How long the open cells of a suite will take, by those that have run."""

from collections.abc import Iterable
from typing import Any

from .cells import Cell
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


def _seconds(record: dict[str, Any], kind: str, share: float) -> float:
    """What a cell of this kind takes, by a record of its method."""
    whole, training = record["run_info"]["total_seconds"], record["train_info"]["seconds"]["train"]
    if kind == "baseline":
        return float(whole - training)
    ratio = 1.0
    if record["run_info"]["kind"] != kind:
        ratio = share if kind == "tuning" else 1 / share
    return float(whole - training + training * ratio)
