"""Several processes that make one run: how they find each other, decide as one, and notice that one has ended.

torchrun, `accelerate launch` and `train --processes` tell each process its place by the same variables (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Everything here is called by all of them in the same order, and does
nothing in a run of one process. What is sent between them goes over the CPU (gloo), so that a wish to stop or a count
never waits for a GPU.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ConfigError, ProcessLost

T = TypeVar("T")
TIMEOUT = timedelta(hours=1)
"""How long one process waits for the others: as long as the first may need to tokenise, or to write a checkpoint. One
that has ended is noticed at once."""
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = "PEFT_ENGINE_LAUNCHER"  # process id of `train --processes`, in the processes that it starts
BROKEN = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "ncclRemoteError", "Broken pipe")

_store: dist.Store | None = None


def world() -> int:
    """Number of processes of this run."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() else 1


def rank() -> int:
    """Number of this process, from 0; the first is the one that writes and prints."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def connect() -> None:
    """Find the others' shared store, so that a fault is told once; before anything is loaded.

    Raises:
        ConfigError: the launcher's variables are not all there.
        ProcessLost: the others can't be reached.
    """
    global _store
    if world() == 1 or _store is not None:
        return
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world()}, but {', '.join(missing)} is not set.",
            "Start the processes with train --processes N, torchrun or accelerate launch, or unset WORLD_SIZE.",
        )
    if os.environ.get(LAUNCHER) == str(os.getppid()) and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG: a launcher that is killed orphans nobody
    with _watched():
        _store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))


def form(device: str) -> None:
    """Make the process group that every collective below, and torch's own, runs in."""
    if world() == 1 or dist.is_initialized():
        return
    connect()
    assert _store is not None
    _wait_for_all(_store)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    with _watched():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore(_key("group"), _store),
            rank=rank(),
            world_size=world(),
            timeout=TIMEOUT,
        )


def _wait_for_all(store: dist.Store) -> None:
    """Come together, in steps that a signal can interrupt, unless one has failed before it came here."""
    store.add(_key("ready"), 1)
    limit = time.monotonic() + TIMEOUT.total_seconds()
    with _watched():
        while store.add(_key("ready"), 0) < world():
            if store.add(_key("failed"), 0) or time.monotonic() > limit:
                raise lost()
            time.sleep(0.02)


def _key(name: str) -> str:
    """In the store, which torchrun --max-restarts may keep."""
    return f"peft_engine/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def leave() -> None:
    """End the group, where there is one; the others are not waited for."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_fail() -> bool:
    """Whether no other process has told a fault yet: what all meet is printed once."""
    if world() == 1 or _store is None:
        return True
    try:
        return int(_store.add(_key("failed"), 1)) == 1
    except RuntimeError:
        # The store went with the process that held it. That was the launcher, which told nobody why it was killed, or
        # the first process, which has told its own.
        return rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def barrier() -> None:
    """Wait until all have come here."""
    maximum([0.0])


def maximum(values: list[float]) -> list[float]:
    """Element by element the largest over all processes; `values` is as long in each."""
    if not _several():
        return values
    found = torch.tensor(values, dtype=torch.float64)
    with _watched():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found]


def total(tensor: Tensor) -> Tensor:
    """Sum of a tensor over all processes, in place."""
    if _several():
        with _watched():
            dist.all_reduce(tensor)
    return tensor


def gathered(value: T) -> list[T]:
    """What each process gives, in their order."""
    if not _several():
        return [value]
    found: list[Any] = [None] * world()
    with _watched():
        dist.all_gather_object(found, value)
    return found


def from_first(value: Callable[[], T]) -> T:
    """What the first process finds; the others don't look, and wait."""
    if not _several():
        return value()
    box = [value() if rank() == 0 else None]
    with _watched():
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def copy_first(tensors: list[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if _several():
        with _watched():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def spread(items: list[T], work: Callable[[list[T]], list[Any]]) -> list[Any]:
    """`work` over `items`, each process doing its share; all get all results, in the order of the items."""
    if not _several():
        return work(items)
    own = items[rank() :: world()]
    parts = gathered(work(own))
    found: list[Any] = [None] * len(items)
    for first, part in enumerate(parts):
        found[first :: world()] = part
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an exception of torch's collectives says that another process is no longer there."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(words in str(error) for words in BROKEN)


def lost() -> ProcessLost:
    return ProcessLost(
        f"Process {rank()} of {world()} waited for another one that has ended, or did not answer in {TIMEOUT}.",
        "What that one said stands above, if it could say anything. Run it again with --resume.",
    )


def _several() -> bool:
    return world() > 1 and dist.is_initialized()


@contextmanager
def _watched() -> Iterator[None]:
    """Whatever breaks while processes talk means that one of them is gone."""
    try:
        yield
    except RuntimeError as error:
        raise lost() from error
