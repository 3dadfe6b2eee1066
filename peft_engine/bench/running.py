"""Runs a suite's cells in processes of their own: what is open, in which order, what is kept of each."""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EngineError, Interrupted
from ..printing import counted
from ..run_directory import RunDirectory, command, storage_errors, write_whole
from .cell import spec_of
from .cells import Cell
from .jobs import Job, end, failure_of, launch, noting_signals
from .published import FILE
from .records import read_record, write_record
from .results import Results
from .suite import to_yaml

CELL = (sys.executable, "-m", "peft_engine.bench.cell")
WORST_FIRST = (1, 8, 4, 7, 2, 3, 5, 6)  # exit codes

Say = Callable[[str], None]


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
        self.refused: EngineError | None = None
        self.work = results.folder / "work"

    def run(self) -> None:
        """Run what is open.

        Raises:
            Interrupted: after SIGTERM or SIGINT. StorageError: another bench runs here. EngineError, with the exit code
            of the cell: the baseline failed, so that nothing else was started. ConfigError: no metric has the name that
            the suite ranks by.
        """
        with RunDirectory(self.results.folder), noting_signals(self._stop):
            self._tidy()
            try:
                while not self.stopped and self.refused is None:
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
                f"{self.stopped}: stopped; records so far: {len(self.results.records)}.",
                "Run the same bench again: it goes on with the cells that are open.",
            )
        if self.refused is not None:
            raise self.refused

    def _stop(self, name: str) -> None:
        self.stopped = name

    def _tidy(self) -> None:
        """Put aside what is not of this suite's settings, take back what is, and leave no half work."""
        folder, results = self.results.folder, self.results
        with storage_errors(folder):
            for name in ("cells", "failed", "work"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            for path in self.work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
            if results.broken is not None:
                self.say(f"{results.broken} It is put aside as suite.yaml.broken and written anew.")
                (folder / "suite.yaml").replace(folder / "suite.yaml.broken")
                results.broken = None
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
                self.say(
                    f"{counted(len(other), 'record')} of other settings than the suite's now: moved to {folder}/other."
                )
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
            if cell.name in busy and cell.kind == "baseline":
                return None  # it finds out whether the others can be judged at all
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
            "command": command(),
            "cells_at_once": self.jobs,
            "tuned": results.choice(cell.method) if cell.kind == "final" else None,
            "forgetting_before": forgetting and forgetting["before"],
            "judged": untouched is not None,
        }
        with storage_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            spec = spec_of(cell, suite.name, suite.general_text, **more)
            job = launch(cell, spec, folder, log, self.program, self.jobs)
        self.tried.add(cell.name)
        self.running.append(job)

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
                try:
                    results.refuse_primary(record)
                except ConfigError as error:
                    self.refused = error
                else:
                    self._tell(job.cell, self._figure(record), took)
                return
        failure = failure_of(job, problem)
        with storage_errors(failed):
            write_whole(failed, json.dumps(failure, ensure_ascii=False, indent=2) + "\n")
        self._remove(job.folder)
        results.read()
        self._tell(job.cell, f"FAILED (exit {failure['exit_code']}): {failure['reason']}", took)
        if job.cell.kind == "baseline":
            self.refused = EngineError(
                f"baseline: {failure['reason']}",
                f"{failure['fix']} No other cell was started. The same command tries again; --only METHOD runs a "
                f"method's cells without the baseline. The log: {job.log}".strip(),
            )
            self.refused.exit_code = failure["exit_code"]

    def _remove(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def _tell(self, cell: Cell, text: str, seconds: float) -> None:
        cells = self.results.cells()
        done = sum(self.results.state(one) in ("done", "diverged") for one in cells)
        count = len(cells) + sum(self.results.waiting().values())
        self.say(f"[{done}/{count}] {cell.title}  {text}  ({seconds:.0f} s)")

    def _end_all(self) -> None:
        """End the cells that still run; what they did so far is lost."""
        end(self.running)
        for job in self.running:
            self._remove(job.folder)
        self.running = []

    def _figure(self, record: dict[str, Any]) -> str:
        """The number that a person wants to see of a record."""
        info = record["train_info"]
        if record["run_info"]["kind"] == "tuning":
            metric = self.results.judged_by(info)[0]
            return f"{metric} {_number(info['eval_curve'][-1].get(metric))} (eval)"
        metric = self.results.suite.primary or info["primary"]
        return f"{metric} {_number((info['metrics_after'] or info['metrics_before'] or {}).get(metric))}"

    def _write_tuning(self) -> None:
        """tuning.json: how each method's learning rate was chosen."""
        chosen = {method: self.results.choice(method) for method in self.results.suite.methods}
        with storage_errors(self.results.folder):
            write_whole(self.results.folder / "tuning.json", json.dumps(chosen, indent=2) + "\n")


def worst(codes: Sequence[int]) -> int:
    """The exit code that says most of several; 0 of none."""
    order = {code: place for place, code in enumerate(WORST_FIRST)}
    return min(codes, key=lambda code: order.get(code, -1), default=0)


def _number(value: float | None) -> str:
    return "not finite" if value is None else format(value, ".4f")
