"""Metrics of classification and regression, by scikit-learn and scipy. Only predictions and labels are kept."""

from typing import Any, Protocol

import numpy as np
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor

from ..data.labels import Labels


class _Scored(Protocol):
    labels: Labels

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor: ...


class ClassMeter:
    """Single label: accuracy, precision, recall, F1 (macro, micro, per class), MCC, confusion matrix.
    Several labels: subset accuracy, F1s. Regression: Pearson, Spearman, mean squared and absolute error. Always loss.
    """

    def __init__(self, task: _Scored) -> None:
        self.task = task
        self.loss = 0.0
        self.predicted: list[np.ndarray] = []
        self.wanted: list[np.ndarray] = []

    def update(self, logits: Tensor, batch: dict[str, Tensor]) -> None:
        loss, predicted = float(self.task.loss(logits, batch)), decide(logits, self.task.labels.kind).cpu().numpy()
        self.loss += loss
        self.predicted.append(predicted)
        self.wanted.append(batch["label"].cpu().numpy())

    def compute(self) -> dict[str, Any]:
        predicted, wanted = np.concatenate(self.predicted), np.concatenate(self.wanted)
        result: dict[str, Any] = {"loss": self.loss / len(wanted), "rows": len(wanted)}
        if self.task.labels.kind == "regression":
            return result | _regression(predicted, wanted)
        return result | _classes(predicted, wanted, self.task.labels)


def decide(logits: Tensor, kind: str) -> Tensor:
    """(rows, classes) → class ids (rows,), 0/1 per class (rows, classes), or values (rows,)."""
    logits = logits.detach().float()
    if kind == "single":
        return logits.argmax(-1)
    return (logits > 0).long() if kind == "multi" else logits.squeeze(-1)


def probabilities(logits: Tensor, kind: str) -> Tensor:
    """(rows, classes) of probabilities; classes exclude one another only for "single"."""
    logits = logits.detach().float()
    return torch.softmax(logits, -1) if kind == "single" else torch.sigmoid(logits)


def predictions(logits: Tensor, labels: Labels) -> list[dict[str, Any]]:
    """Per row `predicted`: a class name, a list of them, or a number; with classes also `probabilities` by name."""
    decided, shares = decide(logits, labels.kind).cpu().tolist(), probabilities(logits, labels.kind).cpu().tolist()
    if labels.kind == "regression":
        return [{"predicted": value} for value in decided]
    found = []
    for choice, share in zip(decided, shares, strict=True):
        on = [name for name, hot in zip(labels.names, choice, strict=True) if hot] if labels.kind == "multi" else None
        label = labels.names[choice] if on is None else on
        found.append({"predicted": label, "probabilities": dict(zip(labels.names, share, strict=True))})
    return found


def _classes(predicted: np.ndarray, wanted: np.ndarray, labels: Labels) -> dict[str, Any]:
    ids = list(range(len(labels.names)))
    result: dict[str, Any] = {"accuracy": float(metrics.accuracy_score(wanted, predicted))}
    for average in ("macro", "micro"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            wanted, predicted, labels=ids, average=average, zero_division=0
        )
        result |= {
            f"precision_{average}": float(precision),
            f"recall_{average}": float(recall),
            f"f1_{average}": float(f1),
        }
    each = metrics.precision_recall_fscore_support(wanted, predicted, labels=ids, average=None, zero_division=0)
    result["per_class"] = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
        for name, p, r, f, n in zip(labels.names, *each, strict=True)
    }
    if labels.kind == "single":
        result["mcc"] = float(metrics.matthews_corrcoef(wanted, predicted))
        result["confusion"] = metrics.confusion_matrix(wanted, predicted, labels=ids).tolist()
    return result


def _regression(predicted: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    varied = len(wanted) > 1 and np.ptp(predicted) > 0 and np.ptp(wanted) > 0
    return {
        "pearson": float(stats.pearsonr(predicted, wanted).statistic) if varied else 0.0,
        "spearman": float(stats.spearmanr(predicted, wanted).statistic) if varied else 0.0,
        "mean_squared_error": float(metrics.mean_squared_error(wanted, predicted)),
        "mean_absolute_error": float(metrics.mean_absolute_error(wanted, predicted)),
    }
