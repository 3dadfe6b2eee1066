"""Rows of more than one text: sentence pairs, choices, tagged words, source and target."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from .messages import Empty, Malformed
from .parsing import Row, is_missing, shown

SENTENCE_PAIRS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("claim", "evidence"),
    ("query", "passage"),
)
TRANSLATIONS = (
    ("source", "target"),
    ("input", "target"),
    ("document", "summary"),
    ("text", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("question", "answer"),
)
WHOLE = re.compile(r"-?\d{1,18}", re.ASCII)
NOT_LEARNED = (None, -100)
"""Tags of words that are read but neither learned nor judged."""
PRINTED = re.compile(r"""\s*(\[['"].*['"]\]|\[[-+\d.\s]+\]|\{['"].*[\]})]\})\s*""", re.DOTALL)


def firsts(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The first column names of pairs of columns, each once."""
    return tuple(dict.fromkeys(pair[0] for pair in pairs))


def seconds(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The second column names, each once."""
    return tuple(dict.fromkeys(pair[1] for pair in pairs))


def pairs_in(columns: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of `pairs` whose columns are both there, by the columns' own names; a pair's case does not matter."""
    by_name: dict[str, str] = {}
    for column in columns:
        by_name.setdefault(str(column).strip().lower(), column)
    return [(by_name[one], by_name[two]) for one, two in pairs if one in by_name and two in by_name]


def is_choices(value: Any) -> bool:
    """Whether a cell holds several answers to choose from: a list of strings, or ARC's {"text": […], "label": […]}.

    A list that is printed so that it can't be read counts too: `choices_of` refuses it with its form.
    """
    return _choices_and_keys(value) is not None or is_printed(parsed(value))


def _choices_and_keys(value: Any) -> tuple[list[str], list[str]] | None:
    value = parsed(value)
    keys: Any = []
    if isinstance(value, dict) and "text" in value:
        value, keys = value["text"], value.get("label", [])
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        return None
    keys = [str(key) for key in keys] if isinstance(keys, list) else []
    return value, keys if len(keys) == len(value) else []


def choices_of(row: Row, column: str) -> tuple[list[str], list[str]]:
    """The answers of a row and their keys (A, B, …; none where the row names none).

    Raises:
        Empty: the cell or one of them is empty.
        Malformed: fewer than two, or something else than strings.
    """
    _refuse_empty(row, column)
    found = _choices_and_keys(row.get(column))
    if found is None:
        raise _no_list(row, column, "strings")
    if not found[0]:
        raise Empty(f"column {column!r} holds no choices")
    if len(found[0]) < 2:
        raise Malformed(f"column {column!r} holds {len(found[0])} choices, two or more were expected")
    if any(not choice.strip() for choice in found[0]):
        raise Empty(f"column {column!r} holds an empty choice")
    return found


def right_choice(label: Any, choices: list[str], keys: list[str]) -> int:
    """Place of the right answer, from 0.

    Args:
        label: one of `keys`, a number from 0 (where the keys are no numbers), a letter, or the answer's own text.

    Raises:
        Malformed: it names none of them, or two different ones.
    """
    readings: list[int] = []
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        numbered = any(WHOLE.fullmatch(key.strip()) for key in keys)
        readings = [i for i, key in enumerate(keys) if key.strip() == str(label)] if numbered else [label]
        readings += [i for i, choice in enumerate(choices) if choice.strip() == str(label)]
    elif isinstance(label, str):
        name = label.strip()
        readings = [i for i, choice in enumerate(choices) if choice.strip() == name]
        readings += [i for i, key in enumerate(keys) if key == name]
        if not keys and name.isascii() and name.isdigit() and int(name) < len(choices):
            readings.append(int(name))
        if not keys and not readings and len(name) == 1 and name.isascii() and name.isalpha():
            readings.append(ord(name.upper()) - ord("A"))
    if len(set(readings)) > 1:
        raise Malformed(f"the label {label!r} may be choice {' or '.join(str(i) for i in sorted(set(readings)))}")
    if not readings or not 0 <= readings[0] < len(choices):
        known = f"0 to {len(choices) - 1}, A to {chr(ord('A') + len(choices) - 1)}"
        if keys:
            known = f"one of the row's own keys ({', '.join(keys)})"
        raise Malformed(
            f"the label is {shown(label)}; with {len(choices)} choices it is {known}, or a choice's own text"
        )
    return readings[0]


def words_of(row: Row, column: str) -> list[str]:
    """The words of a row: a list of strings, one written as JSON or as Python prints it, or a text split at blanks."""
    _refuse_empty(row, column)
    value = parsed(row.get(column))
    if isinstance(value, str) and not is_printed(value):
        value = value.split()
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise _no_list(row, column, "words")
    if not value:
        raise Empty(f"column {column!r} holds no word")
    blank = next((i for i, word in enumerate(value) if not word.strip()), None)
    if blank is not None:
        raise Malformed(f"word {blank + 1} in column {column!r} is {value[blank]!r}, that is blank")
    return value


def tags_of(row: Row, column: str, words: int) -> list[Any]:
    """The tags of a row's words, one each: names, or numbers; None or -100 for words that are not learned."""
    _refuse_empty(row, column)
    value = parsed(row.get(column))
    if isinstance(value, str) and not (value.strip()[:1] == "[" and value.strip()[-1:] == "]"):
        value = value.split()
    if not isinstance(value, list):
        raise _no_list(row, column, "tags")
    if not value:
        raise Empty(f"column {column!r} holds no tag")
    if len(value) != words:
        raise Malformed(f"{words} words have {len(value)} tags in column {column!r}")
    strange = next((tag for tag in value if not isinstance(tag, str | int | None) or isinstance(tag, bool)), None)
    if strange is not None:
        raise Malformed(f"a tag in column {column!r} is {strange!r}, a name or a whole number was expected")
    return [None if tag in NOT_LEARNED or tag == "" else tag for tag in value]


def parsed(value: Any) -> Any:
    """A cell; a list or object in a text (a CSV cell) is read, written as JSON or as Python prints it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            found = _python_literal(value)
        return found if isinstance(found, list | dict) else value
    return value


def is_printed(value: Any) -> bool:
    """Whether a text that `parsed` left alone looks like a printed list, such as numpy's, which has no commas."""
    return isinstance(value, str) and PRINTED.fullmatch(value) is not None


def _python_literal(text: str) -> Any:
    """What pandas writes of a list. None where printing it gives another text: numpy's `['a' 'b']` is not `['ab']`."""
    if text.strip()[-1:] not in ("]", "}"):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return found if "".join(repr(found).split()) == "".join(text.split()) else None


def _refuse_empty(row: Row, column: str) -> None:
    if column in row and is_missing(row[column]):
        raise Empty(f"column {column!r} is {row[column]!r}, that is empty")


def _no_list(row: Row, column: str, of: str) -> Malformed:
    told = "; it looks like a list that was printed: write it as JSON" if is_printed(parsed(row.get(column))) else ""
    return Malformed(f"column {column!r} is {shown(row.get(column))}, a list of {of} was expected{told}")
