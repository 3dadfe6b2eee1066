"""Text classification: one class, several classes, or a number per text.

The head is the model's own (pooler and classifier), or the mean of the last hidden states over real tokens followed by
dropout and one linear layer (`model.pooling`).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..backbone import Backbone, digest_tokenizer, digest_weights, load_model, load_settings, load_tokenizer, padding_id
from ..config import Config, EvaluationConfig
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import Labels
from .base import Batch, pad_tokens, probe_tokens
from .class_metrics import ClassMeter, predictions

PROBLEM = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
HEAD = "classifier"  # name of the mean-pooled head's linear layer


class TextClassification:
    auto = "AutoModelForSequenceClassification"
    generates = False

    def __init__(self, config: Config, labels: Labels | None) -> None:
        assert labels is not None, "text classification needs its classes"
        self.config = config
        self.labels = labels
        self.tokenizer = self.processor = load_tokenizer(config.model)
        self.primary = {"single": "accuracy", "multi": "f1_micro", "regression": "pearson"}[labels.kind]
        self.maximize = True

    def load(self, device: torch.device) -> Backbone:
        model_config = load_settings(self.config.model)
        names = self.labels.names or ["value"]
        model_config.num_labels = len(names)
        model_config.id2label = dict(enumerate(names))
        model_config.label2id = {name: i for i, name in enumerate(names)}
        model_config.problem_type = PROBLEM[self.labels.kind]
        model_config.pad_token_id = padding_id(self.tokenizer)
        model_config.use_cache = False
        if self._pooling() == "mean":
            model, _ = load_model(self.config, AutoModel, model_config, device, _is_pooler)
            digest = digest_weights(model)
            add_mean_pooled_head(model, len(names))
            return Backbone(model, [HEAD], [HEAD], None, digest)
        model, new = load_model(self.config, AutoModelForSequenceClassification, model_config, device, _is_head)
        heads = [
            name
            for name, child in model.named_children()
            if name != model.base_model_prefix and any(True for _ in child.parameters())
        ]
        fresh = [name for name in heads if any(tensor.startswith(f"{name}.") for tensor in new)]
        return Backbone(model, heads, fresh, "SEQ_CLS", digest_weights(model.base_model))

    def _pooling(self) -> str:
        asked = self.config.model.pooling
        if asked != "auto":
            return asked
        stated = Path(self.config.model.path) / "1_Pooling" / "config.json"
        if stated.is_file():
            return "mean" if json.loads(stated.read_text()).get("pooling_mode_mean_tokens") else "model"
        settings = load_settings(self.config.model)
        has_masked_lm_head = any(name.endswith("ForMaskedLM") for name in settings.architectures or [])
        # masked-LM checkpoints carry no trained pooler; where the model has none either, its own head needs none
        return "mean" if has_masked_lm_head and _uses_pooler(settings) else "model"

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "text-classification 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": self.config.data.max_length,
            "labels": self.labels.to_json(),
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        ids = self.tokenizer(example["text"], truncation=True, max_length=self.config.data.max_length)["input_ids"]
        return ids, [False] * len(ids)

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        limit = self.config.data.max_length
        whole = self.tokenizer(example["text"], verbose=False)
        cut = (
            self.tokenizer(example["text"], truncation=True, max_length=limit)
            if len(whole["input_ids"]) > limit
            else whole
        )
        if not cut["input_ids"]:
            return "the tokenizer gives no token for it"
        columns: dict[str, Any] = {}
        if "token_type_ids" in cut:
            columns["token_type_ids"] = cut["token_type_ids"]
        if "label" in example:
            columns["label"] = self.labels.encode(example["label"], where)
        return [EncodedRow(cut["input_ids"], 1, columns, len(cut["input_ids"]) < len(whole["input_ids"]))]

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        batch = pad_tokens(data, rows, padding_id(self.tokenizer))
        if "token_type_ids" in data.columns:
            types = np.zeros(batch["input_ids"].shape, dtype=np.int64)
            for line, row in enumerate(rows):
                own = data.token_column("token_type_ids", int(row))
                types[line, : len(own)] = own
            batch["token_type_ids"] = torch.from_numpy(types)
        if "label" in data.columns:
            dtype = torch.int64 if self.labels.kind == "single" else torch.float32
            batch["label"] = torch.from_numpy(data.columns["label"][rows]).to(dtype)
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes), or (rows, 1) for regression."""
        return model(**{name: tensor for name, tensor in batch.items() if name != "label"}).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum over rows: cross-entropy; mean over classes of binary cross-entropy; squared error."""
        logits = logits.float()
        if self.labels.kind == "single":
            return F.cross_entropy(logits, batch["label"], reduction="sum")
        if self.labels.kind == "multi":
            return F.binary_cross_entropy_with_logits(logits, batch["label"], reduction="none").mean(-1).sum()
        return F.mse_loss(logits.squeeze(-1), batch["label"], reduction="sum")

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.forward(model, batch), batch)

    def meter(self) -> ClassMeter:
        return ClassMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return predictions(logits, self.labels)

    def answers(self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int) -> list[str]:
        raise NotImplementedError("a classifier answers with classes")

    def judge_answers(
        self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int
    ) -> dict[str, Any]:
        raise NotImplementedError("a classifier answers with classes")

    def probe(self, model: nn.Module) -> Batch:
        return probe_tokens(model)

    def plain(self, path: str, **settings: Any) -> Any:
        outputs = max(1, len(self.labels.names))
        model: Any
        if self._pooling() == "mean":
            model = AutoModel.from_pretrained(path, **settings)
            model.classifier = nn.Linear(model.config.hidden_size, outputs, dtype=model.dtype)
            _load_head(model.classifier, path)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                path, num_labels=outputs, ignore_mismatched_sizes=True, **settings
            )
            model.config.pad_token_id = padding_id(self.tokenizer)
        return model

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._pooling() != "mean":
            return self.forward(model, batch)
        encoder: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        logits: Tensor = encoder.classifier(mean_pooled(model(**batch).last_hidden_state, batch["attention_mask"]))
        return logits

    def as_plain(self, model: nn.Module) -> None:
        if isinstance(model, MeanPooled):
            model.__class__ = type(model).__mro__[2]  # the transformers class under the head


class MeanPooled:
    """Mixin that a backbone's class is given: mean of the last hidden states over real tokens, dropout, linear."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = super().forward(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state  # type: ignore[misc]
        mean = mean_pooled(hidden, attention_mask)
        return SequenceClassifierOutput(logits=self.classifier(self.classifier_dropout(mean)))  # type: ignore[attr-defined]


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over real tokens: hidden (rows, length, width), mask (rows, length) → (rows, width)."""
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def _load_head(head: nn.Linear, path: str) -> None:
    """Fill a mean-pooled head from a merged model's folder; one that holds none leaves it as it is."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name, parameter in head.named_parameters():
                if f"{HEAD}.{name}" in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                    parameter.data.copy_(tensors.get_tensor(f"{HEAD}.{name}"))


