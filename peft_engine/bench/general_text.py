"""Forgetting: the loss of a language model on general text, in fixed windows that training knows nothing of."""

from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.reading import read_rows
from ..errors import DataError
from ..runtime import Runtime
from ..tasks.base import to_device
from ..tasks.causal_lm import CausalLM
from .suite import GeneralText

UNIT = "nats per token"


def windows(settings: GeneralText, tokenizer: Any) -> np.ndarray:
    """The first windows of the text, its rows joined by newlines: token ids, int64 (rows, max_length).

    Raises:
        DataError: no column of text, or too little of it.
    """
    table = read_rows(settings.path)
    texts, wanted = [], settings.rows * settings.max_length
    ids: list[int] = []
    for number, row in enumerate(table.rows):
        texts.append(_text(row, table.where(number)))
        # tokenised in growing prefixes, so that a long file is not read to its end for a few windows
        if len(texts) % 256 == 0 and sum(map(len, texts)) > 3 * wanted:
            ids = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= wanted:
                break
    else:
        ids = tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < wanted:
        raise DataError(
            f"general_text: {settings.path} has {len(ids):,} tokens, expected {settings.rows} windows of "
            f"{settings.max_length}.",
            "Lower general_text.rows or general_text.max_length, or give more text.",
        )
    return np.asarray(ids[:wanted], dtype=np.int64).reshape(settings.rows, settings.max_length)


def mean_nats(model: nn.Module, task: CausalLM, ids: np.ndarray, size: int, runtime: Runtime) -> float:
    """Mean loss per predicted token (nats): in each window every token but the first. The model in eval mode."""
    total = 0.0
    for start in range(0, len(ids), size):
        part = torch.from_numpy(ids[start : start + size])
        batch = to_device({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}, runtime.device)
        with torch.no_grad(), runtime.accelerator.autocast():
            logits = task.forward(model, batch)
        total += float(task.loss(logits, batch))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def _text(row: dict[str, Any], where: str) -> str:
    if isinstance(row.get("text"), str):
        return str(row["text"])
    if isinstance(row.get("tokens"), list):
        return " ".join(map(str, row["tokens"]))
    raise DataError(
        f"general_text: {where} has neither text nor tokens, but {', '.join(row)}.", "Give a file with a column text."
    )
