"""What a task must give the engine, and what tasks share."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..config import Config, EvaluationConfig
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import Labels
from ..data.packing import Packs

Batch = dict[str, Tensor]


class Meter(Protocol):
    """Metrics of a split, added up batch by batch; logits are never kept (trap 23)."""

    def update(self, logits: Tensor, batch: Batch) -> None:
        """Add a batch. What runs out of memory changes nothing: the batch comes again in halves."""
        ...

    def compute(self) -> dict[str, Any]: ...


class Task(Protocol):
    """Head, rows, loss and metrics of one kind of problem.

    Attributes:
        primary: name of the metric that early stopping and reports look at.
        maximize: whether more of it is better.
        processor: what turns rows into the model's input, saved beside the adapter: a tokenizer or an image processor.
        auto: name of transformers' Auto class that a merged model of this task is loaded with.
    """

    primary: str
    maximize: bool
    processor: Any
    auto: str

    def __init__(self, config: Config, labels: Labels | None) -> None: ...

    def load(self, device: torch.device) -> Backbone:
        """The backbone with this task's head."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """All that decides `encode`'s result."""
        ...

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        """Sequences of one row, or the reason why it teaches nothing."""
        ...

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        """Token ids of a row, cut to `data.max_length`, and which of them are learned; for showing."""
        ...

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        """A batch of (rows, longest) tensors on the CPU, padded on the right by position."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits."""
        ...

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum over supervised units, fp32 scalar; the caller divides by the units of the whole global batch."""
        ...

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """`loss` of `forward`, perhaps without ever making all logits; runs under autocast."""
        ...

    def meter(self) -> Meter: ...

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Per row what a user is told: `predicted`, and `probabilities` by class where there are classes."""
        ...

    def probe(self, model: nn.Module) -> Batch:
        """A seeded batch on the model's device, on which a reloaded model is compared."""
        ...

    def plain(self, path: str, **settings: Any) -> Any:
        """The model of a hub id or folder as plain transformers loads it, with a head of this task's size.

        Args:
            settings: `from_pretrained`'s own.
        """
        ...

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """`forward` of what `plain` gave, perhaps inside a PeftModel."""
        ...

    def as_plain(self, model: nn.Module) -> None:
        """Take away, in place, what the engine gave the model's class, before it is saved."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A task that answers with text of its own making; others answer with `predictions`."""

    def answers(self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int) -> list[str]:
        """Generated answers, `size` rows at once."""
        ...

    def judge_answers(
        self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int
    ) -> dict[str, Any]:
        """Metrics of generated answers."""
        ...


@runtime_checkable
class Templated(Protocol):
    """A task whose rows may go through a chat template, which writes tokens of its own round those of the rows."""

    def is_templated(self, example: Example) -> bool: ...

    def written(self, example: Example, where: str) -> list[bool]:
        """Per token of the whole row whether it stands for what somebody wrote, and not for the template."""
        ...


def probe_tokens(model: nn.Module) -> Batch:
    """Token ids to compare models on: seeded, (4, 24), the last row padded."""
    entry: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = int(entry.weight.shape[0])
    ids = torch.randint(0, size, (4, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[-1, 16:] = 0
    return to_device({"input_ids": ids, "attention_mask": mask}, next(model.parameters()).device)


@runtime_checkable
class TakesPacks(Protocol):
    """A task whose samples may share a sequence."""

    def collate_packs(self, data: EncodedSet, rows: Packs) -> Batch:
        """A batch of (packs, longest pack) tensors on the CPU."""
        ...


def collated(task: Task, data: EncodedSet, rows: np.ndarray | Packs, seed: int) -> Batch:
    """The batch of a training step's rows, as the step with this seed sees them, or of its packs."""
    if isinstance(rows, Packs):
        assert isinstance(task, TakesPacks), f"{type(task).__name__} takes no packs"
        return task.collate_packs(data, rows)
    return task.collate(*data.drawn(rows, seed))


def pad_tokens(data: EncodedSet, rows: np.ndarray, fill: int) -> Batch:
    """`input_ids` and `attention_mask`, int64 (rows, longest). The mask comes from lengths, never from ids (trap 4)."""
    lengths = data.lengths[rows]
    longest = int(lengths.max())
    ids = np.full((len(rows), longest), fill, dtype=np.int64)
    mask = np.arange(longest)[None, :] < lengths[:, None]
    for line, row in enumerate(rows):
        ids[line, : lengths[line]] = data.tokens(int(row))
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def pad_column(data: EncodedSet, rows: np.ndarray, name: str, fill: int) -> Tensor:
    """A per-token column of whole numbers, int64 (rows, longest), filled up on the right."""
    own = [data.token_column(name, int(row)) for row in rows]
    padded = np.full((len(rows), max(map(len, own))), fill, dtype=np.int64)
    for line, values in enumerate(own):
        padded[line, : len(values)] = values
    return torch.from_numpy(padded)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
