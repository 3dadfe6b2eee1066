"""Judge and use a model: metrics over a split, predictions, generated text."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from .data.chat import render_prompt, stop_token_ids
from .data.encoding import EncodedSet
from .data.formats import Example
from .errors import OutOfMemory
from .runtime import Runtime
from .tasks.base import Task, to_device
from .tasks.class_metrics import decide, probabilities
from .tasks.text_classification import TextClassification
from .training.guards import is_out_of_memory


def evaluate_split(model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime) -> dict[str, Any]:
    """Metrics of a model over a split, batch by batch, longest first; logits are not kept (trap 23).

    Halves the batch on out-of-memory. The model must be in eval mode.
    """
    meter = task.meter()
    for logits, batch, _ in _forward(model, task, data, batch_size, runtime):
        meter.update(logits, batch)
    return meter.compute()


def predict_classes(
    model: nn.Module, task: TextClassification, data: EncodedSet, batch_size: int, runtime: Runtime
) -> list[dict[str, Any]]:
    """Label and probabilities (or value) of every sequence, in the order of the data."""
    found: list[dict[str, Any]] = [{} for _ in range(len(data))]
    names, kind = task.labels.names, task.labels.kind
    for logits, _, rows in _forward(model, task, data, batch_size, runtime):
        decided = decide(logits, kind).cpu().tolist()
        shares = probabilities(logits, kind).cpu().tolist()
        for row, choice, share in zip(rows, decided, shares, strict=True):
            if kind == "regression":
                found[int(row)] = {"value": choice}
                continue
            label = names[choice] if kind == "single" else [name for name, on in zip(names, choice, strict=True) if on]
            found[int(row)] = {"label": label, "probabilities": dict(zip(names, share, strict=True))}
    return found


def _forward(
    model: nn.Module, task: Task, data: EncodedSet, batch_size: int, runtime: Runtime
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor], np.ndarray]]:
    """(logits, batch, rows) over the whole split, longest rows first so that memory is tried at once."""
    order = np.argsort(-data.lengths, kind="stable")
    start, size = 0, batch_size
    while start < len(order):
        rows = order[start : start + size]
        try:
            batch = to_device(task.collate(data, rows), runtime.device)
            with torch.no_grad(), runtime.accelerator.autocast():
                logits = task.forward(model, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    f"Memory ran out evaluating one sequence of {int(data.lengths[rows].max())} tokens.",
                    "Lower data.max_length.",
                ) from error
            size = max(1, size // 2)
            continue
        yield logits, batch, rows
        start += len(rows)


def prompt_and_answer(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str | None]:
    """The text to continue, and the reference answer where the row has one.

    Messages that end with an assistant turn are continued before it.
    """
    if "messages" in example or isinstance(example.get("prompt"), list):
        messages = example.get("messages") or [*example["prompt"], *example.get("completion", [])]
        answer = None
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1].get("content")
        return render_prompt(tokenizer, messages, example.get("tools")), answer
    if "prompt" in example:
        return example["prompt"], example.get("completion")
    return example["text"], None


def generate_text(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    *,
    templated: bool,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Continue prompts, padded on the left by position. Greedy at temperature 0.

    Args:
        templated: the prompts come from a chat template, which already holds the special tokens (trap 18).

    Returns:
        The new text of each, special tokens left out.
    """
    encoded = [tokenizer(text, add_special_tokens=not templated)["input_ids"] for text in prompts]
    longest = max(map(len, encoded))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    device = next(model.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=fill, streamer=streamer,
            eos_token_id=stop_ids(model, tokenizer), use_cache=True, **sampling,
        )  # fmt: skip
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Where generation stops: the model's own stop tokens, the tokenizer's, and what closes a turn in its template."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [stated] if isinstance(stated, int) else list(stated or [])
    return sorted({*found, *stop_token_ids(tokenizer)}) or None


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: list[Example], max_new_tokens: int, batch_size: int
) -> dict[str, Any]:
    """Share of rows whose generated answer is the reference, both stripped of outer white space."""
    pairs = [prompt_and_answer(example, tokenizer) for example in examples]
    pairs = [(prompt, answer) for prompt, answer in pairs if answer]
    templated = bool(examples) and ("messages" in examples[0] or isinstance(examples[0].get("prompt"), list))
    right = 0
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        texts = generate_text(model, tokenizer, [p for p, _ in part], max_new_tokens, templated=templated)
        right += sum(text.strip() == str(answer).strip() for text, (_, answer) in zip(texts, part, strict=True))
    return {"exact_match": right / len(pairs), "generated_rows": len(pairs)} if pairs else {}
