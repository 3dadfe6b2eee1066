"""Which rows ask the same: keys of an example's input, and what they tell about splits.

The input is what the model is given: the text, the prompt, an image (by the digest of its pixels), or all turns of a
conversation that are not the assistant's.
Two rows with one input never stand on two sides of a split, whatever their answers (trap 26).
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from .formats import Example

WORDS = re.compile(r"\w+")


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
        return " ".join(example["tokens"])
    if "text_pair" in example:
        return f"{example['text'].strip()}\n{example['text_pair'].strip()}"
    if "choices" in example:
        return "\n".join([example["text"].strip(), *(choice.strip() for choice in example["choices"])])
    sides = [example.get("chosen"), example.get("rejected")]
    given: Any = next((example[part] for part in ("prompt", "source", "text") if part in example), _canonical(sides))
    if isinstance(given, str):
        return given.strip()
    return _canonical([[_stripped(turn) for turn in given], example.get("tools")])


def row_key(example: Example) -> str:
    """Input and answer; equal keys are rows that repeat each other."""
    answers = ("label", "completion", "messages", "tags", "target", "chosen", "rejected")
    return _canonical([input_key(example), *(example.get(part) for part in answers)])


def label_key(example: Example) -> str:
    """The label; "null" where there is none."""
    return _canonical(example.get("label"))


def near_key(key: str) -> str:
    """An input key without case, punctuation, spacing and Unicode form; equal ones are near duplicates."""
    return " ".join(WORDS.findall(unicodedata.normalize("NFKC", key).casefold())) or key


def repeated(examples: Iterable[Example]) -> int:
    """Rows that repeat an earlier one."""
    keys = [row_key(example) for example in examples]
    return len(keys) - len(set(keys))


def contradictory(examples: Iterable[Example]) -> int:
    """Inputs that stand there with more than one label."""
    label_of: dict[str, str] = {}
    differ: set[str] = set()
    for example in examples:
        answer = example.get("label", example.get("tags"))
        if answer is not None:
            key, label = input_key(example), _canonical(answer)
            if label_of.setdefault(key, label) != label:
                differ.add(key)
    return len(differ)


def _stripped(turn: dict[str, Any]) -> dict[str, Any]:
    return {key: value.strip() if isinstance(value, str) else value for key, value in turn.items()}


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
