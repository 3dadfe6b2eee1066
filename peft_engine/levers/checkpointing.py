"""Gradient checkpointing of all layers or of some: such a layer keeps its input alone and runs again in backward.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". transformers' layers do it, one flag on each.
"""

import re
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import ConfigError

SETTING = "training.gradient_checkpointing"


def checkpoint_layers(model: Any, chosen: bool | int | list[str]) -> str:
    """Let a model's layers be checkpointed, in place; the non-reentrant kind.

    Args:
        model: a transformers model.
        chosen: True for all layers; k for every k-th of each stack (encoder, decoder), from its first on; regular
            expressions for those whose full name one of them finds.

    Returns:
        How many layers of how many, for run.json.

    Raises:
        ConfigError: the model does not support it, or some layers were asked for and it can't tell them apart, or an
            expression finds none.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(f"{SETTING}: {type(model).__name__} does not support it.", "Set it to false.")
    # the reentrant kind gives frozen embeddings' adapters no gradient (trap 6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)}
    if chosen is True:
        return f"all {len(layers)} layers" if layers else "all layers"
    if not layers:
        raise ConfigError(f"{SETTING}: {type(model).__name__} can't checkpoint some of its layers.", "Set it to true.")
    kept = _named(layers, chosen) if isinstance(chosen, list | tuple) else _every(layers, chosen)
    for name, layer in layers.items():
        layer.gradient_checkpointing = name in kept
    return f"{len(kept)} of {len(layers)} layers"


def hold_choice(model: Any) -> None:
    """Let nobody else switch checkpointing, in place. TRL does so round its reference model, and has all layers
    checkpointed after it; without gradients a checkpointed layer runs as any other.
    """
    model.gradient_checkpointing_enable = model.gradient_checkpointing_disable = lambda *_, **__: None


def _every(layers: dict[str, Any], k: int) -> set[str]:
    stacks: dict[str, list[str]] = {}
    for name in layers:
        stacks.setdefault(name.rpartition(".")[0], []).append(name)
    return {name for stack in stacks.values() for name in stack[::k]}


def _named(layers: dict[str, Any], patterns: list[str]) -> set[str]:
    found = {pattern: {name for name in layers if re.search(pattern, name)} for pattern in patterns}
    nothing = [pattern for pattern, names in found.items() if not names]
    if nothing:
        first, *_, last = [*layers, *layers]
        raise ConfigError(
            f"{SETTING}: {nothing[0]} finds none of the model's {len(layers)} layers, named {first} to {last}.",
            "Name some of them, or give a number k for every k-th.",
        )
    return set().union(*found.values())
