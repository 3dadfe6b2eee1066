"""The frozen backbone: a transformers model and its tokenizer, loaded and checked."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_flash_attn_2_available

from . import processes
from .config import Config, ModelConfig
from .errors import ConfigError, EngineError, OutOfMemory, StorageError
from .quantised import (
    all_side_tensors,
    compute_dtype,
    is_quantised,
    load_settings_of,
    make_ready,
    quantised_linears,
    stored_kind,
)
from .runtime import seed_everything
from .stored_checkpoint import missing_package
from .vocabulary import add_tokens

LINEAR_TYPES = (nn.Linear, Conv1D)


@dataclass
class Backbone:
    """A loaded model, as the task shaped it.

    Attributes:
        model: the model with the task's head, all weights frozen or not as the adapter method decides later.
        head_modules: full names of the modules that make the task's output (an LM head, a classifier); never adapted
            by `all-linear`.
        new_modules: those among them whose weights are not from the checkpoint; they are trained in full.
        peft_task: peft's task type, None for a head that peft doesn't know.
        new_token_ids: of `model.new_tokens`, whose rows an adapter trains.
        weights_digest: sha256 over names, shapes and a sample of the values of the loaded pretrained tensors.
        decisions: what the task chose by itself, for run.json.
    """

    model: PreTrainedModel
    head_modules: list[str] = field(default_factory=list)
    new_modules: list[str] = field(default_factory=list)
    peft_task: str | None = None
    weights_digest: str = ""
    decisions: dict[str, str] = field(default_factory=dict)
    new_token_ids: list[int] = field(default_factory=list)


def load_tokenizer(settings: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with any truncation or padding stored in its file switched off."""
    _refuse_missing(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _explain(settings, error, "tokenizer") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up where the folder holds no tokenizer
        raise ConfigError(
            f"model.path: {settings.path} holds no tokenizer: its vocabulary is empty.",
            "Put tokenizer.json and tokenizer_config.json of the model beside its weights.",
        )
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    add_tokens(tokenizer, settings.new_tokens)
    return tokenizer


def load_image_processor(settings: ModelConfig, **replaced: Any) -> Any:
    """The model's image processor, of transformers' PIL kind, with some of its settings replaced."""
    from transformers import AutoImageProcessor

    _refuse_missing(settings)
    try:
        return AutoImageProcessor.from_pretrained(
            settings.path,
            backend="pil",
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            **replaced,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _explain(settings, error, "image processor") from error


def load_settings(settings: ModelConfig) -> Any:
    """The model's transformers config."""
    _refuse_missing(settings)
    try:
        return AutoConfig.from_pretrained(
            settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _explain(settings, error, "model") from error


def load_model(
    config: Config,
    auto_class: Any,
    model_config: Any,
    device: torch.device,
    may_be_new: Callable[[PreTrainedModel, str], bool],
) -> tuple[PreTrainedModel, list[str]]:
    """Load pretrained weights and refuse any that were silently re-initialised (trap 22).

    Args:
        auto_class: transformers' Auto class of the task.
        model_config: the model's transformers config, with the task's fields set.
        may_be_new: (model, tensor name) → whether the task expects this tensor to be absent from the checkpoint.

    Returns:
        The model on `device`, and the names of its newly initialised tensors.

    Raises:
        ConfigError: no such model, or pretrained tensors are missing from its checkpoint.
        StorageError: a weight file is corrupt.
    """
    settings = config.model
    _refuse_flash(settings, device)
    attention = {} if settings.attention == "auto" else {"attn_implementation": settings.attention}
    rounded = load_settings_of(config, auto_class, model_config, device, may_be_new)
    seed_everything(config.training.seed, 0)  # new tensors, if any, are initialised again per member
    try:
        model, info = auto_class.from_pretrained(
            settings.path,
            config=model_config,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            dtype=_dtype(config, model_config, device),
            ignore_mismatched_sizes=True,  # reported in `info` and judged below
            output_loading_info=True,
            **attention,
            **rounded,
        )
    except SafetensorError as error:
        raise StorageError(
            f"The weights of {settings.path} can't be read: {error}.", "Fetch the model again."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        stored = stored_kind(model_config) if isinstance(error, ImportError) else None
        raise (missing_package(settings, stored, error) if stored else _explain(settings, error, "model")) from error
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    new = sorted({*info["missing_keys"], *mismatched})
    wrong = [name for name in new if not may_be_new(model, name)]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        hint = (
            " For text-classification, model.pooling: mean does without the model's own pooler."
            if any("pooler" in name for name in wrong)
            else ""
        )
        raise ConfigError(
            f"{settings.path}: {len(wrong)} pretrained tensors are not in the checkpoint and would start at random: "
            f"{shown}.",
            f"Check that model.path holds this architecture ({type(model).__name__}).{hint}",
        )
    if rounded:  # on its device already
        make_ready(model, compute_dtype(config, device))
        return model, new
    shared_out = config.training.parallel == "fsdp" and processes.world() > 1
    waits = shared_out or config.model.offload == "layers"  # moves to its device part by part
    return model if waits else model.to(device), new


def on_card(config: Config) -> Config:
    """The same with whole models on the device, for what looks at all weights."""
    return config.model_copy(update={"model": config.model.model_copy(update={"offload": "none"})})


def _refuse_flash(settings: ModelConfig, device: torch.device) -> None:
    if settings.attention != "flash_attention_2" or (device.type == "cuda" and is_flash_attn_2_available()):
        return
    reason = "flash-attn is not installed" if device.type == "cuda" else f"the device is {device.type}"
    raise ConfigError(
        f"model.attention: flash_attention_2 needs CUDA and the package flash-attn; {reason}.",
        "Set model.attention: sdpa.",
    )


def _dtype(config: Config, model_config: Any, device: torch.device) -> torch.dtype:
    asked = config.model.dtype
    if asked != "auto":
        return getattr(torch, asked)
    if stored_kind(model_config) or config.model.quantization != "none":
        return compute_dtype(config, device)  # of what is not quantised
    if device.type != "cuda" or config.adapter.method == "full":
        return torch.float32
    stored = getattr(model_config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def digest_weights(model: nn.Module, apart: tuple[str, ...] = ()) -> str:
    """sha256 over a sample of every parameter: name, shape, dtype and up to 4,096 evenly spaced values. Of quantised
    weights these are codes and absmax.

    Args:
        apart: beginnings of the names of those that are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *all_side_tensors(model)):
        if name.startswith(apart):
            continue
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.float32).cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over vocabulary, merges, normalisation, special tokens and chat template."""
    content = (
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256("\0".join([content, special, template, type(tokenizer).__name__]).encode()).hexdigest()


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills batches. Its value never matters: padding is masked by position (trap 4)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def positions_of(model: nn.Module) -> int | None:
    """Longest sequence that the model takes, None where nothing says so."""
    settings: Any = model.config
    names = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    parts = [settings, getattr(settings, "encoder", None), getattr(settings, "decoder", None)]
    stated = [value for part in parts for name in names if isinstance(value := getattr(part, name, None), int)]
    positions = min(stated, default=None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from there
    return positions


def embeddings_of(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embeddings and the output embeddings; None for what a model has not (one for images has no tokens)."""
    found: list[nn.Module | None] = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):
            found.append(None)
    return found[0], found[1]


def linear_names(model: nn.Module) -> list[str]:
    """Full names of all matrix products that can take an adapter, output embeddings left out."""
    output = embeddings_of(model)[1]
    foreign = is_quantised(model) and not quantised_linears(model)
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, LINEAR_TYPES) or (foreign and _is_foreign_linear(module))) and module is not output
    ]


def _is_foreign_linear(module: nn.Module) -> bool:
    """A linear of another quantisation library (GPTQ, AWQ, HQQ), which need not be one of torch's."""
    return "Linear" in type(module).__name__ and hasattr(module, "in_features") and not any(module.children())


def _refuse_missing(settings: ModelConfig) -> None:
    path = Path(settings.path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model.path: {settings.path} holds no config.json, so it is no transformers model folder.",
                "Give the folder that save_pretrained wrote, or a hub id.",
            )
        return
    if path.is_file():
        raise ConfigError(
            f"model.path: {settings.path} is a file; a model is a folder or a hub id.", "Give the folder."
        )
    looks_local = settings.path.startswith((".", "/", "~")) or settings.path.count("/") > 1
    if looks_local:
        beside = [str(p) for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        near = get_close_matches(str(path), beside, n=2, cutoff=0.5)
        hints = [
            f"Near: {', '.join(near)}." if near else "",
            "`make assets` fetches the models of configs/." if ".assets" in path.parts else "",
        ]
        if settings.hub_id:
            hints.append(f"With a network: --set model.path={settings.hub_id}")
        raise ConfigError(
            f"model.path: there is no folder {settings.path}.", " ".join(filter(None, hints)) or "Check the path."
        )


def _explain(settings: ModelConfig, error: Exception, what: str) -> EngineError:
    """Say in one sentence why transformers could not load `what`."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return OutOfMemory(f"Memory ran out loading {settings.path}.", "Take a smaller model, or more memory.")
    folder = Path(settings.path).expanduser()
    closed = [path for path in folder.iterdir() if not os.access(path, os.R_OK)] if folder.is_dir() else []
    if closed:  # libraries say that it isn't there
        return StorageError(f"{closed[0]} can't be read: permission denied.", "Check who may read the model's files.")
    text = str(error)
    where = f"model.path: {settings.path}" + (f" at revision {settings.revision}" if settings.revision else "")
    if "trust_remote_code" in text:
        return ConfigError(
            f"{where} needs Python code that comes with the model.",
            "Read that code, then set model.trust_remote_code: true.",
        )
    if settings.attention != "auto" and isinstance(error, ValueError | ImportError) and "attention" in text.lower():
        return ConfigError(
            f"model.attention: {settings.path} can't run with {settings.attention} ({_first_line(text, 160)})",
            "Set model.attention: auto.",
        )
    if "does not recognize this architecture" in text:
        return ConfigError(
            f"{where}: {_first_line(text, 120)}",
            "Upgrade transformers if the architecture is newer than it, or correct model_type in config.json.",
        )
    if not Path(settings.path).expanduser().is_dir():
        return ConfigError(
            f"{where}: no such local folder, and the {what} could not be had from the hub ({_first_line(text)})",
            "Check the id, the network and HF_HUB_OFFLINE, or give a local folder.",
        )
    return ConfigError(
        f"{where}: the {what} could not be loaded ({type(error).__name__}: {_first_line(text)})",
        "Check the folder's files.",
    )


def _first_line(text: str, most: int = 200) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return line if len(line) <= most else line[:most] + "…"
