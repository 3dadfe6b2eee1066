"""Metrics of tagged words: by word with scikit-learn, by entity with seqeval where the tags mark entities."""

import re
from typing import Any, Protocol

import numpy as np
from sklearn import metrics
from torch import Tensor

from ..data.labels import NOT_LEARNED, Labels

ENTITY = re.compile(r"[BIESLU]-.+")
SEQEVAL = {"L": "E", "U": "S"}  # BILOU's names for what IOBES calls E and S, the only ones that seqeval's reader knows


class _Scored(Protocol):
    labels: Labels

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor: ...


def marks_entities(names: list[str]) -> bool:
    """Whether tags are IOB, IOBES or BILOU: O, and names such as B-PER."""
    return all(name == "O" or ENTITY.fullmatch(name) for name in names) and any(name != "O" for name in names)


class TagMeter:
    """accuracy, f1_macro and loss over words; with entity tags precision, recall and f1 over whole entities, micro and
    by type. `words_lost` were cut off with the row's end (or give no token) and are in no other number.
    """

    def __init__(self, task: _Scored) -> None:
        self.task = task
        self.loss = 0.0
        self.lost = 0
        self.predicted: list[np.ndarray] = []  # one array per row
        self.wanted: list[np.ndarray] = []

    def update(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        loss, predicted = float(self.task.loss(logits, batch)), logits.argmax(-1).cpu().numpy()
        wanted, first = batch["tag"].cpu().numpy(), batch["word"].cpu().numpy() >= 0
        words = int(batch["words"].sum())
        learned = wanted != NOT_LEARNED
        self.loss, self.lost = self.loss + loss, self.lost + words - int(first.sum())
        self.predicted += [row[mask] for row, mask in zip(predicted, learned, strict=True)]
        self.wanted += [row[mask] for row, mask in zip(wanted, learned, strict=True)]

    def compute(self) -> dict[str, Any]:
        names = self.task.labels.names
        predicted, wanted = np.concatenate(self.predicted), np.concatenate(self.wanted)
        each = metrics.precision_recall_fscore_support(
            wanted, predicted, labels=range(len(names)), average=None, zero_division=0
        )
        result: dict[str, Any] = {
            "loss": self.loss / len(wanted),
            "rows": len(self.wanted),
            "words": len(wanted),
            "words_lost": self.lost,
            "accuracy": float(metrics.accuracy_score(wanted, predicted)),
            "f1_macro": float(np.mean(each[2])),
        }
        if marks_entities(names):
            result |= entity_scores(
                [[names[i] for i in row] for row in self.wanted], [[names[i] for i in row] for row in self.predicted]
            )
        result["per_class"] = {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "words": int(n)}
            for name, p, r, f, n in zip(names, *each, strict=True)
        }
        return result


def entity_scores(wanted: list[list[str]], predicted: list[list[str]]) -> dict[str, Any]:
    """precision, recall and f1 of whole entities, micro-averaged, and `per_entity` type, as conlleval counts them."""
    from seqeval.metrics import classification_report

    tags = [[[SEQEVAL.get(tag[0], tag[0]) + tag[1:] for tag in row] for row in rows] for rows in (wanted, predicted)]
    if not any(tag != "O" for rows in tags for row in rows for tag in row):  # seqeval fails where there is no entity
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0, "entities": 0, "per_entity": {}}
    report = classification_report(*tags, output_dict=True, zero_division=0)

    def numbers(found: dict[str, Any], count: str) -> dict[str, Any]:
        named = {"precision": found["precision"], "recall": found["recall"], "f1": found["f1-score"]}
        return {name: float(value) for name, value in named.items()} | {count: int(found["support"])}

    types = {name: numbers(found, "entities") for name, found in report.items() if not name.endswith(" avg")}
    return numbers(report["micro avg"], "entities") | {"per_entity": types}
