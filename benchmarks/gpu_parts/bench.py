"""One bench for all parts: checks a cell, times its contenders in turns, prints and writes it at once.

A cell is one size of one job; its contenders do that job in different ways. Correctness comes first: a red cell keeps
its times and gets no ratios. The parts stop between cells when the budget is spent.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .context import append, ceilings, context

Run = Callable[[int], object]  # does the job once, on input set number i


@dataclass(frozen=True)
class Prepared:
    """A Run that needs something set right first, outside of what is timed."""

    run: Run
    prepare: Callable[[], None]

    def __call__(self, i: int) -> object:
        return self.run(i)


def prepare(run: Run) -> None:
    if isinstance(run, Prepared):
        run.prepare()


class OutOfTimeError(Exception):
    """The budget is spent; what was measured is on disk."""


@dataclass
class Check:
    """Relative errors ‖got − truth‖ / ‖truth‖ of every result, the plain way's beside ours."""

    names: Sequence[str]
    plain: Sequence[float]
    ours: Sequence[float]
    eps: float

    def faults(self) -> list[str]:
        """Ours may err half as much again as plain torch in the same dtype, and half a unit of that dtype besides."""
        return [
            f"{name}: error {o:.2g}, plain torch's is {p:.2g}"
            for name, p, o in zip(self.names, self.plain, self.ours, strict=True)
            if not o <= 1.5 * p + self.eps / 2
        ]


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Norms in float64, so that neither overflow nor rounding of the sum decides. NaN where `got` isn't finite."""
    if not torch.isfinite(got).all():
        return math.nan
    size = torch.linalg.vector_norm(truth, dtype=torch.float64).item()
    gap = torch.linalg.vector_norm(got.to(truth.dtype) - truth, dtype=torch.float64).item()
    return gap / size if size else gap


def compare(names: Sequence[str], truth: Iterable[Any], plain: Iterable[Any], ours: Iterable[Any], eps: float) -> Check:
    rows = list(zip(truth, plain, ours, strict=True))
    return Check(names, [relative_error(p, t) for t, p, _ in rows], [relative_error(o, t) for t, _, o in rows], eps)


