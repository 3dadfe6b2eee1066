"""LoRA and its variants, injected by the peft library."""

import math
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..config import Config
from ..errors import ConfigError
from ..runtime import seed_everything
from .group import Group, Member, MemberSpec, initialise, plain_name
from .targets import find_modules_to_save, find_targets, shorten


def lora(backbone: Backbone, config: Config, specs: list[MemberSpec]) -> Group:
    """Inject one LoRA adapter per member; adapters are fp32 whatever the backbone's dtype (trap 17)."""
    if len(specs) > 1 and moves_weights(config.adapter.init):
        raise ConfigError(
            f"adapter.init: {config.adapter.init} moves part of the frozen weight into the adapter, "
            "so members can't share it.",
            "Use init: default for a group.",
        )
    settings = peft_settings(backbone, config)
    std = getattr(backbone.model.config, "initializer_range", 0.02)
    model: Any = None
    for spec in specs:
        seed_everything(spec.seed, 2)
        try:
            if model is None:
                model = get_peft_model(backbone.model, deepcopy(settings), adapter_name=spec.name)
            else:
                model.add_adapter(spec.name, deepcopy(settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"peft refuses this adapter: {error}", "Correct the adapter section.") from error
        for name in backbone.new_modules:
            wrapper = model.get_submodule(f"base_model.model.{name}")
            assert isinstance(wrapper, ModulesToSaveWrapper), name
            initialise(wrapper.modules_to_save[spec.name], std, spec.seed)
    members = [_member(model, spec) for spec in specs]
    if moves_weights(config.adapter.init):
        members[0].initial = {name: t.detach().clone() for name, t in members[0].tensors.items() if ".lora_" in name}
    group = Group(backbone, model, "lora", members)
    group.activate(members[0])
    return group


def peft_settings(backbone: Backbone, config: Config) -> LoraConfig:
    """The config of peft for `adapter`."""
    asked = config.adapter
    targets = find_targets(backbone, asked)
    init: bool | str = True if asked.init == "default" else asked.init
    try:
        return LoraConfig(
            task_type=backbone.peft_task,
            r=asked.rank,
            lora_alpha=asked.alpha,  # type: ignore[arg-type]  # peft scales by it, fractions work
            lora_dropout=asked.dropout,
            target_modules=shorten(targets, backbone),
            rank_pattern=dict(asked.rank_pattern),
            alpha_pattern=dict(asked.alpha_pattern),
            modules_to_save=find_modules_to_save(backbone, asked.modules_to_save) or None,
            use_rslora=asked.rslora,
            use_dora=asked.dora,
            init_lora_weights=init,  # type: ignore[arg-type]
            bias=asked.bias,
            fan_in_fan_out=any(isinstance(backbone.model.get_submodule(name), Conv1D) for name in targets),
            **asked.options,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft refuses this adapter: {error}", "Correct adapter.options.") from error


def moves_weights(init: str) -> bool:
    """Whether this start takes the initial B·A out of the frozen weight."""
    return init.startswith(("pissa", "olora"))


def without_moved_weights(
    tensors: dict[str, Tensor], initial: dict[str, Tensor], settings: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The same update as an adapter for the original weights: rank 2r, B·A - B₀·A₀ = [B, -B₀]·[A; A₀].

    Keys of `tensors` and `initial` are the adapter file's; only `lora_A` and `lora_B` change. The scale alpha/r (or
    alpha/sqrt(r)) is kept by widening alpha with the rank.
    """
    joined = dict(tensors)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            joined[name] = torch.cat([tensor, initial[name].to(tensor.device)], 0)
        elif ".lora_B." in name:
            joined[name] = torch.cat([tensor, -initial[name].to(tensor.device)], 1)
    wide = deepcopy(settings)
    factor = math.sqrt(2) if settings.use_rslora else 2
    wide.r *= 2
    wide.lora_alpha *= factor  # type: ignore[assignment]
    wide.rank_pattern = {k: 2 * v for k, v in (settings.rank_pattern or {}).items()}
    wide.alpha_pattern = {k: factor * v for k, v in (settings.alpha_pattern or {}).items()}
    wide.init_lora_weights = True
    return joined, wide


def _member(model: Any, spec: MemberSpec) -> Member:
    model.set_adapter(spec.name)
    tensors = {plain_name(name, spec.name): p for name, p in model.named_parameters() if p.requires_grad}
    for tensor in tensors.values():
        tensor.data = tensor.data.float()  # peft widens its adapters, not modules_to_save and biases (trap 17)
    return Member(spec, tensors)
