"""Class weights in the training loss: sum of w·l over sum of w, both over the whole global batch.

The weights stand beside the labels in the training split, as the column `weight`, and the units of a sequence are the
sum of its weights: the loop divides by the units of the global batch, so no way of cutting it changes the mean
(trap 1). Evaluation knows no weights: its loss and its metrics are over rows as they are.
"""

import dataclasses
import difflib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.encoding import EncodedSet
from ..data.labels import Labels
from ..errors import ConfigError

IGNORED = -100
LABEL, TAG, WEIGHT = "label", "tag", "weight"


def weighted(data: EncodedSet, labels: Labels, setting: Any, shares: np.ndarray) -> EncodedSet:
    """The split with the column `weight`, float32, and units to match, float64.

    Args:
        data: class ids are in its column `label`, (sequences,), or `tag`, (total_tokens,), where -100 is no tag.
        setting: `balanced`, or weights by class name.
        shares: how often each sequence is seen in an epoch, float64 (sequences,).
    """
    if labels.kind not in ("single", "tags"):
        raise ConfigError(
            f"data.class_weights: the labels are of type {labels.kind}, where no row has one class.",
            "Set it to none.",
        )
    per_token = TAG in data.columns
    ids = data.columns[TAG if per_token else LABEL]
    often = np.repeat(shares, data.lengths) if per_token else shares
    real = ids != IGNORED
    counts = np.bincount(ids[real].astype(np.int64), often[real], len(labels.names))
    weights = class_weights(labels.names, counts, setting)
    column = np.where(real, weights[np.where(real, ids, 0)], 0.0).astype(np.float32)
    exact = column.astype(np.float64)  # what the loss multiplies by, so that numerator and denominator agree
    units = np.add.reduceat(exact, data.offsets[:-1]) if per_token else exact
    return dataclasses.replace(data, units=units, columns={**data.columns, WEIGHT: column})


def class_weights(names: list[str], counts: np.ndarray, setting: Any) -> np.ndarray:
    """One weight per class, float64 (classes,).

    `balanced` is rows / (classes that occur · rows of the class), as scikit-learn has it: mean 1 over the rows. Given
    by name, classes that are not named weigh 1.

    Args:
        counts: how often each class is seen in an epoch, (classes,).

    Raises:
        ConfigError: a name that is none of the classes.
    """
    if setting == "balanced":
        there = counts > 0
        return np.where(there, counts.sum() / (there.sum() * np.where(there, counts, 1)), 1.0)
    for name in setting:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            listed = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise ConfigError(
                f"data.class_weights: got the class {name!r}, which the data does not have; it has {listed}.",
                f"Did you mean {near[0]!r}?" if near else "Name one of these.",
            )
    return np.array([setting.get(name, 1.0) for name in names])


def weights_by_class(data: EncodedSet, labels: Labels | None) -> dict[str, float] | None:
    """The weight of each class that the training split shows; None where classes are not weighted."""
    if labels is None or WEIGHT not in data.columns:
        return None
    ids = data.columns[TAG if TAG in data.columns else LABEL].astype(np.int64)
    shown, first = np.unique(ids, return_index=True)
    pairs = zip(shown.tolist(), data.columns[WEIGHT][first].tolist(), strict=True)
    return {labels.names[i]: weight for i, weight in pairs if i != IGNORED}


def add_weights(batch: dict[str, Tensor], data: EncodedSet, rows: np.ndarray) -> None:
    """Put the weights of `rows` beside their labels or (rows, length) tags; nothing where classes are not weighted."""
    if WEIGHT not in data.columns:
        return
    if TAG not in batch:
        batch[WEIGHT] = torch.from_numpy(data.columns[WEIGHT][rows])
        return
    filled = np.zeros(tuple(batch[TAG].shape), dtype=np.float32)
    for line, row in enumerate(rows):
        own = data.token_column(WEIGHT, int(row))
        filled[line, : len(own)] = own
    batch[WEIGHT] = torch.from_numpy(filled)


def class_loss(logits: Tensor, label: Tensor, kind: str, weight: Tensor | None = None) -> Tensor:
    """Sum over rows, fp32 scalar: cross-entropy of one class, times its weight; mean over classes of the binary
    cross-entropy of several; squared error of a number.

    Args:
        logits: (rows, classes), or (rows, 1) for a number.
        kind: of the labels: single, multi or regression.
    """
    if kind == "single":
        return weighted_cross_entropy(logits, label, weight)
    logits = logits.float()
    if kind == "multi":
        return F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(-1).sum()
    return F.mse_loss(logits.squeeze(-1), label, reduction="sum")


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
    """Sum of w·(-log p(label)), fp32 scalar; -100 is no label.

    Args:
        logits: (..., classes).
        label: int64 (...,).
        weight: float32 (...,), or None for 1 everywhere.
    """
    logits, label = logits.float().flatten(0, -2), label.flatten()
    if weight is None:
        return F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="sum")
    return (F.cross_entropy(logits, label, ignore_index=IGNORED, reduction="none") * weight.flatten()).sum()
