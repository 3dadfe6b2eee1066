"""Mixtures: `data.train` as a list of sources, each seen as often in an epoch as its weight says.

A source of n sequences with weight w is seen round(w·n) times in every epoch, at least once: each sequence as often as
the whole part of w says, and a fresh draw without repetition for what is left. The draw is a function of
(seed, epoch), the number of steps the same in each epoch. Weights belong to training: splits are made over the union
of the sources, and an evaluation counts each of its rows once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Config, SourceConfig


@dataclass(frozen=True)
class Mixture:
    """Where each sequence comes from, and how often it is seen.

    Attributes:
        sources: int64 (sequences,), index of the sequence's source.
        weights: one for each source.
    """

    sources: np.ndarray
    weights: tuple[float, ...]

    @property
    def size(self) -> int:
        """Sequences of an epoch."""
        counts = np.bincount(self.sources, minlength=len(self.weights))
        return sum(seen(int(n), w) for n, w in zip(counts, self.weights, strict=True))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Sequences of one epoch, source by source, int64 (size,)."""
        parts = []
        for i, weight in enumerate(self.weights):
            own = np.flatnonzero(self.sources == i)
            whole, rest = divmod(seen(len(own), weight), max(1, len(own)))
            parts += [own] * whole + [np.sort(rng.choice(own, rest, replace=False))] * (rest > 0)
        return np.concatenate(parts)

    def shares(self) -> np.ndarray:
        """How often a sequence is seen in an epoch, on average, float64 (sequences,)."""
        counts = np.bincount(self.sources, minlength=len(self.weights))
        often = [seen(int(n), w) / max(1, int(n)) for n, w in zip(counts, self.weights, strict=True)]
        return np.asarray(often)[self.sources]


def seen(rows: int, weight: float) -> int:
    """How many of so many rows an epoch has."""
    return max(1, math.floor(rows * weight + 0.5)) if rows else 0


def sources_of(config: Config) -> list[SourceConfig]:
    """The sources of `data.train`, with the columns of each."""
    train, columns = config.data.train, config.data.columns
    if isinstance(train, str):
        return [SourceConfig(path=train, columns=columns)]
    return [part.model_copy(update={"columns": {**columns, **part.columns}}) for part in train]


def name_of(config: Config) -> str:
    """`data.train` in words, for messages: "a.jsonl" or "a.jsonl + b.csv (x2)"."""
    return " + ".join(part.path + (f" (×{part.weight:g})" if part.weight != 1 else "") for part in sources_of(config))


def mixture(config: Config, sources: Sequence[int], rows: np.ndarray) -> Mixture | None:
    """The mixture of encoded sequences; None where every row is seen once.

    Args:
        sources: source of each row.
        rows: row of each sequence, int64 (sequences,).
    """
    weights = tuple(part.weight for part in sources_of(config))
    if not sources or set(weights) == {1.0}:
        return None
    return Mixture(np.asarray(sources, dtype=np.int64)[rows], weights)


def describe_sources(config: Config, read: Sequence[int], kept: Sequence[int]) -> list[dict[str, Any]]:
    """Per source its path and weight, the rows that were read, those of the training split, and those of an epoch.

    Args:
        read: rows of each source that could be read.
        kept: source of each row of the training split.
    """
    counts = np.bincount(np.asarray(kept, dtype=np.int64), minlength=len(read)).tolist()
    return [
        {"path": part.path, "weight": part.weight, "rows": n, "train": own, "epoch": seen(own, part.weight)}
        for part, n, own in zip(sources_of(config), read, counts, strict=True)
    ]
