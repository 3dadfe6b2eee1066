"""Adapter methods by name, and which settings of `adapter` each one has: a table without the libraries.

A test compares it with the installed peft. A setting belongs to a method only where it means there what it means for
LoRA; what peft calls alike but means otherwise (vera's `r`, miss's `r`, lokr's `module_dropout`) is written under
`adapter.options` by peft's own name.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

MethodName = Literal[
    "lora",
    "full",
    "head",
    "bitfit",
    "houlsby",
    "pfeiffer",
    "parallel",
    "adalora",
    "adamss",
    "adaption-prompt",
    "beft",
    "boft",
    "c3a",
    "cartridge",
    "cpt",
    "deft",
    "delora",
    "fourierft",
    "frod",
    "glora",
    "gralora",
    "hira",
    "hra",
    "ia3",
    "layernorm",
    "lily",
    "loha",
    "lokr",
    "miss",
    "multitask-prompt",
    "oft",
    "osf",
    "p-tuning",
    "peanut",
    "poly",
    "prefix",
    "prompt",
    "psoft",
    "pvera",
    "randlora",
    "road",
    "shadow",
    "shira",
    "supertuning",
    "tinylora",
    "trainable-tokens",
    "unilora",
    "vblora",
    "vera",
    "waveft",
    "xlora",
]
WHOLE_TENSORS = ("full", "head", "bitfit")
"""Methods that train tensors of the backbone itself."""
BOTTLENECK = ("houlsby", "pfeiffer", "parallel")
"""Bottleneck adapters: modules of ours beside or after the backbone's."""
PEFT_TYPES = {
    "layernorm": "LN_TUNING",
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "multitask-prompt": "MULTITASK_PROMPT_TUNING",
}
"""Where our name is not peft's own in lower case with dashes."""


MERGES = (
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""How `merge` adds adapters up."""

PROMPTS = ("prefix", "prompt", "p-tuning", "multitask-prompt", "cpt", "cartridge")
"""Methods that train virtual tokens before the input (or before every layer's keys and values)."""
VIRTUAL_TOKENS = 20
"""How many, where `adapter.options` doesn't say."""

_PLACES = {"targets": "target_modules", "layers": "layers_to_transform", "modules_to_save": "modules_to_save"}
_LORA = _PLACES | {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "init": "init_lora_weights",
    "bias": "bias",
    "lora_plus_ratio": "",
}
_HEAD = {"modules_to_save": "modules_to_save"}
_RANKED = _PLACES | {"rank": "r"}
_LYCORIS = _RANKED | {"alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
_BOTTLENECK = {"rank": "", "layers": "", "modules_to_save": ""}

SETTINGS: dict[str, dict[str, str]] = {
    "lora": _LORA,
    "adalora": _PLACES | {"rank": "target_r", "alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias"},
    "loha": _LYCORIS,
    "lokr": _LYCORIS,
    "hira": _RANKED | {"dropout": "hira_dropout", "rank_pattern": "rank_pattern"},
    "gralora": _RANKED | {"alpha": "alpha", "dropout": "gralora_dropout"},
    "delora": _RANKED | {"rank_pattern": "rank_pattern"},
    "deft": _RANKED | {"dropout": "deft_dropout"},
    "glora": _RANKED,
    "hra": _RANKED,
    "shira": _RANKED,
    "poly": _RANKED,
    **{
        name: _PLACES | {"dropout": f"{name}_dropout"}
        for name in ("vera", "pvera", "randlora", "miss", "frod", "psoft", "tinylora", "unilora", "vblora")
    },
    **dict.fromkeys(
        (
            "adamss",
            "beft",
            "boft",
            "c3a",
            "fourierft",
            "ia3",
            "layernorm",
            "lily",
            "oft",
            "osf",
            "peanut",
            "road",
            "supertuning",
            "waveft",
        ),
        _PLACES,
    ),
    **dict.fromkeys(PROMPTS, _HEAD),
    "shadow": _HEAD,
    "trainable-tokens": {},
    "adaption-prompt": {},
    "xlora": {},
    "houlsby": _BOTTLENECK,
    "pfeiffer": _BOTTLENECK,
    "parallel": _BOTTLENECK | {"alpha": ""},
    "full": {},
    "head": {},
    "bitfit": {},
}
"""Method → its settings of `adapter`, with peft's names for them ("" where peft has none)."""

ADAPTER_SETTINGS = tuple(_LORA)
"""Settings of `adapter` that not every method has; `options` is another."""

ENGINE_SETS = {"adalora": ("total_step",)}
"""peft's fields that follow from the run."""


def peft_type(method: str) -> str | None:
    """The name of peft's `PeftType`, None for a method that is not peft's."""
    if method in WHOLE_TENSORS or method in BOTTLENECK:
        return None
    return PEFT_TYPES.get(method, method.upper().replace("-", "_"))


def names() -> tuple[str, ...]:
    return get_args(MethodName)


def owners(setting: str) -> list[str]:
    """Methods that have a setting of `adapter`."""
    return [name for name in names() if setting in SETTINGS[name]]


def peft_names(method: str) -> dict[str, str]:
    """peft's field → the setting of ours that it is, for one method."""
    return {theirs: f"adapter.{ours}" for ours, theirs in SETTINGS[method].items() if theirs}


def plain_fields(method: str, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of peft's config that are numbers of ours, `options` on top; not where it goes, nor how it starts.

    Args:
        adapter: the settings of `adapter`, by name.
    """
    left_out = (*_PLACES, "rslora", "dora", "init", "lora_plus_ratio")
    fields = {theirs: adapter[ours] for ours, theirs in SETTINGS[method].items() if ours not in left_out and theirs}
    if method == "adalora":
        fields["init_r"] = -(-3 * adapter["rank"] // 2)  # peft's own proportion: 12 for 8
    if method in PROMPTS and method != "cpt":
        fields["num_virtual_tokens"] = VIRTUAL_TOKENS
    return fields | adapter["options"]
