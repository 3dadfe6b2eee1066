"""Which columns of the rows play which part, and one shape of example per kind of data (`examples` makes them).

    causal-lm            {"messages": [{"role", "content", …}, …], "tools": [...]}      tools where the row has some
                         {"prompt": …, "completion": …}      both strings, or both lists of messages (then also "tools")
                         {"text": str}
    text-classification  {"text": str, "label": Any}                                    no label when predicting
                         {"text": str, "text_pair": str, "label": Any}
                         {"text": str, "choices": [str, …], "label": int}               the right one's place, from 0
    image-classification {"image": Picture, "label": Any}                               no label when predicting
    token-classification {"tokens": [str, …], "tags": [str | int | None, …]}            no tags when predicting
    seq2seq              {"source": str, "target": str}                                 no target when predicting
    dpo, orpo, reward    {"prompt": …, "chosen": …, "rejected": …}     strings, or lists of messages; the prompt may be
                         missing where chosen and rejected hold it
    kto                  {"prompt": …, "completion": …, "label": bool}

Columns are found by the conventions of TRL, OpenAI, ShareGPT and Alpaca, or named in `data.columns`.
"""

import difflib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, DataError
from .parsing import Row, is_missing
from .reading import Rows
from .text_layouts import (
    SENTENCE_PAIRS,
    TRANSLATIONS,
    firsts,
    is_choices,
    pairs_in,
    seconds,
)

Example = dict[str, Any]
Kind = Literal[
    "messages", "prompt-completion", "text", "text-label", "pair-label", "choices-label", "tokens-tags",
    "source-target", "image-label", "preference", "rated",
]  # fmt: skip

CONVENTIONS = {
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction"),
    "completion": ("completion", "output"),
    "text": ("text", "sentence", "content", "document"),
    "image": (
        *("image", "images", "img", "pixels", "image_path", "file_name", "filename", "file", "path"),
        *("filepath", "image_bytes", "image_base64", "x"),
    ),
    "label": ("label", "labels", "class", "target", "category", "score", "sentiment"),
    "text_pair": seconds(SENTENCE_PAIRS),
    "choices": ("choices", "endings"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "pos_tags", "labels"),
    "source": firsts(TRANSLATIONS),
    "target": seconds(TRANSLATIONS),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
CHOICES_TEXT = ("question", "context", "ctx", "premise")
CHOICES_LABEL = ("answer", "answerkey")
KINDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "text-label": ("text", "label"),
    "image-label": ("image", "label"),
    "pair-label": ("text", "text_pair", "label"),
    "choices-label": ("text", "choices", "label"),
    "tokens-tags": ("tokens", "tags"),
    "source-target": ("source", "target"),
    "preference": ("chosen", "rejected"),
    "rated": ("prompt", "completion", "label"),
}
PREFERENCE_KINDS: dict[str, Kind] = {"dpo": "preference", "orpo": "preference", "reward": "preference", "kto": "rated"}
CAUSAL_KINDS: tuple[Kind, ...] = ("messages", "prompt-completion", "text")
ANSWERS = ("label", "completion", "tags", "target")
PARTS = {
    "causal-lm": ("messages", "tools", "prompt", "completion", "text"),
    "text-classification": ("text", "text_pair", "choices", "label"),
    "image-classification": ("image", "label"),
    "token-classification": ("tokens", "tags"),
    "seq2seq": ("source", "target"),
    "dpo": ("prompt", "chosen", "rejected", "tools"),
    "orpo": ("prompt", "chosen", "rejected", "tools"),
    "reward": ("prompt", "chosen", "rejected", "tools"),
    "kto": ("prompt", "completion", "label", "tools"),
}


@dataclass(frozen=True)
class Layout:
    """What kind of data the rows are, and the column of each part."""

    kind: Kind
    columns: dict[str, str]
    """Part to column. Alpaca's optional `input` column is the part "input"."""
    answered: bool = True
    """Rows must hold what is to be learned: a label, a completion, an assistant turn."""
    folder: str = ""
    """Paths of images are relative to it."""


