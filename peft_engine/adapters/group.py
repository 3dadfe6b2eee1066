"""A group: members that train over one backbone. A single run is a group of one.

With LoRA each member is an adapter of its own on the shared frozen backbone. Methods that train the backbone's own
tensors (`full`, `head`, `bitfit`) hold one member.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Embedding
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbone import LINEAR_TYPES, Backbone
from ..levers.activations import ActivationOffload
from ..quantised import count_of
from ..runtime import seed_everything
from .adalora import RankAllocation
from .fusing import FuseReport, RowSeeds
from .fusing.linears import FusedLoraLinear
from .neftune import Neftune


@dataclass(frozen=True)
class MemberSpec:
    """What tells one member from the next; everything else is the run's config.

    Args:
        name: also peft's adapter name.
        seed: of its initialisation, data order and dropout.
        learning_rate: peak learning rate.
    """

    name: str
    seed: int
    learning_rate: float


@dataclass
class Member:
    """A member's trainable tensors, by names that do not hold the member's own name.

    `initial` holds the start of A and B where the method moved their product out of the frozen weight (PiSSA, OLoRA,
    LoRA-GA). `kept` holds the method's tensors that `training.trainable` and `training.frozen` take out of training;
    they are saved with the others. `allocation` is AdaLoRA's.
    """

    spec: MemberSpec
    tensors: dict[str, nn.Parameter]
    initial: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, nn.Parameter] = field(default_factory=dict)
    allocation: RankAllocation | None = None

    def all_tensors(self) -> dict[str, nn.Parameter]:
        """All that the method adds or owns, trained or not: what an adapter file holds."""
        return {**self.tensors, **self.kept}


@dataclass
class Group:
    """Members over one backbone.

    Attributes:
        model: what is called in forward: a PeftModel for lora, else the backbone's model.
        method: of `adapter.method`.
        fused: what `fuse` did to the model; None with `kernels: off`.
        settings: what, beside shapes, decides what an adapter of our own computes; kept with its file.
        rows: names the samples of a batch to the fused model's dropout.
        noise: on the input embeddings in training, None without NEFTune.
        offload: where saved tensors go between forward and backward, None where they stay.
        started_from: what `adapter.start_from` gave, for the record.
    """

    backbone: Backbone
    model: nn.Module
    method: str
    members: list[Member]
    fused: FuseReport | None = None
    rows: RowSeeds | None = None
    noise: Neftune | None = None
    offload: ActivationOffload | None = None
    started_from: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    _active: str | None = None

    def activate(self, member: Member) -> None:
        """Let forward run with this member's adapter, and its tensors only require gradients."""
        if isinstance(self.model, PeftModel) and self._active != member.spec.name:
            self.model.set_adapter(member.spec.name)
            self._active = member.spec.name
            for tensor in member.kept.values():  # peft lets all of an active adapter train
                tensor.requires_grad_(False)

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode. Batch norms keep their pretrained statistics, under every method: what they
        made of a batch would depend on how a step is cut into micro-batches, and they would drift without a gradient.
        """
        self.model.train(mode)
        for module in self.batch_norms():
            module.eval()

    def batch_norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def saving(self) -> AbstractContextManager[None]:
        """Around a forward pass that a backward pass follows: what becomes of the tensors that it saves."""
        return nullcontext() if self.offload is None else self.offload.during()

    def begin(self, total_steps: int) -> None:
        """Before the first step of a run: methods with a schedule of their own hear how long it is."""
        for member in self.members:
            if member.allocation:
                member.allocation.begin(total_steps)

    def penalty(self) -> Tensor | None:
        """A term that the active member's method adds to the loss of a whole step, fp32 scalar; None for most."""
        found = next((m.allocation for m in self.members if m.allocation and m.spec.name == self._active), None)
        return found.penalty() if found else None

    def after_step(self, member: Member, step: int) -> None:
        """After an optimizer step, with its gradients still there."""
        if member.allocation:
            member.allocation.after_step(step)

    def decisions(self) -> dict[str, str]:
        """What was chosen without being asked for, for run.json."""
        frozen = len(self.batch_norms())
        told = {"batch_norm": f"frozen statistics in {frozen} layers"} if frozen else {}
        return {**self.backbone.decisions, **told}

    def own_dropout(self) -> list[str]:
        """Names of adapted layers whose dropout is drawn from the process's own stream, not by the rows' seeds: all but
        the fused ones, and LoRA's embeddings, where peft drops nothing.
        """
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, BaseTunerLayer)
            and not isinstance(module, FusedLoraLinear | Embedding)
            and _drops(cast(nn.Module, module))
        ]

    @contextmanager
    def evaluating(self, member: Member) -> Iterator[nn.Module]:
        """The model in eval mode with this member active; training mode is restored."""
        self.activate(member)
        was_training = self.model.training
        self.model.eval()
        try:
            yield self.model
        finally:
            self.train(was_training)

    def parameter_counts(self, member: Member) -> tuple[int, int]:
        """(trainable, total) parameters; other members' adapters are not counted."""
        own = {id(t) for t in member.all_tensors().values()}
        others = {id(t) for m in self.members for t in m.all_tensors().values()} - own
        total = sum(count_of(p) for p in self.model.parameters() if id(p) not in others)
        return sum(t.numel() for t in member.tensors.values()), total


def _drops(layer: nn.Module) -> bool:
    """Whether peft drops anything of an adapter here: by modules with a p, or by numbers (LoHa, LoKr)."""
    found = [getattr(part, "p", 0) for name, part in layer.named_modules() if "base_layer" not in name]
    for kind in ("rank_dropout", "module_dropout"):
        found += dict(getattr(layer, kind, {})).values()
    return any(isinstance(p, int | float) and p > 0 for p in found)


def plain_name(name: str, adapter: str) -> str:
    """A parameter's name without peft's adapter name: `….lora_A.NAME.weight` → `….lora_A.weight`."""
    if name.endswith(f".{adapter}"):
        return name[: -len(adapter) - 1]
    return name.replace(f".{adapter}.", ".")


def initialise(module: nn.Module, std: float, seed: int) -> None:
    """Start a new head from a seed as transformers does: normal weights, zero biases; other layers reset themselves."""
    seed_everything(seed, 1)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, LINEAR_TYPES):
                part.weight.normal_(0.0, std)
                if part.bias is not None:
                    part.bias.zero_()
            elif hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]
