"""Checks of `adapter.options`: they must exist, must not repeat settings of ours, and peft must take them together."""

import difflib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_methods import BOTTLENECK, ENGINE_SETS, peft_names, peft_type, plain_fields

OUR_NAMES = {
    "peft_type": "adapter.method",
    "task_type": "task",
    "base_model_name_or_path": "model.path",
    "revision": "model.revision",
}
"""peft's fields that are settings of ours with every method."""
ALWAYS_ENGINE = ("inference_mode", "peft_version", "auto_mapping")
ELSEWHERE = {
    ("lora", "kasa_config"): "its loss term is not part of the engine's loss",
    ("lora", "monteclora_config"): "its loss term is not part of the engine's loss",
    ("adamss", "use_asa"): "its masks need a call after every step that the engine does not make",
    ("cpt", "opt_weighted_loss_type"): "it is part of peft's own loss, and the engine's is another",
}
"""Options that would silently do nothing here."""
NEEDS_DATA = {"eva": "eva", "lora-ga": "lora_ga"}
"""Starts of LoRA that are computed from training batches, with peft's names."""


def peft_config_class(method: str) -> Any:
    """peft's config class of a method."""
    from peft import PeftType  # slow: only where it is needed
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    name = peft_type(method)
    assert name is not None
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[name]]


def option_faults(method: str, adapter: Mapping[str, Any], steps: int | None) -> Iterator[tuple[str | None, str]]:
    """(option, what is wrong with it); None for the option where they don't go together.

    Args:
        adapter: the settings of `adapter`, defaults filled in.
        steps: of `training.steps`.
    """
    if method in BOTTLENECK:
        yield from _bottleneck(method, adapter["options"])
        return
    cls = peft_config_class(method)
    ours = OUR_NAMES | peft_names(method)
    engine = (*ALWAYS_ENGINE, *ENGINE_SETS.get(method, ()))
    free = sorted(set(cls.__dataclass_fields__) - set(ours) - set(engine))
    refused = False
    for key in adapter["options"]:
        text = None
        if key in ours:
            text = f"is a setting of its own here; write {ours[key]}"
        elif (method, key) in ELSEWHERE and adapter["options"][key] not in (None, False, "none"):
            text = f"can't be used: {ELSEWHERE[method, key]}; remove it"
        elif key in engine:
            text = "is set by the engine; remove it"
        elif key not in free:
            near = difflib.get_close_matches(key, [*free, *ours], n=1)
            hint = f"nearest: {ours.get(near[0], near[0])}" if near else f"it has {', '.join(free)}"
            text = f"peft's {cls.__name__} has no such field; {hint}"
        if text:
            refused = True
            yield key, text
    if refused:
        return
    try:
        with warnings.catch_warnings(action="ignore"):
            cls(**_trial(method, adapter, steps))
    except (TypeError, ValueError, AssertionError, ImportError) as error:
        yield None, f"peft refuses these settings: {' '.join(str(error).split())}"


def _trial(method: str, adapter: Mapping[str, Any], steps: int | None) -> dict[str, Any]:
    """What peft's config would get, as far as it is known without a model."""
    fields = plain_fields(method, adapter)
    if method == "adalora":
        fields["total_step"] = steps or 10**9
    targets, layers, init = adapter["targets"], adapter["layers"], adapter["init"]
    if "target_modules" in peft_names(method):
        fields["target_modules"] = targets if isinstance(targets, list) else ["linear"]
    if method == "ia3" and not isinstance(targets, list):
        fields["target_modules"] = None  # feedforward_modules is compared with the real ones at injection
    if method == "lora":
        fields["use_dora"] = adapter["dora"]
        fields["init_lora_weights"] = True if init in ("default", "loftq") else NEEDS_DATA.get(init, init)
        fields["target_modules"] = targets if isinstance(targets, list) else None
        fields["layers_to_transform"] = layers if isinstance(layers, list) else None
        if adapter["init"] == "lora-ga" and "lora_ga_config" not in fields:
            from peft import LoraGAConfig

            fields["lora_ga_config"] = LoraGAConfig()
    return fields


def _bottleneck(method: str, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in options.items():
        if key != "activation":
            yield key, f"{method} has no such option; it has activation"
            continue
        from transformers.activations import ACT2FN  # slow: only where it is needed

        if value not in ACT2FN:
            near = ", ".join(difflib.get_close_matches(str(value), list(ACT2FN), n=3)) or "relu, gelu, silu"
            yield key, f"got {value}, expected an activation of transformers such as {near}"
