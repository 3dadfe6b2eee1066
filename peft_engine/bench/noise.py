"""What noise alone makes of the differences between two runs of the same suite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FAMILY = 0.05
"""Chance that any of all comparisons of two results says "worse" where nothing differs; "better" has as much."""
RESTLESS = 20.0
"""A method whose variance is this many medians of all is judged by its own alone. Of 9 methods with 3 seeds and equal
noise, one of 1,000 sets has such a method (exponential variances: the median is 0.69, 9 exceed 13.8 with 9e-6)."""


@dataclass(frozen=True)
class Move:
    """How far a method moved, and how far noise alone may move it; in the number's unit.

    Attributes:
        mean: over seeds.
        margin: of the mean.
        single: of one seed, by the other methods' noise; None where no other tells it.
    """

    mean: float
    margin: float
    single: float | None = None


Values = Sequence[float] | np.ndarray
Sides = Mapping[str, tuple[Values, Values]]
"""Method → new and old values on the seeds in common, in the same order."""


def moves(sides: Mapping[str, Sides]) -> dict[str, dict[str, Move | None]]:
    """Judge all methods and numbers at once.

    A difference's noise is the larger of the method's own standard deviation over seeds and the pooled one of all
    methods: one of three seeds may be small by chance, many are not. The margin is that of a t test on one side, at
    FAMILY by the number of comparisons (Bonferroni). Its degrees of freedom are those of all methods where their noise
    is alike, and fewer where a few methods make more of it (Satterthwaite 1946). A restless method, whose differences
    or values vary RESTLESS times more than the median method's, is judged by its own noise and seeds alone, and the
    others without it. Methods that came out the same to the last bit are no comparison, and tell nothing of noise.

    Args:
        sides: number → method → values.

    Returns:
        The same names; None where nothing tells a method's noise.
    """
    each = {name: {method: np.subtract(new, old) for method, (new, old) in of.items()} for name, of in sides.items()}
    tests = sum(np.any(one) for of in each.values() for one in of.values())
    found: dict[str, dict[str, Move | None]] = {}
    for name, of in each.items():
        changed = {method: one for method, one in of.items() if np.any(one)}
        restless = set().union(
            _restless(changed), *(_restless({m: pair[side] for m, pair in sides[name].items()}) for side in (0, 1))
        )
        calm = {method: one for method, one in changed.items() if method not in restless}
        found[name] = {method: Move(0.0, 0.0) for method in of if method not in changed}
        for method, one in changed.items():
            pooled, freedom = _pooled([one] if method in restless else list(calm.values()))
            if freedom == 0:
                found[name][method] = None
                continue
            own = float(np.var(one, ddof=1)) if len(one) > 1 else 0.0
            error = np.sqrt(max(own, pooled) / len(one))
            others, of_others = _pooled([other for m, other in calm.items() if m != method])
            single = _quantile(FAMILY / tests, of_others) * np.sqrt(others) if of_others else None
            margin = float(_quantile(FAMILY / tests, freedom) * error)
            found[name][method] = Move(float(np.mean(one)), margin, None if single is None else float(single))
    return found


def _restless(each: Mapping[str, Values]) -> set[str]:
    """Methods whose values vary far more than those of most."""
    variances = {method: float(np.var(one, ddof=1)) for method, one in each.items() if len(one) > 1}
    if len(variances) < 3:
        return set()
    usual = float(np.median(list(variances.values())))
    return {method for method, one in variances.items() if one > RESTLESS * usual}


def _pooled(each: Sequence[Values]) -> tuple[float, float]:
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
