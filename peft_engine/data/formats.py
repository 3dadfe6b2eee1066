"""From rows to examples: which columns play which part, and one shape per kind of data.

    causal-lm            {"messages": [{"role", "content", …}, …], "tools": [...]}      tools where the row has some
                         {"prompt": …, "completion": …}      both strings, or both lists of messages (then also "tools")
                         {"text": str}
    text-classification  {"text": str, "label": Any}                                    no label when predicting
    dpo, orpo, reward    {"prompt": …, "chosen": …, "rejected": …}     strings, or lists of messages; the prompt may be
                         missing where chosen and rejected hold it
    kto                  {"prompt": …, "completion": …, "label": bool}

Columns are found by the conventions of TRL, OpenAI, ShareGPT and Alpaca, or named in `data.columns`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, DataError
from .messages import Malformed, as_conversation, as_tools
from .parsing import Row, shown
from .reading import Rows

Example = dict[str, Any]
Kind = Literal["messages", "prompt-completion", "text", "text-label", "preference", "rated"]

CONVENTIONS = {
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "prompt": ("prompt", "instruction"),
    "completion": ("completion", "output"),
    "text": ("text", "sentence", "content", "document"),
    "label": ("label", "labels", "class", "target", "category", "score", "sentiment"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
KINDS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
    "text-label": ("text", "label"),
    "preference": ("chosen", "rejected"),
    "rated": ("prompt", "completion", "label"),
}
PREFERENCE_KINDS: dict[str, Kind] = {"dpo": "preference", "orpo": "preference", "reward": "preference", "kto": "rated"}
CAUSAL_KINDS: tuple[Kind, ...] = ("messages", "prompt-completion", "text")
ANSWERS = ("label", "completion")
PARTS = {
    "causal-lm": ("messages", "tools", "prompt", "completion", "text"),
    "text-classification": ("text", "label"),
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
    kind = _kind(rows, task, columns, need_label)
    found = {part: _find(rows, part, columns) for part in KINDS[kind] if need_label or part not in ANSWERS}
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
    return Layout(kind, found, answered=need_label)


def _kind(rows: Rows, task: str, columns: dict[str, str], need_label: bool) -> Kind:
    if task == "text-classification":
        return "text-label"
    if task in PREFERENCE_KINDS and need_label:
        return PREFERENCE_KINDS[task]
    return _causal_kind(rows, columns, need_label)


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


def to_examples(rows: Rows, layout: Layout) -> list[Example]:
    """One example per row, in order.

    Raises:
        DataError: rows that can't be learned from. The first is named, the others are counted.
    """
    examples: list[Example] = []
    faults: list[tuple[int, Malformed]] = []
    for i, row in enumerate(rows.rows):
        try:
            examples.append(to_example(row, layout))
        except Malformed as fault:
            faults.append((i, fault))
    if faults:
        first, problem = faults[0]
        raise refused_rows(rows.where(first), problem, len(faults))
    return examples


def to_example(row: Row, layout: Layout) -> Example:
    """The example that one row is. Raises Malformed."""
    return _CONVERTERS[layout.kind](row, layout)


def refused_rows(where: str, problem: Malformed, count: int) -> DataError:
    """What is told of `count` rows that can't be learned from, the first of which stands at `where`."""
    others = f" ({count - 1} more rows can't be used either.)" if count > 1 else ""
    return DataError(f"{where}: {problem}.{others}", "Mend or remove such rows.")


def is_conversation(example: Example) -> bool:
    """Whether an example goes through the chat template."""
    return "messages" in example or isinstance(example.get("prompt", example.get("chosen")), list)


def _text_example(row: Row, layout: Layout) -> Example:
    return {"text": _filled_string(row, layout.columns["text"])}


def _labelled_example(row: Row, layout: Layout) -> Example:
    example = _text_example(row, layout)
    if "label" in layout.columns:
        column = layout.columns["label"]
        label = row.get(column)
        if column not in row:
            raise Malformed(f"column {column!r} is not in this row")
        if label is None or label != label or (isinstance(label, str) and label.strip().lower() in ("", "nan")):
            raise Malformed(f"the label in column {column!r} is {label!r}, that is missing")
        example["label"] = label
    return example


def _messages_example(row: Row, layout: Layout) -> Example:
    messages = as_conversation(row.get(layout.columns["messages"]), layout.columns["messages"])
    if layout.answered and not any(turn["role"] == "assistant" for turn in messages):
        raise Malformed("the conversation has no assistant turn to learn from")
    return {"messages": messages} | _tools(row, layout)


def _completion_example(row: Row, layout: Layout) -> Example:
    prompt = _side(row, layout.columns["prompt"])
    if isinstance(prompt, str) and "input" in layout.columns:
        more = row.get(layout.columns["input"])
        if not isinstance(more, str | None):
            raise Malformed(f"the input is {shown(more)}, a string was expected")
        prompt = f"{prompt}\n\n{more}" if more and more.strip() else prompt
    example: Example = {"prompt": prompt}
    if layout.answered:
        completion = example["completion"] = _side(row, layout.columns["completion"])
        if type(prompt) is not type(completion):
            raise Malformed("one of prompt and completion is a string, the other a list of messages")
        if isinstance(completion, list) and not any(turn["role"] == "assistant" for turn in completion):
            raise Malformed("the completion has no assistant turn to learn from")
    return example | (_tools(row, layout) if isinstance(prompt, list) else {})


def _preference_example(row: Row, layout: Layout) -> Example:
    example = {
        part: _side(row, layout.columns[part]) for part in ("prompt", "chosen", "rejected") if part in layout.columns
    }
    if len({type(side) for side in example.values()}) > 1:
        raise Malformed("of prompt, chosen and rejected some are strings, others lists of messages")
    if example["chosen"] == example["rejected"]:
        raise Malformed("chosen and rejected are the same: there is no preference to learn")
    return example | _tools(row, layout)


def _rated_example(row: Row, layout: Layout) -> Example:
    example = _completion_example(row, layout)
    label = row.get(layout.columns["label"])
    known = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}
    key = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(key, str | bool | int) or key not in known:
        raise Malformed(f"the label is {shown(label)}; expected true (a good answer) or false")
    return {**example, "label": known[key]}


def _side(row: Row, column: str) -> str | list[dict[str, Any]]:
    return as_conversation(row[column], column) if isinstance(row.get(column), list) else _filled_string(row, column)


def _tools(row: Row, layout: Layout) -> Example:
    tools = as_tools(row.get(layout.columns["tools"])) if "tools" in layout.columns else None
    return {"tools": tools} if tools else {}


def _filled_string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        got = f"is {shown(value)}, a string was expected" if column in row else "is not in this row"
        raise Malformed(f"column {column!r} {got}")
    if not value.strip():
        raise Malformed(f"column {column!r} is empty" if not value else f"column {column!r} is blank ({value[:20]!r})")
    return value


_CONVERTERS: dict[Kind, Callable[[Row, Layout], Example]] = {
    "messages": _messages_example,
    "prompt-completion": _completion_example,
    "text": _text_example,
    "text-label": _labelled_example,
    "preference": _preference_example,
    "rated": _rated_example,
}
