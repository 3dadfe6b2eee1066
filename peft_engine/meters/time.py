"""Wall seconds by phase."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np


class PhaseTimer:
    """Adds up wall seconds per named phase. Phases may nest: the inner one's time is taken out of the outer one's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer_inner, self._inner = self._inner, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner
            self._inner = outer_inner + spent

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """{"p10", "p50", "p90", "p99", "mean", "count"}, interpolated linearly; None of nothing."""
    if not seconds:
        return None
    found = np.percentile(seconds, [10, 50, 90, 99]).tolist()
    return dict(zip(("p10", "p50", "p90", "p99"), found, strict=True)) | {
        "mean": float(np.mean(seconds)),
        "count": len(seconds),
    }
