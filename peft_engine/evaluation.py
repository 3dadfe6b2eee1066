"""Judge a model: metrics and predictions over a split."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from .data.encoding import EncodedSet
from .errors import OutOfMemory
from .runtime import Runtime
from .tasks.base import Batch, Task, to_device
from .training.guards import is_out_of_memory


def evaluate_split(model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime) -> dict[str, Any]:
    """Metrics of a model over a split, batch by batch, longest first; logits are not kept (trap 23).

    Halves the batch on out-of-memory. The model must be in eval mode.
    """
    meter = task.meter()
    _visit(model, task, data, batch_size, runtime, lambda logits, batch, _: meter.update(logits, batch))
    return meter.compute()


def predict_rows(
    model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime
) -> list[dict[str, Any]]:
    """What the task says of every sequence (`Task.predictions`), in the order of the data."""
    found: list[dict[str, Any]] = [{} for _ in range(len(data))]

    def note(logits: torch.Tensor, batch: Batch, rows: np.ndarray) -> None:
        for row, one in zip(rows, task.predictions(logits, batch), strict=True):
            found[int(row)] = one

    _visit(model, task, data, batch_size, runtime, note)
    return found


def _visit(
    model: nn.Module,
    task: Task,
    data: EncodedSet,
    batch_size: int,
    runtime: Runtime,
    use: Callable[[torch.Tensor, Batch, np.ndarray], None],
) -> None:
    """Call `use` with (logits, batch, rows) over the whole split, longest rows first so that memory is tried at once.

    A batch that `use` runs out of memory on is given to it again in halves, so it must change nothing before the end.
    """

    def visit(rows: np.ndarray) -> None:
        batch = to_device(task.collate(data, rows), runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast():
            logits = task.forward(model, batch)
        use(logits, batch, rows)

    order = np.argsort(-data.lengths, kind="stable")
    start, size = 0, batch_size
    while start < len(order):
        rows = order[start : start + size]
        try:
            visit(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    f"Memory ran out evaluating one sequence of {int(data.lengths[rows].max())} tokens.",
                    "Lower data.max_length.",
                ) from error
            size = max(1, size // 2)
            continue
        start += len(rows)
