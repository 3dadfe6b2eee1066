"""Errors a user can meet, each with the exit code of the command line.

Every message says what was got, what was expected, and (in `fix`) what to do. The CLI prints it without a traceback;
in Python these are ordinary exceptions. `assert` is for our own mistakes only.
"""


class EngineError(Exception):
    """Base of all errors below; by itself an internal error.

    Args:
        problem: what was got and what was expected, with the offending value, row or line.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str = "") -> None:
        super().__init__(f"{problem} {fix}".strip())
        self.problem = problem
        self.fix = fix


class ProcessLost(EngineError):
    """Of several processes that make one run, another has ended."""


class ConfigError(EngineError, ValueError):
    """A setting, an argument, or a model or file that isn't there."""

    exit_code = 2


class DataError(EngineError, ValueError):
    """The data can't be read, or can't be trained on as it is."""

    exit_code = 3


class OutOfMemory(EngineError):
    """One sequence at a time does not fit."""

    exit_code = 4


class Diverged(EngineError):
    """The loss or the gradient is not finite."""

    exit_code = 5


class BudgetReached(EngineError):
    """A limit of `budget` was reached; a complete checkpoint stands."""

    exit_code = 6


class VerificationError(EngineError):
    """What was written does not do what was trained."""

    exit_code = 7


class StorageError(EngineError):
    """Disk full, read-only, locked, or a corrupt file."""

    exit_code = 8


class Interrupted(EngineError):
    """SIGINT or SIGTERM; `--resume` goes on from here."""

    exit_code = 75
