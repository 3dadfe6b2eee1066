"""Processes of cells: begun, ended, and what a failed one said."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from .cell import UNTIL_CLOSED
from .cells import Cell

TAIL = 30  # lines of a failed cell's log that are kept with it
PATIENCE = 20  # seconds that cells get to end by themselves


@dataclass
class Job:
    """A cell whose process runs."""

    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    began: float


def launch(
    cell: Cell, spec: Mapping[str, Any], folder: Path, log: Path, program: Sequence[str], at_once: int = 1
) -> Job:
    """Begin a cell's process, which leaves `record.json` or `failure.json` in `folder`.

    Args:
        spec: what it is told, see `cell.spec_of`.
        program: what runs a cell; takes SPEC, RECORD and a flag.
        at_once: processes that share the cores.
    """
    (folder / "spec.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    words = [*program, str(folder / "spec.json"), str(folder / "record.json"), UNTIL_CLOSED]
    with log.open("wb") as out:
        # a session of its own: Ctrl-C reaches this process alone, which then ends its cells
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=out, stderr=out, env=_environment(at_once), start_new_session=True
        )
    return Job(cell, process, folder, log, time.monotonic())


def end(jobs: Sequence[Job]) -> None:
    """End processes that may still run."""
    for job in jobs:
        job.process.terminate()
    until = time.monotonic() + PATIENCE
    for job in jobs:
        try:
            job.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            job.process.kill()
            job.process.wait()
        if job.process.stdin is not None:
            job.process.stdin.close()


@contextlib.contextmanager
def noting_signals(note: Callable[[str], None]) -> Iterator[None]:
    """Call `note` with the name of each SIGINT and SIGTERM, instead of what they do."""

    def noted(number: int, frame: FrameType | None) -> None:
        note(signal.Signals(number).name)

    old = {number: signal.signal(number, noted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def failure_of(job: Job, problem: str | None) -> dict[str, Any]:
    """What is kept of a failed cell: its own word, or how its process ended."""
    code = job.process.returncode
    told: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((job.folder / "failure.json").read_text(encoding="utf-8"))
    if problem is None and not told:
        killed = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; out of memory?" if code == -signal.SIGKILL else ""
        problem = f"The cell's process said nothing ({killed}{hint})."
    tail = job.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if job.log.exists() else []
    cell = job.cell
    return {
        "reason": problem or told["reason"],
        "fix": told.get("fix", ""),
        "exit_code": (4 if code == -signal.SIGKILL else 1) if problem else int(told.get("exit_code") or 1),
        "kind": cell.kind,
        "method": cell.method,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "key": cell.key,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "log_tail": tail,
    }


def _environment(at_once: int) -> dict[str, str]:
    """That of a cell: its share of the cores, unless somebody has said otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    share = {"OMP_NUM_THREADS": str(max(1, cores // at_once))} if at_once > 1 else {}
    return {**share, **os.environ}
