"""One optimizer step of one member: forward and backward over micro-batches, then the update.

`gradients` has no `.item()` and no data-dependent control flow, so that it runs on fake tensors too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..data.encoding import EncodedSet
from ..runtime import Runtime
from ..tasks.base import Task, to_device


@dataclass(frozen=True)
class Gradients:
    """What backward gave.

    Attributes:
        loss: mean over the global batch's units, fp32 scalar on the device.
        norm: of the whole gradient before clipping, fp32 scalar on the device.
    """

    loss: Tensor
    norm: Tensor


def gradients(
    model: nn.Module,
    task: Task,
    data: EncodedSet,
    micro_batches: Sequence[np.ndarray],
    units: int,
    tensors: Sequence[nn.Parameter],
    runtime: Runtime,
) -> Gradients:
    """Accumulate gradients of the mean loss over the whole global batch into `tensors`.

    Each micro-batch's summed loss is divided by the units of the *global* batch, so any way of cutting it gives the
    same mean (trap 1).

    Args:
        micro_batches: this process's rows of the step, in pieces.
        units: supervised units of the global batch over all processes, known from the data.
    """
    accelerator = runtime.accelerator
    total = torch.zeros((), device=runtime.device)
    for rows in micro_batches:
        batch = to_device(task.collate(data, rows), runtime.device)
        with accelerator.autocast():
            logits = task.forward(model, batch)
        loss = task.loss(logits, batch) / units
        del logits
        accelerator.backward(loss)
        total += loss.detach()
    if runtime.world > 1:
        total = _sum_over_processes(tensors, total, runtime)
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    return Gradients(total, norm)


def clip(tensors: Sequence[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients in place so that their global norm is at most `limit`."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(tensors, limit, norm)


def cut(rows: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in pieces of at most `size`."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _sum_over_processes(tensors: Sequence[nn.Parameter], total: Tensor, runtime: Runtime) -> Tensor:
    """Add up gradients and losses over processes: what trains is small, so one flat reduction does."""
    for tensor in tensors:
        if tensor.grad is None:
            tensor.grad = torch.zeros_like(tensor)
    flat = torch.cat([total.reshape(1), *(t.grad.reshape(-1) for t in tensors if t.grad is not None)])
    flat = runtime.accelerator.reduce(flat, "sum")
    start = 1
    for tensor in tensors:
        assert tensor.grad is not None
        tensor.grad.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
    return flat[0]
