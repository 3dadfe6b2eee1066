"""Rows that are left out of a run, each with its reason: what `data.clean` asks for, leaks and near duplicates.

Malformed and empty rows are left out of every file, before anything else looks at them; so are repeated rows of each
split, once splits are made; contradictory ones of the training split alone, before its repetitions are counted, so
that a majority is one of rows. What is left out is never silent: `dropped.jsonl` of the run holds every such row.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..config import CleanConfig
from ..errors import DataError
from .duplicates import answer_key, input_key, row_key
from .examples import convert_rows, refuse_rows
from .formats import Example, Layout
from .messages import Empty
from .reading import Rows

MOST_FAULTY = 0.5  # a file with more malformed or empty rows than this is the wrong file, or its columns are


@dataclass(frozen=True)
class Dropped:
    """A row that is not used.

    Attributes:
        split: the split it stood in; "train" for what stood in `data.train` before splits were made.
        where: "train.jsonl, line 7".
        kind: malformed, empty, duplicate, contradictory, leaked, near duplicate, or teaches nothing.
        reason: a sentence without its full stop.
    """

    split: str
    where: str
    kind: str
    reason: str


def usable(
    rows: Rows, layout: Layout, clean: CleanConfig, split: str
) -> tuple[list[Example], list[str], list[Dropped]]:
    """Examples of the rows that can be used, where each stands, and the rows that `clean` lets go.

    Raises:
        DataError: a faulty row of a sort that is not to be dropped, or more than half of all rows are faulty.
    """
    examples, faults = convert_rows(rows, layout)
    kinds = ["empty" if isinstance(problem, Empty) else "malformed" for _, problem in faults]
    kept = [fault for fault, kind in zip(faults, kinds, strict=True) if getattr(clean, kind) == "refuse"]
    if kept:
        refuse_rows(rows, kept, layout)
    dropped = [Dropped(split, where, "malformed", problem) for where, problem in rows.skipped]
    dropped += [
        Dropped(split, rows.where(i), kind, str(problem)) for (i, problem), kind in zip(faults, kinds, strict=True)
    ]
    total = len(rows.rows) + len(rows.skipped)
    if len(dropped) > MOST_FAULTY * total:
        first = dropped[0]
        raise DataError(
            f"{rows.source}: {len(dropped)} of {total} rows are malformed or empty, more than half. "
            f"First: {first.where}: {first.reason}.",
            "Check the format and data.columns; what is left would not be this data.",
        )
    return list(examples.values()), [rows.where(i) for i in examples], dropped


def without_contradictory(
    examples: Sequence[Example], where: Sequence[str], how: str
) -> tuple[list[int], list[Dropped]]:
    """Which training rows stay when those with one input and different answers go, and the rows that go.

    Args:
        how: `keep`; `drop` all of them; `majority` keeps those with the most frequent answer, none where two are tied.
    """
    if how == "keep":
        return list(range(len(examples))), []
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(input_key(example), []).append(i)
    reasons: dict[int, str] = {}
    for rows in groups.values():
        answers = [answer_key(examples[i]) for i in rows] if len(rows) > 1 else []
        counts = Counter(answers).most_common()
        if len(counts) < 2:
            continue
        wins = how == "majority" and counts[0][1] > counts[1][1]
        for i, answer in zip(rows, answers, strict=True):
            if wins and answer == counts[0][0]:
                continue
            other = next(j for j, its in zip(rows, answers, strict=True) if its != answer)
            told = f"the input of {where[other]} with another answer; {len(counts)} answers in {len(rows)} rows"
            reasons[i] = f"{told}{', no majority' if how == 'majority' and not wins else ''}"
    kept = [i for i in range(len(examples)) if i not in reasons]
    return kept, [Dropped("train", where[i], "contradictory", reasons[i]) for i in sorted(reasons)]


def without_repeated(examples: Sequence[Example], where: Sequence[str], split: str) -> tuple[list[int], list[Dropped]]:
    """Which rows repeat no earlier one, answer included, and those that do."""
    first: dict[str, int] = {}
    kept, dropped = [], []
    for i, example in enumerate(examples):
        earlier = first.setdefault(row_key(example), i)
        if earlier == i:
            kept.append(i)
        else:
            dropped.append(Dropped(split, where[i], "duplicate", f"repeats {where[earlier]}"))
    return kept, dropped


def counted(dropped: Iterable[Dropped]) -> dict[str, dict[str, int]]:
    """Rows by split and kind."""
    found: dict[str, dict[str, int]] = {}
    for row in dropped:
        kinds = found.setdefault(row.split, {})
        kinds[row.kind] = kinds.get(row.kind, 0) + 1
    return found


def refuse_nothing_left(left: int, dropped: Sequence[Dropped], split: str, setting: str) -> None:
    """Raise a DataError where a setting took all rows of a split."""
    if not left:
        first = dropped[0]
        raise DataError(
            f"{setting} leaves no row of {split}. First: {first.where}: {first.reason}.",
            "Set it to keep, or give other rows.",
        )


def as_lines(dropped: Iterable[Dropped]) -> str:
    """`dropped.jsonl`: one object per row."""
    return "".join(
        json.dumps({"split": r.split, "where": r.where, "kind": r.kind, "reason": r.reason}, ensure_ascii=False) + "\n"
        for r in dropped
    )
