"""Warm start: `adapter.start_from` names a run or an adapter folder whose weights this run begins with.

The method, every name and shape, and all settings that decide what the weights mean must be the same.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from peft.utils import set_peft_model_state_dict

from ..config import Config
from ..config_methods import peft_names, peft_type
from ..config_options import OUR_NAMES
from ..data.labels import Labels
from ..errors import ConfigError, StorageError
from .files import SETTINGS, TENSORS_FORMAT, WEIGHTS, adapter_content, read_adapter, refuse_difference
from .group import Group

LABELS = "labels.json"
ELSEWHERE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "module_dropout",
    "modules_to_save",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "trainable_token_indices",
}
"""Fields of peft's configs that say nothing of what given weights mean, or that names and shapes decide."""


def start_from(group: Group, config: Config, labels: Labels | None) -> dict[str, Any] | None:
    """Put the weights of `adapter.start_from` into every member of a new group, in place.

    Returns:
        What run.json records: path, sha256 of the weights, and whether the run it came from had the same backbone
        (None: unknown); None where the setting is not in use.

    Raises:
        ConfigError: no adapter there, another method, other settings or other classes.
        StorageError: its file can't be read, or its tensors are not exactly those of this model and method.
    """
    if config.adapter.start_from is None:
        return None
    folder = adapter_folder(config.adapter.start_from)
    tensors, settings = read_adapter(folder)
    _refuse_other_method(settings, config, folder)
    for member in group.members:
        here, own = adapter_content(group, member)
        if isinstance(own, PeftConfig):
            _refuse_other_settings(own, settings, config.adapter.method, folder)
        _refuse_other_classes(folder, labels)
        refuse_difference(here, tensors, str(folder / WEIGHTS))
        if isinstance(group.model, PeftModel):
            set_peft_model_state_dict(group.model, tensors, adapter_name=member.spec.name)
        else:
            with torch.no_grad():
                for name, parameter in member.all_tensors().items():
                    parameter.copy_(tensors[name])
        landed, _ = adapter_content(group, member)
        wrong = [n for n, t in landed.items() if not torch.equal(t.detach().cpu().float(), tensors[n].float())]
        if wrong:
            raise StorageError(
                f"{folder / WEIGHTS}: {len(wrong)} tensors did not reach the model, {wrong[0]} first.",
                "Report this with the config.",
            )
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    return {
        "path": config.adapter.start_from,
        "sha256": digest,
        "same_backbone": _same_backbone(folder, group.backbone.weights_digest, config),
    }


def adapter_folder(path: str) -> Path:
    """The adapter of a run directory, or the folder itself."""
    folder = Path(path).expanduser()
    inside = folder / "adapter"
    if (inside / SETTINGS).is_file():
        return inside
    if not folder.is_dir():
        raise ConfigError(
            f"adapter.start_from: there is no folder {path}.", "Give a finished run or an adapter folder."
        )
    if not (folder / SETTINGS).is_file():
        raise ConfigError(
            f"adapter.start_from: {path} holds no adapter ({SETTINGS} and {WEIGHTS}).",
            "Give a run directory whose training ended, or an adapter folder.",
        )
    return folder


def _refuse_other_method(settings: dict[str, Any], config: Config, folder: Path) -> None:
    asked = config.adapter.method
    if settings.get("format") == TENSORS_FORMAT:
        found, same = settings.get("method"), settings.get("method") == asked
    else:
        found = str(settings.get("peft_type", "unknown"))
        same = peft_type(asked) == found
    if not same:
        raise ConfigError(
            f"adapter.start_from: {folder} holds a {str(found).lower()} adapter, and adapter.method is {asked}.",
            "Set the method that it was trained with, or start from another.",
        )


def _refuse_other_settings(own: Any, found: dict[str, Any], method: str, folder: Path) -> None:
    """Same shapes are not enough: alpha, for one, decides what the weights do."""
    here = json.loads(json.dumps(own.to_dict(), default=_listed))
    different = [
        name
        for name in sorted(here)
        if name not in ELSEWHERE and name in found and (here[name] or None) != (found[name] or None)
    ]
    if not different:
        return
    ours = OUR_NAMES | peft_names(method)
    said = "; ".join(
        f"{ours.get(name, f'adapter.options.{name}')} was {found[name]!r}, is {here[name]!r}" for name in different
    )
    fix = "Set them as they were, or start from another."
    moved = _init_of(folder)
    if "r" in different and moved:
        fix = (
            f"It was trained with adapter.init: {moved}, so its file holds the update for the original weights at "
            f"twice the rank. Set adapter.rank: {found['r']} and adapter.alpha: {found.get('lora_alpha')}."
        )
    raise ConfigError(f"adapter.start_from: {folder} was trained with other settings: {said}.", fix)


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _refuse_other_classes(folder: Path, labels: Labels | None) -> None:
    """A head's rows are classes: the same ones, in the same order."""
    path = folder / LABELS
    if labels is None or not path.is_file():
        return
    try:
        theirs = Labels.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read: {error}.", "Restore it.") from error
    if (theirs.kind, theirs.names) != (labels.kind, labels.names):
        raise ConfigError(
            f"adapter.start_from: {folder} has a head for {_classes(theirs)}, this run needs one for "
            f"{_classes(labels)}.",
            "Name the classes in data.labels in the same order, or start from an adapter for these classes.",
        )


def _classes(labels: Labels) -> str:
    if not labels.names:
        return labels.kind
    shown = ", ".join(labels.names[:5]) + (", …" if len(labels.names) > 5 else "")
    return f"{len(labels.names)} classes ({shown}), {labels.kind}"


def _init_of(folder: Path) -> str | None:
    """`adapter.init` of the run that an adapter lies in, where it moves part of the frozen weight."""
    path = folder.parent / "config.yaml"
    if not path.is_file():
        return None
    try:
        init = str(yaml.safe_load(path.read_text(encoding="utf-8"))["adapter"]["init"])
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return None
    return init if init.startswith(("pissa", "olora")) else None


def _same_backbone(folder: Path, digest: str, config: Config) -> bool | None:
    """Whether the run that the adapter lies in was trained on these weights, rounded as they are here."""
    path = folder.parent / "run.json"
    if folder.name != "adapter" or not path.is_file():
        return None
    try:
        same = bool(json.loads(path.read_text(encoding="utf-8"))["digests"]["backbone"] == digest)
        model = yaml.safe_load((folder.parent / "config.yaml").read_text(encoding="utf-8"))["model"]
        kind = str(model.get("quantization", "none"))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    told = None
    if kind != config.model.quantization:
        told = f"over weights in quantization {kind}, and this run has them in {config.model.quantization}"
    elif kind != "none" and _init_of(folder):
        told = f"over what {_init_of(folder)} had left of the weights in {kind}, and this run has all of them"
    if told:
        logging.getLogger(__name__).warning(
            "adapter.start_from: %s was trained %s: it begins elsewhere than that run ended.", folder.parent, told
        )
    return same and told is None
