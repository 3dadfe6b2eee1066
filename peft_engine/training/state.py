"""A member on its way through a run: weights, optimizer, data order, what it has seen."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.group import Member
from ..data.batching import BatchPlan
from .ema import Average

EARLIER = {"counted_value": "best_value"}  # what older checkpoints hold instead


@dataclass
class Trainee:
    """A member in training.

    Attributes:
        step: optimizer steps done.
        micro_batch_size: sequences at once on this process; falls on out-of-memory.
        average: of the weights, where it is to be used instead of them.
        window: sums since the last logged row: loss, units, tokens, seconds.
        step_seconds: wall seconds of each step that was not measured for memory, not the first.
        best: value, step and weights (where they are to be restored) of the best evaluation.
        counted_value: the last value that was better by more than early stopping's min_delta.
        waited: evaluations since then.
        stopped: early stopping ended it.
    """

    member: Member
    optimizer: torch.optim.Optimizer
    plan: BatchPlan
    micro_batch_size: int
    average: Average | None = None
    step: int = 0
    window: dict[str, float] = field(default_factory=lambda: {"loss": 0.0, "units": 0, "tokens": 0, "seconds": 0.0})
    step_seconds: list[float] = field(default_factory=list)
    timed_tokens: int = 0
    total_tokens: int = 0
    train_seconds: float = 0.0
    live_bytes: int | None = None
    best_value: float | None = None
    best_step: int | None = None
    best_tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    counted_value: float | None = None
    waited: int = 0
    stopped: bool = False
    updates: int = 0  # optimizer steps at a learning rate above 0
    skipped: int = 0  # fp16 steps in a row without a finite gradient
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    SAVED = (
        "step",
        "micro_batch_size",
        "window",
        "step_seconds",
        "timed_tokens",
        "total_tokens",
        "train_seconds",
        "live_bytes",
        "best_value",
        "best_step",
        "counted_value",
        "waited",
        "stopped",
        "updates",
        "skipped",
        "evaluations",
    )

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.SAVED}

    def restore(self, saved: dict[str, Any]) -> None:
        for name in self.SAVED:
            setattr(self, name, saved[name] if name in saved else saved[EARLIER[name]])
