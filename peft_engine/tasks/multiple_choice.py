"""Multiple choice: which of a row's answers is right. Text classification takes it for rows with `choices`.

Each choice is read together with the row's text and gets one score; a softmax over a row's own scores decides. A row is
one flat sequence of all its readings, and a batch holds as many readings as its rows have choices: rows may differ in
their number, and none is made up.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForMultipleChoice

from ..backbone import Backbone, digest_tokenizer, load_settings, load_tokenizer, padding_id
from ..config import Config
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import Labels
from ..errors import DataError
from .base import Batch, probe_tokens
from .heads import load_with_head, name_classes
from .text_classification import (
    load_mean_pooled,
    plain_mean_logits,
    plain_mean_pooled,
    pooling_of,
    tokenise,
    without_mean_pooling,
)

OWN = ("label", "row", "place", "slots")  # what the model does not read


class MultipleChoice:
    primary = "accuracy"
    maximize = True
    auto = "AutoModelForMultipleChoice"

    def __init__(self, config: Config, labels: Labels | None) -> None:
        assert labels is not None
        assert labels.kind == "choice"
        self.config = config
        self.labels = labels
        self.tokenizer = self.processor = load_tokenizer(config.model)

    def load(self, device: torch.device) -> Backbone:
        model_config = load_settings(self.config.model)
        name_classes(model_config, ["score"])
        model_config.use_cache = False
        if pooling_of(self.config.model) == "mean":
            return load_mean_pooled(self.config, model_config, device, 1)
        return load_with_head(self.config, AutoModelForMultipleChoice, model_config, device, None)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "multiple-choice 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": self.config.data.max_length,
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        ids = [token for cut, _ in self._readings(example, where) for token in cut["input_ids"]]
        return ids, [False] * len(ids)

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        readings = self._readings(example, where)
        if not all(cut["input_ids"] for cut, _ in readings):
            return "the tokenizer gives no token for one of its choices"
        lengths = [len(cut["input_ids"]) for cut, _ in readings]
        columns: dict[str, Any] = {
            "choice": [i for i, length in enumerate(lengths) for _ in range(length)],
            "longest": max(lengths),
        }
        if "token_type_ids" in readings[0][0]:
            columns["token_type_ids"] = [kind for cut, _ in readings for kind in cut["token_type_ids"]]
        if "label" in example:
            columns["label"] = example["label"]
        ids = [token for cut, _ in readings for token in cut["input_ids"]]
        return [EncodedRow(ids, 1, columns, any(is_cut for _, is_cut in readings))]

    def _readings(self, example: Example, where: str) -> list[tuple[Any, bool]]:
        """The encoding of the text with each choice, and whether it was cut."""
        if "choices" not in example:
            raise DataError(
                f"{where}: this run learned to choose, and the row has no choices.",
                "Name the column: data.columns.choices=COLUMN.",
            )
        limit = self.config.data.max_length
        return [tokenise(self.tokenizer, [example["text"], choice], limit) for choice in example["choices"]]

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        """(readings, longest) ids, mask and types; `row` and `place` (readings,) tell whose each is; `slots` (rows,
        most choices) where each is found, -1 where a row has fewer; label (rows,)."""
        names = [name for name in ("token_type_ids",) if name in data.columns]
        parts: list[tuple[int, int, np.ndarray, list[np.ndarray]]] = []
        for line, row in enumerate(rows):
            choice = data.token_column("choice", int(row))
            for place in range(int(choice[-1]) + 1):
                own = choice == place
                parts.append(
                    (line, place, data.tokens(int(row))[own], [data.token_column(n, int(row))[own] for n in names])
                )
        longest = max(len(ids) for _, _, ids, _ in parts)
        batch = {
            name: torch.full((len(parts), longest), fill, dtype=torch.int64)
            for name, fill in (
                ("input_ids", padding_id(self.tokenizer)),
                ("attention_mask", 0),
                *((n, 0) for n in names),
            )
        }
        for at, (_, _, ids, others) in enumerate(parts):
            batch["input_ids"][at, : len(ids)] = torch.from_numpy(ids)
            batch["attention_mask"][at, : len(ids)] = 1
            for name, values in zip(names, others, strict=True):
                batch[name][at, : len(ids)] = torch.from_numpy(values)
        batch["row"] = torch.tensor([line for line, _, _, _ in parts])
        batch["place"] = torch.tensor([place for _, place, _, _ in parts])
        batch["slots"] = torch.full((len(rows), int(batch["place"].max()) + 1), -1)
        batch["slots"][batch["row"], batch["place"]] = torch.arange(len(parts))
        if "label" in data.columns:
            batch["label"] = torch.from_numpy(data.columns["label"][rows]).long()
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, most choices); -inf where a row has fewer."""
        return self._by_row(self._scores(model, batch), batch)

    def _by_row(self, scores: Tensor, batch: Batch) -> Tensor:
        if "slots" not in batch:  # the probe: readings of no row
            return scores.unsqueeze(-1)
        slots = batch["slots"]
        return scores[slots.clamp(min=0)].masked_fill(slots < 0, -torch.inf)

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """One score per reading, (readings,)."""
        inputs = {name: tensor for name, tensor in batch.items() if name not in OWN}
        if pooling_of(self.config.model) == "mean":
            return model(**inputs).logits.squeeze(-1)
        # as rows with one choice each
        return model(**{name: tensor.unsqueeze(1) for name, tensor in inputs.items()}).logits.squeeze(-1)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum over rows of the cross-entropy among the row's choices."""
        return F.cross_entropy(logits.float(), batch["label"], reduction="sum")

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.forward(model, batch), batch)

    def meter(self) -> "ChoiceMeter":
        return ChoiceMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Per row `predicted`, the choice's place from 0, and the `probabilities` of all places."""
        shares = logits.detach().float().softmax(-1).tolist()
        counts = (batch["slots"] >= 0).sum(-1).tolist()
        return [
            {"predicted": int(np.argmax(share[:n])), "probabilities": {str(i): share[i] for i in range(n)}}
            for share, n in zip(shares, counts, strict=True)
        ]

    def probe(self, model: nn.Module) -> Batch:
        return probe_tokens(model)

    def plain(self, path: str, **settings: Any) -> Any:
        if pooling_of(self.config.model) == "mean":
            return plain_mean_pooled(path, 1, **settings)
        return AutoModelForMultipleChoice.from_pretrained(path, **settings)

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if pooling_of(self.config.model) != "mean":
            return self.forward(model, batch)
        inputs = {name: tensor for name, tensor in batch.items() if name not in OWN}
        return self._by_row(plain_mean_logits(model, inputs).squeeze(-1), batch)

    def as_plain(self, model: nn.Module) -> None:
        without_mean_pooling(model)


class ChoiceMeter:
    """accuracy, loss, and `chance`: the accuracy of choosing blindly among each row's choices."""

    def __init__(self, task: MultipleChoice) -> None:
        self.task = task
        self.loss = self.right = self.chance = 0.0
        self.rows = 0

    def update(self, logits: Tensor, batch: Batch) -> None:
        loss, right = float(self.task.loss(logits, batch)), float((logits.argmax(-1) == batch["label"]).sum())
        chance = float((1 / (batch["slots"] >= 0).sum(-1)).sum())
        self.loss, self.right, self.chance = self.loss + loss, self.right + right, self.chance + chance
        self.rows += len(batch["label"])

    def compute(self) -> dict[str, Any]:
        return {
            "loss": self.loss / self.rows,
            "rows": self.rows,
            "accuracy": self.right / self.rows,
            "chance": self.chance / self.rows,
        }
