"""One optimizer step of one member: forward and backward over micro-batches, then the update.

`gradients` has no `.item()` and no data-dependent control flow, so that it runs on fake tensors too.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .. import processes
from ..adapters.group import Group
from ..adapters.neftune import packed_samples, padded_samples
from ..data.encoding import EncodedSet
from ..data.packing import Packs
from ..runtime import Runtime
from ..tasks.base import Batch, Task, collated, to_device

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no two rows share a number

PLACES_APART = 0x2545F4914F6CDD1D  # between the seeds of two samples of one row


@dataclass(frozen=True)
class Gradients:
    """What backward gave.

    Attributes:
        loss: mean over the global batch's units, fp32 scalar on the device.
        norm: of the whole gradient before clipping, fp32 scalar on the device.
        reached: with several processes, in how many of them each tensor got a gradient, (tensors,) on the device.
    """

    loss: Tensor
    norm: Tensor
    reached: Tensor | None = None


def gradients(
    group: Group,
    task: Task,
    data: EncodedSet,
    micro_batches: Sequence[np.ndarray | Packs],
    units: float,
    tensors: Sequence[nn.Parameter],
    runtime: Runtime,
    seed: int,
    idle: Sequence[np.ndarray] = (),
) -> Gradients:
    """Accumulate gradients of the mean loss over the whole global batch into `tensors`.

    Each micro-batch's summed loss is divided by the units of the *global* batch, so any way of cutting it gives the
    same mean (trap 1).

    Args:
        micro_batches: this process's rows of the step, in pieces, or its packs.
        units: supervised units of the global batch over all processes, known from the data; their weights' sum where
            classes are weighted.
        seed: of this member and step; with a row's number it names the row's dropout masks in a fused model, which
            therefore depend neither on the cut into micro-batches nor on the number of processes. So do augmentations.
            A pack's masks are named by all of its rows.
        idle: rows to pass through the model with no weight, because another process has more micro-batches and a
            sharded backbone runs in all processes at once.
    """
    accelerator = runtime.accelerator
    total, reached = torch.zeros((), device=runtime.device), None
    for place, rows in enumerate([*micro_batches, *idle]):
        held = collated(task, data, rows, seed)
        batch = to_device(held, runtime.device)
        seeds = sample_seeds(seed, rows)
        if "place" in held:  # a row that is read several times (choices) has as many samples
            seeds = seeds[held["row"]] + held["place"] * PLACES_APART
        if group.rows is not None:
            group.rows.seeds = seeds.to(runtime.device)
        with _noise(group, data, batch, held, rows, seed, seeds):  # also over backward: a replay needs it again
            with accelerator.autocast(), group.saving():
                loss = task.training_loss(group.model, batch) / units
                if place >= len(micro_batches):
                    loss = loss * 0
            accelerator.backward(loss)
        total += loss.detach()
    penalty = group.penalty()  # of the step, not of its rows: once, whatever the cut
    if penalty is not None:
        accelerator.backward(penalty / runtime.world)
        total += penalty.detach() / runtime.world
    if runtime.world > 1:
        total, reached = _sum_over_processes(tensors, total)
    norm = torch.nn.utils.get_total_norm([t.grad for t in tensors if t.grad is not None])
    return Gradients(total, norm, reached)


def _noise(
    group: Group, data: EncodedSet, batch: Batch, held: Batch, rows: np.ndarray | Packs, seed: int, seeds: Tensor
) -> AbstractContextManager[None]:
    """NEFTune's noise on this batch's embeddings, where it is asked for. `held` is the batch on the CPU."""
    if group.noise is None:
        return nullcontext()
    if isinstance(rows, Packs):
        named = [sample_seeds(seed, pack).tolist() for pack in rows.packs]
        samples = packed_samples([data.lengths[pack].tolist() for pack in rows.packs], named)
    else:
        samples = padded_samples(held["attention_mask"], seeds)
    return group.noise.during(batch["input_ids"], samples)


def sample_seeds(seed: int, rows: np.ndarray | Packs) -> Tensor:
    """One 64-bit number per row of the data, or per pack of rows, int64 (rows,), for this member and step."""
    if isinstance(rows, Packs):
        rows = np.array([pack_name(pack) for pack in rows.packs], dtype=np.uint64)
    words = np.random.SeedSequence(seed).generate_state(1, np.uint64) + rows.astype(np.uint64) * GOLDEN
    return torch.from_numpy(words.view(np.int64))


def pack_name(rows: np.ndarray) -> int:
    """64 bits that tell a pack from others; a pack of one row has that row's number, and so its masks."""
    name = 0
    for row in rows.tolist():
        name = (name * int(GOLDEN) + row) % 2**64
    return name


def clip(tensors: Sequence[nn.Parameter], norm: Tensor, limit: float | None) -> None:
    """Scale gradients in place so that their global norm is at most `limit`."""
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(tensors, limit, norm)


def _sum_over_processes(tensors: Sequence[nn.Parameter], loss: Tensor) -> tuple[Tensor, Tensor]:
    """Add up gradients and losses over processes: what trains is small, so one flat reduction does.

    A process without rows, in an uneven last batch, adds zeros.

    Returns:
        The loss, and in how many processes each tensor got a gradient: adding hides where it is missing (trap 6).
    """
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    reached = torch.tensor([t.grad is not None for t in tensors], dtype=loss.dtype, device=loss.device)
    flat = torch.cat([loss.reshape(1), reached, *(grad.reshape(-1) for grad in grads)])
    flat = processes.total(flat)
    head = 1 + len(tensors)
    for tensor, grad, part in zip(tensors, grads, flat[head:].split([t.numel() for t in tensors]), strict=True):
        tensor.grad = grad.copy_(part.view_as(grad))
    return flat[0], flat[1:head]
