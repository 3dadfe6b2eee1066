"""Changes to training texts, drawn anew for every row of every step: left-out tokens, masked tokens, punctuation.

A draw is a function of (seed of the member and step, row), so it depends neither on micro-batches nor on processes,
and a resumed run draws the same. All is done on tokens, after tokenising:

    token_dropout  leaves a token out
    masking        puts the mask token in its place, or the unknown token
    punctuation    puts a mark between two words (AEDA, Karimi et al. 2021); only marks that do not change how the
                   words round them are cut, so that this is what tokenising the changed text would give

Never changed: special tokens, what a chat template wrote, and supervised tokens, which are a language model's targets.
A tagged word may be masked, since its tag stays, but is never left out. The first token of a row always stays, and one
token at least of those that may go; no part of a row gets longer than `data.max_length`.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..config import TextAugmentConfig
from ..errors import ConfigError
from .encoding import Change, EncodedSet

MARKS = (".", ";", "?", ":", "!", ",")  # AEDA's
INSERTED: dict[str, Any] = {"supervised": False, "text_bytes": 0, "tag": -100, "word": -1, "weight": 0}
"""What a per-token column says of a mark; other columns repeat the token before it."""


def text_change(
    settings: TextAugmentConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    data: EncodedSet,
    written: np.ndarray | None,
) -> Change:
    """What `EncodedSet.change` of a training split is.

    Args:
        longest: most tokens of a changed row, or of each of its parts.
        written: tokens that somebody wrote, bool (total_tokens,); None is all.

    Raises:
        ConfigError: the tokenizer has no token to mask with or no marks, or no token may be changed.
    """
    mask = _mask_token(tokenizer) if settings.masking else None
    marks = _marks(tokenizer) if settings.punctuation else []
    begins = _word_starts(tokenizer) if settings.punctuation else np.zeros(0, dtype=bool)
    special = np.asarray(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
    tagged = "tag" in data.columns

    def free_in(of: EncodedSet, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a row that may be masked, and those that may be left out, bool (length,)."""
        free = ~np.isin(of.input_ids[start:end], special)
        if written is not None:
            free &= written[start:end]
        fixed = of.columns["supervised"][start:end].astype(bool) if "supervised" in of.columns else np.zeros_like(free)
        return (free if tagged else free & ~fixed), free & ~fixed

    if not any(free_in(data, int(a), int(b))[0][1:].any() for a, b in pairwise(data.offsets)):
        raise ConfigError(
            "data.augment.text: no token of the training rows may be changed: all are learned or special.",
            "Set its shares to 0; prompts can be changed where data.supervise leaves them out.",
        )

    def change(of: EncodedSet, rows: np.ndarray, seed: int) -> EncodedSet:
        parts = []
        for row in rows:
            start, end = int(of.offsets[row]), int(of.offsets[row + 1])
            free, may_go = free_in(of, start, end)
            own = np.array(of.input_ids[start:end])
            rng = np.random.default_rng([seed, int(row)])
            draws = rng.random((3, len(own)))  # always all, so that one setting does not move another's draws
            keep = _kept(draws[0] < settings.token_dropout, may_go, starts := _starts(of, start, end))
            gaps = []
            if marks:
                chosen, part = rng.integers(len(marks), size=len(own)), _parts(of, start, end)
                room = longest - np.bincount(part[keep], minlength=int(part.max()) + 1)
                may_begin = free & keep & ~starts & begins[own] & (draws[2] < settings.punctuation)
                fits = may_begin[1:] & free[:-1]
                for at in np.flatnonzero(fits) + 1:
                    mark = marks[chosen[at]]
                    room[part[at]] -= len(mark)
                    gaps += [(int(at), mark)] if room[part[at]] >= 0 else []
            if mask is not None:
                own[free & (draws[1] < settings.masking)] = mask
            parts.append(_spliced(own, start, keep, gaps))
        return _assembled(of, rows, parts)

    return change


def _parts(of: EncodedSet, start: int, end: int) -> np.ndarray:
    """Which part of the row each token belongs to, int64 (length,): a reading where it has choices, source or target of
    what an encoder reads; `data.max_length` holds for each."""
    for name in ("choice", "supervised") if "longest" in of.columns else ("choice",):
        if name in of.columns:
            return np.asarray(of.columns[name][start:end]).astype(np.int64)
    return np.zeros(end - start, dtype=np.int64)


