"""What a quantised backbone can't be combined with."""

from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_frozen import PREFERENCE
from peft_engine.config_methods import BOTTLENECK, PROMPTS

KINDS = ("nf4", "fp4", "int8")
"""Formats of bitsandbytes."""
METHODS = (
    "lora",
    "adalora",
    "ia3",
    "road",
    "randlora",
    "vera",
    "fourierft",
    "head",
    "layernorm",
    "trainable-tokens",
    *BOTTLENECK,
    *PROMPTS,
)
"""Methods whose layers never touch a frozen linear's weight but through its product, or have a form for bitsandbytes'
linears in peft."""


def quantised_faults(values: Mapping[str, Any], stored: str | None = None) -> Iterator[tuple[str, str]]:
    """(setting, dotted, and what is wrong with it).

    Args:
        values: all settings, defaults filled in; required ones may be missing.
        stored: the format in which the checkpoint holds its weights, where somebody has looked.
    """
    model, adapter = values.get("model") or {}, values.get("adapter") or {}
    kind, method = stored or model.get("quantization"), adapter.get("method")
    place, got, remedy = "model.quantization", f"got {kind}", "write none"
    if stored:
        place, got, remedy = "model.path", f"the checkpoint is stored in {kind}", "give the model in full precision"
    if kind in (None, "none"):
        if model.get("quantization_skip"):
            yield "model.quantization_skip", "has no effect with quantization none; set that to nf4, or remove this"
        if model.get("double_quantization") is False:
            yield "model.double_quantization", "has no effect with quantization none; set that to nf4, or remove this"
        return
    if kind == "int8" and model.get("double_quantization") is False:
        yield "model.double_quantization", "is for nf4 and fp4; int8 has a float32 for each row. Remove it"
    if model.get("frozen_compute") not in (None, "full"):
        yield (
            "model.frozen_compute",
            f"got {model['frozen_compute']} beside quantization {kind}; they are two formats for the same weights: "
            "take one of the two (nf4 for memory, int8 here for speed)",
        )
    if (values.get("training") or {}).get("parallel") == "fsdp":
        yield (
            "training.parallel",
            f"fsdp shares out weights as they are, and {kind} has scales beside them; write ddp",
        )
    if values.get("task") in PREFERENCE:
        yield place, f"{got}; task {values['task']} trains in the loop of TRL, here with weights in full precision only"
    if method == "full":
        yield place, f"{got}, and adapter.method full trains these weights; {remedy}, or take lora"
    if kind not in KINDS:  # by peft's own layers, of which it knows
        return
    if method is not None and method not in ("full", *METHODS):
        yield (
            place,
            f"{got}, and adapter.method {method} is not among those proved on quantised weights: {', '.join(METHODS)}",
        )
    if kind == "int8" and adapter.get("dora"):
        yield (
            "adapter.dora",
            "peft's DoRA loses the scales of int8 weights after the first forward; leave it out, or take nf4",
        )
    if adapter.get("bias") not in (None, "none"):
        yield "adapter.bias", f"got {adapter['bias']}; training biases over quantised weights is not proved. Write none"
    if str(adapter.get("init")) == "lora-ga":
        yield (
            "adapter.init",
            "lora-ga reads the gradient of weights, which quantised ones have none of; try loftq or eva",
        )
