"""LoRA and its variants, injected by the peft library."""

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from ..backbone import Backbone
from ..config import AdapterConfig, Config
from ..config_options import NEEDS_DATA
from ..errors import ConfigError
from ..quantised import Format, is_quantised, kind_of, requantise
from ..runtime import seed_everything
from .data_start import DataStart, refuse_eva, start_eva, start_lora_ga
from .group import Group, Member, MemberSpec, initialise, plain_name
from .new_rows import rows_to_train
from .quantised_start import start_quantised, starts_from_weights
from .targets import find_modules_to_save, find_targets, shorten


def lora(backbone: Backbone, config: Config, specs: list[MemberSpec], start: DataStart | None = None) -> Group:
    """Inject one LoRA adapter per member; adapters are fp32 whatever the backbone's dtype (trap 17).

    Args:
        start: the training batches, which some values of `adapter.init` read.
    """
    init = config.adapter.init
    rounded = _rounded_start(backbone, init)
    if len(specs) > 1 and (moves_weights(init) or init in NEEDS_DATA):
        why = "moves part of the frozen weight into the adapter" if moves_weights(init) else "gives modules own ranks"
        raise ConfigError(f"adapter.init: {init} {why}, so members can't share it.", "Use init: default for a group.")
    if init in NEEDS_DATA and start is None:
        raise ConfigError(f"adapter.init: {init} reads training batches, and there are none.", "Use init: default.")
    refuse_ambiguous_names(backbone, specs)
    settings = peft_settings(backbone, config)
    wanted = deepcopy(settings)
    if rounded:
        settings.init_lora_weights = True
    std = getattr(backbone.model.config, "initializer_range", 0.02)
    model: Any = None
    if init == "eva":
        refuse_eva(backbone, find_targets(backbone, config.adapter))
    if start and init == "lora-ga":
        start_lora_ga(backbone, settings, start, specs[0])
    for spec in specs:
        seed_everything(spec.seed, 2)
        try:
            if model is None:
                model = get_peft_model(backbone.model, deepcopy(settings), adapter_name=spec.name)
            else:
                model.add_adapter(spec.name, deepcopy(settings))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"peft refuses this adapter: {error}", "Correct the adapter section.") from error
        if start and init == "eva":
            start_eva(model, start, spec)
        if rounded:
            start_quantised(model, spec.name, init, wanted, config.model)
        for name in backbone.new_modules:
            wrapper = model.get_submodule(f"base_model.model.{name}")
            assert isinstance(wrapper, ModulesToSaveWrapper), name
            initialise(wrapper.modules_to_save[spec.name], std, spec.seed)
    members = [member_of(model, spec) for spec in specs]
    if moves_weights(init):
        members[0].initial = {name: t.detach().clone() for name, t in members[0].tensors.items() if ".lora_" in name}
    group = Group(backbone, model, "lora", members)
    group.activate(members[0])
    return group


def _rounded_start(backbone: Backbone, init: str) -> bool:
    """Whether a start is made here, because the weights are quantised. Raises ConfigError for what does not go."""
    quantised = is_quantised(backbone.model)
    if init == "loftq" and not quantised:
        raise ConfigError(
            "adapter.init: loftq mends the rounding of a quantised backbone, and this one is in full precision.",
            "Set model.quantization: nf4, or use init: pissa or default.",
        )
    if init == "lora-ga" and quantised:
        raise ConfigError(
            "adapter.init: lora-ga reads the gradient of the weights, which quantised ones have none of.",
            "Use init: loftq, eva or default.",
        )
    return quantised and starts_from_weights(init)


