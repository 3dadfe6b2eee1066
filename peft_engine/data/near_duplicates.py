"""Training rows that nearly repeat a row of the evaluation or test split.

Two inputs are near duplicates where the sets of their word 3-grams have a Jaccard similarity of at least the threshold
(Broder 1997), or where they are equal but for case, punctuation and spacing. Pairs are found by MinHash and
locality-sensitive hashing (`datasketch`) and then compared exactly, so that none is reported which is not one; a pair
at the threshold is missed with a probability below 1e-4. Training rows are compared with held-out rows only.

Chinese and Japanese are written without blanks, so that there each character is a word; of a run of Thai, Lao, Khmer or
Burmese letters each three that follow each other are one. Images are only compared exactly, by their pixels.

Of a conversation the words of the user count, since a system prompt stands in every row. For the same reason 3-grams
that stand in more than a hundredth of the held-out rows (and in more than 50) are a template's and count nowhere.

Before any hashing, rows that can't reach the threshold are let go exactly: a row with n 3-grams needs at least t·n of
them somewhere on the other side. On most data that leaves few rows to hash.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from .duplicates import input_key, near_key
from .formats import Example

GRAM = 3
PERMUTATIONS = 128
MISSED = 1e-4  # largest probability that a pair at the threshold is no candidate
AFFORDABLE = 50_000_000  # characters that `report` looks at: about 10 seconds of one core
IDEOGRAPHS = "\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTERS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\uaa60-\uaa7f"
"""Alphabets of languages that put no blanks between words: Thai and Lao, Burmese, Khmer."""
WITHOUT_BLANKS = re.compile(f"[{IDEOGRAPHS}{LETTERS}]")
RUNS = re.compile(f"[{IDEOGRAPHS}]|[{LETTERS}]+|[^{IDEOGRAPHS}{LETTERS}]+")
LETTERS_OF_A_WORD = 3
CHARACTER_COST = 5  # a character that is a word, against one of a word
TEMPLATE_SHARE, TEMPLATE_ROWS = 0.01, 50


@dataclass(frozen=True)
class Near:
    """A training row that nearly repeats a held-out one.

    Attributes:
        row: index in the training split.
        split: "eval" or "test".
        other: index in that split.
        similarity: Jaccard similarity; 1 where they are equal but for case, punctuation and spacing.
    """

    row: int
    split: str
    other: int
    similarity: float


def find_near(
    train: Sequence[Example], held: Mapping[str, Sequence[Example]], threshold: float, *, fuzzy: bool
) -> list[Near]:
    """Of each training row and held-out split one pair, the first that is equal or else the most similar.

    Args:
        fuzzy: also those that are similar and not equal; needs `datasketch`.
    """
    found = {(near.row, near.split): near for near in _equal(train, held)}
    if fuzzy:
        for near in _similar(train, held, threshold):
            found.setdefault((near.row, near.split), near)
    return [found[key] for key in sorted(found)]


def method_for(train: Sequence[Example], held: Mapping[str, Sequence[Example]], setting: str) -> tuple[str, str | None]:
    """How near duplicates are looked for (`minhash`, `normalised`, images `exact`), and a note where that is less than
    was asked for.

    Args:
        setting: `report` or `drop`.
    """
    if train and "image" in train[0]:
        return (
            "exact",
            "Near duplicates: images were compared exactly, by their pixels; none that are similar.",
        )
    if find_spec("datasketch") is None:
        return "normalised", (
            "Near duplicates: only rows equal but for case, punctuation and spacing were looked for, because "
            "datasketch is not installed (pip install 'peft-engine[dedup]')."
        )
    if setting == "report" and held:
        keys = [input_key(example) for part in (train, *held.values()) for example in part]
        size = sum(map(len, keys))
        if sum(map(_cost, keys)) > AFFORDABLE:
            return "normalised", (
                f"Near duplicates: only rows equal but for case, punctuation and spacing were looked for, because the "
                f"data has {size:,} characters; data.near_duplicates: drop compares them all."
            )
    return "minhash", None


def words(example: Example) -> list[str]:
    """Normalised words of an input; of a conversation those of the user, where there are any."""
    turns = example.get("messages", example.get("prompt"))
    if isinstance(turns, list):
        said = [turn.get("content") for turn in turns if turn["role"] == "user"]
        if said := [text for text in said if isinstance(text, str)]:
            return _split(near_key("\n".join(said)))
    return _split(near_key(input_key(example)))


def _split(key: str) -> list[str]:
    """Words between blanks, and within runs that hold none."""
    if not WITHOUT_BLANKS.search(key):
        return key.split(" ")
    found: list[str] = []
    for word in key.split(" "):
        for run in RUNS.findall(word):
            if len(run) > LETTERS_OF_A_WORD and WITHOUT_BLANKS.match(run):
                found += [run[i : i + LETTERS_OF_A_WORD] for i in range(len(run) - LETTERS_OF_A_WORD + 1)]
            else:
                found.append(run)
    return found


def _cost(key: str) -> int:
    """Characters of a text, those that are words of their own counted as what they cost."""
    return len(key) + (CHARACTER_COST - 1) * len(WITHOUT_BLANKS.findall(key))


def grams(of: Sequence[str]) -> set[str]:
    """Word 3-grams; all words as one where there are fewer."""
    return {" ".join(of[i : i + GRAM]) for i in range(max(1, len(of) - GRAM + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """Shared members as a share of all; 0 for two empty sets."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared) if shared else 0.0


