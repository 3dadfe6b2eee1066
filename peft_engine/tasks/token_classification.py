"""Token classification: a tag for every word of a row.

A word's first sub-word carries its tag; the others are read, but neither learned nor judged. Words that truncation cuts
off are counted, and predicted as None.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from ..backbone import Backbone, digest_tokenizer, load_settings, load_tokenizer, padding_id
from ..config import Config
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import NOT_LEARNED, Labels
from ..errors import ConfigError
from .base import Batch, pad_column, pad_tokens, probe_tokens
from .heads import load_with_head, name_classes, with_outputs
from .tag_metrics import TagMeter, marks_entities
from .weighting import TAG, WEIGHT, add_weights, weighted_cross_entropy

NOT_READ = ("word", "words", "tag", WEIGHT)  # by the model


class TokenClassification:
    maximize = True
    auto = "AutoModelForTokenClassification"

    def __init__(self, config: Config, labels: Labels | None) -> None:
        assert labels is not None, "token classification needs its tags"
        self.config = config
        self.labels = labels
        self.tokenizer = self.processor = load_tokenizer(config.model)
        self.primary = "f1" if marks_entities(labels.names) else "accuracy"
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"model.path: the tokenizer of {config.model.path} does not tell which token is of which word "
                f"({type(self.tokenizer).__name__}).",
                "Take a model whose folder holds a tokenizer.json.",
            )
        self.before = _before_words(self.tokenizer)

    def load(self, device: torch.device) -> Backbone:
        model_config = load_settings(self.config.model)
        name_classes(model_config, self.labels.names)
        model_config.use_cache = False
        return load_with_head(self.config, AutoModelForTokenClassification, model_config, device, "TOKEN_CLS")

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "token-classification 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": self.config.data.max_length,
            "labels": self.labels.to_json(),
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        cut, _ = self._tokens(example)
        return cut["input_ids"], [place >= 0 for place in _first_places(cut.word_ids())]

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        cut, is_cut = self._tokens(example)
        places = _first_places(cut.word_ids())
        columns: dict[str, Any] = {"word": places, "words": len(example["tokens"])}
        learned = [place >= 0 for place in places]
        if "token_type_ids" in cut:
            columns["token_type_ids"] = cut["token_type_ids"]
        if "tags" in example:
            ids = self.labels.encode_tags(example["tags"], where)
            columns["tag"] = [ids[place] if place >= 0 else NOT_LEARNED for place in places]
            learned = [tag != NOT_LEARNED for tag in columns["tag"]]
        if not any(learned):
            return f"none of its {len(example['tokens'])} words has a tag and a token within data.max_length"
        return [EncodedRow(cut["input_ids"], sum(learned), columns | {"supervised": learned}, is_cut)]

    def _tokens(self, example: Example) -> tuple[Any, bool]:
        """The tokenizer's encoding of a row, cut to `data.max_length`, and whether it was cut."""
        words = [self.before * (i > 0) + word for i, word in enumerate(example["tokens"])]
        whole = self.tokenizer(words, is_split_into_words=True, verbose=False)
        limit = self.config.data.max_length
        if len(whole["input_ids"]) <= limit:
            return whole, False
        return self.tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit), True

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        batch = pad_tokens(data, rows, padding_id(self.tokenizer))
        for name, fill in (("token_type_ids", 0), ("word", -1), ("tag", NOT_LEARNED)):
            if name in data.columns:
                batch[name] = pad_column(data, rows, name, fill)
        if "tag" in batch:
            add_weights(batch, data, rows)
        return batch | {"words": torch.from_numpy(data.columns["words"][rows])}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, tags)."""
        return model(**{name: tensor for name, tensor in batch.items() if name not in NOT_READ}).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum over words of the cross-entropy."""
        return weighted_cross_entropy(logits, batch[TAG], None)

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return weighted_cross_entropy(self.forward(model, batch), batch[TAG], batch.get(WEIGHT))

    def meter(self) -> TagMeter:
        return TagMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        """Per row `predicted` and `probabilities` (of what is predicted), a list with one entry per word."""
        shares, chosen = logits.detach().float().softmax(-1).max(-1)
        found = []
        rows = zip(chosen.tolist(), shares.tolist(), batch["word"].tolist(), batch["words"].tolist(), strict=True)
        for ids, probabilities, places, words in rows:
            tags: list[str | None] = [None] * words
            sure: list[float | None] = [None] * words
            for tag, probability, place in zip(ids, probabilities, places, strict=True):
                if place >= 0:
                    tags[place], sure[place] = self.labels.names[tag], probability
            found.append({"predicted": tags, "probabilities": sure})
        return found

    def probe(self, model: nn.Module) -> Batch:
        return probe_tokens(model)

    def plain(self, path: str, **settings: Any) -> Any:
        return AutoModelForTokenClassification.from_pretrained(
            path, ignore_mismatched_sizes=True, **with_outputs(len(self.labels.names), settings)
        )

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.forward(model, batch)

    def as_plain(self, model: nn.Module) -> None:
        """Nothing: the class is transformers' own."""


def _first_places(word_ids: list[int | None]) -> list[int]:
    """Per token the place of the word that begins there, -1 where none does."""
    before = [None, *word_ids[:-1]]
    return [-1 if word is None or word == last else word for word, last in zip(word_ids, before, strict=True)]


def _before_words(tokenizer: Any) -> str:
    """What to put before each word but the first, so that words are read as in running text.

    Byte-level tokenizers would else read "a", "b" as "ab".
    """
    text = tokenizer("the cat")["input_ids"]
    for before in ("", " "):
        try:
            if tokenizer(["the", f"{before}cat"], is_split_into_words=True)["input_ids"] == text:
                return before
        except (AssertionError, ValueError):  # some refuse words that bring no blank of their own
            continue
    return ""