def peft_settings(backbone: Backbone, config: Config) -> LoraConfig:
    """The config of peft for `adapter`."""
    asked = config.adapter
    targets = find_targets(backbone, asked)
    conv1d = [name for name in targets if isinstance(backbone.model.get_submodule(name), Conv1D)]
    if conv1d and asked.init == "olora":
        raise ConfigError(
            f"adapter.init: olora in peft takes {conv1d[0]}, a Conv1D, for a Linear, whose weight lies the other way "
            "round, and would start from a changed model.",
            "Use init: pissa or default.",
        )
    init: bool | str = True if asked.init in ("default", "loftq") else NEEDS_DATA.get(asked.init, asked.init)
    options = dict(asked.options)
    if asked.init == "lora-ga":
        options.setdefault("lora_ga_config", LoraGAConfig())
    _refuse_parameters(backbone, asked)
    rows = rows_to_train(backbone)
    if rows:
        options["trainable_token_indices"] = rows
    saved = find_modules_to_save(backbone, asked.modules_to_save)
    try:
        return LoraConfig(
            task_type=backbone.peft_task,
            r=asked.rank,
            lora_alpha=asked.alpha,  # type: ignore[arg-type]  # peft scales by it, fractions work
            lora_dropout=asked.dropout,
            target_modules=shorten(targets, backbone),
            rank_pattern=dict(asked.rank_pattern),
            alpha_pattern=dict(asked.alpha_pattern),
            modules_to_save=saved or None,
            use_rslora=asked.rslora,
            use_dora=asked.dora,
            init_lora_weights=init,  # type: ignore[arg-type]
            bias=asked.bias,
            fan_in_fan_out=bool(conv1d),
            **options,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft refuses this adapter: {error}", "Correct adapter.options.") from error


def _refuse_parameters(backbone: Backbone, asked: AdapterConfig) -> None:
    """Names of `target_parameters` (a MoE's experts) that match nothing, which peft passes over (trap 21)."""
    wanted = asked.options.get("target_parameters") or []
    names = [name for name, _ in backbone.model.named_parameters()]
    for ending in wanted:
        if not any(name == ending or name.endswith(f".{ending}") for name in names):
            near = get_close_matches(
                ending, {n.split(".", 1)[-1] for n in names} | {n.rpartition(".")[2] for n in names}
            )
            raise ConfigError(
                f"adapter.options.target_parameters: {ending!r} matches no parameter of this model.",
                f"Nearest: {', '.join(near)}." if near else "Name parameters such as mlp.experts.gate_up_proj.",
            )
    if wanted and asked.layers is not None:
        raise ConfigError(
            "adapter.layers: it does not reach the parameters of options.target_parameters.",
            "Write full parameter names there, and leave adapter.layers out.",
        )


def refuse_ambiguous_names(backbone: Backbone, specs: list[MemberSpec]) -> None:
    """peft finds an adapter's tensors by its name between dots; a module of that name would be taken for it."""
    taken = {part for name, _ in backbone.model.named_parameters() for part in name.split(".")}
    taken |= {"base_model", "base_layer", "original_module", "modules_to_save"}
    names = [spec.name for spec in specs]
    for name in names:
        if name in taken or "." in name or name.startswith("lora_") or names.count(name) > 1:
            why = "two members have it" if names.count(name) > 1 else "parts of the model are called so"
            raise ConfigError(f"member {name!r}: the name is not usable, {why}.", "Choose another, without dots.")


def moves_weights(init: str) -> bool:
    """Whether this start takes the initial B·A out of the frozen weight."""
    return init.startswith(("pissa", "olora", "lora-ga"))


def without_moved_weights(
    tensors: dict[str, Tensor], initial: dict[str, Tensor], settings: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The same update as an adapter for the original weights: rank 2r, B·A - B₀·A₀ = [B, -B₀]·[A; A₀].

    Keys of `tensors` and `initial` are the adapter file's; only A and B change. The scale alpha/r (or
    alpha/sqrt(r)) is kept by widening alpha with the rank.
    """
    joined = dict(tensors)
    for name, tensor in tensors.items():
        if ".lora_A." in name or name.endswith(".lora_embedding_A"):
            joined[name] = torch.cat([tensor, initial[name].to(tensor.device)], 0)
        elif ".lora_B." in name or name.endswith(".lora_embedding_B"):
            joined[name] = torch.cat([tensor, -initial[name].to(tensor.device)], 1)
    wide = deepcopy(settings)
    factor = math.sqrt(2) if settings.use_rslora else 2
    wide.r *= 2
    wide.lora_alpha *= factor  # type: ignore[assignment]
    wide.rank_pattern = {k: 2 * v for k, v in (settings.rank_pattern or {}).items()}
    wide.alpha_pattern = {k: factor * v for k, v in (settings.alpha_pattern or {}).items()}
    wide.init_lora_weights = True
    return joined, wide


def member_of(model: Any, spec: MemberSpec, names: Sequence[str] = ()) -> Member:
    """The adapter of that name as a member, in fp32.

    Args:
        names: of all members; peft's prompt methods leave every prompt trainable.
    """
    model.set_adapter(spec.name)
    others = {name for name in names if name != spec.name}
    tensors = {
        plain_name(name, spec.name): p
        for name, p in model.named_parameters()
        if p.requires_grad and not others.intersection(name.split("."))
    }
    for tensor in tensors.values():
        tensor.data = tensor.data.float()  # peft widens its adapters, not modules_to_save and biases (trap 17)
    return Member(spec, tensors)


def move_weights_again(
    model: Any,
    adapter: str,
    names: Collection[str],
    wholes: Mapping[str, Tensor] | None = None,
    formats: Mapping[str, Format] | None = None,
) -> None:
    """Undo `without_moved_weights` for some linears of a model with such an adapter: it is W - s·B₀·A₀ and B·A again.

    In full precision that is the same function. Rounded it is not: what training rounded is W - s·B₀·A₀.

    Args:
        adapter: its name; it has twice the rank that it was trained with. Weights and adapter are changed in place.
        names: of the linears, below peft's wrappers.
        wholes: the full-precision weights W of those that are quantised: float32 (out, in), on the CPU.
        formats: how those were quantised that are plain linears now.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        plain = name.removeprefix("base_model.model.")
        if plain not in names:
            continue
        base: Any = layer.get_base_layer()
        down: torch.Tensor = layer.lora_A[adapter].weight  # type: ignore[assignment]
        up: torch.Tensor = layer.lora_B[adapter].weight  # type: ignore[assignment]
        rank = len(down) // 2
        with torch.no_grad():
            where = torch.device("cpu") if wholes else down.device  # the bits that the start had
            first = up[:, rank:].contiguous().to(where), down[rank:].contiguous().to(where)
            moved = layer.scaling[adapter] * first[0] @ first[1]
            if wholes and kind_of(base):
                requantise(base, wholes[plain] + moved)
            else:
                if wholes and formats:
                    left = formats[plain].rounded(wholes[plain] + moved)
                else:
                    left = moved + (base.weight.float().t() if isinstance(base, Conv1D) else base.weight.float())
                base.weight.copy_(left.t() if isinstance(base, Conv1D) else left)
        down.data, up.data = down.data[:rank].clone(), up.data[:, :rank].clone()
        layer.r[adapter] = rank
