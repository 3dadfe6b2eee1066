"""Every other method of the peft library, injected by its own name. `lora.py` holds LoRA."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import Conv2d as LoraConv2d
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..config import Config
from ..config_methods import PROMPTS, SETTINGS, plain_fields
from ..config_options import peft_config_class
from ..errors import ConfigError
from ..runtime import seed_everything
from .adalora import RankAllocation
from .group import Group, Member, MemberSpec, initialise
from .lora import member_of, refuse_ambiguous_names
from .targets import find_modules_to_save, find_targets, shorten

REFUSALS = (
    ValueError,
    TypeError,
    NotImplementedError,
    AttributeError,
    KeyError,
    AssertionError,
    ImportError,
    IndexError,
)
"""What peft's methods raise at settings or models that they can't take."""


def peft_method(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Inject one adapter per member; what trains is fp32 whatever the backbone's dtype (trap 17).

    Raises:
        ConfigError: peft refuses the settings, the model or a second member, in its own words; the task's new head
            would not train; other modules than the targets would be adapted.
    """
    method = config.adapter.method
    if method == "shadow":
        raise ConfigError(
            "adapter.method: shadow trains its second road by a loss of its own inside peft's forward, which the "
            "engine's losses do not have.",
            "Use another method such as lora.",
        )
    refuse_ambiguous_names(backbone, specs)
    settings, targets = peft_settings(backbone, config)
    _refuse_without_layer(backbone, method, settings, targets)
    std = getattr(backbone.model.config, "initializer_range", 0.02)
    model: Any = None
    for spec in specs:
        seed_everything(spec.seed, 2)
        try:
            if model is None:
                model = get_peft_model(backbone.model, deepcopy(settings), adapter_name=spec.name)
            else:
                model.add_adapter(spec.name, deepcopy(settings))
        except REFUSALS as error:
            raise refusal(method, error) from error
        for name in backbone.new_modules:
            initialise(_own_copy(model.get_base_model().get_submodule(name), spec.name), std, spec.seed)
    _refuse_other_modules(model, method, targets)
    trim_prompts(model)
    members = [member_of(model, spec, [s.name for s in specs]) for spec in specs]
    _refuse_shared(method, members)
    if method == "adalora":
        members[0].allocation = RankAllocation(model, specs[0].name)
    group = Group(backbone, model, method, members)
    group.activate(members[0])
    return group


def refusal(method: str, error: Exception) -> ConfigError:
    """peft's own words as an error of ours."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return ConfigError(f"adapter.method: peft refuses {method} here: {text}.", "Correct the adapter section.")


def peft_settings(backbone: Backbone, config: Config) -> tuple[PeftConfig, list[str]]:
    """The config of peft for `adapter`, and the full names of the modules to adapt (none where peft finds them)."""
    asked, method = config.adapter, config.adapter.method
    cls, own = peft_config_class(method), SETTINGS[method]
    fields = plain_fields(method, asked.model_dump())
    targets: list[str] = []
    if "task_type" in cls.__dataclass_fields__:
        fields["task_type"] = backbone.peft_task
    if method in PROMPTS and backbone.peft_task is None:
        raise ConfigError(
            f"adapter.method: {method} puts virtual tokens before a text, and peft has no such form for "
            f"{type(backbone.model).__name__} in this task.",
            "Use another method such as lora.",
        )
    if "targets" in own:
        targets = find_targets(backbone, asked, norms=method == "layernorm")
        fields["target_modules"] = shorten(targets, backbone)
    if "fan_in_fan_out" in cls.__dataclass_fields__ and targets:
        fields["fan_in_fan_out"] = any(isinstance(backbone.model.get_submodule(n), Conv1D) for n in targets)
    if "modules_to_save" in own:
        fields["modules_to_save"] = find_modules_to_save(backbone, asked.modules_to_save) or None
    elif backbone.new_modules:
        raise ConfigError(
            f"adapter.method: peft's {method} trains nothing else, and {', '.join(backbone.new_modules)} of this task "
            "is new and must be trained.",
            "Use another method such as lora.",
        )
    if method == "ia3":
        fields.setdefault("feedforward_modules", [])  # every target's output is scaled
        _name_alike(fields, targets)
    if method == "oft":
        _refuse_overlapping_patches(backbone, targets)
    if method == "adalora":
        fields["total_step"] = 10**9  # the run's, as soon as it is known: Group.begin
    try:
        return cls(**fields), targets
    except REFUSALS as error:
        raise refusal(method, error) from error


def _name_alike(fields: dict[str, Any], targets: list[str]) -> None:
    """peft compares the names in ia3's `feedforward_modules` with those of the targets: in full where these are."""
    inputs, given = fields["feedforward_modules"], fields["target_modules"]
    if isinstance(inputs, list) and not set(inputs) <= set(given):
        ends = [[name for name in targets if f".{name}".endswith(f".{ending}")] for ending in inputs]
        if all(ends):
            fields["target_modules"] = targets
            fields["feedforward_modules"] = sorted({name for names in ends for name in names})


