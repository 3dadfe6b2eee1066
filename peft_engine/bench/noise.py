"""What noise alone makes of the differences between two runs of the same suite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FAMILY = 0.05
"""Chance that any of all comparisons of two results says "worse" where nothing differs; "better" has as much."""


@dataclass(frozen=True)
class Move:
    """How far a method's mean over seeds moved, and how far noise alone may move it; in the number's unit."""

    mean: float
    margin: float


def moves(differences: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Move | None]]:
    """Judge all methods and numbers at once.

    A difference's noise is the larger of the method's own standard deviation over seeds and the pooled one of all
    methods: one of three seeds may be small by chance, many are not. The margin is that of a t test on one side, with
    the degrees of freedom of all methods, at FAMILY by the number of comparisons (Bonferroni). Methods that came out
    the same to the last bit are no comparison, and tell nothing of the others' noise.

    Where methods differ much in their noise, the chance of a false word is a little above FAMILY: the pooled degrees
    of freedom are then more than a noisy method's own.

    Args:
        differences: number → method → new − old, one per seed in common.

    Returns:
        The same names; None where no method of a number has two seeds that tell the noise.
    """
    changed = {name: {m: each for m, each in of.items() if np.any(each)} for name, of in differences.items()}
    tests = sum(map(len, changed.values()))
    found: dict[str, dict[str, Move | None]] = {}
    for name, of in differences.items():
        arrays = [np.asarray(each, dtype=np.float64) for each in changed[name].values()]
        freedom = sum(len(each) - 1 for each in arrays)
        pooled = sum(float(((each - each.mean()) ** 2).sum()) for each in arrays) / freedom if freedom else None
        found[name] = {}
        for method, each in of.items():
            if method not in changed[name]:
                found[name][method] = Move(0.0, 0.0)
            elif pooled is None:
                found[name][method] = None
            else:
                own = float(np.var(each, ddof=1)) if len(each) > 1 else 0.0
                error = np.sqrt(max(own, pooled) / len(each))
                found[name][method] = Move(float(np.mean(each)), float(_quantile(FAMILY / tests, freedom) * error))
    return found


def _quantile(chance: float, freedom: int) -> float:
    """What Student's t exceeds with this chance."""
    from scipy.stats import t

    return float(t.isf(chance, freedom))
