"""Runs a probe in a process of its own, to predict a suite of which nothing has run. It leaves nothing behind."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError, Interrupted, StorageError
from ..run_directory import command, storage_errors
from . import running
from .cell import spec_of
from .jobs import end, failure_of, launch, noting_signals
from .records import read_record
from .results import Results


def probe(
    results: Results, say: running.Say, program: Sequence[str] | None = None, jobs: int = 1
) -> tuple[dict[str, Any], float]:
    """A few steps and rows of the reference's first final cell.

    Args:
        program: what runs a cell; takes SPEC, RECORD and a flag.
        jobs: cells at once of the bench that it is for: as many share the cores.

    Returns:
        The record (`trying.tried`), and the seconds that its process took.

    Raises:
        EngineError: the probe failed; the exit code is the cell's. Interrupted: SIGINT or SIGTERM.
    """
    suite = results.suite
    cell = results.final(suite.reference, suite.rates(suite.reference)[0])[0]
    say(f"No cell has trained yet: timing a few steps of {cell.method} in a process of its own. Nothing is recorded.")
    stopped: list[str] = []
    # in the system's folder, which is tidied when this process is killed; TMPDIR names a larger one
    with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="peft-engine-probe-") as place:
        folder = Path(place)
        more = {"command": command(), "cells_at_once": jobs, "tuned": None, "forgetting_before": None, "probe": True}
        spec = spec_of(cell, suite.name, suite.general_text, **more)
        job = launch(cell, spec, folder, folder / "log", program or running.CELL, jobs)
        try:
            with noting_signals(stopped.append):
                while job.process.poll() is None and not stopped:
                    time.sleep(0.05)
        finally:
            took = time.monotonic() - job.began
            end([job])
        if stopped:
            raise Interrupted(f"{stopped[0]}: the probe was stopped.", "The same command tries it again.")
        problem = None
        if job.process.returncode == 0:
            try:
                return read_record(folder / "record.json"), took
            except StorageError as error:
                problem = f"The process ended well, but its record doesn't check: {error}"
        failure = failure_of(job, problem)
    if failure["exit_code"] == 1:
        say("\n".join(failure["log_tail"]))
    failed = EngineError(f"The probe of {cell.method} failed: {failure['reason']}", failure["fix"])
    failed.exit_code = failure["exit_code"]
    raise failed