def adapted_names(model: PeftModel) -> set[str]:
    """Names, in the model below peft's wrappers, of the modules that hold an adapter."""
    return {name for name, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}


def _refuse_other_modules(model: PeftModel, method: str, targets: list[str]) -> None:
    """peft takes names by their ends: a full name may be the end of another one (trap 21)."""
    if not targets:
        return
    found = adapted_names(model)
    wrong = sorted(found - set(targets)) or sorted(set(targets) - found)
    if wrong:
        what = "also adapts" if found - set(targets) else "leaves out"
        raise ConfigError(
            f"adapter.targets: peft's {method} {what} {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more." if len(wrong) > 3 else "."),
            "Name modules that it takes, by endings that fit them only, or use another method.",
        )


def _refuse_without_layer(backbone: Backbone, method: str, settings: PeftConfig, targets: list[str]) -> None:
    """In place of a Conv1D stands a linear of bitsandbytes, which peft may have a layer for where it has none for the
    Conv1D of the model's own code: what trains there could never be merged."""
    modules: dict[str, Any] = {name: backbone.model.get_submodule(name) for name in targets}
    name = next((name for name, module in modules.items() if getattr(module, "source_cls", None) is Conv1D), None)
    if name is None:
        return
    asked: Any = deepcopy(settings)
    asked.target_modules, asked.modules_to_save = {"linear"}, None
    if hasattr(asked, "fan_in_fan_out"):
        asked.fan_in_fan_out = True
    own = nn.ModuleDict({"linear": Conv1D(modules[name].out_features, modules[name].in_features)})
    try:
        inject_adapter_in_model(asked, own)
    except REFUSALS as error:
        raise refusal(method, error) from error


def _refuse_overlapping_patches(backbone: Backbone, targets: list[str]) -> None:
    """peft's oft turns patches of the input and adds them up again, which is the input only where none overlap."""
    for name in targets:
        module = backbone.model.get_submodule(name)
        if isinstance(module, nn.Conv2d) and any(k > s for k, s in zip(module.kernel_size, module.stride, strict=True)):
            raise ConfigError(
                f"adapter.method: oft on {name} would change the model before any training: peft adds up the "
                "overlapping patches of a convolution.",
                "Target convolutions with a kernel of 1 (or a stride as large as the kernel), or use boft or lora.",
            )


def refuse_failing(group: Group, forward: Callable[[nn.Module], Any]) -> None:
    """Run the adapted model once without gradients, before any time is spent: some methods need what no task gives.

    Raises:
        ConfigError: with the exception's own words.
    """
    if not isinstance(group.model, PeftModel):
        return
    if group.method == "lora" and not any(isinstance(m, LoraConv2d) for m in group.model.modules()):
        return  # linears can't fail; MobileNet with tf_padding reads attributes that a wrapped convolution lacks
    with group.evaluating(group.members[0]) as model, torch.no_grad():
        try:
            forward(model)
        except REFUSALS as error:
            raise refusal(group.method, error) from error


def _refuse_shared(method: str, members: list[Member]) -> None:
    seen: dict[int, str] = {}
    for member in members:
        if member.tensors.keys() != members[0].tensors.keys():  # peft's lily gives a second adapter other sharing
            raise ConfigError(
                f"adapter.method: peft gives a second adapter of {method} other tensors than the first.",
                "Use lora for a group, or run the members one by one.",
            )
        for name, tensor in member.tensors.items():
            if seen.setdefault(id(tensor), member.spec.name) != member.spec.name:
                raise ConfigError(
                    f"adapter.method: members of {method} would share {name}, so they can't train side by side.",
                    "Use lora for a group, or run the members one by one.",
                )


def _own_copy(module: Any, adapter: str) -> nn.Module:
    """A member's copy of a module of `modules_to_save`."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None or adapter not in copies:
        raise ConfigError(f"adapter.method: peft does not train {type(module).__name__}, the new head.", "Use lora.")
    own: nn.Module = copies[adapter]
    return own


class TrimmedPrompts:
    """Mixin of a PeftModel whose virtual tokens lengthen the logits: they are cut off, so that every position is that
    of a token of the input.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As peft's, but logits of (rows, tokens of the input, classes)."""
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        logits = getattr(output, "logits", None)
        found = (kwargs.get(n) for n in ("decoder_input_ids", "labels", "input_ids", "inputs_embeds"))
        given = next((t for t in (*found, *args[:1]) if isinstance(t, Tensor) and t.dim() > 1), None)
        if isinstance(logits, Tensor) and logits.dim() == 3 and given is not None and logits.shape[1] > given.shape[1]:
            output.logits = logits[:, logits.shape[1] - given.shape[1] :]
        return output


def trim_prompts(model: PeftModel) -> None:
    """Give a model with virtual tokens the mixin above, in place."""
    if model.active_peft_config.is_prompt_learning:
        model.__class__ = type(f"Trimmed{type(model).__name__}", (TrimmedPrompts, type(model)), {})


def virtual_tokens(model: nn.Module) -> int:
    """Positions that an adapter takes beside those of the text."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return int(model.active_peft_config.num_virtual_tokens)
    return 0