def templates(held: Iterable[set[str]], rows: int) -> set[str]:
    """3-grams that stand in so many held-out rows that they tell nothing."""
    counts = Counter(gram for row in held for gram in row)
    return {gram for gram, n in counts.items() if n > max(TEMPLATE_ROWS, TEMPLATE_SHARE * rows)}


def _equal(train: Sequence[Example], held: Mapping[str, Sequence[Example]]) -> list[Near]:
    first: dict[str, dict[str, int]] = {}
    for split, examples in held.items():
        stands = first.setdefault(split, {})
        for i, example in enumerate(examples):
            stands.setdefault(near_key(input_key(example)), i)
    found = []
    for i, example in enumerate(train) if held else ():
        key = near_key(input_key(example))
        found += [Near(i, split, stands[key], 1.0) for split, stands in first.items() if key in stands]
    return found


def _similar(train: Sequence[Example], held: Mapping[str, Sequence[Example]], threshold: float) -> list[Near]:
    places = [(split, i) for split, examples in held.items() for i in range(len(examples))]
    theirs = [grams(words(example)) for examples in held.values() for example in examples]
    common = templates(theirs, len(theirs))
    theirs = [row - common for row in theirs]
    there = set().union(*theirs)
    mine: dict[int, set[str]] = {}
    for i, example in enumerate(train):
        row = grams(words(example)) - common
        if row and len(row & there) >= threshold * len(row) - 1e-9:
            mine[i] = row
    here: set[str] = set().union(*mine.values())
    others = {k: row for k, row in enumerate(theirs) if row and len(row & here) >= threshold * len(row) - 1e-9}
    return _pairs(mine, others, places, threshold) if mine and others else []


def _pairs(
    mine: dict[int, set[str]], others: dict[int, set[str]], places: list[tuple[str, int]], threshold: float
) -> list[Near]:
    from datasketch import MinHash, MinHashLSH

    hashes = MinHash(PERMUTATIONS, hashfunc=zlib.crc32)

    def sketch(row: set[str]) -> Any:
        made = hashes.copy()
        made.update_batch([gram.encode("utf-8", "surrogatepass") for gram in row])
        return made

    index = MinHashLSH(threshold, PERMUTATIONS, params=bands(threshold))
    for k, row in others.items():
        index.insert(k, sketch(row), check_duplication=False)
    found: list[Near] = []
    for i, row in mine.items():
        best: dict[str, Near] = {}
        for k in sorted(index.query(sketch(row))):
            split, other = places[k]
            small, large = sorted((len(row), len(others[k])))
            if small < threshold * large - 1e-9 or (split in best and best[split].similarity == 1.0):
                continue
            similarity = jaccard(row, others[k])
            if similarity >= threshold and (split not in best or similarity > best[split].similarity):
                best[split] = Near(i, split, other, similarity)
        found += best.values()
    return found


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of the hashing: the longest bands with which a pair at the threshold is hardly ever missed."""
    fitting = [(PERMUTATIONS // r, r) for r in range(1, PERMUTATIONS // 2 + 1)]
    kept = [(b, r) for b, r in fitting if (1 - threshold**r) ** b <= MISSED]
    return kept[-1] if kept else fitting[0]
