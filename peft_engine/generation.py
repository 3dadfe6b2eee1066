"""Text that a model makes: prompts of rows, greedy or sampled continuation, exact match."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TextStreamer

from . import processes
from .adapters.sharding import is_sharded
from .answers import AnswerKind, is_right
from .backbone import positions_of
from .data.chat import Rendered, encode_rendered, render_prompt, stop_token_ids
from .data.formats import Example, is_conversation
from .errors import DataError


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
    templated: bool | Sequence[bool],
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Continue prompts, padded on the left by position. Greedy at temperature 0.

    Args:
        max_new_tokens: at most; fewer where the model's positions end.
        templated: the prompts come from a chat template, which already holds the special tokens (trap 18); or of each.

    Returns:
        The new text of each, special tokens left out.

    Raises:
        DataError: a prompt fills the model's positions.
    """
    # by the road of training: one BOS, and no EOS after the prompt from tokenizers that add one
    flags = [templated] * len(prompts) if isinstance(templated, bool) else templated
    sides = zip(prompts, flags, strict=True)
    encoded = [encode_rendered(tokenizer, Rendered(t, []), "the prompt", not flag)[0] for t, flag in sides]
    longest = max(map(len, encoded))
    positions = positions_of(model)
    if positions is not None and longest >= positions:
        raise DataError(
            f"A prompt has {longest} tokens, the model has {positions} positions: there is no room to answer.",
            "Shorten the prompt.",
        )
    room = max_new_tokens if positions is None else min(max_new_tokens, positions - longest)
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    device = next(model.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.no_grad(), matched(model):
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=room, pad_token_id=fill, streamer=streamer,
            eos_token_id=stop_ids(model, tokenizer), use_cache=True,
            synced_gpus=is_sharded(model), **sampling,
        )  # fmt: skip
    return [str(tokenizer.decode(row[longest:], skip_special_tokens=True)) for row in out]


def matched(model: nn.Module) -> torch.autocast:
    """Autocast to the backbone's dtype where fp32 tensors were trained inside a narrower one, else no autocast.

    LoRA's own products need none: peft casts their input.
    """
    floats = [(name, p) for name, p in model.named_parameters() if p.is_floating_point()]  # codes are integers
    dtypes = {p.dtype for name, p in floats if ".lora_" not in name}
    narrow = next(iter(dtypes - {torch.float32}), torch.bfloat16)
    return torch.autocast(next(model.parameters()).device.type, narrow, enabled=len(dtypes) > 1)


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Where generation stops: the model's own stop tokens, the tokenizer's, and what closes a turn in its template."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [stated] if isinstance(stated, int) else list(stated or [])
    return sorted({*found, *stop_token_ids(tokenizer)}) or None


def exact_match(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    max_new_tokens: int,
    batch_size: int,
    kind: AnswerKind = "text",
) -> dict[str, Any]:
    """Share of rows whose generated answer is the reference's (`answers.is_right`)."""
    pairs = [prompt_and_answer(example, tokenizer) for example in examples]
    templated = [is_conversation(example) for example, (_, answer) in zip(examples, pairs, strict=True) if answer]
    pairs = [(prompt, answer) for prompt, answer in pairs if answer]
    prompts = [prompt for prompt, _ in pairs]
    texts = generate_all(model, tokenizer, prompts, max_new_tokens, batch_size, templated=templated)
    right = sum(is_right(text, str(answer), kind) for text, (_, answer) in zip(texts, pairs, strict=True))
    return {"exact_match": right / len(pairs), "generated_rows": len(pairs)} if pairs else {}


def generate_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    batch_size: int,
    *,
    templated: Sequence[bool],
) -> list[str]:
    """`generate_text`, `batch_size` prompts at once; several processes do a share each.

    Args:
        templated: of each prompt.
    """
    given = list(zip(prompts, templated, strict=True))
    rounds = math.ceil(math.ceil(len(prompts) / processes.world()) / batch_size)

    def work(own: list[tuple[str, bool]]) -> list[str]:
        texts: list[str] = []
        for start in range(0, rounds * batch_size, batch_size):
            part = own[start : start + batch_size]
            if part or is_sharded(model):  # a sharded model runs in all processes at once
                together, flags = zip(*(part or given[:1]), strict=True)
                found = generate_text(model, tokenizer, list(together), max_new_tokens, templated=flags)
                texts += found[: len(part)]
        return texts

    return processes.spread(given, work)
