"""`peft-engine` as real processes that can be killed, starved and stripped of rights.

They are forked from one server that has imported the libraries, so that a test pays for the imports once. Nothing else
is shared: every process has its own memory, signals, limits and exit code.
"""

import codecs
import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HEAVY = (
    "peft_engine.run",
    "peft_engine.using",
    "peft_engine.inspection",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
NOBODY = 65534

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*HEAVY, "processes"])


@dataclass(frozen=True)
class Ended:
    """Exit code (minus the signal, where one ended it) and what was printed."""

    code: int
    out: str
    err: str


class Engine:
    """A running `peft-engine ARGUMENTS`.

    Args:
        folder: where its output is kept, and its current directory.
        file_bytes: largest file it may write (RLIMIT_FSIZE).
        memory_bytes: address space it may take beyond what it has when it begins (RLIMIT_AS).
        nobody: run as another user, who may own nothing; needs root.
        unprivileged: the same user, but file modes count also for root.
        without: a package that is not installed, as far as this process can tell.
        environment: variables it has besides.
        first: called with nothing before it begins; must be importable.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        file_bytes: int | None = None,
        memory_bytes: int | None = None,
        nobody: bool = False,
        unprivileged: bool = False,
        without: str | None = None,
        environment: dict[str, str] | None = None,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        argv = [str(word) for word in arguments]
        limits = (file_bytes, memory_bytes, nobody, unprivileged, without, environment, first)
        self.process = _context.Process(target=_main, args=(argv, str(folder), *limits))
        self.process.start()

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> bool:
        """Watch closely until `what` holds; False if the process ended before."""
        limit = time.monotonic() + seconds
        while not what():
            if not self.alive:
                return what()
            if time.monotonic() > limit:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"waited {seconds} s in vain; stderr: {self._read('err')}")
            time.sleep(0.0005)
        return True

    def wait(self, seconds: float = 120) -> Ended:
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"not done after {seconds} s; stderr: {self._read('err')}")
        return Ended(code, self._read("out"), self._read("err"))

    def _read(self, name: str) -> str:
        path = self.folder / f"std{name}.txt"
        return path.read_text(encoding="utf-8") if path.exists() else ""


def engine(*arguments: object, folder: Path, **limits: object) -> Ended:
    """Run `peft-engine ARGUMENTS` to its end; see `Engine`."""
    return Engine(*arguments, folder=folder, **limits).wait()  # type: ignore[arg-type]


def _drop_capabilities() -> None:
    """Make root an ordinary owner of its files (Linux). Another user could not reach folders that only root enters."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


def _main(
    argv: list[str],
    folder: str,
    file_bytes: int | None,
    memory_bytes: int | None,
    nobody: bool,
    unprivileged: bool,
    without: str | None,
    environment: dict[str, str] | None,
    first: Callable[[], None] | None,
) -> None:
    os.environ.update(environment or {})
    os.chdir(folder)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        file = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o666)
        os.dup2(file, number)
        os.close(file)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if memory_bytes is not None:
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if nobody:
        codecs.lookup("utf-8-sig")  # Python's own folder may be closed to others
        os.environ["HOME"] = folder
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    if unprivileged and os.geteuid() == 0:
        _drop_capabilities()
    if without:
        sys.modules[without] = None  # type: ignore[assignment]  # Python's own note of what can't be imported
    sys.argv = ["peft-engine", *argv]
    if first:
        first()
    from peft_engine.cli import main

    main()
