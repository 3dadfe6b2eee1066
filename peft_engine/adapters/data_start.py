"""Starts of LoRA that are computed from training batches: EVA (Paischer et al. 2024) and LoRA-GA (Wang et al. 2024).

peft computes both; here are the engine's own batches, whole and in the order in which training begins, so that the
result depends neither on micro-batches nor on the number of processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.eva import initialize_lora_eva_weights, prepare_model_inputs_fn_language_modeling
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from ..backbone import LINEAR_TYPES, Backbone
from ..errors import ConfigError
from ..runtime import seed_everything
from .group import MemberSpec, initialise

GRADIENT_BATCHES = 8
"""Batches over which LoRA-GA averages the gradient."""
EVA_BATCHES = 1000
"""After so many batches EVA gives up."""


@dataclass(frozen=True)
class DataStart:
    """What a start from data needs of the run.

    Attributes:
        batches: seed → the training batches in the order of that member, on the device, each with its units, without
            an end.
        forward: (model, batch) → logits.
        loss: (model, batch) → summed loss of the batch, a scalar.
    """

    batches: Callable[[int], Iterator[tuple[dict[str, Tensor], int]]]
    forward: Callable[[nn.Module, dict[str, Tensor]], Any]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]


class _Limited:
    """Batches from the first one at every iteration; an error where they are too many in all."""

    def __init__(self, start: DataStart, seed: int) -> None:
        self.start, self.seed, self.seen = start, seed, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch, _ in self.start.batches(self.seed):
            if self.seen == EVA_BATCHES:
                raise ConfigError(
                    f"adapter.init: eva has not converged after {EVA_BATCHES} batches.",
                    "Lower adapter.rank, or options: {eva_config: {tau: 0.9}}, or raise training.batch_size.",
                )
            self.seen += 1
            yield batch


def start_eva(model: PeftModel, backbone: Backbone, targets: list[str], start: DataStart, spec: MemberSpec) -> None:
    """Set A to the principal directions of each module's inputs, and share the ranks out by what they explain."""
    other = [name for name in targets if not isinstance(_base(model, name), LINEAR_TYPES)]
    if other or backbone.peft_task == "SEQ_2_SEQ_LM":
        what = f"{other[0]}, a {type(_base(model, other[0])).__name__}" if other else "models with two stacks"
        raise ConfigError(
            f"adapter.init: eva reads the inputs of linears under one mask; it can't start {what}.",
            "Use init: default, or other targets.",
        )
    seed_everything(spec.seed, 2)
    try:
        initialize_lora_eva_weights(
            model,
            _Limited(start, spec.seed),
            forward_fn=start.forward,
            prepare_model_inputs_fn=_mask,
            prepare_layer_inputs_fn=_rows,
            adapter_name=spec.name,
            gather_distributed_inputs=False,  # every process reads the same batches
            show_progress_bar=False,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"adapter.init: peft can't start eva: {error}", "Use another init.") from error


def start_lora_ga(backbone: Backbone, settings: LoraConfig, start: DataStart, spec: MemberSpec) -> None:
    """Leave on every target the mean gradient of its weight, from which peft makes A and B when it injects them."""
    model = backbone.model
    std = getattr(model.config, "initializer_range", 0.02)
    for name in backbone.new_modules:  # as it will be when training begins
        initialise(model.get_submodule(name), std, spec.seed)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    seed_everything(spec.seed, 2)

    def run() -> None:
        for batch, units in islice(start.batches(spec.seed), GRADIENT_BATCHES):
            (start.loss(model, batch) / units).backward()  # type: ignore[no-untyped-call]

    try:
        preprocess_loraga(model, settings, run)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter.init: peft can't start lora-ga: {error}", "Use another init.") from error
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _base(model: PeftModel, name: str) -> nn.Module:
    module: Any = model.get_base_model().get_submodule(name)
    base: nn.Module = module.get_base_layer()
    return base


def _mask(batch: dict[str, Tensor], settings: LoraConfig) -> Tensor | None:
    """Which positions count: peft's rule for texts (real, and supervised), (n, 2); None for images."""
    if "input_ids" not in batch:
        return None
    found: Tensor = prepare_model_inputs_fn_language_modeling(batch, settings)
    return found


def _rows(given: Any, positions: Tensor | None, name: str) -> Tensor:
    """Inputs of a module as rows: (n, in)."""
    x: Tensor = given if isinstance(given, Tensor) else given[0]
    if positions is None or x.dim() != 3:  # a pooler sees one position of each text
        return x.reshape(-1, x.shape[-1])
    return x[positions.T.unbind()]
