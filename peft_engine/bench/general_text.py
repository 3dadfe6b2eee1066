"""The general text that forgetting is measured on: fixed windows that training knows nothing of."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..data.reading import read_rows
from ..errors import DataError
from .suite import GeneralText


def windows(settings: GeneralText, tokenizer: Any) -> np.ndarray:
    """The first windows of the text, its rows joined by newlines: token ids, int64 (rows, max_length).

    Raises:
        ConfigError, StorageError: the file isn't there, or can't be read. DataError: no column of text, or too little
            of it.
    """
    texts, wanted = [], settings.rows * settings.max_length
    ids: list[int] = []
    for text in texts_of(settings):
        texts.append(text)
        # tokenised in growing prefixes, so that a long file is not read to its end for a few windows
        if len(texts) % 256 == 0 and sum(map(len, texts)) > 3 * wanted:
            ids = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted:
                break
    else:
        ids = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < wanted:
        raise too_short(settings, f"{len(ids):,} tokens")
    return np.asarray(ids[:wanted], dtype=np.int64).reshape(settings.rows, settings.max_length)


def texts_of(settings: GeneralText) -> Iterator[str]:
    """The text of each row. Raises as `windows` does."""
    table = read_rows(settings.path)
    for number, row in enumerate(table.rows):
        yield _text(row, table.where(number))


def too_short(settings: GeneralText, held: str) -> DataError:
    """What is told of a text that holds less than its windows."""
    return DataError(
        f"general_text: {settings.path} has {held}, expected {settings.rows} windows of {settings.max_length}.",
        "Lower general_text.rows or general_text.max_length, or give more text.",
    )


def _text(row: dict[str, Any], where: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("tokens"), list):
        return " ".join(map(str, row["tokens"]))
    raise DataError(
        f"general_text: {where} has neither text nor tokens, but {', '.join(row)}.", "Give a file with a column text."
    )
