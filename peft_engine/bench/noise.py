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
    methods: one of three seeds may be small by chance, many are not. The margin is that of a t test on one side, at
    FAMILY by the number of comparisons (Bonferroni). Its degrees of freedom are those of all methods where their noise
    is alike, and fewer where a few methods make most of it (Satterthwaite 1946). Methods that came out the same to the
    last bit are no comparison, and tell nothing of the others' noise.

    Args:
        differences: number → method → new − old, one per seed in common.

    Returns:
        The same names; None where no method of a number has two seeds that tell the noise.
    """
    changed = {name: {m: each for m, each in of.items() if np.any(each)} for name, of in differences.items()}
    tests = sum(map(len, changed.values()))
    found: dict[str, dict[str, Move | None]] = {}
    for name, of in differences.items():
        pooled, freedom = _pooled(list(changed[name].values()))
        found[name] = {}
        for method, each in of.items():
            if method not in changed[name]:
                found[name][method] = Move(0.0, 0.0)
            elif freedom == 0:
                found[name][method] = None
            else:
                own = float(np.var(each, ddof=1)) if len(each) > 1 else 0.0
                error = np.sqrt(max(own, pooled) / len(each))
                found[name][method] = Move(float(np.mean(each)), float(_quantile(FAMILY / tests, freedom) * error))
    return found


def _pooled(each: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Variance over seeds of all methods, and its degrees of freedom; 0, 0 where no method has two seeds."""
    each = [one for one in each if len(one) > 1]
    if not each:
        return 0.0, 0.0
    variances = np.array([np.var(one, ddof=1) for one in each])
    freedoms = np.array([len(one) - 1.0 for one in each])
    whole = float((freedoms * variances).sum())
    below = float((freedoms * variances**2).sum())
    freedom = whole**2 / below if below > 0 else float(freedoms.sum())
    return whole / float(freedoms.sum()), freedom


def _quantile(chance: float, freedom: float) -> float:
    """What Student's t exceeds with this chance."""
    from scipy.stats import t

    return float(t.isf(chance, freedom))