def add_mean_pooled_head(model: PreTrainedModel, outputs: int) -> None:
    """Give this instance of an encoder or decoder a mean-pooled linear head, in place.

    The head is an ordinary submodule `classifier`, so that adapters, checkpoints and exports see one model. An unused
    pooler is dropped: it would never get a gradient.
    """
    settings: Any = model.config
    rate = getattr(settings, "classifier_dropout", None)
    if rate is None:
        rate = float(getattr(settings, "hidden_dropout_prob", 0.0))
    if isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None  # type: ignore[assignment]
    first = next(model.parameters())
    model.classifier_dropout = nn.Dropout(rate)
    model.classifier = nn.Linear(settings.hidden_size, outputs, device=first.device, dtype=first.dtype)
    cls = type(model)
    model.__class__ = type(f"MeanPooled{cls.__name__}", (MeanPooled, cls), {})


def _is_pooler(model: PreTrainedModel, name: str) -> bool:
    return name.startswith("pooler.")  # not used, dropped


def _is_head(model: PreTrainedModel, name: str) -> bool:
    return not name.startswith(f"{model.base_model_prefix}.")


def _uses_pooler(settings: Any) -> bool:
    """Whether the model's own classification head reads a pooler inside the base model (BERT does, RoBERTa doesn't)."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    return isinstance(getattr(model.base_model, "pooler", None), nn.Module)
