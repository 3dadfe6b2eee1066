"""What the memory levers can't be combined with."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_frozen import PREFERENCE


def memory_faults(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(path of the setting, what is wrong with it).

    Args:
        values: all settings, defaults filled in; required ones may be missing.
    """
    training, model = values.get("training") or {}, values.get("model") or {}
    yield from _checkpointing(training.get("gradient_checkpointing"))
    yield from _on_a_card(values.get("device"), training)
    if training.get("gradient_checkpointing") and (values.get("adapter") or {}).get("method") == "prefix":
        text = "runs layers again without the keys and values that adapter.method prefix gives them; set it to false"
        yield ("training", "gradient_checkpointing"), f"{text}, or take another method, such as prompt"
    task = values.get("task")
    for section, name, off in (
        ("training", "activation_offload", "none"),
        ("training", "optimizer_in_backward", False),
        ("model", "offload", "none"),
    ):
        if values.get(section) and values[section].get(name) not in (None, off) and task in PREFERENCE:
            yield (section, name), f"works in the engine's own loop, and task {task} trains in TRL's; remove it"
    if model.get("offload") == "layers":
        for name, text in _layers(values):
            yield ("model", "offload"), f"keeps frozen layers on the host, and {name}; {text}"
    if training.get("optimizer_in_backward"):
        for reason in _in_backward(values):
            yield ("training", "optimizer_in_backward"), f"updates a tensor once its gradient is there, and {reason}"


def _checkpointing(chosen: Any) -> Iterator[tuple[tuple[str | int, ...], str]]:
    path = ("training", "gradient_checkpointing")
    if chosen == []:
        yield path, "names no layer; false checkpoints none, true all"
    for number, pattern in enumerate(chosen if isinstance(chosen, list | tuple) else ()):
        try:
            re.compile(pattern)
        except re.error as error:
            yield (*path, number), f"got {pattern!r}, expected a regular expression: {error}"


def _on_a_card(device: Any, training: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What a device has no second memory for; `model.offload` is among `_layers`."""
    if device in (None, "auto", "cuda"):
        return
    if training.get("activation_offload") == "cpu":
        text = f"keeps saved tensors on the host, and device {device} has no memory but the host's; write none"
        yield ("training", "activation_offload"), text
    if str(training.get("optimizer")).startswith("paged"):
        text = f"got {training['optimizer']}, whose state lies in CUDA's unified memory, and device is {device}"
        yield ("training", "optimizer"), f"{text}; write adamw8bit, or adamw"


def _layers(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what speaks against layers on the host, what to do)."""
    compute, adapter = values["model"].get("frozen_compute"), values.get("adapter") or {}
    if adapter.get("method") == "full":
        yield "adapter.method full freezes none", "write none, or train lora"
    if adapter.get("init") in ("eva", "lora-ga"):
        yield f"adapter.init {adapter['init']} runs the model before they are there", "take another init"
    if values["model"].get("quantization") == "int8":
        yield "bitsandbytes leaves the scales of int8 weights behind there", "write model.quantization: nf4, or none"
    if compute not in (None, "full"):
        yield f"model.frozen_compute {compute} changes them", "leave one of the two out"
    if (values.get("training") or {}).get("parallel") == "fsdp":
        yield "training.parallel fsdp shares them out", "leave one of the two out"
    if values.get("device") not in (None, "auto", "cuda"):
        yield f"device {values['device']} has no memory but the host's", "write none"


def _in_backward(values: Mapping[str, Any]) -> Iterator[str]:
    training = values["training"]
    micro, batch = training.get("micro_batch_size"), training.get("batch_size")
    if training.get("max_grad_norm") is not None:
        limit = training["max_grad_norm"]
        yield f"max_grad_norm {limit} needs all gradients at once; set training.max_grad_norm: null"
    if isinstance(micro, int) and isinstance(batch, int) and micro < batch:
        yield (
            f"{micro} of {batch} sequences at once add up the gradients of several micro-batches; "
            "set training.micro_batch_size: auto, or batch_size as small"
        )
    if (values.get("data") or {}).get("packing"):
        yield "data.packing adds up the gradients of several packs; leave one of the two out"
    if training.get("ema_decay") is not None:
        yield "ema_decay keeps an average as large as the gradients that this saves; leave one of the two out"
    if training.get("precision") == "fp16":
        yield "fp16 looks at all gradients for its loss scale; set training.precision: bf16, or fp32"
    if (values.get("adapter") or {}).get("method") == "adalora":
        yield "adalora reads all gradients after the step; take another method"
