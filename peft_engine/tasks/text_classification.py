"""Text classification: one class, several classes, or a number per text or pair of texts.

The head is the model's own (pooler and classifier), or the mean of the last hidden states over real tokens followed by
dropout and one linear layer (`model.pooling`).
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from ..backbone import Backbone, digest_tokenizer, digest_weights, load_model, load_settings, load_tokenizer, padding_id
from ..config import Config, ModelConfig
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import Labels
from ..errors import ConfigError, DataError
from .base import Batch, pad_column, pad_tokens, probe_tokens
from .class_metrics import ClassMeter, predictions
from .heads import load_with_head, name_classes, with_outputs
from .weighting import LABEL, WEIGHT, add_weights, class_loss

PROBLEM = {"single": "single_label_classification", "multi": "multi_label_classification", "regression": "regression"}
HEAD = "classifier"  # name of the mean-pooled head's linear layer


class TextClassification:
    auto = "AutoModelForSequenceClassification"

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
        name_classes(model_config, names)
        model_config.problem_type = PROBLEM[self.labels.kind]
        model_config.pad_token_id = padding_id(self.tokenizer)
        model_config.use_cache = False
        if pooling_of(self.config.model) == "mean":
            return load_mean_pooled(self.config, model_config, device, len(names))
        return load_with_head(self.config, AutoModelForSequenceClassification, model_config, device, "SEQ_CLS")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "text-classification 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": self.config.data.max_length,
            "labels": self.labels.to_json(),
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        ids = tokenise(self.tokenizer, _texts(example), self.config.data.max_length)[0]["input_ids"]
        return ids, [False] * len(ids)

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        if self.labels.pair != ("text_pair" in example):
            learned, got = ("pairs", "one text") if self.labels.pair else ("single texts", "a pair")
            raise DataError(
                f"{where}: this run learned {learned}, the row has {got}.",
                "Name the columns: data.columns.text=COLUMN, for a pair data.columns.text_pair=COLUMN too.",
            )
        cut, is_cut = tokenise(self.tokenizer, _texts(example), self.config.data.max_length)
        if not cut["input_ids"]:
            return "the tokenizer gives no token for it"
        columns: dict[str, Any] = {}
        if "token_type_ids" in cut:
            columns["token_type_ids"] = cut["token_type_ids"]
        if "label" in example:
            columns["label"] = self.labels.encode(example["label"], where)
        return [EncodedRow(cut["input_ids"], 1, columns, is_cut)]

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        batch = pad_tokens(data, rows, padding_id(self.tokenizer))
        if "token_type_ids" in data.columns:
            batch["token_type_ids"] = pad_column(data, rows, "token_type_ids", 0)
        if "label" in data.columns:
            dtype = torch.int64 if self.labels.kind == "single" else torch.float32
            batch["label"] = torch.from_numpy(data.columns["label"][rows]).to(dtype)
            add_weights(batch, data, rows)
        return batch

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, classes), or (rows, 1) for regression."""
        return model(**{name: tensor for name, tensor in batch.items() if name not in (LABEL, WEIGHT)}).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return class_loss(logits, batch[LABEL], self.labels.kind)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return class_loss(self.forward(model, batch), batch[LABEL], self.labels.kind, batch.get(WEIGHT))

    def meter(self) -> ClassMeter:
        return ClassMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return predictions(logits, self.labels)

    def probe(self, model: nn.Module) -> Batch:
        return probe_tokens(model)

    def plain(self, path: str, **settings: Any) -> Any:
        outputs = max(1, len(self.labels.names))
        model: Any
        if pooling_of(self.config.model) == "mean":
            model = plain_mean_pooled(path, outputs, **settings)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                path, ignore_mismatched_sizes=True, **with_outputs(outputs, settings)
            )
            model.config.pad_token_id = padding_id(self.tokenizer)
        return model

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if pooling_of(self.config.model) != "mean":
            return self.forward(model, batch)
        return plain_mean_logits(model, {n: tensor for n, tensor in batch.items() if n not in (LABEL, WEIGHT)})

    def as_plain(self, model: nn.Module) -> None:
        without_mean_pooling(model)


def tokenise(tokenizer: Any, texts: list[str], limit: int) -> tuple[Any, bool]:
    """The encoding of one text or two, with what the tokenizer puts around and between them; and whether it was cut.

    A pair is cut where it is longest, token by token.
    """
    whole = tokenizer(*texts, verbose=False)
    if len(whole["input_ids"]) <= limit:
        return whole, False
    cut = tokenizer(*texts, truncation="longest_first", max_length=limit)
    if len(cut["input_ids"]) > limit:  # then tokenizers cut nothing, and say nothing
        raise ConfigError(
            f"data.max_length = {limit} has no room for the tokens that this tokenizer puts around its texts.",
            "Raise it.",
        )
    return cut, True


def _texts(example: Example) -> list[str]:
    return [example["text"], example["text_pair"]] if "text_pair" in example else [example["text"]]


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


def pooling_of(settings: ModelConfig) -> Literal["model", "mean"]:
    """`model.pooling` with `auto` decided."""
    if settings.pooling != "auto":
        return settings.pooling
    stated = Path(settings.path) / "1_Pooling" / "config.json"
    if stated.is_file():
        return "mean" if json.loads(stated.read_text()).get("pooling_mode_mean_tokens") else "model"
    model_config = load_settings(settings)
    has_masked_lm_head = any(name.endswith("ForMaskedLM") for name in model_config.architectures or [])
    # masked-LM checkpoints carry no trained pooler; where the model has none either, its own head needs none
    return "mean" if has_masked_lm_head and _uses_pooler(model_config) else "model"


def load_mean_pooled(config: Config, model_config: Any, device: torch.device, outputs: int) -> Backbone:
    """The backbone under a new mean-pooled head."""
    model, _ = load_model(config, AutoModel, model_config, device, _is_pooler)
    digest = digest_weights(model)
    add_mean_pooled_head(model, outputs)
    return Backbone(model, [HEAD], [HEAD], None, digest)


def plain_mean_pooled(path: str, outputs: int, **settings: Any) -> Any:
    """A plain model with a linear `classifier` beside it, filled from the folder where that holds one."""
    model: Any = AutoModel.from_pretrained(path, **settings)
    model.classifier = nn.Linear(model.config.hidden_size, outputs, dtype=model.dtype)
    _load_head(model.classifier, path)
    return model


def plain_mean_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of what `plain_mean_pooled` gave, perhaps inside a PeftModel."""
    encoder: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    logits: Tensor = encoder.classifier(mean_pooled(model(**batch).last_hidden_state, batch["attention_mask"]))
    return logits


def without_mean_pooling(model: nn.Module) -> None:
    """Give a mean-pooled model back transformers' class, in place; others are left alone."""
    if isinstance(model, MeanPooled):
        model.__class__ = type(model).__mro__[2]


def _is_pooler(model: PreTrainedModel, name: str) -> bool:
    return name.startswith("pooler.")  # not used, dropped


def _uses_pooler(settings: Any) -> bool:
    """Whether the model's own classification head reads a pooler inside the base model (BERT does, RoBERTa doesn't)."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(settings)
    return isinstance(getattr(model.base_model, "pooler", None), nn.Module)
