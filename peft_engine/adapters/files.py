"""Adapter folders: written so that other tools read them, read so that nothing is left at random.

LoRA is peft's own format. `full`, `head` and `bitfit` are the trained tensors under the model's own names, with an
`adapter_config.json` that says so. Loading refuses any missing, unexpected or misshapen tensor (trap 15).
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..backbone import Backbone
from ..config import Config
from ..config_methods import peft_type
from ..errors import ConfigError, StorageError, VerificationError
from .group import Group, Member, MemberSpec
from .lora import member_of, without_moved_weights
from .methods import adapt
from .peft_methods import REFUSALS, trim_prompts

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"
TENSORS_FORMAT = "peft-engine tensors 1"


def save_adapter(group: Group, member: Member, folder: Path) -> None:
    """Write a member's adapter into `folder` and compare the file with the live weights, bit by bit (traps 7, 14)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, settings = adapter_content(group, member)
    tensors = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    if isinstance(settings, PeftConfig):
        settings.save_pretrained(str(folder))
    else:
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    written = load_file(folder / WEIGHTS)
    wrong = [name for name in tensors if name not in written or not torch.equal(written[name], tensors[name])]
    if wrong or len(written) != len(tensors) or not tensors:
        raise VerificationError(
            f"{folder / WEIGHTS} differs from the trained weights at {wrong[:3]}.", "Save again; check the disk."
        )


def adapter_content(group: Group, member: Member) -> tuple[dict[str, Tensor], PeftConfig | dict[str, Any]]:
    """Tensors by the names of the file, and the settings that go with them."""
    if not isinstance(group.model, PeftModel):
        base = group.backbone.model.config._name_or_path
        settings = {"format": TENSORS_FORMAT, "method": group.method, "base_model_name_or_path": base}
        return dict(member.all_tensors()), settings | group.settings
    name = member.spec.name
    if member.allocation:
        member.allocation.settle()
    tensors = _file_tensors(group.model, name)
    config: PeftConfig = deepcopy(group.model.peft_config[name])
    config.inference_mode = True
    if not config.is_prompt_learning:  # of those peft writes the prompts that their encoder makes, not the encoder
        own = member.all_tensors()
        held = {t.data_ptr() for t in tensors.values()}
        resized = set(tensors) if member.allocation else set()  # without the ranks that AdaLoRA took away
        lost = [k for k, t in own.items() if t.data_ptr() not in held and t.numel() and k not in resized]
        if lost:
            raise VerificationError(
                f"peft would leave {len(lost)} of {len(own)} tensors out, {lost[0]} first.",
                "Report this with the config.",
            )
    if member.allocation:
        assert isinstance(config, AdaLoraConfig)
        config.orth_reg_weight = member.allocation.weight
    if member.initial:
        assert isinstance(config, LoraConfig)
        tensors, config = without_moved_weights(tensors, member.initial, config)
    return tensors, config


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of an adapter folder.

    Raises:
        ConfigError: no adapter there.
        StorageError: its files can't be read.
    """
    if not (folder / SETTINGS).is_file() or not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} holds no adapter ({SETTINGS} and {WEIGHTS}).", "Give a run directory whose training ended."
        )
    name = WEIGHTS
    try:
        (folder / WEIGHTS).open("rb").close()  # safetensors calls a file that it may not read missing
        tensors = load_file(folder / WEIGHTS)
        name = SETTINGS
        settings = json.loads((folder / SETTINGS).read_text())
    except (SafetensorError, ValueError) as error:
        raise StorageError(
            f"{folder / name} can't be read: {error}.", "Restore it, or run train --resume, which writes it anew."
        ) from error
    except OSError as error:
        raise StorageError(
            f"{folder / name} can't be read: {error.strerror or error}.", "Check who may read the run's files."
        ) from error
    return tensors, settings


def load_adapter(backbone: Backbone, config: Config, folder: Path) -> Group:
    """The backbone with the adapter of `folder`, as a group of one.

    Raises:
        ConfigError: no adapter there, or it is another method's.
        StorageError: the file can't be read, or its tensors are not exactly those of this model and method.
    """
    tensors, settings = read_adapter(folder)
    spec = MemberSpec("default", config.training.seed, config.training.learning_rate)
    if settings.get("format") == TENSORS_FORMAT:
        group = adapt(backbone, config, [spec])
        for key, value in {"method": group.method, **group.settings}.items():
            if settings.get(key) != value:
                raise ConfigError(
                    f"{folder} was trained with {key} {settings.get(key)}, the config has {value}.",
                    "Use the adapter settings that it was trained with.",
                )
        _copy(group.members[0], tensors, folder)
        return group
    found = settings.get("peft_type")
    if found != peft_type(config.adapter.method):
        raise ConfigError(
            f"{folder} holds a peft adapter of type {found}, but adapter.method is {config.adapter.method}.",
            "Set adapter.method to the one that it was trained with.",
        )
    try:
        model = get_peft_model(backbone.model, PeftConfig.from_pretrained(str(folder)), adapter_name=spec.name)
    except REFUSALS as error:
        raise StorageError(
            f"{folder / SETTINGS} does not fit this model: {error}",
            "Use the model and the adapter settings that it was trained with.",
        ) from error
    member_of(model, spec)  # in fp32 before it is filled: peft makes copies of modules in the backbone's dtype
    refuse_difference(_file_tensors(model, spec.name), tensors, str(folder / WEIGHTS))
    set_peft_model_state_dict(model, tensors, adapter_name=spec.name)
    trim_prompts(model)
    return Group(backbone, model, config.adapter.method, [member_of(model, spec)])


def refuse_difference(here: dict[str, Tensor] | dict[str, Any], found: dict[str, Tensor], where: str) -> None:
    """Raise unless `found` has exactly the names and shapes of `here`."""
    faults = [f"missing {name}" for name in here if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in here]
    faults += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(here[name].shape)}"
        for name in here
        if name in found and found[name].shape != here[name].shape
    ]
    if faults:
        raise StorageError(
            f"{where} does not fit this model: {'; '.join(faults[:3])}"
            + (f" and {len(faults) - 3} more." if len(faults) > 3 else "."),
            "Use the model and the adapter settings that it was trained with.",
        )


def _file_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """peft's tensors of an adapter. With `bias: all` peft lists the biases of a fully trained module twice more, as its
    untrained original's and under the wrapper's own name; those are left out.
    """
    found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {k: t for k, t in found.items() if ".original_module." not in k and ".modules_to_save." not in k}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with a copy for every name but the first where layers share a tensor: safetensors takes no aliases."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if pointer in seen and tensor.numel() else tensor
        seen.add(pointer)
    return found


def _copy(member: Member, tensors: dict[str, Tensor], folder: Path) -> None:
    refuse_difference(member.tensors, tensors, str(folder / WEIGHTS))
    with torch.no_grad():
        for name, parameter in member.tensors.items():
            parameter.copy_(tensors[name])
