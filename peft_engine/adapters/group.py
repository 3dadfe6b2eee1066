"""A group: members that train over one backbone. A single run is a group of one.

With LoRA each member is an adapter of its own on the shared frozen backbone. Methods that train the backbone's own
tensors (`full`, `head`, `bitfit`) hold one member.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbone import LINEAR_TYPES, Backbone
from ..runtime import seed_everything
from .fusing import FuseReport, RowSeeds


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

    `initial` holds the start of A and B where the method moved their product out of the frozen weight (PiSSA, OLoRA).
    """

    spec: MemberSpec
    tensors: dict[str, nn.Parameter]
    initial: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Group:
    """Members over one backbone.

    Attributes:
        model: what is called in forward: a PeftModel for lora, else the backbone's model.
        method: of `adapter.method`.
        fused: what `fuse` did to the model; None with `kernels: off`.
        rows: names the samples of a batch to the fused model's dropout.
    """

    backbone: Backbone
    model: nn.Module
    method: str
    members: list[Member]
    fused: FuseReport | None = None
    rows: RowSeeds | None = None
    _active: str | None = None

    def activate(self, member: Member) -> None:
        """Let forward run with this member's adapter, and its tensors only require gradients."""
        if isinstance(self.model, PeftModel) and self._active != member.spec.name:
            self.model.set_adapter(member.spec.name)
            self._active = member.spec.name

    def train(self, mode: bool = True) -> None:
        """Put the model into training mode. Batch norms keep their pretrained statistics, under every method: what they
        made of a batch would depend on how a step is cut into micro-batches, and they would drift without a gradient.
        """
        self.model.train(mode)
        for module in self.batch_norms():
            module.eval()

    def batch_norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, _BatchNorm)]

    def decisions(self) -> dict[str, str]:
        """What was chosen without being asked for, for run.json."""
        frozen = len(self.batch_norms())
        told = {"batch_norm": f"frozen statistics in {frozen} layers"} if frozen else {}
        return {**self.backbone.decisions, **told}

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
        own = {id(t) for t in member.tensors.values()}
        others = {id(t) for m in self.members for t in m.tensors.values()} - own
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in others)
        return sum(t.numel() for t in member.tensors.values()), total


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
