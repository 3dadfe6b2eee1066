"""The methods: which tensors train, and how they get onto the backbone.

`METHODS` is the table of those with code of their own; a method is a function (backbone, config, specs) → Group. All
others are peft's.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..backbone import Backbone, embeddings_of
from ..config import Config
from ..config_methods import BOTTLENECK, WHOLE_TENSORS
from ..errors import ConfigError
from .bottleneck import bottleneck
from .data_start import DataStart
from .group import Group, Member, MemberSpec, initialise
from .lora import lora
from .peft_methods import peft_method


def adapt(backbone: Backbone, config: Config, specs: list[MemberSpec], start: DataStart | None = None) -> Group:
    """Make `specs` into members over `backbone`, in place. All other weights are frozen.

    Args:
        start: the training batches, which some values of `adapter.init` read.

    Raises:
        ConfigError: nothing would train, a target matches nothing, or the method can't share its backbone.
    """
    if len(specs) > 1 and config.adapter.method in (*WHOLE_TENSORS, *BOTTLENECK):
        raise ConfigError(
            f"adapter.method: {config.adapter.method} trains tensors inside the backbone, so it holds one member, "
            f"got {len(specs)}.",
            "Use lora for a group, or run the members one by one.",
        )
    if config.adapter.method == "lora":
        return lora(backbone, config, specs, start)
    return METHODS.get(config.adapter.method, peft_method)(backbone, config, specs)


def full(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Every weight trains."""
    return _own_tensors(backbone, config, specs[0], lambda name: True)


def head(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Linear probe: only the modules that make the output train. A tied LM head is untied first."""
    _untie(backbone)
    if not backbone.head_modules:
        raise ConfigError("adapter.method: this model has no output head to train.", "Use lora.")
    return _own_tensors(backbone, config, specs[0], lambda name: _inside(name, backbone.head_modules))


def bitfit(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Bias terms (Ben Zaken et al. 2022), and a task's new head."""
    if not any(
        name.endswith(".bias") and not _inside(name, backbone.new_modules)
        for name, _ in backbone.model.named_parameters()
    ):
        raise ConfigError(
            f"adapter.method: bitfit trains biases, and {type(backbone.model).__name__} has none.", "Use lora."
        )
    return _own_tensors(
        backbone, config, specs[0], lambda name: name.endswith(".bias") or _inside(name, backbone.new_modules)
    )


METHODS: dict[str, Callable[[Backbone, Config, list[MemberSpec]], Group]] = {
    "full": full,
    "head": head,
    "bitfit": bitfit,
    **dict.fromkeys(BOTTLENECK, bottleneck),
}


def _own_tensors(backbone: Backbone, config: Config, spec: MemberSpec, trains: Callable[[str], bool]) -> Group:
    model = backbone.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # narrower weights round small updates to nothing (trap 17)
    std = getattr(model.config, "initializer_range", 0.02)
    for name in backbone.new_modules:
        initialise(model.get_submodule(name), std, spec.seed)
    tensors = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Group(backbone, model, config.adapter.method, [Member(spec, tensors)])


def _untie(backbone: Backbone) -> None:
    model = backbone.model
    ends: Any = embeddings_of(model)
    entry, output = ends
    if output is not None and entry is not None and output.weight is entry.weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
        model.config.tie_word_embeddings = False


def _inside(name: str, modules: list[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
