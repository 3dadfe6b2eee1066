"""Scores and their 95% intervals. A metric is a function of sums over test items, so a resample is a matrix product.

Each draw takes as many test items as there are, with replacement, the same ones for every cell, and as many seeds as a
method has, with replacement (both levels drawn apart: the pigeonhole bootstrap of Owen 2007, which errs on the wide
side where item and seed act together). The interval goes from the 2.5th to the 97.5th percentile of the draws.

Few seeds: draws can't reach beyond the seeds that were run. Where seeds alone make the noise, the interval of 3 seeds
is at most their range and holds the truth 75 times in 100, not 95; benchmarks/README.md says more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000
LEVEL = 0.95
_CHUNK = 250

Sums = dict[str, np.ndarray]
"""Columns by name, each (items,) or (items, classes); or their sums over items: (), (classes,), with draws in front."""


@dataclass(frozen=True)
class Sample:
    """A metric of one method: per seed, and per seed under each draw of items.

    seeds: the numbers of the seeds. values: (seeds,) on all items. drawn: (draws, seeds); where no items were kept,
    the values again in each draw, and `over_items` is False.
    """

    seeds: tuple[int, ...]
    values: np.ndarray
    drawn: np.ndarray
    over_items: bool = True

    def only(self, seeds: Sequence[int]) -> "Sample":
        """The same, of these seeds in this order."""
        at = [self.seeds.index(seed) for seed in seeds]
        return Sample(tuple(seeds), self.values[at], self.drawn[:, at], self.over_items)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds with the 95% bootstrap interval, in the metric's unit."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def scores(sums: Sums, whole: Sums | None = None) -> dict[str, np.ndarray]:
    """Metrics of sums over items, whichever their columns allow.

    Columns (see columns.py): rows; loss with units; right (rows whose label is hit); hit, said, true (…, classes) for
    F1; single for MCC; x, y, xx, yy, xy, gap for regression; bytes; tokens_right; words_right with words;
    entity_hit, entity_said, entity_true; exact with judged.
    A ratio of nothing to nothing is 0, as scikit-learn has it with zero_division=0.

    Args:
        whole: sums over all items, where `sums` are of draws: a class without a true row in a draw, but with some in
            all items, is left out of that draw's macro means. A draw that lost it says nothing of it.
    """
    found: dict[str, np.ndarray] = {}
    rows = sums["rows"]
    if "right" in sums:
        found["accuracy"] = _over(sums["right"], rows)
    if "words_right" in sums:
        found["accuracy"] = _over(sums["words_right"], sums["words"])
    if "hit" in sums:
        hit, said, true = sums["hit"], sums["said"], sums["true"]
        each = class_scores(sums)
        found["f1_macro"] = _macro(each["f1"], sums, whole)
        if "words" not in sums:
            pooled = class_scores({name: sums[name].sum(-1) for name in ("hit", "said", "true")})
            for name in ("precision", "recall", "f1"):
                found |= {f"{name}_macro": _macro(each[name], sums, whole), f"{name}_micro": pooled[name]}
        if "single" in sums:
            right = hit.sum(-1)
            above = right * rows - (said * true).sum(-1)
            below = np.sqrt((rows**2 - (said**2).sum(-1)) * (rows**2 - (true**2).sum(-1)))
            found["mcc"] = _over(above, below)
    if "entity_hit" in sums:
        pooled = class_scores({name: sums[f"entity_{name}"] for name in ("hit", "said", "true")})
        found |= {name: pooled[name] for name in ("precision", "recall", "f1")}
    if "xy" in sums:
        x, y, xx, yy, xy = (sums[name] for name in ("x", "y", "xx", "yy", "xy"))
        spread = np.sqrt(np.maximum(rows * xx - x**2, 0) * np.maximum(rows * yy - y**2, 0))
        found["pearson"] = np.clip(_over(rows * xy - x * y, spread), -1, 1)
        found["mean_squared_error"] = _over(np.maximum(xx + yy - 2 * xy, 0), rows)
        found["mean_absolute_error"] = _over(sums["gap"], rows)
    if "exact" in sums:
        found["exact_match"] = _over(sums["exact"], sums["judged"])
    if "loss" in sums:
        found["loss"] = _over(sums["loss"], sums["units"])
        if "tokens_right" in sums:
            found["token_accuracy"] = _over(sums["tokens_right"], sums["units"])
            found["perplexity"] = np.exp(np.minimum(found["loss"], 700))
        if "bytes" in sums:
            found["bits_per_byte"] = _over(sums["loss"], sums["bytes"]) / np.log(2)
    return found


def class_scores(sums: Sums) -> dict[str, np.ndarray]:
    """precision, recall, f1 and rows, each (…, classes); `sums` needs hit, said, true."""
    hit, said, true = sums["hit"], sums["said"], sums["true"]
    return {
        "precision": _over(hit, said),
        "recall": _over(hit, true),
        "f1": _over(2 * hit, said + true),
        "rows": true,
    }


def _macro(each: np.ndarray, sums: Sums, whole: Sums | None) -> np.ndarray:
    """Mean over classes; of a draw, over those that it could say something of."""
    if whole is None:
        return np.asarray(each.mean(-1))
    counted = (sums["true"] > 0) | (whole["true"] == 0)
    return _over((each * counted).sum(-1), counted.sum(-1))


def totals(columns: Sums) -> Sums:
    """Sums over all items."""
    return {name: column.sum(0) for name, column in columns.items()}


def resample(cells: Sequence[Sums], draws: int = DRAWS, seed: int = 0) -> list[Sums]:
    """Sums over each draw of the items, which are the same for all cells.

    Args:
        cells: columns of each cell, all over the same items in the same order.

    Returns:
        Per cell the same names, each (draws,) or (draws, classes).
    """
    if not cells:
        return []
    wide = [column.reshape(len(column), -1) for cell in cells for column in cell.values()]
    stacked = np.concatenate(wide, axis=1).astype(np.float64)  # (items, all columns)
    items, random = len(stacked), np.random.default_rng(seed)
    drawn = np.empty((draws, stacked.shape[1]))
    for first in range(0, draws, _CHUNK):
        size = min(_CHUNK, draws - first)
        picks = random.integers(items, size=(size, items)) + items * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * items).reshape(size, items)
        drawn[first : first + size] = counts @ stacked
    found, start = [], 0
    for cell in cells:
        one: Sums = {}
        for name, column in cell.items():
            width = 1 if column.ndim == 1 else column.shape[1]
            part = drawn[:, start : start + width]
            one[name] = part[:, 0] if column.ndim == 1 else part
            start += width
        found.append(one)
    return found


def sample(by_seed: Mapping[int, tuple[Sums, Sums]]) -> dict[str, Sample]:
    """Samples by metric of one method; `by_seed`: seed → (columns, their `resample`)."""
    seeds = tuple(sorted(by_seed))
    whole = [totals(by_seed[seed][0]) for seed in seeds]
    values = [scores(one) for one in whole]
    drawn = [scores(by_seed[seed][1], one) for seed, one in zip(seeds, whole, strict=True)]
    return {
        name: Sample(seeds, np.array([one[name] for one in values]), np.stack([one[name] for one in drawn], 1))
        for name in values[0]
        if all(name in one for one in values)
    }


def flat_sample(by_seed: Mapping[int, float], draws: int = DRAWS) -> Sample:
    """A sample of a number of which only one per seed is known: its interval is over seeds alone."""
    seeds = tuple(sorted(by_seed))
    values = np.array([by_seed[seed] for seed in seeds], dtype=np.float64)
    return Sample(seeds, values, np.broadcast_to(values, (draws, len(values))), over_items=False)


def interval(one: Sample) -> Interval:
    """Mean over seeds, with the interval over seeds and items."""
    return _interval(float(one.values.mean()), _mean_of_drawn(one))


def paired(method: Sample, reference: Sample) -> Interval | None:
    """method − reference on the same seeds and the same drawn items; None where they share no seed."""
    pair = _shared(method, reference)
    if pair is None:
        return None
    ours, theirs = pair
    return interval(Sample(ours.seeds, ours.values - theirs.values, ours.drawn - theirs.drawn))


def gain_kept(method: Sample, reference: Sample, before: Sample) -> Interval | None:
    """(method − before) / (reference − before), 1 where the method gains as much as the reference.

    Args:
        before: the untouched model: one column for all seeds, or one per seed of the reference.

    Returns:
        None where they share no seed, or where the reference's own gain is not told apart from none: a share of
        nothing has no meaning.
    """
    pair = _shared(method, reference)
    if pair is None:
        return None
    ours, theirs = pair
    if len(before.seeds) > 1:
        if not set(ours.seeds) <= set(before.seeds):
            return None
        before = before.only(ours.seeds)
    gained = Sample(theirs.seeds, theirs.values - before.values, theirs.drawn - before.drawn)
    if not interval(gained).excludes_zero:
        return None
    kept = Sample(ours.seeds, ours.values - before.values, ours.drawn - before.drawn)
    below = _mean_of_drawn(gained)
    sign = np.sign(gained.values.mean())
    share = np.where(below * sign > 0, _mean_of_drawn(kept) / np.where(below == 0, 1, below), np.inf)
    return _interval(float(kept.values.mean() / gained.values.mean()), share)


def ratio(method: Mapping[int, float], reference: Mapping[int, float]) -> Interval | None:
    """Method by reference, seed by seed: the median of these ratios, and their range.

    Where no seed is shared, of all pairs. None where one side is empty or the reference is 0.
    """
    if not method or not reference or min(reference.values()) <= 0:
        return None
    shared = [seed for seed in method if seed in reference]
    each = [method[seed] / reference[seed] for seed in shared]
    each = each or [one / other for one in method.values() for other in reference.values()]
    return Interval(float(np.median(each)), min(each), max(each))


def _shared(one: Sample, other: Sample) -> tuple[Sample, Sample] | None:
    seeds = [seed for seed in one.seeds if seed in other.seeds]
    return (one.only(seeds), other.only(seeds)) if seeds else None


def _mean_of_drawn(one: Sample) -> np.ndarray:
    """(draws,): in each draw the mean over the seeds drawn. Equal numbers of seeds get equal draws."""
    draws, seeds = one.drawn.shape
    picks = np.random.default_rng([1, seeds]).integers(seeds, size=(draws, seeds))
    return np.take_along_axis(one.drawn, picks, axis=1).mean(1)


def _interval(mean: float, drawn: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="lower" if np.isinf(drawn).any() else "linear")
    return Interval(mean, float(low), float(high))


def _over(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.zeros(np.broadcast(above, below).shape), where=below != 0)
