"""Sequence to sequence: an encoder reads the source, a decoder learns the target, its end included (trap 5).

A row is one flat sequence, source then target; `supervised` tells the two apart.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, TextStreamer

from ..backbone import (
    Backbone,
    digest_tokenizer,
    digest_weights,
    load_model,
    load_settings,
    load_tokenizer,
    padding_id,
    positions_of,
)
from ..config import Config, EvaluationConfig
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example
from ..data.labels import Labels
from ..errors import ConfigError, DataError
from ..generation import matched, stop_ids
from .base import Batch, probe_tokens
from .heads import output_names
from .text_metrics import refuse_missing_packages, text_scores

IGNORED = -100


class Seq2Seq:
    primary = "loss"
    maximize = False
    auto = "AutoModelForSeq2SeqLM"

    def __init__(self, config: Config, labels: Labels | None = None) -> None:
        self.config = config
        self.tokenizer = self.processor = load_tokenizer(config.model)
        self.end = self.tokenizer.eos_token_id
        if self.end is None:
            self.end = self.tokenizer.sep_token_id  # what closes a text in BERT's vocabulary
        if self.end is None:
            raise ConfigError(
                f"model.path: the tokenizer of {config.model.path} has no end token, so no answer could end.",
                "Set eos_token in its tokenizer_config.json.",
            )
        if config.evaluation.generate_rows:
            refuse_missing_packages()

    def load(self, device: torch.device) -> Backbone:
        settings = load_settings(self.config.model)
        model, _ = load_model(self.config, AutoModelForSeq2SeqLM, settings, device, _is_encoder_pooler)
        encoder: Any = getattr(model, "encoder", None)
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None  # nothing reads it, so it would get no gradient
        _refuse_without_start(model, self.config.model.path)
        return Backbone(model, output_names(model), [], "SEQ_2_SEQ_LM", digest_weights(model))

    def fingerprint(self) -> dict[str, Any]:
        return {
            "task": "seq2seq 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": self.config.data.max_length,
        }

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        (source, _), (target, _) = self._source(example["source"]), self._target(example["target"])
        return source + target, [False] * len(source) + [True] * len(target)

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        (source, source_is_cut), (target, target_is_cut) = (
            self._source(example["source"]),
            self._target(example["target"]),
        )
        if not source:
            return "the tokenizer gives no token for its source"
        columns = {
            "supervised": [False] * len(source) + [True] * len(target),
            "longest": max(len(source), len(target)),
        }
        return [EncodedRow(source + target, len(target), columns, source_is_cut or target_is_cut)]

    def _source(self, text: str) -> tuple[list[int], bool]:
        """Ids as the tokenizer makes them, cut to `data.max_length` before what closes a text."""
        whole = self.tokenizer(text, verbose=False)["input_ids"]
        limit = self.config.data.max_length
        if len(whole) <= limit:
            return whole, False
        return self.tokenizer(text, truncation=True, max_length=limit)["input_ids"], True

    def _target(self, text: str) -> tuple[list[int], bool]:
        """Ids that end with the end token; a target that is too long loses its end, so that nothing learns to stop
        within a text."""
        ids = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        if not ids or ids[-1] != self.end:
            ids = [*ids, self.end]
        limit = self.config.data.max_length
        return ids[:limit], len(ids) > limit

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        """input_ids and attention_mask (rows, longest source), labels (rows, longest target), int64."""
        sides = [(data.tokens(int(row)), data.token_column("supervised", int(row))) for row in rows]
        sources = [ids[~is_target] for ids, is_target in sides]
        ids, mask = _padded(sources, padding_id(self.tokenizer))
        labels, _ = _padded([ids[is_target] for ids, is_target in sides], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, target length, vocabulary). The decoder reads the labels shifted as the model itself shifts them."""
        shift: Any = model.prepare_decoder_input_ids_from_labels
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=shift(labels=batch["labels"]),
            use_cache=False,
        ).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over target tokens."""
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.loss(self.forward(model, batch), batch)

    def meter(self) -> "TargetMeter":
        return TargetMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        raise NotImplementedError("a seq2seq model answers with text")

    def answers(self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int) -> list[str]:
        if not examples:
            raise DataError("There are no rows to predict.", "Give a file with rows.")
        texts: list[str] = []
        for start in range(0, len(examples), size):
            sources = [example["source"] for example in examples[start : start + size]]
            texts += self.generate(model, sources, settings.max_new_tokens, beams=settings.num_beams)
        return texts

    def judge_answers(
        self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int
    ) -> dict[str, Any]:
        return text_scores(self.answers(model, examples, settings, size), [example["target"] for example in examples])

    def generate(
        self,
        model: Any,
        sources: list[str],
        max_new_tokens: int,
        *,
        beams: int = 1,
        temperature: float = 0.0,
        streamer: TextStreamer | None = None,
    ) -> list[str]:
        """The targets that the model makes, special tokens left out; greedy, or a beam search, at temperature 0.

        Args:
            max_new_tokens: at most; fewer where the decoder's positions end.
        """
        encoded = [self._source(text) for text in sources]
        cut = sum(is_cut for _, is_cut in encoded)
        if cut:
            logging.getLogger(__name__).warning(
                "%d of %d sources were cut to data.max_length = %d tokens.",
                cut,
                len(encoded),
                self.config.data.max_length,
            )
        device = next(model.parameters()).device
        ids, mask = _padded([np.asarray(ids, dtype=np.int64) for ids, _ in encoded], padding_id(self.tokenizer))
        positions = positions_of(model)
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - 1)
        options: dict[str, Any] = (
            {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        )
        if getattr(model.generation_config, "decoder_start_token_id", None) is None:
            options["decoder_start_token_id"] = model.config.decoder_start_token_id
        with torch.no_grad(), matched(model):
            out = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=room, num_beams=beams,
                pad_token_id=padding_id(self.tokenizer), streamer=streamer, use_cache=True,
                eos_token_id=sorted({*(stop_ids(model, self.tokenizer) or ()), self.end}), **options,
            )  # fmt: skip
        return [str(self.tokenizer.decode(row, skip_special_tokens=True)).strip() for row in out]

    def probe(self, model: nn.Module) -> Batch:
        batch = probe_tokens(model)
        labels = batch["input_ids"].flip(0)[:, :13].clone()
        labels[0, 9:] = IGNORED
        return batch | {"labels": labels}

    def plain(self, path: str, **settings: Any) -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(path, **settings)

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.forward(model, batch)

    def as_plain(self, model: nn.Module) -> None:
        """Embeddings that are one, in a model whose output was untied from them, are saved one by one: with
        `tie_word_embeddings` off, some models (BART) start those at random that are not in the file (trap 13)."""
        settings: Any = model.config
        if getattr(settings, "tie_word_embeddings", True):  # two models in one say it one by one
            return
        seen: set[int] = set()
        for part in model.modules():
            if isinstance(part, nn.Embedding):
                if id(part.weight) in seen:
                    part.weight = nn.Parameter(part.weight.detach().clone())
                seen.add(id(part.weight))


class TargetMeter:
    """loss (nats per target token, its end included), perplexity, token_accuracy given the right tokens before it."""

    def __init__(self, task: Seq2Seq) -> None:
        self.task = task
        self.nats = self.tokens = self.right = 0.0

    def update(self, logits: Tensor, batch: Batch) -> None:
        nats = float(self.task.loss(logits, batch))
        right = float((logits.argmax(-1) == batch["labels"]).sum())
        self.nats, self.right = self.nats + nats, self.right + right  # at the end: see evaluation, on memory
        self.tokens += float((batch["labels"] != IGNORED).sum())

    def compute(self) -> dict[str, Any]:
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "token_accuracy": self.right / self.tokens,
            "tokens": int(self.tokens),
        }


def _padded(rows: list[np.ndarray], fill: int) -> tuple[Tensor, Tensor]:
    """Rows filled up on the right, and the mask of what is real, by position; both int64 (rows, longest)."""
    lengths = np.array([len(row) for row in rows])
    padded = np.full((len(rows), int(lengths.max())), fill, dtype=np.int64)
    for line, row in enumerate(rows):
        padded[line, : len(row)] = row
    mask = np.arange(padded.shape[1])[None, :] < lengths[:, None]
    return torch.from_numpy(padded), torch.from_numpy(mask.astype(np.int64))


def _refuse_without_start(model: Any, path: str) -> None:
    """A model that can't make its decoder's input from labels."""
    try:
        model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([[1, IGNORED]]))
    except (AttributeError, ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"model.path: {path} ({type(model).__name__}) does not say how its decoder starts: {error}",
            "Set decoder_start_token_id and pad_token_id in its config.json.",
        ) from error


def _is_encoder_pooler(model: PreTrainedModel, name: str) -> bool:
    return name.startswith("encoder.pooler.")  # not used, dropped
