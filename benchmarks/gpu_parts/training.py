"""What `step` and `encoder` share: a model of random weights with adapters, its training step, the check of both ways.

One model serves both sides: PEFT's forward, then `fuse(model)`, then `unfuse(model)`, in turns, on the same weights.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_engine.adapters.fusing import fuse, unfuse

from .bench import Bench, Check, Prepared, Run, relative_error

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the datasheets


@dataclass
class Subject:
    """A model in training, and one batch for it.

    Attributes:
        autocast: compute in bf16 around wider tensors, as HF's Trainer does with bf16=True.
        flops: of one step, recomputation not counted.
        drops: whether anything draws dropout masks in training.
        frozen_compute: the format of frozen weights where the model is fused.
    """

    bench: Bench
    model: nn.Module
    batch: dict[str, Tensor]
    autocast: bool
    flops: float
    drops: bool
    frozen_compute: str = "full"
    report: Any = None
    is_fused: bool = False

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=self.bench.device.type == "cuda")

    def be(self, fused: bool, then: Run | None = None) -> None:
        """Swap where needed, and take the first step after a swap, which fills caches."""
        if fused == self.is_fused:
            return
        if fused:
            options: Any = {} if self.frozen_compute == "full" else {"frozen_compute": self.frozen_compute}
            self.report = fuse(self.model, self.bench.backend, **options)
        else:
            unfuse(self.model)
        self.is_fused = fused
        if then:
            then(0)

    def told(self) -> str:
        """What was swapped, and what was not and why."""
        if self.report is None:
            return "never fused"
        skipped = sorted(set(self.report.skipped.values()))
        frozen = f", frozen linears: {self.report.told()}" if self.report.record or self.report.quantised else ""
        return f"backend {self.report.backend}, swapped {self.report.counts()}{frozen}, skipped {skipped or 'nothing'}"

    def region(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.bench.device.type, torch.bfloat16) if self.autocast else nullcontext()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with self.region():
            return model(**batch).loss

    def step(self, model: Callable[..., Any] | None = None) -> Run:
        def work(i: int) -> None:
            self.loss(model or self.model, self.batch).backward()  # type: ignore[arg-type]
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return work

    def tokens(self) -> int:
        return self.batch["input_ids"].numel()

    def rates(self, label: str, ms: float) -> dict[str, float]:
        found = {"tokens_per_s": self.tokens() / ms * 1e3, "of_matmul": self.flops / ms * 1e3}
        found["of_matmul"] /= self.bench.ceilings["flops_per_second"]
        card = self.bench.context["hardware"].get("gpu", "")
        for name, peak in PEAK_FLOPS.items():
            if name in card:
                found["mfu"] = self.flops / ms * 1e3 / peak
        return found


def adapted(model: PreTrainedModel, p: float, *, task: str, wide: bool) -> nn.Module:
    """LoRA r=16 on every linear, B drawn at random so that every gradient is alive. `wide`: fp32 adapters (default)."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=p, target_modules="all-linear", task_type=task, init_lora_weights=False
    )
    made = get_peft_model(model, config, autocast_adapter_dtype=wide)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return made.train()


def fused(subject: Subject, run: Run) -> Prepared:
    """`run` on the fused model."""
    return Prepared(run, lambda: subject.be(True, run))


def plain(subject: Subject, run: Run) -> Prepared:
    """`run` on the model as PEFT has it."""
    return Prepared(run, lambda: subject.be(False, run))


@contextmanager
def without_dropout(subject: Subject, model: nn.Module) -> Iterator[None]:
    """The two ways draw different masks; without masks they compute one function. Training mode where none is drawn."""
    model.train(not subject.drops)
    try:
        yield
    finally:
        model.train()


def loss_and_gradients(subject: Subject, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss, and the gradients of all A, of all B and of whatever else trains, each as one vector."""
    model.zero_grad(set_to_none=True)
    with without_dropout(subject, model):
        loss = subject.loss(model, batch)
        loss.backward()
    groups: dict[str, list[Tensor]] = {"lora_A": [], "lora_B": [], "other": []}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = next((kind for kind in ("lora_A", "lora_B") if kind in name), "other")
            groups[kind].append(parameter.grad.flatten().float())
    model.zero_grad(set_to_none=True)
    return [loss.detach().float(), *(torch.cat(group) for group in groups.values() if group)]


def same_training(subject: Subject, batch: dict[str, Tensor]) -> list[Check]:
    """Loss and gradients without dropout: fused no further from the float32 model than PEFT in the same dtype is."""
    subject.be(False)
    wide = copy.deepcopy(subject.model).float()
    autocast, subject.autocast = subject.autocast, False
    truth = loss_and_gradients(subject, wide, batch)
    subject.autocast = autocast
    del wide
    sides = []
    for ours in (False, True):
        subject.be(ours)
        sides.append(loss_and_gradients(subject, subject.model, batch))
    names = ["loss", "dA", "dB", "other"][: len(truth)]
    narrow = subject.autocast or subject.bench.dtype == torch.bfloat16
    eps = torch.finfo(torch.bfloat16 if narrow else torch.float32).eps
    errors = [[relative_error(got, t) for got, t in zip(side, truth, strict=True)] for side in sides]
    return [Check(names, errors[0], errors[1], eps)]
