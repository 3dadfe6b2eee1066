"""`train` as a command: in this process, as one of several, or by starting several. Heavy imports happen inside."""

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from .config import Config
from .faults import several
from .run_directory import RunDirectory


def enter() -> None:
    """As one of several: meet the others, so that even a fault of the settings is told once."""
    if several():
        from .processes import connect

        connect()


def start_here(settings: Config, *, resume: bool, overwrite: bool, quiet: bool) -> dict[str, Any] | None:
    """Train in this process.

    Returns:
        The summary, to be shown; None in all but the first of several processes.
    """
    first = not several() or os.environ.get("RANK") == "0"
    if first:  # one writer among processes; told before torch is waited for
        RunDirectory(settings.output).refuse_occupied(resume=resume, overwrite=overwrite)
    from .run import train

    if several():  # the run has its own way with signals; a launcher must not cut short what comes after it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    summary = train(settings, resume=resume, overwrite=overwrite, quiet=quiet)
    return summary if first else None


def start_processes(
    settings: Config, config: str, overrides: Sequence[str], flags: Mapping[str, bool], count: int
) -> int:
    """Train in `count` processes of this machine, with the same words. Returns their exit code."""
    RunDirectory(settings.output).refuse_occupied(resume=flags["--resume"], overwrite=flags["--overwrite"])
    from .launching import launch

    words = [word for one in overrides for word in ("--set", one)]
    return launch(settings, ["train", config, *words, *(name for name, given in flags.items() if given)], count)
