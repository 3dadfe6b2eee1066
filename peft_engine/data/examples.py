"""From rows to examples, by the layout of their columns; the shapes of examples stand in `formats`."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..errors import DataError
from .formats import Example, Kind, Layout
from .images import picture
from .messages import Empty, Malformed, as_conversation, as_tools
from .parsing import Row, is_missing, shown
from .reading import Rows
from .text_layouts import choices_of, right_choice, tags_of, words_of


def to_examples(rows: Rows, layout: Layout) -> list[Example]:
    """One example per row, in order.

    Raises:
        DataError: rows that can't be learned from. The first is named, the others are counted.
    """
    examples, faults = convert_rows(rows, layout)
    if faults:
        refuse_rows(rows, faults, layout)
    return list(examples.values())


def convert_rows(rows: Rows, layout: Layout) -> tuple[dict[int, Example], list[tuple[int, Malformed]]]:
    """The example of each row that can be learned from, by the row's number, and what is wrong with the others."""
    examples: dict[int, Example] = {}
    faults: list[tuple[int, Malformed]] = []
    for i, row in enumerate(rows.rows):
        try:
            examples[i] = to_example(row, layout)
        except Malformed as fault:
            faults.append((i, fault))
    return examples, faults


def to_example(row: Row, layout: Layout) -> Example:
    """The example that one row is. Raises Malformed."""
    return _CONVERTERS[layout.kind](row, layout)


def refuse_rows(rows: Rows, faults: list[tuple[int, Malformed]], layout: Layout) -> NoReturn:
    """Raise a DataError that names the first of the faulty rows and counts the others."""
    first, problem = faults[0]
    setting = "empty" if isinstance(problem, Empty) else "malformed"
    other_way = f", or set data.clean.{setting}: drop" if layout.answered else ""
    raise refused_rows(rows.where(first), problem, len(faults), other_way)


def refused_rows(where: str, problem: Malformed, count: int, other_way: str = "") -> DataError:
    """What is told of `count` rows that can't be learned from, the first of which stands at `where`."""
    others = f" ({count - 1} more rows can't be used either.)" if count > 1 else ""
    return DataError(f"{where}: {problem}.{others}", f"Mend or remove such rows{other_way}.")


def _text_example(row: Row, layout: Layout) -> Example:
    return {"text": _filled_string(row, layout.columns["text"])}


def _labelled_example(row: Row, layout: Layout) -> Example:
    return _text_example(row, layout) | _label(row, layout)


def _image_example(row: Row, layout: Layout) -> Example:
    column = layout.columns["image"]
    if column not in row:
        raise Malformed(f"column {column!r} is not in this row")
    image = row[column]
    parts = [image.get("bytes"), image.get("path")] if isinstance(image, dict) else [image]
    if all(map(is_missing, parts)):
        raise Empty(f"column {column!r} is {shown(image)}, that is empty")
    labelled = _label(row, layout)
    if isinstance(image, np.ndarray) and isinstance(labelled.get("label"), list) and len(labelled["label"]) == 1:
        labelled = {"label": labelled["label"][0]}  # an array of labels (rows, 1), as Keras keeps CIFAR's
    return {"image": picture(image, layout.folder)} | labelled


def _label(row: Row, layout: Layout) -> Example:
    if "label" in layout.columns:
        column = layout.columns["label"]
        label = row.get(column)
        if column not in row:
            raise Malformed(f"column {column!r} is not in this row")
        if label is None or label != label or (isinstance(label, str) and label.strip().lower() in ("", "nan")):
            raise Empty(f"the label in column {column!r} is {label!r}, that is missing")
        return {"label": label}
    return {}


def _pair_example(row: Row, layout: Layout) -> Example:
    return _labelled_example(row, layout) | {"text_pair": _filled_string(row, layout.columns["text_pair"])}


def _choices_example(row: Row, layout: Layout) -> Example:
    choices, keys = choices_of(row, layout.columns["choices"])
    example = _labelled_example(row, layout) | {"choices": choices}
    if "label" in example:
        example["label"] = right_choice(example["label"], choices, keys)
    return example


def _tagged_example(row: Row, layout: Layout) -> Example:
    words = words_of(row, layout.columns["tokens"])
    tagged = {"tags": tags_of(row, layout.columns["tags"], len(words))} if "tags" in layout.columns else {}
    return {"tokens": words} | tagged


def _source_example(row: Row, layout: Layout) -> Example:
    return {part: _filled_string(row, layout.columns[part]) for part in ("source", "target") if part in layout.columns}


def _messages_example(row: Row, layout: Layout) -> Example:
    column = layout.columns["messages"]
    if column in row and is_missing(row[column]):
        raise Empty(f"column {column!r} is {row[column]!r}, that is empty")
    messages = as_conversation(row.get(column), column)
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
    column = layout.columns["label"]
    label = row.get(column)
    if column in row and is_missing(label):
        raise Empty(f"the label in column {column!r} is {label!r}, that is missing")
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
        raise (Empty if value is None and column in row else Malformed)(f"column {column!r} {got}")
    if not value.strip():
        raise Empty(f"column {column!r} is empty" if not value else f"column {column!r} is blank ({value[:20]!r})")
    return value


_CONVERTERS: dict[Kind, Callable[[Row, Layout], Example]] = {
    "messages": _messages_example,
    "prompt-completion": _completion_example,
    "text": _text_example,
    "text-label": _labelled_example,
    "image-label": _image_example,
    "pair-label": _pair_example,
    "choices-label": _choices_example,
    "tokens-tags": _tagged_example,
    "source-target": _source_example,
    "preference": _preference_example,
    "rated": _rated_example,
}
