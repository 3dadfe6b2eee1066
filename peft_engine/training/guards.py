"""What watches a run: dead gradients, loss that is not finite, memory, signals."""

import errno
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import processes
from ..adapters.group import Member
from ..data.encoding import EncodedSet
from ..errors import ConfigError, Interrupted
from ..runtime import Runtime
from ..tasks.base import Task, to_device


def check_gradients(member: Member, reached: Tensor | None = None) -> None:
    """After the first backward every trainable tensor has a gradient (trap 6).

    Its value may be zero: LoRA's A has an exactly zero gradient while B is zero. With several processes `reached` says
    in how many of them each tensor, (tensors,), got one.
    """
    got = [t.grad is not None for t in member.tensors.values()] if reached is None else (reached > 0).tolist()
    dead = [name for name, there in zip(member.tensors, got, strict=True) if not there]
    if dead:
        raise ConfigError(
            f"{len(dead)} of {len(member.tensors)} trainable tensors got no gradient, so they would never learn: "
            f"{', '.join(dead[:3])}.",
            "The model does not use them in this task, or gradient checkpointing cuts them off: adapt other modules, "
            "or set training.gradient_checkpointing: false.",
        )


def check_moving(member: Member, starts_at_zero: bool) -> None:
    """After two updates at a learning rate above 0, no LoRA B that started at zero is still zero (trap 6)."""
    if not starts_at_zero:
        return
    still = [name for name, tensor in member.tensors.items() if ".lora_B." in name and not bool(tensor.detach().any())]
    if still:
        raise ConfigError(
            f"{len(still)} adapters have not moved after two optimizer steps: {', '.join(still[:3])}.",
            "Their gradient is zero: adapt modules that reach the loss, or set training.gradient_checkpointing: false.",
        )


def rows_not_finite(
    model: nn.Module, task: Task, data: EncodedSet, rows: np.ndarray, runtime: Runtime, seed: int
) -> list[int]:
    """Those of `rows` whose own loss is not finite, found one by one without gradients.

    Args:
        seed: of the member and step, for the same augmentation.
    """
    found = []
    with torch.no_grad():
        for row in rows:
            batch = to_device(task.collate(*data.drawn(np.array([row]), seed)), runtime.device)
            with runtime.accelerator.autocast():
                logits = task.forward(model, batch)
            if not torch.isfinite(task.loss(logits, batch)):
                found.append(int(row))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text
        or "Cannot allocate memory" in text  # mmap of a weight file
        or "not enough memory" in text
        or "out of memory" in text
    )


class Signals:
    """SIGINT and SIGTERM as a request: the loop asks `wanted` between steps, writes a checkpoint and stops.

    A second signal stops at once; in one of several processes only after a second, since a launcher passes on what the
    scheduler has sent to all. Outside `deferred` a signal raises `Interrupted` where it hits.
    """

    def __init__(self) -> None:
        self.wanted: str | None = None
        self._deferred = False
        self._since = 0.0

    @contextmanager
    def handled(self) -> Iterator["Signals"]:
        """Install the handlers (in the main thread), and put the old ones back."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While active, a first signal only sets `wanted`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._deferred and self.wanted and processes.world() > 1 and time.monotonic() < self._since + 1.0:
            return
        if not self._deferred or self.wanted:
            if _in_finalizer(frame):
                threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # Python drops what is raised in there
                return
            raise Interrupted(
                f"{name}: stopped.",
                "Run it again with --resume (and without --overwrite): it goes on from the last checkpoint, if any.",
            )
        self.wanted, self._since = name, time.monotonic()


def _in_finalizer(frame: FrameType | None) -> bool:
    """Whether a weak reference's callback runs: an exception would be printed and forgotten."""
    while frame is not None:
        if frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def describe_rows(data: EncodedSet, where: Sequence[str], rows: list[int]) -> list[dict[str, Any]]:
    """Provenance of encoded rows, for messages and failure.json."""
    return [{"row": where[int(data.rows[row])], "tokens": int(data.lengths[row])} for row in rows]
