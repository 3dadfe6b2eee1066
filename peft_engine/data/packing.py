"""Samples of one optimizer step laid out in packs: several samples in a row, so that little or nothing is padded.

The step keeps its samples; only their places change. A pack's content depends on the step's rows and their lengths
alone, neither on the micro-batch nor on the number of processes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LIKE = 7 / 8  # a pack that is shorter than this share of another is not padded to it


@dataclass(frozen=True)
class Packs:
    """A micro-batch of packs, each int64 (samples,): rows of the data in the order in which they stand in the pack."""

    packs: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.packs)


@dataclass(frozen=True)
class Packing:
    """How samples are packed.

    Attributes:
        tokens: of a pack at most; a longer sample stands alone.
        together: several packs may stand in one batch. Not so where only one row of a batch is told apart into samples
            (flash attention).
    """

    tokens: int
    together: bool = True

    def packs(self, rows: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """First-fit decreasing (Johnson 1973) finds the number of packs: the longest sample first, each into the first
        pack with room. Then the samples are spread over so many packs evenly (Graham 1969: each into the shortest),
        where that keeps to the limit: equal packs pad nothing beside each other, and are equal work for processes.

        Args:
            rows: int64 (samples,), of one optimizer step over all processes.
            lengths: tokens of every row of the data, int64 (rows of the data,).

        Returns:
            Packs, longest first; each row is in exactly one.
        """
        ordered = rows[np.argsort(-lengths[rows], kind="stable")].tolist()
        sizes = [int(lengths[row]) for row in ordered]
        places, sums = _first_fit(sizes, self.tokens)
        even, even_sums = _evenly(sizes, len(sums))
        if max(even_sums) <= max(self.tokens, sizes[0]):
            places, sums = even, even_sums
        packs: list[list[int]] = [[] for _ in sums]
        for row, place in zip(ordered, places, strict=True):
            packs[place].append(row)
        order = sorted(range(len(packs)), key=lambda i: -sums[i])
        return [np.array(packs[i], dtype=np.int64) for i in order]

    def cut(self, packs: Sequence[np.ndarray], lengths: np.ndarray, budget: int) -> list[Packs]:
        """Packs in micro-batches of packs of like length, none shorter than `LIKE` of the longest beside it.

        Args:
            packs: longest first, as `packs` gives them.
            budget: largest padded size of a micro-batch, packs times the longest; a pack that is longer stands alone.
        """
        pieces: list[Packs] = []
        sums = [int(lengths[pack].sum()) for pack in packs]
        start = 0
        while start < len(packs):
            fit = max(1, budget // max(1, sums[start])) if self.together else 1
            like = sum(held >= LIKE * sums[start] for held in sums[start:])
            end = start + min(fit, like)
            pieces.append(Packs(tuple(packs[start:end])))
            start = end
        return pieces


def _first_fit(sizes: Sequence[int], limit: int) -> tuple[list[int], list[int]]:
    """The pack of each size, and the packs' sums."""
    places: list[int] = []
    sums: list[int] = []
    for size in sizes:
        place = next((i for i, held in enumerate(sums) if held + size <= limit), len(sums))
        if place == len(sums):
            sums.append(0)
        sums[place] += size
        places.append(place)
    return places, sums


def _evenly(sizes: Sequence[int], packs: int) -> tuple[list[int], list[int]]:
    """The same with the number of packs given, each size into the pack that is shortest then."""
    places: list[int] = []
    heap = [(0, place) for place in range(packs)]
    for size in sizes:
        held, place = heap[0]
        heapq.heapreplace(heap, (held + size, place))
        places.append(place)
    return places, [held for held, _ in sorted(heap, key=lambda entry: entry[1])]


def padded_tokens(pieces: Sequence[Packs], lengths: np.ndarray) -> int:
    """Positions that a model computes for these micro-batches, padding included."""
    return sum(len(piece) * max(int(lengths[pack].sum()) for pack in piece.packs) for piece in pieces)


def lay_out(packs: Sequence[Sequence[np.ndarray]], fill: int) -> dict[str, np.ndarray]:
    """`input_ids` and `position_ids`, int64 (packs, longest pack).

    Positions begin at 0 with every sample, which tells samples apart; so does the padding at the end of a pack, which
    is a sample of its own that nothing looks at.

    Args:
        packs: per pack the token ids of its samples.
        fill: id of the padding.
    """
    longest = max(sum(map(len, samples)) for samples in packs)
    ids = np.full((len(packs), longest), fill, dtype=np.int64)
    positions = np.empty((len(packs), longest), dtype=np.int64)
    for line, samples in enumerate(packs):
        start = 0
        for sample in samples:
            ids[line, start : start + len(sample)] = sample
            positions[line, start : start + len(sample)] = np.arange(len(sample))
            start += len(sample)
        positions[line, start:] = np.arange(longest - start)
    return {"input_ids": ids, "position_ids": positions}
