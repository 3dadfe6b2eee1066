"""How the command line ends: what the machine did wrong, in a user's words, told once however many processes met it."""

import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

from .errors import EngineError, OutOfMemory


def several() -> bool:
    """Whether a launcher has started several processes; asked without waiting for torch."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def told_by_another() -> bool:
    """Whether another process of this run has told a fault, which ours is the same as or follows from."""
    if not several():
        return False
    from .processes import first_to_fail

    return not first_to_fail()


def explain(error: Exception) -> EngineError | None:
    """A fault of the machine in the user's words; None for one of our own."""
    from .run_directory import explain_storage

    text = str(error)
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if "torch" in sys.modules and isinstance(error, RuntimeError):
        from .training.guards import is_out_of_memory

        memory = memory or is_out_of_memory(error)
        if several():
            from .processes import is_lost, lost

            if is_lost(error):
                return lost()
    if isinstance(error, ImportError):  # a shared library that found no room
        memory = memory or "failed to map segment" in text or "cannot allocate memory" in text.lower()
    if memory:
        return OutOfMemory(
            f"Memory ran out ({text.splitlines()[0] if text else type(error).__name__}).",
            "Use a machine with more memory, or take a smaller model, a lower data.max_length or fewer rows.",
        )
    if not isinstance(error, OSError):
        return None
    return explain_storage(error, None if error.filename else Path("standard output or a file"))


def leave(code: int) -> NoReturn:
    """End this process."""
    try:
        sys.stdout.flush()
    except OSError:  # told already; Python would tell it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.stderr.flush()
    sys.exit(code)
