"""What `peft-engine data CONFIG` tells of a run's data: counts, lengths, labels, faults, and the mask of real rows."""

import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .encoding import EncodedSet
from .labels import NOT_LEARNED, Labels
from .splitting import Split, Splits

SHOWN_DROPPED = 5
SHOWN_LABELS = 20
REVERSING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that change the direction of writing
GREEN, DIM, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def inspect_splits(splits: Splits, encoded: dict[str, EncodedSet]) -> dict[str, Any]:
    """Numbers about each split and the whole, as plain JSON types.

    Args:
        encoded: the tokenised splits by name ("train", "eval", "test"); one that is not there is told without tokens.
    """
    report = splits.report
    parts = {name: split for name in ("train", "eval", "test") if (split := getattr(splits, name)) is not None}
    return {
        "layout": splits.layout.kind,
        "columns": dict(splits.layout.columns),
        "digest": splits.digest,
        "labels": splits.labels.to_json() if splits.labels else None,
        "splits": {
            name: {
                "rows": len(split.examples),
                "made": report.made.get(name, False),
                "duplicates": report.duplicates.get(name, 0),
                "leaked_into_train": report.leaked.get(name, 0),
                "near_train": report.near.get(name, 0),
                **_label_facts(split, splits.labels),
                **(_token_facts(split, encoded[name]) if name in encoded else {}),
            }
            for name, split in parts.items()
        },
        "sources": list(report.sources),
        "removed": dict(report.removed),
        "removed_first": [asdict(row) for row in splits.dropped[:SHOWN_DROPPED]],
        "near_method": report.near_method,
        "near_dropped": report.near_dropped,
        "contradictory": report.contradictory,
        "leaked_where": list(report.leaked_where),
        "near_where": list(report.near_where),
        "notes": list(report.notes),
    }


def mask_preview(
    tokenizer: PreTrainedTokenizerBase, input_ids: Sequence[int], supervised: Sequence[bool], *, colour: bool
) -> str:
    """A row as the model reads it, showing what is learned: green against dim, or between ⟦ and ⟧ without colour.

    Line ends are shown as ↵, other control characters by their symbols, so that the data can't steer the terminal.
    """
    ids = [int(token) for token in input_ids]
    runs, end = [], 0
    for is_learned, group in groupby(bool(flag) for flag in supervised):
        start, end = end, end + len(list(group))
        text = _visible(_decoded(tokenizer, ids, start, end))
        if colour:
            runs.append(f"{GREEN if is_learned else DIM}{text}{RESET}")
        else:
            runs.append(f"⟦{text}⟧" if is_learned else text)
    return "".join(runs)


def print_inspection(report: dict[str, Any], console: Console) -> None:
    """Print what `inspect_splits` gave as tables."""
    parts: dict[str, dict[str, Any]] = report["splits"]
    table = Table(title="Splits", title_justify="left")
    table.add_column("")
    for name, facts in parts.items():
        table.add_column(f"{name} (made)" if facts["made"] else name, justify="right")
    for title, values in _lines(parts):
        table.add_row(title, *values)
    console.print(table)
    if report["sources"]:
        console.print(_source_table(report["sources"]))
    if report["labels"] and report["labels"]["names"]:
        console.print(_label_table(parts, report["labels"]["names"]))
    for text in _warnings(report):
        console.print(Text(text))


def _token_facts(split: Split, data: EncodedSet) -> dict[str, Any]:
    if "pixels" in data.columns:
        return _pixel_facts(data)
    lengths = data.lengths
    tokens = int(lengths.sum())
    facts: dict[str, Any] = {
        "sequences": len(data),
        "tokens": tokens,
        "lengths": _percentiles(lengths),
        "truncated": int(data.truncated),
        "truncated_share": data.truncated / max(1, len(split.examples)),
        "dropped": len(data.dropped),
        "dropped_first": [{"where": split.where[i], "reason": reason} for i, reason in data.dropped[:SHOWN_DROPPED]],
    }
    if "supervised" in data.columns:
        learned = int(data.columns["supervised"].sum())
        facts |= {"supervised_tokens": learned, "supervised_share": learned / max(1, tokens)}
    if "words" in data.columns:
        facts["words_lost"] = int(data.columns["words"].sum() - (data.columns["word"] >= 0).sum())
    return facts


