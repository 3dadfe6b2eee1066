"""How far a model is from the one that was trained, on the same input (trap 12)."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .data.encoding import EncodedSet
from .errors import VerificationError
from .evaluation import visit_rows
from .generation import matched
from .runtime import Runtime
from .tasks.base import Batch, Task
from .tasks.items import item_kind, judged

ROWS = 256
"""Rows that a merged model is compared on at most, spread evenly over the split."""
MAX_KL = 0.05
"""Bound of the mean KL(trained ‖ merged), in nats per token, word or row."""
MIN_TOP1 = 0.9
"""Bound of the share of places where both choose the same token, tag or class."""
MAX_RELATIVE = 0.1
"""Of regression, which has neither: bound of the largest difference over the largest output."""
CHUNK = 512  # places that are compared at once: probabilities over a vocabulary are large
UNITS = {"tokens": "token", "tags": "word", "classes": "row", "values": "row"}


@dataclass(frozen=True)
class HeldOut:
    """How far a merged model is from the trained one on rows of the run's data.

    Attributes:
        split: of the run, that the rows are from: test, else eval, else train. "probe" is none of them but seeded
            random input, where the run's rows can't be read; `note` says why.
        rows: of them.
        places: supervised tokens, tagged words, or rows that were compared.
        unit: what a place is.
        relative: largest |difference| of logits over largest |logit|.
        kl: mean KL(trained ‖ merged), nats per place; None for regression.
        top1_agreement: share of places with the same choice; None for regression.
        bounds: by the name of what they bound.
    """

    split: str
    rows: int
    places: int
    unit: str
    relative: float
    kl: float | None
    top1_agreement: float | None
    bounds: dict[str, float]
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For merge.json and --json."""
        return asdict(self)

    def told(self) -> str:
        """A line for people."""
        where = "seeded random input" if self.split == "probe" else f"{self.rows} {self.split} rows"
        if self.kl is None:
            found = f"largest difference {self.relative:.1e} of the largest output (bound {self.bounds['relative']:g})"
        else:
            found = (
                f"KL {self.kl:.1e} nats per {self.unit} (bound {self.bounds['kl']:g}), "
                f"top-1 agreement {self.top1_agreement:.1%} (bound {self.bounds['top1_agreement']:.0%})"
            )
        return f"{found} on {where}" + (f", because {self.note}" if self.note else "")

    def within(self) -> bool:
        """Whether all figures are numbers within their bounds."""
        values = asdict(self)
        return all(_within(name, values[name], bound) for name, bound in self.bounds.items())

    def refuse(self, what: str = "merged model") -> None:
        """Raise VerificationError beyond a bound, or where a figure is not a number."""
        if not self.within():
            raise VerificationError(
                f"The {what} is not what was trained: {self.told()}.",
                "Use the adapter with this engine, on the weights that it was trained on, train it with "
                "model.frozen_compute: full (and quantization: none), or allow a merged model more with --max-kl.",
            )


@dataclass(frozen=True)
class Drift:
    """How far the reloaded model is from the trained one, on the same input.

    Attributes:
        relative: largest |difference| of logits over largest |logit|.
        kl: mean KL(trained ‖ reloaded) in nats (classes or next tokens; 0 for regression).
        top1_agreement: share of positions with the same best class or token.
        held_out: of a merged model, against what was trained, on rows of the run's data.
        base: weights that the adapter was folded into: "full precision" or "dequantised".
        bases: `held_out` on each of them, where both were tried.
    """

    relative: float
    kl: float
    top1_agreement: float
    held_out: HeldOut | None = None
    base: str = "full precision"
    bases: dict[str, HeldOut] = field(default_factory=dict)


class Gap:
    """Adds up the distance of two sets of logits. What is -inf in the trained ones (choices that a row does not have)
    takes part in nothing; whatever is not a number makes the figures so."""

    def __init__(self) -> None:
        self.places = self.same = 0
        self.nats = 0.0
        self.difference = self.largest = torch.zeros(())

    def update(self, trained: Tensor, found: Tensor) -> None:
        """Add (n, classes) logits of both models. Nothing changes where memory runs out."""
        same, nats = 0, 0.0
        difference, largest = self.difference, self.largest
        for p, q in zip(trained.split(CHUNK), found.split(CHUNK), strict=True):
            p, q = p.float(), q.float()
            nothing = p == -torch.inf
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            by_place = (log_p.exp() * (log_p - log_q)).masked_fill(nothing, 0).sum(-1)
            nats += float(by_place.cpu().double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            apart = (p - q).masked_fill(nothing, 0).abs()
            if apart.numel():
                difference = torch.maximum(difference, apart.max().cpu())
                largest = torch.maximum(largest, p.masked_fill(nothing, 0).abs().max().cpu())
        self.places, self.same, self.nats = self.places + len(trained), self.same + same, self.nats + nats
        self.difference, self.largest = difference, largest

    def compute(self) -> Drift:
        """The figures over all places. `held_out` is for whoever knows the rows."""
        assert self.places, "nothing was compared"
        relative = float(self.difference / self.largest.clamp_min(1e-12))
        kl = self.nats / self.places
        return Drift(relative, 0.0 if kl < 0 else kl, self.same / self.places)  # below 0 by rounding; NaN stays


def compare(
    trained: nn.Module,
    merged: nn.Module,
    task: Task,
    data: EncodedSet,
    split: str,
    batch_size: int,
    runtime: Runtime,
    max_kl: float = MAX_KL,
) -> HeldOut:
    """Both models, in eval mode, on `ROWS` rows of a split. Logits are not kept (trap 23).

    Args:
        merged: as the task's `plain` loads it.
        split: what `data` is, for the record.
    """
    gap = Gap()
    rows = np.unique(np.linspace(0, len(data) - 1, min(ROWS, len(data))).round().astype(np.int64))
    longest_first = rows[np.argsort(-data.lengths[rows], kind="stable")]
    region = runtime.accelerator.autocast if runtime.precision != "fp32" else lambda: matched(merged)

    def use(wanted: Tensor, batch: Batch, _: np.ndarray) -> None:
        with torch.no_grad(), region():
            found = task.plain_logits(merged, batch)
        gap.update(judged(task, wanted, batch), judged(task, found, batch))

    visit_rows(trained, task, data, batch_size, runtime, use, longest_first)
    return held_out(gap.compute(), task, split, len(rows), gap.places, max_kl)


def held_out(
    drift: Drift, task: Task, split: str, rows: int, places: int, max_kl: float, note: str | None = None
) -> HeldOut:
    """What was found on a split, with the bounds that hold for this task."""
    kind = item_kind(task)
    unit = "label" if getattr(getattr(task, "labels", None), "kind", None) == "multi" else UNITS[kind]
    if kind == "values":
        bounds = {"relative": MAX_RELATIVE}
        return HeldOut(split, rows, places, unit, drift.relative, None, None, bounds, note)
    bounds = {"kl": max_kl, "top1_agreement": MIN_TOP1}
    return HeldOut(split, rows, places, unit, drift.relative, drift.kl, drift.top1_agreement, bounds, note)


def judge_batches(trained: Tensor, found: Tensor) -> Drift:
    """The distance of two models' logits (…, classes) on one batch; padding is left in."""
    gap = Gap()
    gap.update(trained.flatten(0, -2), found.flatten(0, -2))
    return gap.compute()


def _within(name: str, value: float, bound: float) -> bool:
    """False for what is not a number."""
    return value >= bound if name == "top1_agreement" else value <= bound
