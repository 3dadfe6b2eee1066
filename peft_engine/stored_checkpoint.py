"""Checkpoints that are quantised already: what a run can't do with them, and what in them stays as it is."""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file

from .config import Config, ModelConfig
from .config_quantised import KINDS, quantised_faults
from .errors import ConfigError

STORED = ("model.safetensors.index.json", "model.safetensors")
BESIDE = re.compile(r"(.+?)(\.weight\.absmax|\.SCB)$")
"""What bitsandbytes stores beside a linear's codes."""
PACKAGES = {
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "hqq": "hqq",
    "torchao": "torchao",
    "aqlm": "aqlm",
    "eetq": "kernels",
    "quanto": "optimum-quanto",
    "compressed-tensors": "compressed-tensors",
}
"""What other formats of checkpoints need."""


def refuse_with_stored(config: Config, stored: str, model_config: Any) -> None:
    """Settings that contradict what is stored, and the rules of `model.quantization` for a format that only the
    checkpoint tells.

    Raises:
        ConfigError: a setting can't be combined with it.
    """
    _refuse_contradiction(config.model, stored, model_config)
    for setting, text in quantised_faults(config.model_dump(), stored):
        where = "" if setting == "model.path" else f" {config.model.path} is stored in {stored}."
        raise ConfigError(f"{setting}: {text}.{where}", "Change that, or give the model in full precision.")


def _refuse_contradiction(settings: ModelConfig, stored: str, model_config: Any) -> None:
    if settings.quantization not in ("none", stored):
        raise ConfigError(
            f"model.quantization: got {settings.quantization}, and the checkpoint {settings.path} is stored in "
            f"{stored} already.",
            "Set model.quantization: none to take it as it is stored, or give the model in full precision.",
        )
    found = model_config.quantization_config
    nested = (found if isinstance(found, dict) else found.to_dict()).get("bnb_4bit_use_double_quant", False)
    for name, differs in (
        ("double_quantization", stored in ("nf4", "fp4") and nested and not settings.double_quantization),
        ("quantization_skip", bool(settings.quantization_skip)),
    ):
        if settings.quantization != "none" and differs:
            raise ConfigError(
                f"model.{name}: got {getattr(settings, name)}, and the checkpoint {settings.path} is stored in another "
                f"{stored}.",
                "Set model.quantization: none, and leave this out, to take it as it is stored.",
            )
    if settings.offload == "layers" and stored not in ("nf4", "fp4"):
        raise ConfigError(
            f"model.offload: got layers, and the checkpoint {settings.path} is stored in {stored}; of quantised layers "
            "only nf4 and fp4 live on the host.",
            "Set model.offload: none.",
        )
    if settings.frozen_compute != "full":
        raise ConfigError(
            f"model.frozen_compute: got {settings.frozen_compute}, and the checkpoint {settings.path} is stored in "
            f"{stored}, which would be rounded once more.",
            "Set model.frozen_compute: full.",
        )


def missing_package(settings: ModelConfig, stored: str, error: Exception) -> ConfigError:
    """A checkpoint in a format whose library is not here."""
    package = PACKAGES.get(stored, "bitsandbytes" if stored in KINDS else stored)
    return ConfigError(
        f"model.path: {settings.path} is stored in {stored}, which needs a package that is not here ({error}).",
        f"Install {package}, or give the model in full precision.",
    )


def keep_new(
    auto_class: Any, model_config: Any, settings: ModelConfig, may_be_new: Callable[[PreTrainedModel, str], bool]
) -> None:
    """Leave linears that the task makes anew out of what the checkpoint's config has quantised. `model_config` changes.

    A linear that may be new, but is stored quantised, is left alone.

    Args:
        model_config: with a `quantization_config` of bitsandbytes.
        may_be_new: (model, tensor name) → whether the task makes this tensor anew.
    """
    found = model_config.quantization_config
    stated = found if isinstance(found, dict) else found.to_dict()
    del model_config.quantization_config
    with torch.device("meta"):
        skeleton = auto_class.from_config(model_config, trust_remote_code=settings.trust_remote_code)
    model_config.quantization_config = found
    stored, prefix = _quantised_names(settings), f"{skeleton.base_model_prefix}."
    if stored is None:
        return
    own = {name.removeprefix(prefix) for name in stored}
    new = [
        re.escape(name)
        for name, module in skeleton.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and may_be_new(skeleton, f"{name}.weight")
        and name.removeprefix(prefix) not in own
    ]
    if new:
        skipped = HfQuantizer.get_modules_to_not_convert(skeleton, stated.get("llm_int8_skip_modules"))
        model_config.quantization_config = {**stated, "llm_int8_skip_modules": sorted({*skipped, *new})}


def _quantised_names(settings: ModelConfig) -> set[str] | None:
    """Linears that the checkpoint's files hold quantised; None where these can't be looked into."""
    for name in STORED:
        path = cached_file(
            settings.path, name, revision=settings.revision,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        if path is None:
            continue
        try:
            if name.endswith("json"):
                with open(path, encoding="utf-8") as file:
                    names = list(json.load(file)["weight_map"])
            else:
                with safe_open(path, framework="pt") as tensors:
                    names = list(tensors.keys())
        except (SafetensorError, OSError, ValueError, KeyError):
            return None  # from_pretrained says why
        return {found[1] for name in names if (found := BESIDE.match(name))}
    return None