def _pixel_facts(data: EncodedSet) -> dict[str, Any]:
    rows, height, width, _ = data.columns["pixels"].shape
    return {"images": rows, "width": width, "height": height, "megabytes": data.columns["pixels"].nbytes / 2**20}


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Lengths that rows really have: the smallest that at least this share of rows does not exceed."""
    if not len(lengths):
        return {"p50": 0, "p90": 0, "p99": 0, "max": 0}
    found = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf")
    return dict(zip(("p50", "p90", "p99", "max"), map(int, found), strict=True))


def _label_facts(split: Split, labels: Labels | None) -> dict[str, Any]:
    """Rows per class, in order of the ids; of numbers their range, mean and standard deviation."""
    if labels is None:
        return {}
    rows = list(zip(split.examples, split.where, strict=True))
    if labels.kind == "tags":
        ids = np.concatenate([labels.encode_tags(row["tags"], where) for row, where in rows])
        counts = np.bincount(ids[ids != NOT_LEARNED], minlength=len(labels.names))
        words = sum(len(row["tokens"]) for row, _ in rows)
        return {"label_counts": {n: int(c) for n, c in zip(labels.names, counts, strict=True)}, "words": words}
    values = [labels.encode(row["label"], where) for row, where in rows]
    if labels.kind == "choice":
        return {"places": {str(i): int(n) for i, n in enumerate(np.bincount(np.asarray(values, dtype=np.int64)))}}
    if labels.kind == "regression":
        numbers = np.asarray(values, dtype=np.float64)
        named = {"min": numbers.min(), "mean": numbers.mean(), "max": numbers.max(), "std": numbers.std()}
        return {"label_numbers": {name: float(value) for name, value in named.items()}}
    if labels.kind == "multi":
        counts = np.asarray(values, dtype=np.float64).sum(axis=0)
        unlabelled = {"rows_without_label": sum(not any(row) for row in values if isinstance(row, list))}
    else:
        counts, unlabelled = np.bincount(np.asarray(values, dtype=np.int64), minlength=len(labels.names)), {}
    return {"label_counts": {name: int(n) for name, n in zip(labels.names, counts, strict=True)}, **unlabelled}


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, end: int) -> str:
    """Text of `ids[start:end]` where they stand: tokenizers drop a space at the beginning of what they decode."""

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    before, upto = decode(ids[:start]), decode(ids[:end])
    return upto[len(before) :] if upto.startswith(before) else decode(ids[start:end])


def _visible(text: str) -> str:
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if ord(character) < 0x20 and character != "\t":
        return chr(0x2400 + ord(character))
    if character in REVERSING or (unicodedata.category(character) == "Cc" and character != "\t"):
        return f"\\u{ord(character):04x}"
    return character


def _lines(parts: dict[str, dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of the table: title and a cell per split; those that no split has are left out."""

    def cells(key: str, form: str = ",") -> list[str]:
        return [format(facts[key], form) if key in facts else "–" for facts in parts.values()]

    def inner(key: str, name: str, form: str = ",") -> list[str]:
        return [format(facts[key][name], form) if key in facts else "–" for facts in parts.values()]

    def with_share(key: str, share: str) -> list[str]:
        return [f"{facts[key]:,} ({facts[share]:.1%})" if key in facts else "–" for facts in parts.values()]

    lines = [
        ("rows", cells("rows")),
        ("sequences", cells("sequences")),
        ("pixels wide", cells("width")),
        ("pixels high", cells("height")),
        ("MiB of pixels", cells("megabytes", ",.1f")),
        ("tokens", cells("tokens")),
        ("supervised tokens", with_share("supervised_tokens", "supervised_share")),
        *((f"length {name}", inner("lengths", name)) for name in ("p50", "p90", "p99", "max")),
        ("rows truncated", with_share("truncated", "truncated_share")),
        ("words", cells("words")),
        ("words lost by truncation", cells("words_lost")),
        ("rows dropped", cells("dropped")),
        ("rows that repeat an earlier one", cells("duplicates")),
        ("rows without any label", cells("rows_without_label")),
        *((f"label {name}", inner("label_numbers", name, ".4g")) for name in ("min", "mean", "max", "std")),
    ]
    return [(title, values) for title, values in lines if set(values) != {"–"}]


def _label_table(parts: dict[str, dict[str, Any]], names: list[str]) -> Table:
    unit = "words" if any("words" in facts for facts in parts.values()) else "rows"
    table = Table(title=f"{unit.capitalize()} per label", title_justify="left")
    table.add_column("label")
    for name in parts:
        table.add_column(name, justify="right")
    for label in names[:SHOWN_LABELS]:
        counts = [(facts["label_counts"][label], facts[unit]) for facts in parts.values()]
        table.add_row(Text(_visible(label)), *(f"{n:,} ({n / max(1, rows):.1%})" for n, rows in counts))
    if len(names) > SHOWN_LABELS:
        table.add_row(f"… and {len(names) - SHOWN_LABELS} more", *("" for _ in parts))
    return table


def _source_table(sources: list[dict[str, Any]]) -> Table:
    table = Table(title="Rows per source of data.train", title_justify="left")
    for title in ("source", "weight", "rows", "in train", "seen per epoch"):
        table.add_column(title, justify="left" if title == "source" else "right")
    for part in sources:
        counts = (f"{part[key]:,}" for key in ("rows", "train", "epoch"))
        table.add_row(Text(_visible(part["path"])), f"{part['weight']:g}", *counts)
    return table


def _warnings(report: dict[str, Any]) -> list[str]:
    """Sentences about faults of the data."""
    lines = []
    for name, facts in report["splits"].items():
        if facts["leaked_into_train"]:
            lines.append(
                f"Leakage: {facts['leaked_into_train']:,} training rows stand in {name} too; removed from train."
            )
        if facts["near_train"]:
            done = "removed from train" if report["near_dropped"] else "kept"
            lines.append(f"Near duplicates: {facts['near_train']:,} training rows are almost those of {name}; {done}.")
        for dropped in facts.get("dropped_first", []):
            lines.append(f"Dropped from {name}: {dropped['where']}: {dropped['reason']}")
    lines += [f"  leaked: {pair}" for pair in report["leaked_where"]]
    lines += [f"  near: {pair}" for pair in report["near_where"]]
    for name, kinds in report["removed"].items():
        told = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        lines.append(f"Left out of {name}: {told}.")
    lines += [f"  left out: {row['where']}: {row['kind']}: {row['reason']}" for row in report["removed_first"]]
    if report["contradictory"] and report["labels"]:
        when = " as read" if any("contradictory" in kinds for kinds in report["removed"].values()) else ""
        lines.append(f"Contradictory: {report['contradictory']:,} inputs have more than one label{when}.")
    return [_visible(line) for line in lines + [f"Note: {note}" for note in report["notes"]]]
