"""One optimizer step of one member: forward and backward over micro-batches, then the update.

`gradients` has no `.item()` and no data-dependent control flow, so that it runs on fake tensors too.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.group import Group
from ..adapters.neftune import packed_samples, padded_samples
from ..data.encoding import EncodedSet
from ..runtime import Runtime
from ..tasks.base import Batch, Task, to_device

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no two rows share a number


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
    group: Group,
    task: Task,
    data: EncodedSet,
    micro_batches: Sequence[np.ndarray],
    units: int,
    tensors: Sequence[nn.Parameter],
    runtime: Runtime,
    seed: int,
) -> Gradients:
    """Accumulate gradients of the mean loss over the whole global batch into `tensors`.

    Each micro-batch's summed loss is divided by the units of the *global* batch, so any way of cutting it gives the
    same mean (trap 1).

    Args:
        micro_batches: this process's rows of the step, in pieces.
        units: supervised units of the global batch over all processes, known from the data.
        seed: of this member and step; with a row's number it names the row's dropout masks in a fused model, which
            therefore depend neither on the cut into micro-batches nor on the number of processes.
    """
    accelerator = runtime.accelerator
    total = torch.zeros((), device=runtime.device)
    for rows in micro_batches:
        held = task.collate(data, rows)
        batch = to_device(held, runtime.device)
        if group.rows is not None:
            group.rows.seeds = sample_seeds(seed, rows).to(runtime.device)
        with _noise(group, data, batch, held, rows, seed):  # also over backward: a replay needs it again
            with accelerator.autocast():
                loss = task.training_loss(group.model, batch) / units
            accelerator.backward(loss)
        total += loss.detach()
    if runtime.world > 1:
        total = _sum_over_processes(tensors, total, runtime)
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    return Gradients(total, norm)


def sample_seeds(seed: int, rows: np.ndarray) -> Tensor:
    """One 64-bit number per row of the data, int64 (rows,), for this member and step."""
    words = np.random.SeedSequence(seed).generate_state(1, np.uint64) + rows.astype(np.uint64) * GOLDEN
    return torch.from_numpy(words.view(np.int64))


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


def _noise(
    group: Group, data: EncodedSet, batch: Batch, held: Batch, rows: Any, seed: int
) -> AbstractContextManager[None]:
    """NEFTune's noise on this batch's embeddings, where it is asked for. `held` is the batch on the CPU."""
    if group.noise is None:
        return nullcontext()
    packs = getattr(rows, "packs", None)
    if packs is None:
        samples = padded_samples(held["attention_mask"], sample_seeds(seed, rows))
    else:
        seeds = [sample_seeds(seed, pack).tolist() for pack in packs]
        samples = packed_samples([data.lengths[pack].tolist() for pack in packs], seeds)
    return group.noise.during(batch["input_ids"], samples)