def _starts(of: EncodedSet, start: int, end: int) -> np.ndarray:
    """The first token of the row, and of each of its readings where it has choices, bool (length,)."""
    starts = np.zeros(end - start, dtype=bool)
    starts[0] = True
    if "choice" in of.columns:
        starts[1:] = np.diff(of.columns["choice"][start:end]) != 0
    return starts


def _kept(out: np.ndarray, may_go: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Tokens that stay, bool (length,): those that begin something, and one of those that may go at least."""
    keep = ~(out & may_go) | starts
    if may_go.any() and not (keep & may_go).any():
        keep[np.flatnonzero(may_go)[0]] = True
    return keep


def _spliced(
    own: np.ndarray, start: int, keep: np.ndarray, gaps: list[tuple[int, list[int]]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, the place in the data that each comes from (a mark's: that of the token before), and which are marks.

    Args:
        keep: tokens that stay.
        gaps: tokens that stay and get a mark before them, with the mark's tokens.
    """
    places = np.flatnonzero(keep)
    sizes = [len(mark) for _, mark in gaps]
    before = np.repeat(np.searchsorted(places, [at for at, _ in gaps]), sizes)  # in the kept row
    added = np.array([token for _, mark in gaps for token in mark], dtype=own.dtype)
    ids = np.insert(own[places], before, added)
    origin = np.insert(places, before, places[before - 1]) + start
    return ids, origin, np.insert(np.zeros(len(places), dtype=bool), before, True)


def _assembled(
    of: EncodedSet, rows: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> EncodedSet:
    """A set of the changed rows alone."""
    ids, origin, is_mark = (np.concatenate(column) for column in zip(*parts, strict=True))
    columns = {}
    for name, values in of.columns.items():
        if len(values) == len(of.input_ids) and name != "label":
            columns[name] = values[origin]
            if name in INSERTED:
                columns[name][is_mark] = INSERTED[name]
        else:
            columns[name] = values[rows]
    offsets = np.concatenate([[0], np.cumsum([len(part[0]) for part in parts])]).astype(np.int64)
    return replace(
        of,
        input_ids=ids.astype(np.int32),
        offsets=offsets,
        units=of.units[rows],
        rows=of.rows[rows],
        columns=columns,
        mixture=None,
        change=None,
    )


def written_tokens(tokenizer: PreTrainedTokenizerBase, text: str, contents: Sequence[str]) -> list[bool]:
    """Per token of a rendered conversation whether it lies within one of its contents, which stand there in order.

    A content that the template changed is not found, and counts as the template's.
    """
    inside, cursor = np.zeros(len(text) + 1, dtype=bool), 0
    for content in contents:
        place = text.find(content.strip(), cursor) if content.strip() else -1
        if place >= 0:
            cursor = place + len(content.strip())
            inside[place:cursor] = True
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    return [end > start and bool(inside[start:end].all()) for start, end in encoded["offset_mapping"]]


def _mask_token(tokenizer: PreTrainedTokenizerBase) -> int:
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    for found in (tokenizer.mask_token_id, tokenizer.unk_token_id):
        if isinstance(found, int) and found not in ends:
            return found
    raise ConfigError(
        "data.augment.text.masking: the tokenizer has no mask token and no unknown token of its own.",
        "Use token_dropout instead.",
    )


def _marks(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each mark that changes neither of the words it stands between."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    left, right = ids("river"), ids("the river")[len(ids("the")) :]
    found = []
    for mark in MARKS:
        whole = ids(f"river {mark} river")
        inner = whole[len(left) : len(whole) - len(right)]
        if inner and whole == [*left, *inner, *right]:
            found.append(inner)
    if not found:
        raise ConfigError(
            "data.augment.text.punctuation: this tokenizer has no mark that leaves the words round it alone.",
            "Use token_dropout or masking instead.",
        )
    return found


def _word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Which tokens begin a word after a blank, bool (vocabulary,). Raises ConfigError where tokens don't tell."""
    found = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    pieces = [piece if isinstance(piece, str) else "" for piece in found]
    if any(piece.startswith("##") for piece in pieces):
        return np.array([piece[:1].isalnum() for piece in pieces])  # all others are punctuation or go on
    begins = np.array([piece.startswith(("Ġ", "▁")) and len(piece) > 1 for piece in pieces])
    if not begins.any():
        raise ConfigError(
            "data.augment.text.punctuation: the tokens of this tokenizer do not tell where a word begins.",
            "Use token_dropout or masking instead.",
        )
    return begins
