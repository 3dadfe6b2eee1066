"""Which rows ask the same: keys of an example's input, and what they tell about splits.

The input is what the model is given: the text, the prompt, an image (by the digest of its pixels), or all turns of a
conversation that are not the assistant's.
Two rows with one input never stand on two sides of a split, whatever their answers (trap 26).
"""

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from .formats import Example
from .labels import as_list, class_name

INPUTS = ("text", "text_pair", "choices", "prompt", "tools", "source", "tokens", "image")  # all else is the answer


@functools.cache
def _words() -> re.Pattern[str]:
    """Runs of letters, digits and the marks that stand on or beside them (vowel and tone signs)."""
    marks = (chr(code) for code in range(0x300, sys.maxunicode) if unicodedata.category(chr(code)).startswith("M"))
    return re.compile(f"[\\w{''.join(marks)}]+")


def input_key(example: Example) -> str:
    """The input, without surrounding whitespace; equal keys are exact duplicates.

    A conversation in which nobody but the system and the assistant speaks counts as a whole: its learned turns are all
    that tells it from the others.
    """
    if "messages" in example:
        turns = example["messages"]
        asked = [turn for turn in turns if turn["role"] != "assistant"]
        if all(turn["role"] in ("system", "developer") for turn in asked):
            asked = turns
        return _canonical([[_stripped(turn) for turn in asked], example.get("tools")])
    if "image" in example:
        return str(example["image"])
    if "tokens" in example:
        return _joined(example["tokens"])
    if "text_pair" in example:
        return _joined([example["text"].strip(), example["text_pair"].strip()])
    if "choices" in example:
        return _joined([example["text"].strip(), *(choice.strip() for choice in example["choices"])])
    sides = [example.get("chosen"), example.get("rejected")]
    given: Any = next((example[part] for part in ("prompt", "source", "text") if part in example), _canonical(sides))
    if isinstance(given, str):
        return given.strip()
    return _canonical([[_stripped(turn) for turn in given], example.get("tools")])


def row_key(example: Example) -> str:
    """Input and answer; equal keys are rows that repeat each other."""
    return _canonical([input_key(example), answer_key(example)])


def answer_key(example: Example) -> str:
    """What is to be learned of an example, in one form for all that is the same: equal keys are one answer.

    1, 1.0 and "1" name one class, several classes have no order, and white space around a text or turn is nothing.
    """
    parts = {part: _bare(value) for part, value in example.items() if part not in INPUTS}
    if "label" in parts:
        listed = as_list(example["label"])
        parts["label"] = _class(example["label"]) if listed is None else sorted(map(_class, listed))
    if "tags" in parts:
        parts["tags"] = [None if tag is None else _class(tag) for tag in example["tags"]]
    return _canonical(parts)


def label_key(example: Example) -> str:
    """The label as it is written; "null" where there is none."""
    return _canonical(example.get("label"))


def near_key(key: str) -> str:
    """An input key without case, punctuation, spacing and Unicode form; equal ones are near duplicates."""
    return " ".join(_words().findall(unicodedata.normalize("NFKC", key).casefold())) or key


def repeated(examples: Iterable[Example]) -> int:
    """Rows that repeat an earlier one."""
    keys = [row_key(example) for example in examples]
    return len(keys) - len(set(keys))


def contradictory(examples: Iterable[Example]) -> int:
    """Inputs that stand there with more than one answer; what `cleaning.without_contradictory` calls so."""
    first: dict[str, str] = {}
    differ: set[str] = set()
    for example in examples:
        key, answer = input_key(example), answer_key(example)
        if first.setdefault(key, answer) != answer:
            differ.add(key)
    return len(differ)


def _joined(parts: Iterable[str]) -> str:
    """One text of several that no others give; what stands between them is no word, so that `near_key` can read it."""
    return "\x1f\x1e".join(part.replace("\x1f", "\x1f\x1f") for part in parts)


def _class(value: Any) -> str:
    name = class_name(value)
    return _canonical(value) if name is None else name.strip()


def _bare(value: Any) -> Any:
    if isinstance(value, list):
        return [_stripped(item) if isinstance(item, dict) else item for item in value]
    return value.strip() if isinstance(value, str) else value


def _stripped(turn: dict[str, Any]) -> dict[str, Any]:
    return {key: value.strip() if isinstance(value, str) else value for key, value in turn.items()}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
