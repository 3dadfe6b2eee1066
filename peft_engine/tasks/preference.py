"""Preference tuning and reward models: what a row weighs here, and what the trained model is used as afterwards.

TRL's trainers do the training (`preference_run`); a dpo, orpo or kto run leaves a causal LM, a reward run a scorer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backbone import Backbone
from ..config import Config
from ..data.encoding import EncodedRow
from ..data.formats import Example
from ..data.labels import Labels
from .base import Batch
from .causal_lm import CausalLM
from .text_classification import TextClassification

SIDES = ("chosen", "rejected", "completion")


class Preference(CausalLM):
    """dpo, orpo and kto."""

    def __init__(self, config: Config, labels: Labels | None = None) -> None:
        super().__init__(config, labels)
        # KTO's eval has no accuracy: its rewards' margin is what it maximises
        self.primary = "rewards/margins" if config.task == "kto" else "rewards/accuracies"
        self.maximize = True

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"task": f"{self.config.task} 1"}

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        """One row, as long as its longer side with the prompt; for counts, lengths and the refusal of too long ones."""
        if not any(side in example for side in SIDES):
            return super().encode(example, where)
        return _widest([super(Preference, self).encode(side, where) for side in sides(example)])

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        return super().mask(next(sides(example)) if any(s in example for s in SIDES) else example, where)


class Reward(TextClassification):
    """A score per text: a linear head on the last token, trained on pairs."""

    def __init__(self, config: Config, labels: Labels | None = None) -> None:
        super().__init__(config, labels or Labels("regression", []))
        self.primary = "accuracy"

    def load(self, device: torch.device) -> Backbone:
        backbone = super().load(device)
        backbone.model.config.problem_type = None  # TRL's trainer makes the loss
        return backbone

    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint() | {"task": "reward 1"}

    def encode(self, example: Example, where: str) -> list[EncodedRow] | str:
        texts = [self._text(side) for side in sides(example)] if "chosen" in example else [self._text(example)]
        return _widest([super(Reward, self).encode({"text": text}, where) for text in texts])

    def mask(self, example: Example, where: str) -> tuple[list[int], list[bool]]:
        side = next(sides(example)) if "chosen" in example else example
        return super().mask({"text": self._text(side)}, where)

    def predictions(self, logits: Tensor, batch: Batch) -> list[dict[str, Any]]:
        return [{"predicted": float(score)} for score in logits.float().squeeze(-1).cpu()]

    def training_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        raise NotImplementedError("TRL's RewardTrainer makes the loss")

    def _text(self, example: Example) -> str:
        """What TRL's RewardTrainer makes of a side: templated, or plain and closed by the end-of-text token."""
        turns = example.get("messages") or example.get("prompt")
        if isinstance(turns, list):
            whole = [*turns, *example.get("completion", [])] if "messages" not in example else turns
            return str(self.tokenizer.apply_chat_template(whole, tools=example.get("tools"), tokenize=False))
        text = str(example.get("text", "")) or str(example.get("prompt", "")) + str(example.get("completion", ""))
        end = self.tokenizer.eos_token or ""
        return text if not end or text.endswith(end) else text + end


def sides(example: Example) -> Iterator[Example]:
    """The answers of a row, each as an example of its own: chosen, then rejected; or its one completion."""
    for part in SIDES:
        if part not in example:
            continue
        answer, prompt = example[part], example.get("prompt")
        tools = {"tools": example["tools"]} if "tools" in example else {}
        if prompt is not None:
            yield {"prompt": prompt, "completion": answer} | tools
        elif isinstance(answer, list):
            yield {"messages": answer} | tools
        else:
            yield {"text": answer}


def over_rows(batches: dict[str, list[float]], labels: list[bool], size: int) -> dict[str, float]:
    """KTO's rewards as means over the rows of a split: TRL's are over batches, and leave out a side that one lacks.

    Args:
        batches: a value per batch that holds good (chosen), or bad (rejected), answers.
        labels: of the rows, in their order.
        size: rows of a batch; the last may be smaller.
    """
    found = {}
    pieces = [labels[i : i + size] for i in range(0, len(labels), size)]
    for side, wanted in (("chosen", True), ("rejected", False)):
        counts = [n for n in (sum(bool(label) == wanted for label in piece) for piece in pieces) if n]
        for name in (f"rewards/{side}", f"logps/{side}"):
            found[name] = sum(v * n for v, n in zip(batches[name], counts, strict=True)) / sum(counts)
    return found | {"rewards/margins": found["rewards/chosen"] - found["rewards/rejected"]}


def _widest(found: list[list[EncodedRow] | str]) -> list[EncodedRow] | str:
    """The longest sequence among a row's sides, or why one of them teaches nothing."""
    rows: list[EncodedRow] = []
    for side in found:
        if isinstance(side, str):
            return side
        rows += side
    longest = max(rows, key=lambda row: len(row.input_ids))
    return [EncodedRow(longest.input_ids, 1, longest.columns, any(row.truncated for row in rows))]
