"""What a model made of every single row, beside the metrics of the whole: for statistics over test rows."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..data.encoding import EncodedSet
from ..data.labels import NOT_LEARNED
from ..errors import ConfigError
from .base import Batch, Task
from .causal_lm import IGNORED, CausalLM
from .class_metrics import decide
from .image_classification import ImageClassification
from .multiple_choice import MultipleChoice
from .seq2seq import Seq2Seq
from .text_classification import TextClassification
from .token_classification import TokenClassification

ItemKind = Literal["classes", "values", "tokens", "tags"]
COLUMNS: dict[ItemKind, tuple[str, ...]] = {
    "classes": ("label", "predicted", "loss", "units"),
    "values": ("label", "predicted", "loss", "units"),
    "tags": ("label", "predicted", "loss", "units"),
    "tokens": ("loss", "units", "right", "bytes"),
}


def item_kind(task: Task) -> ItemKind:
    """`classes` are ids (several labels: 0 or 1 per class), `values` numbers, `tags` lists of ids, `tokens` sums.

    Raises:
        ConfigError: a task that is not judged row by row.
    """
    if isinstance(task, CausalLM | Seq2Seq):
        return "tokens"
    if isinstance(task, TokenClassification):
        return "tags"
    if isinstance(task, MultipleChoice):
        return "classes"
    if isinstance(task, TextClassification | ImageClassification):
        return "values" if task.labels.kind == "regression" else "classes"
    raise ConfigError(f"task: {type(task).__name__} is not judged row by row.", "Take another task.")


def outcomes(task: Task, logits: Tensor, batch: Batch, data: EncodedSet, rows: np.ndarray) -> list[dict[str, Any]]:
    """Per sequence of a batch the columns of its kind: `loss` is its summed loss by the task's own, `units` what that
    is to be divided by, `right` tokens predicted rightly given the right ones before them, `bytes` of supervised text.
    """
    kind = item_kind(task)
    found: list[dict[str, Any]] = [
        {"loss": float(task.loss(logits[i : i + 1], _one(batch, i, len(rows)))), "units": 1} for i in range(len(rows))
    ]
    if kind == "tokens":
        is_causal = isinstance(task, CausalLM)
        chosen, wanted = logits.argmax(-1), batch["labels"]
        if is_causal:  # position t predicts token t+1
            chosen, wanted = chosen[:, :-1], wanted[:, 1:]
        columns = {
            "units": (wanted != IGNORED).sum(-1).tolist(),
            "right": (chosen == wanted).sum(-1).tolist(),
            "bytes": [_text_bytes(data, int(row)) if is_causal else None for row in rows],
        }
    elif kind == "tags":
        tags, best = batch["tag"].cpu().numpy(), logits.argmax(-1).cpu().numpy()
        learned = tags != NOT_LEARNED
        columns = {
            "label": [line[mask].tolist() for line, mask in zip(tags, learned, strict=True)],
            "predicted": [line[mask].tolist() for line, mask in zip(best, learned, strict=True)],
            "units": learned.sum(-1).tolist(),
        }
    else:
        labels: Any = task.labels  # type: ignore[attr-defined]
        decided = logits.argmax(-1) if labels.kind == "choice" else decide(logits, labels.kind)
        label = batch["label"].long() if labels.kind == "multi" else batch["label"]
        columns = {"label": label.tolist(), "predicted": decided.tolist()}
    for name, values in columns.items():
        for one, value in zip(found, values, strict=True):
            one[name] = value
    return found


def judged(task: Task, logits: Tensor, batch: Batch) -> Tensor:
    """Logits of the places that a batch is judged by, (places, classes): supervised tokens, tagged words, rows. Each of
    several labels of a row is a place with two classes; numbers have one."""
    kind = item_kind(task)
    if kind == "tokens":
        wanted = batch["labels"]
        if isinstance(task, CausalLM):  # position t predicts token t+1
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        return logits[wanted != IGNORED]
    if kind == "tags":
        return logits[batch["tag"] != NOT_LEARNED]
    labels: Any = task.labels  # type: ignore[attr-defined]
    if labels.kind == "multi":
        return torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1)
    return logits


def _one(batch: Batch, i: int, rows: int) -> Batch:
    """Row i of a batch, still a batch."""
    return {name: t[i : i + 1] if t.dim() and len(t) == rows else t for name, t in batch.items()}


def _text_bytes(data: EncodedSet, row: int) -> int:
    return int(data.token_column("text_bytes", row).sum())
