"""Adapter methods by name, and which settings of `adapter` each one has: a table without the libraries.

A test compares it with the installed peft.
"""

from typing import Literal, get_args

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


def peft_type(method: str) -> str | None:
    """The name of peft's `PeftType`, None for a method that is not peft's."""
    if method in WHOLE_TENSORS or method in BOTTLENECK:
        return None
    return PEFT_TYPES.get(method, method.upper().replace("-", "_"))


def names() -> tuple[str, ...]:
    return get_args(MethodName)
