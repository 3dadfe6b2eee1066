"""Causal language modelling: conversations, prompt/completion pairs, plain text.

Token t+1 is predicted from tokens up to t; only supervised targets enter the loss.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..adapters.fusing import fuses_loss
from ..backbone import Backbone, digest_tokenizer, digest_weights, load_model, load_settings, load_tokenizer, padding_id
from ..config import Config, EvaluationConfig
from ..data.augmenting_text import written_tokens
from ..data.chat import Rendered, check_stop_token, encode_rendered, render_messages
from ..data.encoding import EncodedRow, EncodedSet
from ..data.formats import Example, is_conversation
from ..data.labels import Labels
from ..data.packing import Packs, lay_out
from ..errors import DataError
from ..generation import exact_match, generate_all, prompt_and_answer
from .base import Batch, pad_tokens, probe_tokens
from .heads import output_names

IGNORED = -100


class CausalLM:
    primary = "loss"
    maximize = False
    auto = "AutoModelForCausalLM"

    def __init__(self, config: Config, labels: Labels | None = None) -> None:
        self.config = config
        self.tokenizer = self.processor = load_tokenizer(config.model)

    def load(self, device: torch.device) -> Backbone:
        model_config = load_settings(self.config.model)
        model, _ = load_model(self.config, AutoModelForCausalLM, model_config, device, _nothing_new)
        return Backbone(model, output_names(model), [], "CAUSAL_LM", digest_weights(model))

    def fingerprint(self) -> dict[str, Any]:
        data = self.config.data
        return {
            "task": "causal-lm 1",
            "tokenizer": digest_tokenizer(self.tokenizer),
            "max_length": data.max_length,
            "supervise": data.supervise,
        }

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        limit = self.config.data.max_length
        ids, supervised, text_bytes = self._tokens(example, where)
        if "text" in example:
            windows = [(start, min(start + limit, len(ids))) for start in range(0, len(ids), limit)]
        else:
            check_stop_token(self.tokenizer, ids, supervised, where)
            windows = [(0, min(limit, len(ids)))]
        rows = [self._row(ids[a:b], supervised[a:b], text_bytes[a:b], truncated=len(ids) > limit) for a, b in windows]
        rows = [row for row in rows if row.units]
        if rows:
            return rows
        if not any(supervised[1:]):
            return "no token is supervised"
        return f"its first {limit} of {len(ids)} tokens hold nothing to learn"

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        ids, supervised, _ = self._tokens(example, where)
        limit = self.config.data.max_length
        return ids[:limit], [False, *supervised[1:limit]][: len(ids)]

    def is_templated(self, example: Example) -> bool:
        return is_conversation(example)

    def written(self, example: Example, where: str) -> list[bool]:
        turns = example["messages"] if "messages" in example else [*example["prompt"], *example["completion"]]
        texts = [turn["content"] for turn in turns if isinstance(turn.get("content"), str)]
        return written_tokens(self.tokenizer, self._render(example, where).text, texts)

    def _tokens(self, example: Example, where: str) -> tuple[list[int], list[bool], list[int]]:
        """A whole row: input_ids, supervised, text bytes, each (length,)."""
        rendered = self._render(example, where)
        add_special = "messages" not in example and not isinstance(example.get("prompt"), list)
        ids, supervised, text_bytes = encode_rendered(self.tokenizer, rendered, where, add_special_tokens=add_special)
        return self._close(ids, supervised, text_bytes) if "text" in example else (ids, supervised, text_bytes)

    def _render(self, example: Example, where: str) -> Rendered:
        asked = self.config.data.supervise
        if "messages" in example:
            return render_messages(self.tokenizer, example["messages"], example.get("tools"), _turns(asked), where)
        if "text" in example:
            return Rendered(example["text"], [(0, len(example["text"]))])
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, list):
            turns, tools = [*prompt, *completion], example.get("tools")
            return render_messages(self.tokenizer, turns, tools, _turns(asked), where, first=len(prompt))
        end = self.tokenizer.eos_token or ""
        text = prompt + completion + ("" if end and completion.endswith(end) else end)
        return Rendered(text, [(0 if asked == "all" else len(prompt), len(text))])

    def _close(
        self, ids: list[int], supervised: list[bool], text_bytes: list[int]
    ) -> tuple[list[int], list[bool], list[int]]:
        """End a document with the end-of-text token, so that the model learns to stop."""
        end = self.tokenizer.eos_token_id
        if end is None or (ids and ids[-1] == end):
            return ids, supervised, text_bytes
        return [*ids, end], [*supervised, True], [*text_bytes, 0]

    def _row(self, ids: list[int], supervised: list[bool], text_bytes: list[int], truncated: bool) -> EncodedRow:
        # the first token has no predecessor to predict it from
        targets = [False, *supervised[1:]]
        columns = {
            "supervised": targets,
            "text_bytes": [n if is_target else 0 for n, is_target in zip(text_bytes, targets, strict=True)],
        }
        return EncodedRow(ids, sum(targets), columns, truncated)

    def collate(self, data: EncodedSet, rows: np.ndarray) -> Batch:
        batch = pad_tokens(data, rows, padding_id(self.tokenizer))
        labels = np.full(batch["input_ids"].shape, IGNORED, dtype=np.int64)
        text_bytes = 0
        for line, row in enumerate(rows):
            taught = data.token_column("supervised", int(row))
            labels[line, : len(taught)][taught] = data.tokens(int(row))[taught]
            text_bytes += int(data.token_column("text_bytes", int(row)).sum())
        return batch | {"labels": torch.from_numpy(labels), "text_bytes": torch.tensor(text_bytes)}

    def collate_packs(self, data: EncodedSet, rows: Packs) -> Batch:
        """`input_ids`, `position_ids` and `labels`, int64 (packs, longest pack); no attention_mask, so that
        transformers tells the samples apart by their positions. A sample's first token is never a target (trap 8)."""
        packs = [[data.tokens(int(row)) for row in pack] for pack in rows.packs]
        found = lay_out(packs, padding_id(self.tokenizer))
        labels = np.full(found["input_ids"].shape, IGNORED, dtype=np.int64)
        for line, pack in enumerate(rows.packs):
            taught = np.concatenate([_after_first(data.token_column("supervised", int(row))) for row in pack])
            labels[line, : len(taught)][taught] = found["input_ids"][line, : len(taught)][taught]
        return {name: torch.from_numpy(array) for name, array in (found | {"labels": labels}).items()}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, length, vocabulary) in the model's compute dtype."""
        return model(**_given(batch), use_cache=False).logits

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        shifted = logits[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(shifted, batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not fuses_loss(model):
            return self.loss(self.forward(model, batch), batch)
        return model(**_given(batch), labels=batch["labels"], use_cache=False, num_items_in_batch=1).loss

    def meter(self) -> "LanguageMeter":
        return LanguageMeter(self)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        raise NotImplementedError("a causal LM answers with text")

    def answers(self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int) -> list[str]:
        prompts = [prompt_and_answer(example, self.tokenizer)[0] for example in examples]
        if not prompts:
            raise DataError("There are no rows to predict.", "Give a file with rows.")
        templated = [is_conversation(example) for example in examples]
        return generate_all(model, self.tokenizer, prompts, settings.max_new_tokens, size, templated=templated)

    def judge_answers(
        self, model: nn.Module, examples: list[Example], settings: EvaluationConfig, size: int
    ) -> dict[str, Any]:
        return exact_match(model, self.tokenizer, examples, settings.max_new_tokens, size, settings.answer)

    def probe(self, model: nn.Module) -> Batch:
        return probe_tokens(model)

    def plain(self, path: str, **settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, **settings)

    def plain_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.forward(model, batch)

    def as_plain(self, model: nn.Module) -> None:
        """Nothing: the class is transformers' own."""


class LanguageMeter:
    """loss (nats per supervised token), perplexity, bits_per_byte (of supervised text), token_accuracy."""

    def __init__(self, task: CausalLM) -> None:
        self.task = task
        self.nats = self.tokens = self.right = self.text_bytes = 0.0

    def update(self, logits: Tensor, batch: Batch) -> None:
        targets = batch["labels"][:, 1:]
        nats = float(self.task.loss(logits, batch))
        right = float((logits[:, :-1].argmax(-1) == targets).sum())
        self.nats, self.right = self.nats + nats, self.right + right  # at the end: see evaluation, on memory
        self.tokens += float((targets != IGNORED).sum())
        self.text_bytes += float(batch["text_bytes"])

    def compute(self) -> dict[str, Any]:
        loss = self.nats / self.tokens
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": self.nats / math.log(2) / self.text_bytes if self.text_bytes else None,
            "token_accuracy": self.right / self.tokens,
            "tokens": int(self.tokens),
        }


def _given(batch: Batch) -> Batch:
    """What tells a model which tokens see which: a mask, or the positions of packed samples."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def _after_first(supervised: np.ndarray) -> np.ndarray:
    """Supervision of one sample without its first token, whose predecessor in a pack is another sample's last."""
    taught = supervised.astype(bool)
    taught[:1] = False
    return taught


def _turns(asked: str) -> Literal["assistant", "last", "all"]:
    return "last" if asked == "last" else "all" if asked == "all" else "assistant"


def _nothing_new(model: PreTrainedModel, name: str) -> bool:
    return False
