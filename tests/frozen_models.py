"""Small models whose frozen linears are codes, and how far two tensors are apart."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_engine.adapters.fusing import FuseReport, fuse

# how far logits and gradients of these tiny random models go off, in relative norm: an int8 row of 32 numbers errs by
# about a hundredth, and errors add up over two layers
NEAR = {"int8": 0.08, "bf16": 0.03}


def calibrated(model: Any, batch: dict[str, Tensor], format: str = "int8", **settings: Any) -> FuseReport:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return fuse(model, "auto", format, calibrate=lambda: model(**inputs), frozen_error_bound=1.0, **settings)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12))
