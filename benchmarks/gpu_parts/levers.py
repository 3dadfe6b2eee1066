"""Part `levers`: what each memory lever costs and saves on a whole step of a fused Llama, LoRA r=16 on all linears.

Every lever has a model of its own beside the plain one, with the same weights; its loss and gradients must be the plain
one's. `held` is what a side has on the card between steps (weights, buffers, optimizer), `peak_bytes` what a step takes
above that.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peft_engine.adapters.fusing import fuse
from peft_engine.adapters.sharding import blocks
from peft_engine.levers.activations import ActivationOffload
from peft_engine.levers.checkpointing import checkpoint_layers
from peft_engine.levers.in_backward import StepInBackward
from peft_engine.levers.lane import CudaLane, Lane
from peft_engine.levers.layers import StreamedLayers
from peft_engine.meters.memory import storage_bytes
from peft_engine.quantised import weights_of

from .bench import Bench, Check, Run, relative_error
from .step import LARGE, SMALL, TINY, Shape, llama, step_flops
from .training import Subject, adapted, loss_and_gradients

LEVERS = (
    "all layers checkpointed",
    "every second layer checkpointed",
    "activations on the host",
    "layers on the host",
    "optimizer in backward",
    "all three",
)


class DirectLane:
    """For --smoke, where there is no card: copies are done when they are asked for."""

    def host(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source.detach())

    def wait(self, ticket: None) -> None:
        pass


def run(bench: Bench) -> None:
    for shape in bench.small((SMALL, LARGE), (TINY,)):
        for lever in LEVERS:
            bench.room(0 if bench.smoke else 60)
            lever_cell(bench, shape, lever)


class Leveraged(Subject):
    """A fused model in training with a lever."""

    lever = ""

    def pull(self, lever: str) -> None:
        self.lever = lever
        lane: Lane = DirectLane() if self.bench.smoke else CudaLane(self.bench.device)
        base: Any = self.model.base_model.model  # type: ignore[union-attr]
        if lever in ("layers on the host", "all three"):
            layers = list(blocks(base))
            inside = {p for layer in layers for p in layer.parameters()}
            kept = {p for p in self.model.parameters() if p not in inside}
            StreamedLayers(layers, kept, lane, self.bench.device)
        fuse(self.model, self.bench.backend)
        if "checkpointed" in lever or lever == "all three":
            checkpoint_layers(base, 2 if "second" in lever else True)
        moves = lever in ("activations on the host", "all three")
        self.offload = ActivationOffload(self.model, lane, 0 if self.bench.smoke else 2**18) if moves else None

    @contextmanager
    def region(self) -> Iterator[None]:
        with super().region(), self.offload.during() if self.offload else nullcontext():
            yield

    def step(self, model: Any = None) -> Run:
        if self.lever != "optimizer in backward":
            return super().step(model)
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def work(i: int) -> None:
            with StepInBackward(self.optimizer, trained).during():
                self.loss(self.model, self.batch).backward()

        return work

    def held(self) -> int:
        """Bytes of its tensors on the card; layers that are on the host have none there."""
        states = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return storage_bytes([*weights_of(self.model), *states])


def lever_cell(bench: Bench, shape: Shape, lever: str) -> None:
    """Without dropout, so that the check is made in training mode, where layers are checkpointed and the loss fused."""
    sides = {}
    ids = torch.randint(0, shape.vocabulary, (shape.samples, shape.length), device=bench.device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    for name in ("no lever", lever):
        torch.manual_seed(0)
        model = adapted(llama(bench, shape), 0.0, task="CAUSAL_LM", wide=True)
        sides[name] = Leveraged(bench, model, batch, True, step_flops(model, shape), False)
        sides[name].pull(name)
    short = {name: t[:1, :128] for name, t in batch.items()}
    bench.cell(
        "lever",
        {"model": shape.name, "tokens": f"{shape.samples}x{shape.length}", "lever": lever},
        {name: side.step() for name, side in sides.items()},
        check=lambda: [_same(sides["no lever"], sides[lever], short)],
        versus={lever: ["no lever"]},
        memory=True,
        rounds=5,
        more=lambda label, ms: {**sides[label].rates(label, ms), "held": sides[label].held()},
    )


def _same(plain: Subject, ours: Subject, batch: dict[str, Tensor]) -> Check:
    """Loss and gradients beside those without the lever; on a card attention sums in another order each time."""
    wanted, got = (loss_and_gradients(side, side.model, batch) for side in (plain, ours))
    eps = 0.0 if plain.bench.smoke else torch.finfo(torch.bfloat16).eps
    errors = [relative_error(g, w) for g, w in zip(got, wanted, strict=True)]
    return Check(["loss", "dA", "dB", "other"][: len(errors)], [0.0] * len(errors), errors, eps)