@dataclass
class Bench:
    """Times cells and keeps what was measured.

    Attributes:
        part: the part's name; the file is called after it.
        smoke: tiny sizes, wall clock, CPU.
        path: the JSON file, which is appended to; its Markdown twin is written beside it.
        budget: seconds after which no further cell starts.
    """

    part: str
    smoke: bool
    path: Path
    budget: float
    device: torch.device
    start: float = field(default_factory=time.monotonic)
    cells: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _written: bool = False

    def __post_init__(self) -> None:
        self.context = context(self.device, self.smoke)
        self.ceilings = ceilings(self.device, self.smoke)
        for name, value in self.ceilings.items():
            print(f"  {name.replace('_', ' ')}: {value:.4g}", flush=True)

    @property
    def dtype(self) -> torch.dtype:
        """What the timed work runs in."""
        return torch.float32 if self.smoke else torch.bfloat16

    @property
    def backend(self) -> Any:
        return "triton" if self.device.type == "cuda" else "torch"

    @property
    def red(self) -> int:
        return sum(not cell["green"] for cell in self.cells)

    def small(self, real: Any, tiny: Any) -> Any:
        """A size: the real one, or the one for --smoke."""
        return tiny if self.smoke else real

    def floor_ms(self, flops: float, extra_bytes: float) -> float:
        """Matrix work at the measured matmul rate, plus bytes beyond it at the measured copy rate."""
        rates = self.ceilings
        return 1e3 * (flops / rates["flops_per_second"] + extra_bytes / rates["bytes_per_second"])

    def sets(self, set_bytes: int) -> int:
        """How many input sets to rotate among, so that L2 holds none of them when its turn comes."""
        l2 = self.context["hardware"].get("l2_bytes", 0)
        return max(1, min(16, math.ceil(2 * l2 / max(1, set_bytes))))

    def room(self, seconds: float = 0) -> None:
        """Raises OutOfTimeError where `seconds` more would pass the budget."""
        if time.monotonic() - self.start + seconds > self.budget:
            raise OutOfTimeError

    def note(self, text: str) -> None:
        print(f"  note: {text}", flush=True)
        self.notes.append(text)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cell(
        self,
        name: str,
        settings: dict[str, Any],
        contenders: dict[str, Run],
        *,
        check: Callable[[], Sequence[Check]],
        versus: dict[str, Sequence[str]],
        facts: dict[str, float] | None = None,
        memory: bool = False,
        rounds: int = 7,
        device_time: bool = True,
        more: Callable[[str, float], dict[str, float]] | None = None,
    ) -> dict[str, Any]:
        """Measure one cell.

        Args:
            contenders: what to time, by name.
            check: compares the results that matter with the truth; what it raises makes the cell red.
            versus: contender → the ones that its speed is set against.
            facts: floor_ms and the like.
            memory: measure the peak above what was there before, too.
            device_time: measure the sum of kernel times beside the elapsed time.
            more: (contender, ms) → further numbers, such as tokens per second.
        """
        self.room()
        record: dict[str, Any] = {"cell": name, "settings": settings, "facts": facts or {}, "contenders": {}}
        record |= self._checked(check)
        results: dict[str, dict[str, Any]] = {label: {} for label in contenders}
        record["contenders"] = results
        samples: dict[str, list[float]] = {label: [] for label in contenders}
        counts: dict[str, int] = {}
        for label, run in contenders.items():
            self._attempt(results[label], lambda label=label, run=run: counts.update({label: self._first(run)}))
        for _ in range(2 if self.smoke else rounds):
            for label, run in contenders.items():
                if "error" not in results[label]:
                    work = lambda label=label, run=run: samples[label].append(self._sample(run, counts[label]))  # noqa: E731
                    self._attempt(results[label], work)
        for label, run in contenders.items():
            one, taken = results[label], samples[label]
            if "error" in one:
                continue
            one |= {"ms": statistics.median(taken), "ms_least": min(taken), "ms_most": max(taken)}
            if more:
                one["more"] = more(label, one["ms"])
            if memory and self.device.type == "cuda":
                self._attempt(one, lambda one=one, run=run: one.update(peak_bytes=self._peak(run)))
            if device_time and self.device.type == "cuda":
                self._attempt(
                    one, lambda one=one, run=run: one.update(device_ms=self._device_ms(run, 5 if one["ms"] < 50 else 1))
                )
        for label, others in versus.items():
            if record["green"] and "ms" in results.get(label, {}):
                rivals = [other for other in others if "ms" in results.get(other, {})]
                results[label]["faster_than"] = {o: results[o]["ms"] / results[label]["ms"] for o in rivals}
        self.add(record)
        return record

    def add(self, record: dict[str, Any]) -> None:
        """Print a finished cell and write it, so that a run that is cut off keeps it."""
        self.cells.append(record)
        settings = " ".join(f"{key}={value}" for key, value in record["settings"].items())
        print(f"{record['cell']} {settings}: {'green' if record['green'] else 'RED ' + record['why']}", flush=True)
        for label, one in record["contenders"].items():
            if "ms" in one:
                ratios = ", ".join(f"{ratio:.2f}x {other}" for other, ratio in one.get("faster_than", {}).items())
                kernels = f" (device {one['device_ms']:.4f})" if one.get("device_ms") else ""
                further = "".join(f" {key}={value:.4g}" for key, value in one.get("more", {}).items())
                print(f"    {label:28} {one['ms']:.4f} ms{kernels}{further} {ratios}", flush=True)
            else:
                print(f"    {label:28} {one.get('error', '')}", flush=True)
        self.write()

    def write(self) -> None:
        run = {"part": self.part, "context": self.context, "ceilings": self.ceilings}
        run |= {"cells": self.cells, "notes": self.notes, "seconds": round(time.monotonic() - self.start, 1)}
        append(self.path, run, fresh=not self._written)
        self._written = True

    def _checked(self, check: Callable[[], Sequence[Check]]) -> dict[str, Any]:
        try:
            found = check()
        except Exception as error:
            return {"green": False, "why": f"check failed: {_told(error)}", "errors": {}}
        finally:
            self._clear()
        errors = {
            n: {"plain": p, "ours": o} for one in found for n, p, o in zip(one.names, one.plain, one.ours, strict=True)
        }
        faults = [fault for one in found for fault in one.faults()]
        return {"green": bool(found) and not faults, "why": "; ".join(faults), "errors": errors}

    def _attempt(self, result: dict[str, Any], work: Callable[[], object]) -> None:
        """A contender that can't run is part of the result, ours included: the cell is then without its ratio."""
        try:
            work()
            self.synchronize()
            return
        except torch.cuda.OutOfMemoryError:
            result["error"] = "out of memory"
        except Exception as error:
            result["error"] = _told(error)
        self._clear()

    def _clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _first(self, run: Run) -> int:
        """Warm up, and say how many runs make a sample: about 10 ms of work."""
        prepare(run)
        for i in range(1 if self.smoke else 3):  # compilation, kernel load, cuBLAS handles
            run(i)
        return 1 if self.smoke else max(1, min(50, math.ceil(10 / max(1e-3, self._sample(run, 2)))))

    def _sample(self, run: Run, count: int) -> float:
        """Milliseconds per run."""
        prepare(run)
        if self.device.type != "cuda":
            began = time.perf_counter()
            for i in range(count):
                run(i)
            return (time.perf_counter() - began) * 1e3 / count
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.synchronize()
        start.record()
        for i in range(count):
            run(i)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    def _peak(self, run: Run) -> int:
        prepare(run)
        self._clear()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run(0)
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def _device_ms(self, run: Run, count: int) -> float | None:
        """Sum of the kernels' own times per run: less than the elapsed time where the host is what is waited for."""
        prepare(run)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for i in range(count):
                run(i)
            self.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        total = sum(e.time_range.elapsed_us() for e in kernels if not getattr(e, "is_user_annotation", False))
        return total / 1e3 / count or None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def compiled(bench: Bench, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile from a clean slate, for the sizes it is called with; in smoke only as far as the graph."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, backend="eager" if bench.smoke else "inductor")


def optional(bench: Bench, name: str, make: Callable[[], Run]) -> dict[str, Run]:
    """{name: make()}, or nothing where its package is not there; either way the record says so."""
    try:
        return {name: make()}
    except Exception as error:
        text = f"{name} left out: {_told(error)}"
        if text not in bench.notes:
            bench.note(text)
        return {}