def find_layout(rows: Rows, task: str, columns: dict[str, str], *, need_label: bool = True) -> Layout:
    """The layout that `columns` (part to column name) and the conventions give.

    Args:
        need_label: false for prediction: label and completion are not looked for.

    Raises:
        ConfigError: `columns` names parts that the task has not, or that exclude each other.
        DataError: a named column is not there, no convention fits, or more than one does.
    """
    unused = [part for part in columns if part not in PARTS[task]]
    if unused:
        raise ConfigError(
            f"data.columns.{unused[0]} = {columns[unused[0]]!r} has no use in task {task}.",
            f"Its parts are {', '.join(PARTS[task])}.",
        )
    kind, columns = _kind(rows, task, columns, need_label)
    answered = need_label or task == "reward"  # which scores answers
    found = {part: _find(rows, part, columns) for part in KINDS[kind] if answered or part not in ANSWERS}
    if len(set(found.values())) < len(found):
        raise ConfigError(f"data.columns: {found} names one column for two parts.", "Name two columns.")
    if kind == "prompt-completion":
        found |= _alpaca_input(rows, found, columns)
    if kind == "preference" and ("prompt" in columns or _candidates(rows, "prompt")):
        found["prompt"] = _find(rows, "prompt", columns)
    if kind != "text" and "tools" in PARTS[task] and ("tools" in columns or _candidates(rows, "tools")):
        found["tools"] = _find(rows, "tools", columns)
    elif "tools" in columns:
        raise ConfigError(f"data.columns.tools = {columns['tools']!r} has no use in plain text.", "Remove it.")
    folder = "" if rows.places else os.path.dirname(os.path.expanduser(rows.source))
    return Layout(kind, found, answered, folder)


def _kind(rows: Rows, task: str, columns: dict[str, str], need_label: bool) -> tuple[Kind, dict[str, str]]:
    """The kind of rows of a task, and `columns` with those that only a pair of columns tells."""
    if task == "image-classification":
        return "image-label", columns
    if task == "token-classification":
        return "tokens-tags", columns
    if task == "seq2seq":
        return "source-target", columns or _one_pair(rows, "source", "target", TRANSLATIONS)
    if task == "text-classification":
        return _labelled_kind(rows, columns)
    if task in PREFERENCE_KINDS and need_label:
        return PREFERENCE_KINDS[task], columns
    return _causal_kind(rows, columns, need_label), columns


def _labelled_kind(rows: Rows, columns: dict[str, str]) -> tuple[Kind, dict[str, str]]:
    """One text, two, or a text with choices; what is named in `columns` decides, else what the columns are called."""
    if "text_pair" in columns and "choices" in columns:
        raise ConfigError("data.columns names both text_pair and choices.", "Name one of them.")
    if "text_pair" in columns:
        return "pair-label", columns
    told = (first_value(rows.rows, column) for column in _candidates(rows, "choices"))
    if "choices" in columns or any(map(is_choices, told)):
        own = {"text": CHOICES_TEXT, "label": CHOICES_LABEL}
        for part, names in own.items():
            found = [column for column in rows.columns if _plain(column) in names]
            if part not in columns and not _candidates(rows, part) and len(found) == 1:
                columns = columns | {part: found[0]}
        return "choices-label", columns
    if "text" in columns:
        return "text-label", columns
    pair = _one_pair(rows, "text", "text_pair", SENTENCE_PAIRS)
    alone = [column for column in _candidates(rows, "text") if column not in pair.values()]
    if pair and alone:
        raise DataError(
            f"{rows.source} could be read as the pair {pair['text']!r} and {pair['text_pair']!r} or as the text "
            f"{alone[0]!r}; its columns are {_listed(rows)}.",
            "Name the text (data.columns.text=COLUMN), and data.columns.text_pair=COLUMN for a pair.",
        )
    return ("pair-label", columns | pair) if pair else ("text-label", columns)


def first_value(rows: Iterable[Row], column: str) -> Any:
    """The first cell of a column that holds something; None where none does."""
    return next((row[column] for row in rows if not is_missing(row.get(column))), None)


def told_by_value(task: str, columns: Iterable[str]) -> list[str]:
    """Columns of which a cell is needed to tell the layout; the name tells of the others."""
    return [c for c in columns if task == "text-classification" and _plain(c) in CONVENTIONS["choices"]]


