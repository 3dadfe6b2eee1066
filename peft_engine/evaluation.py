"""Judge a model: metrics and predictions over a split."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from . import processes
from .data.encoding import EncodedSet
from .errors import OutOfMemory
from .runtime import Runtime
from .tasks.base import Batch, Meter, Task, to_device
from .tasks.items import COLUMNS, item_kind, outcomes
from .training.guards import is_out_of_memory

COUNTS = (int, float, np.generic, np.ndarray, list)


def evaluate_split(model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime) -> dict[str, Any]:
    """Metrics of a model over a split, batch by batch, longest first; logits are not kept (trap 23).

    Halves the batch on out-of-memory. The model must be in eval mode. Several processes do a share each, and all get
    the metrics of the whole.
    """
    meter = task.meter()
    order = np.argsort(-data.lengths, kind="stable")
    own, first = order[runtime.rank :: runtime.world], order[:: runtime.world]

    def update(logits: torch.Tensor, batch: Batch, rows: np.ndarray) -> None:
        meter.update(logits, batch)

    visit_rows(model, task, data, batch_size, runtime, update, own)
    if runtime.sharded:  # all processes go through the blocks equally often
        for _ in range(math.ceil(len(first) / batch_size) - math.ceil(len(own) / batch_size)):
            visit_rows(model, task, data, batch_size, runtime, lambda *_: None, order[:1])
    return join(meter, task.meter()).compute()


def join(meter: Meter, fresh: Meter) -> Meter:
    """The meter of all processes together, from each one's own.

    What a meter counts is numbers and arrays, which are added up, and lists, which are put one after another in the
    order of the processes; whatever `fresh`, one that has seen nothing, holds as well stays as it is.
    """
    if processes.world() == 1:
        return meter
    begun: dict[str, Any] = vars(fresh)
    counted: dict[str, Any] = {name: value for name, value in vars(meter).items() if isinstance(value, COUNTS)}
    for name, value in vars(meter).items():
        assert name in counted or value is begun[name], f"{type(meter).__name__}.{name}: can't be joined"
    parts = processes.gathered(counted)
    for name in counted:
        start = begun[name]
        if isinstance(start, list):
            setattr(fresh, name, [*start, *(item for part in parts for item in part[name][len(start) :])])
        else:
            setattr(fresh, name, start + sum(part[name] - start for part in parts))
    return fresh


def predict_rows(
    model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime
) -> list[dict[str, Any]]:
    """What the task says of every sequence (`Task.predictions`), in the order of the data."""
    found: list[dict[str, Any]] = [{} for _ in range(len(data))]

    def note(logits: torch.Tensor, batch: Batch, rows: np.ndarray) -> None:
        for row, one in zip(rows, task.predictions(logits, batch), strict=True):
            found[int(row)] = one

    visit_rows(model, task, data, batch_size, runtime, note, np.argsort(-data.lengths, kind="stable"))
    return found


def evaluate_items(model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime) -> dict[str, Any]:
    """What the model makes of every row, visited as `evaluate_split` does. One process; the model in eval mode.

    Returns:
        {"kind", "rows", …}: `rows` are numbers of source rows in rising order, the other lists have an entry for each,
        see `tasks.items`. Several sequences of one source row (windows of a long text) are added up.

    Raises:
        ConfigError: a task that is not judged row by row.
    """
    kind = item_kind(task)
    found: list[dict[str, Any]] = [{} for _ in range(len(data))]

    def note(logits: torch.Tensor, batch: Batch, rows: np.ndarray) -> None:
        for row, one in zip(rows, outcomes(task, logits, batch, data, rows), strict=True):
            found[int(row)] = one

    visit_rows(model, task, data, batch_size, runtime, note, np.argsort(-data.lengths, kind="stable"))
    by_row: dict[int, dict[str, Any]] = {}
    for source, one in zip(data.rows.tolist(), found, strict=True):
        seen = by_row.get(source)
        assert seen is None or kind == "tokens", f"source row {source} gives several {kind}"
        by_row[source] = one if seen is None else {name: _sum(seen[name], value) for name, value in one.items()}
    rows = sorted(by_row)
    return {"kind": kind, "rows": rows} | {name: [by_row[row][name] for row in rows] for name in COLUMNS[kind]}


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second


def visit_rows(
    model: nn.Module,
    task: Task,
    data: EncodedSet,
    batch_size: int,
    runtime: Runtime,
    use: Callable[[torch.Tensor, Batch, np.ndarray], None],
    order: np.ndarray,
) -> None:
    """Call `use` with (logits, batch, rows) over the rows in `order`: longest first, so that memory is tried at once.

    A batch that `use` runs out of memory on is given to it again in halves, so it must change nothing before the end.
    """

    def visit(rows: np.ndarray) -> None:
        batch = to_device(task.collate(data, rows), runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast():
            logits = task.forward(model, batch)
        use(logits, batch, rows)

    start, size = 0, batch_size
    while start < len(order):
        rows = order[start : start + size]
        try:
            visit(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1 or runtime.sharded:
                raise OutOfMemory(
                    f"Memory ran out evaluating {len(rows)} {data.largest} at once.",
                    f"Lower evaluation.batch_size or {data.length_setting}.",
                ) from error
            size = max(1, size // 2)
            continue
        start += len(rows)
