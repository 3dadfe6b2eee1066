"""`train --processes N`: one process per share of the work on this machine, ended together.

torch's own launcher starts and watches them; this file gives them what torchrun would, passes signals on, and makes one
exit code and one message of theirs.
"""

import logging
import os
import signal
import sys
import tempfile
from types import FrameType

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from .config import Config
from .errors import EngineError
from .processes import LAUNCHER
from .runtime import device_of, refuse_processes

POLL_SECONDS = 0.1


def launch(config: Config, arguments: list[str], count: int) -> int:
    """Run `peft-engine ARGUMENTS` in `count` processes and wait for them.

    Returns:
        Their exit code.

    Raises:
        ConfigError: this machine can't hold so many.
        EngineError: one was ended by a signal that nobody sent through this process.
    """
    refuse_processes(config, device_of(config), count, count)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL + 1)  # told here
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, _cores() // count))),
        LAUNCHER: str(os.getpid()),
    }
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        processes = start_processes(
            "peft-engine",
            sys.executable,
            dict.fromkeys(range(count), ("-m", "peft_engine", *arguments)),
            {place: {**shared, "RANK": str(place), "LOCAL_RANK": str(place)} for place in range(count)},
            DefaultLogsSpecs(folder),
        )
        asked: list[int] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            asked.append(number)
            for process in processes.pids().values():
                _send(process, number)

        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, pass_on)
            result = processes.wait(period=POLL_SECONDS)
        except SignalException as error:  # it came before the handler above stood
            asked.append(error.sigval)
            processes.close(error.sigval)
            return 75
        finally:
            processes.close(signal.SIGKILL)  # nothing is left behind, whatever happened
    assert result is not None
    return _joined({place: failure.exitcode for place, failure in result.failures.items()}, bool(asked))


def _joined(codes: dict[int, int], asked: bool) -> int:
    """One exit code of those that were not 0.

    A code with a meaning comes before a signal, and both before 1, which the others end with when one is gone.
    """
    told = [code for code in codes.values() if code > 1]
    if told or not codes:
        return told[0] if told else 0
    killed = {place: -code for place, code in codes.items() if code < 0}
    if killed and asked:
        return 75
    if killed:
        place, number = min(killed.items(), key=lambda one: one[1] == signal.SIGTERM)
        raise EngineError(
            f"Process {place} was ended by {signal.Signals(number).name}, and the others with it.",
            "SIGKILL is often the kernel's, out of memory. Run it again with --resume.",
        )
    return 1


def _send(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:  # has ended by itself
        return


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