def _one_pair(rows: Rows, one: str, two: str, pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Columns of the one pair that is there, none where there is none."""
    found = pairs_in(rows.columns, pairs)
    if len(found) > 1:
        raise DataError(
            f"{rows.source} could be read as {' or as '.join(f'{a!r} and {b!r}' for a, b in found)}.",
            f"Name both: data.columns.{one}=COLUMN and data.columns.{two}=COLUMN.",
        )
    return {one: found[0][0], two: found[0][1]} if found else {}


def _alpaca_input(rows: Rows, found: dict[str, str], columns: dict[str, str]) -> dict[str, str]:
    """The column of Alpaca's `input`, if there is one. Refuses one convention's prompt with another's completion."""
    pair = tuple(_plain(found[part]) for part in KINDS["prompt-completion"] if part in found and part not in columns)
    if len(pair) == 2 and pair not in (("prompt", "completion"), ("instruction", "output")):
        raise DataError(
            f"{rows.source}: {found['prompt']!r} and {found['completion']!r} are of two conventions; "
            f"its columns are {_listed(rows)}.",
            "Name both: data.columns.prompt=COLUMN and data.columns.completion=COLUMN.",
        )
    inputs = [column for column in rows.columns if _plain(column) == "input"]
    return {"input": inputs[0]} if inputs and _plain(found["prompt"]) == "instruction" else {}


def _causal_kind(rows: Rows, columns: dict[str, str], need_label: bool) -> Kind:
    """The one kind that `columns` names parts of; else the one that the conventions find all parts of."""
    named = [kind for kind in CAUSAL_KINDS if any(part in columns for part in KINDS[kind])]
    if len(named) > 1:
        raise ConfigError(f"data.columns names parts of {' and of '.join(named)}.", "Name the parts of one of them.")
    fit = named or [kind for kind in CAUSAL_KINDS if all(_candidates(rows, part) for part in KINDS[kind])]
    if not fit and not need_label and _candidates(rows, "prompt"):
        fit = ["prompt-completion"]
    if len(fit) > 1:
        part = KINDS[fit[0]][-1]
        raise DataError(
            f"{rows.source} could be read as {' or as '.join(fit)}; its columns are {_listed(rows)}.",
            f"Name the part to use, for example data.columns.{part}={_candidates(rows, part)[0]} for {fit[0]}.",
        )
    if not fit:
        raise DataError(
            f"{rows.source} has no columns for causal-lm; it has {_listed(rows)}.",
            "Looked for: messages; prompt and completion; instruction and output; text. "
            "Name one, for example data.columns.text=COLUMN.",
        )
    return fit[0]


def _candidates(rows: Rows, part: str) -> list[str]:
    """Columns that by convention play a part: the part's own name alone if it is there, else all its other names."""
    by_name = {name: [column for column in rows.columns if _plain(column) == name] for name in CONVENTIONS[part]}
    if part in rows.columns:
        return [part]
    return by_name[part] or [column for columns in by_name.values() for column in columns]


def _plain(column: Any) -> str:
    return str(column).strip().lower()


def _find(rows: Rows, part: str, named: dict[str, str]) -> str:
    if part in named:
        return _existing(rows, part, named[part])
    candidates = _candidates(rows, part)
    if len(candidates) == 1:
        return candidates[0]
    problem = f"has several columns that may be the {part}: {', '.join(map(repr, candidates))}"
    if not candidates:
        problem = f"has no column for the {part} ({', '.join(CONVENTIONS[part])}); it has {_listed(rows)}"
    raise DataError(f"{rows.source} {problem}.", f"Name it: data.columns.{part}=COLUMN.")


def _existing(rows: Rows, part: str, name: str) -> str:
    if name not in rows.columns:
        near = difflib.get_close_matches(name, rows.columns, n=1, cutoff=0.5)
        raise DataError(
            f"{rows.source} has no column {name!r} (data.columns.{part}); it has {_listed(rows)}.",
            f"Did you mean {near[0]!r}?" if near else f"Name one of these as data.columns.{part}.",
        )
    return name


def _listed(rows: Rows) -> str:
    return ", ".join(map(repr, rows.columns))


def is_conversation(example: Example) -> bool:
    """Whether an example goes through the chat template."""
    return "messages" in example or isinstance(example.get("prompt", example.get("chosen")), list)
