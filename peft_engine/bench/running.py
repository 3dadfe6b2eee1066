"""Runs a suite's cells in processes of their own: what is open, in which order, what is kept of each."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import Interrupted
from ..run_directory import RunDirectory, storage_errors, write_whole
from .cell import UNTIL_CLOSED, spec_of
from .cells import Cell
from .published import FILE
from .records import read_record, write_record
from .results import Results
from .suite import to_yaml

CELL = (sys.executable, "-m", "peft_engine.bench.cell")
TAIL = 30  # lines of a failed cell's log that are kept with it
WORST_FIRST = (1, 8, 4, 7, 2, 3, 5, 6)  # exit codes
PATIENCE = 20  # seconds that cells get to end by themselves

Say = Callable[[str], None]


@dataclass
class Job:
    """A cell whose process runs."""

    cell: Cell
    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    began: float


class Bench:
    """One call of `bench`.

    Args:
        jobs: cells at once.
        only: pattern that cells' names must match.
        limit: cells to start at most.
        program: what runs a cell; takes SPEC, RECORD and a flag.
    """

    def __init__(
        self,
        results: Results,
        say: Say,
        *,
        jobs: int = 1,
        only: str | None = None,
        limit: int | None = None,
        program: Sequence[str] | None = None,
    ) -> None:
        self.results, self.say = results, say
        self.jobs, self.only, self.limit, self.program = jobs, only, limit, program or CELL
        self.running: list[Job] = []
        self.tried: set[str] = set()
        self.stopped: str | None = None
        self.work = results.folder / "work"

    def run(self) -> None:
        """Run what is open. Raises Interrupted after SIGTERM or SIGINT; StorageError where another bench runs here."""
        with RunDirectory(self.results.folder), self._signals():
            self._tidy()
            try:
                while not self.stopped:
                    while len(self.running) < self.jobs and (cell := self._next()) is not None:
                        self._start(cell)
                    if not self.running:
                        break
                    self._collect()
            finally:
                self._end_all()
            with storage_errors(self.results.folder):
                self._put_aside()  # final cells of a rate that this search did not choose
            self._write_tuning()
        if self.stopped:
            raise Interrupted(
                f"{self.stopped}: stopped; {len(self.results.records)} records stand.",
                "Run the same bench again: it goes on with the cells that are open.",
            )

    def _tidy(self) -> None:
        """Put aside what is not of this suite's settings, take back what is, and leave no half work."""
        folder, results = self.results.folder, self.results
        with storage_errors(folder):
            for name in ("cells", "failed", "work"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            for path in self.work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            write_whole(folder / "suite.yaml", to_yaml(results.suite))
            if published := results.suite.published:
                write_whole(folder / FILE, Path(published.path).read_text(encoding="utf-8"))
            else:
                (folder / FILE).unlink(missing_ok=True)
        for name, problem in results.damaged.items():
            self.say(f"{problem} It is made again.")
            (folder / "cells" / f"{name}.json").unlink(missing_ok=True)
        self._take_back()
        self._put_aside()
        known = {cell.name for cell in results.possible()}
        for log in self.work.glob("*.log"):
            if log.stem not in known:
                log.unlink()

    def _put_aside(self) -> None:
        """Move what is not of this suite's settings to other/; forget failures of cells that it does not have."""
        folder, results = self.results.folder, self.results
        results.read()
        known = {cell.name for cell in results.possible()}
        for place, names in (("cells", results.records), ("failed", results.failures)):
            other = [name for name in names if name not in known]
            for name in other:
                path = folder / place / f"{name}.json"
                if place == "failed":
                    path.unlink()
                    continue
                (folder / "other").mkdir(exist_ok=True)
                path.replace(folder / "other" / path.name)
            if other and place == "cells":
                self.say(f"{len(other)} records are of other settings than the suite's now: moved to {folder}/other.")
        results.read()

    def _take_back(self) -> None:
        """Records that were put aside and are of the suite's settings again."""
        folder, results = self.results.folder, self.results
        for _ in range(2):  # the final cells are known once those of the search are back
            results.read()
            for cell in results.cells():
                aside = folder / "other" / f"{cell.name}.json"
                if aside.is_file() and results.state(cell) != "done":
                    aside.replace(folder / "cells" / aside.name)

    def _next(self) -> Cell | None:
        if self.limit is not None and len(self.tried) >= self.limit:
            return None
        busy = {job.cell.name for job in self.running}
        for cell in self.results.cells():
            if cell.name in busy or cell.name in self.tried or (self.only and not cell.matches(self.only)):
                continue
            if self.results.state(cell) not in ("done", "diverged"):
                return cell
        return None

    def _start(self, cell: Cell) -> None:
        suite, results = self.results.suite, self.results
        folder, log = self.work / cell.name, self.work / f"{cell.name}.log"
        untouched = results.records.get(results.baseline().name)
        forgetting = untouched and untouched["train_info"]["forgetting"]
        more = {
            "command": _command(),
            "cells_at_once": self.jobs,
            "tuned": results.choice(cell.method) if cell.kind == "final" else None,
            "forgetting_before": forgetting and forgetting["before"],
        }
        with storage_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            spec = spec_of(cell, suite.name, suite.general_text, **more)
            (folder / "spec.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
            with log.open("wb") as out:
                words = [*self.program, str(folder / "spec.json"), str(folder / "record.json"), UNTIL_CLOSED]
                # a session of its own: Ctrl-C reaches this process alone, which then ends its cells
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=out,
                    stderr=out,
                    env=_environment(self.jobs),
                    start_new_session=True,
                )
        self.tried.add(cell.name)
        self.running.append(Job(cell, process, folder, log, time.monotonic()))

    def _collect(self) -> None:
        """Wait until a cell ends, or something is asked of this process; keep what the cells left."""
        while not self.stopped and all(job.process.poll() is None for job in self.running):
            time.sleep(0.05)
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            assert job.process.stdin is not None
            job.process.stdin.close()
            if not self.stopped or job.process.returncode == 0:
                self._keep(job)

    def _keep(self, job: Job) -> None:
        name, results = job.cell.name, self.results
        failed = results.folder / "failed" / f"{name}.json"
        took = time.monotonic() - job.began
        problem: str | None = None
        if job.process.returncode == 0:
            try:
                record = read_record(job.folder / "record.json")
            except Exception as error:
                problem = f"The process ended well, but its record doesn't check: {error}"
            else:
                write_record(results.folder / "cells" / f"{name}.json", record)
                failed.unlink(missing_ok=True)
                self._remove(job.folder)
                results.read()
                self._tell(job.cell, _figure(record), took)
                return
        failure = _failure(job, problem)
        with storage_errors(failed):
            write_whole(failed, json.dumps(failure, ensure_ascii=False, indent=2) + "\n")
        self._remove(job.folder)
        results.read()
        self._tell(job.cell, f"FAILED (exit {failure['exit_code']}): {failure['reason']}", took)

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, cell: Cell, text: str, seconds: float) -> None:
        cells = self.results.cells()
        done = sum(self.results.state(one) in ("done", "diverged") for one in cells)
        count = len(cells) + sum(self.results.waiting().values())
        self.say(f"[{done}/{count}] {cell.title}  {text}  ({seconds:.0f} s)")

    def _end_all(self) -> None:
        """End the cells that still run; what they did so far is lost."""
        for job in self.running:
            job.process.terminate()
        until = time.monotonic() + PATIENCE
        for job in self.running:
            try:
                job.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                job.process.kill()
                job.process.wait()
            if job.process.stdin is not None:
                job.process.stdin.close()
            self._remove(job.folder)
        self.running = []

    def _write_tuning(self) -> None:
        """tuning.json: how each method's learning rate was chosen."""
        chosen = {method: self.results.choice(method) for method in self.results.suite.methods}
        with storage_errors(self.results.folder):
            write_whole(self.results.folder / "tuning.json", json.dumps(chosen, indent=2) + "\n")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.stopped = signal.Signals(number).name

        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


def worst(codes: Sequence[int]) -> int:
    """The exit code that says most of several; 0 of none."""
    order = {code: place for place, code in enumerate(WORST_FIRST)}
    return min(codes, key=lambda code: order.get(code, -1), default=0)


def _failure(job: Job, problem: str | None) -> dict[str, Any]:
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


def _figure(record: dict[str, Any]) -> str:
    """The number that a person wants to see of a record."""
    info = record["train_info"]
    primary = info["primary"]
    tuning = record["run_info"]["kind"] == "tuning"
    found = info["eval_curve"][-1] if tuning else info["metrics_after"] or info["metrics_before"] or {}
    value = found.get(primary)
    return f"{primary} {'not finite' if value is None else format(value, '.4f')}" + (" (eval)" if tuning else "")


def _environment(jobs: int) -> dict[str, str]:
    """That of a cell: its share of the cores, unless somebody has said otherwise."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    share = {"OMP_NUM_THREADS": str(max(1, cores // jobs))} if jobs > 1 else {}
    return {**share, **os.environ}


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
