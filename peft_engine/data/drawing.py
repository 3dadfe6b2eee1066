"""Seeded draws of row indices, in proportion to classes where these are large enough (scikit-learn's split).

A draw depends on the seed, the number of rows and their classes' names, on nothing else: not on the process, and not
on the order of the classes' ids.
"""

from collections import Counter
from collections.abc import Sequence


def draw(indices: Sequence[int], count: int, strata: Sequence[str] | None, seed: int) -> tuple[list[int], bool]:
    """Draw `count` of `indices`.

    Args:
        indices: candidates, more than `count`.
        strata: class of each row, by row index; None draws plainly.
        seed: any integer.

    Returns:
        The drawn indices in ascending order, and whether the classes in `strata` were kept in proportion. Classes with
        a single candidate are not drawn then.
    """
    from sklearn.model_selection import train_test_split

    state = seed % 2**32  # what NumPy takes
    if strata is not None:
        sizes = Counter(strata[i] for i in indices)
        shared = [i for i in indices if sizes[strata[i]] > 1]
        classes = sum(size > 1 for size in sizes.values())
        if 0 < classes <= count <= len(shared) - classes:
            drawn, _ = train_test_split(
                shared, train_size=count, stratify=[strata[i] for i in shared], random_state=state
            )
            return sorted(drawn), True
    drawn, _ = train_test_split(list(indices), train_size=count, random_state=state)
    return sorted(drawn), False


def hold_out(
    indices: Sequence[int], count: int, strata: Sequence[str] | None, classes: Sequence[Sequence[str]], seed: int
) -> tuple[list[int], list[str]]:
    """Draw about `count` of `indices`, so that every class is still among those that stay.

    Args:
        classes: all classes of each row, by row index: one, several (multi-label), or none (no classes).

    Returns:
        The drawn indices in ascending order, and notes: what is not as it was asked for.
    """
    drawn, stratified = draw(indices, count, strata, seed)
    notes = []
    if strata is not None and not stratified:
        number = len({strata[i] for i in indices})
        notes.append(f"{count} of {len(indices)} inputs can't hold {number} classes in proportion: drawn plainly")
    held = set(drawn)
    staying = {name for i in indices if i not in held for name in classes[i]}
    kept = [i for i in drawn if staying.issuperset(classes[i])]
    if len(kept) < len(drawn):
        notes.append(f"{len(drawn) - len(kept)} inputs stay in train, which would else lack their class")
    singles = [name for name, size in Counter(name for i in indices for name in set(classes[i])).items() if size == 1]
    if singles:
        named = ", ".join(map(repr, sorted(singles)[:5])) + (", …" if len(singles) > 5 else "")
        notes.append(f"{len(singles)} classes have one input each, which stays in train: {named}")
    return kept, notes
