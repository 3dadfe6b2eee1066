"""Whether a generated answer is the reference's: as text, or as the number that a worked solution ends with.

`number` follows the harness of PEFT's method comparison on MetaMathQA and GSM8K: what stands behind the last
announcement of an answer, up to the end of its line, compared as a number where it is one.
"""

from decimal import Decimal, DecimalException
from typing import Literal

AnswerKind = Literal["text", "number"]

ANNOUNCED = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
"""In order: the first of these that a text holds is the one that counts, at its last place."""


def is_right(text: str, reference: str, kind: AnswerKind = "text") -> bool:
    """`text`: equal but for outer white space. `number`: the same final answer; a text that announces none is wrong."""
    if kind == "text":
        return text.strip() == reference.strip()
    found, wanted = final_answer(text), final_answer(reference)
    if found is None or wanted is None:
        return False
    a, b = as_number(found), as_number(wanted)
    return found == wanted if a is None and b is None else a == b


def final_answer(text: str) -> str | None:
    """What stands behind the last announcement, without closing marks, currency and percent signs; None without one."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in ANNOUNCED if mark in text), None)
    if mark is None:
        return None
    line = text.rpartition(mark)[2].strip().split("\n", 1)[0]
    return line.strip(" .!?$%")


def as_number(text: str) -> float | None:
    """A decimal number or a fraction a/b; None for anything else (a thousands separator too)."""
    above, *below = text.split("/")
    try:
        value = Decimal(above.strip())
        for part in below:
            value /= Decimal(part.strip())
    except DecimalException:
        return None
    return float(value) if len(below) < 2 and value.is_finite() else None
