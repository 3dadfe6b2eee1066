"""What leaves a run: the adapter with its tokenizer and model card, or a merged model; verified by plain libraries."""

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .adapters.files import save_adapter
from .adapters.group import Group, Member
from .adapters.new_rows import grow
from .adapters.peft_methods import trim_prompts
from .backbone import embeddings_of, load_settings
from .config import Config
from .config_methods import BOTTLENECK, PROMPTS
from .data.labels import Labels
from .drift import Drift, judge_batches
from .errors import ConfigError, StorageError, VerificationError
from .generation import matched
from .model_card import write_card, write_merged_card
from .quantised import OWN, compute_dtype, is_quantised, kind_of, make_ready, stored_kind
from .tasks.base import Batch, Task
from .tasks.text_classification import MeanPooled

LABELS = "labels.json"
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest tolerated |difference| of logits, as a share of the largest |logit|, per dtype of the weights."""
IN_ENGINE = (
    "Other libraries can't load such a run: use it through peft-engine (evaluate, predict, generate on the run's "
    "folder), or train lora."
)


def save_trained(
    group: Group,
    member: Member,
    task: Task,
    labels: Labels | None,
    folder: Path,
    summary: dict[str, Any],
    config: Config,
) -> None:
    """Write `adapter/`: weights, settings, tokenizer, class names, model card. It is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_adapter(group, member, part)
    task.processor.save_pretrained(str(part))
    write_labels(labels, part)
    write_card(part / "README.md", group, config, labels, summary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def write_labels(labels: Labels | None, folder: Path) -> None:
    if labels is not None:
        text = json.dumps(labels.to_json(), indent=2, ensure_ascii=False) + "\n"
        (folder / LABELS).write_text(text, encoding="utf-8")


def read_labels(folder: Path) -> Labels | None:
    """The class names of an adapter, None where it has none. Raises StorageError where they can't be read."""
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        return Labels.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read: {error}.", "Restore it, or train again.") from error


def verify_adapter(group: Group, config: Config, task: Task, folder: Path) -> Drift:
    """Load the adapter in plain transformers and peft, without this engine, and compare logits.

    Raises:
        ConfigError: the method is not peft's.
        VerificationError: they differ beyond the bound.
    """
    if not isinstance(group.model, PeftModel):
        raise ConfigError(
            f"A run of adapter.method {group.method} holds no peft adapter that plain peft could load.",
            IN_ENGINE if config.adapter.method in BOTTLENECK else "Use export --merged.",
        )
    batch = task.probe(group.model)
    trained = _logits(group.model, batch, task.forward)
    settings, device = config.model, next(group.model.parameters()).device
    base = task.plain(
        settings.path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype=group.backbone.model.dtype,
        **_quantised_alike(group, config, device),
    )
    grow(base, task.processor, settings.new_tokens)
    if is_quantised(base):
        make_ready(base, compute_dtype(config, device))
        for part in base.modules():  # a head of ours beside it; quantised models are not moved
            if kind_of(part) is None and not any(part.children()):
                part.to(device)
    else:
        base = base.to(device)
    plain = PeftModel.from_pretrained(base, str(folder))
    trim_prompts(plain)
    return _judge(trained, _logits(plain, batch, task.plain_logits), group, "The adapter loaded in plain peft")


def _quantised_alike(group: Group, config: Config, device: torch.device) -> dict[str, Any]:
    """What plain transformers is told to quantise as the backbone is; nothing for a plain one."""
    model: Any = group.backbone.model
    if not is_quantised(model):
        return {}
    where: dict[str, Any] = {"device_map": {"": str(device)}}
    if not model.hf_quantizer.pre_quantized:
        return where | {"quantization_config": deepcopy(model.config.quantization_config)}
    if stored_kind(model.config) not in OWN:
        return where
    own = load_settings(config.model)  # as it is stored, but for what the task made anew
    own.quantization_config = model.config.quantization_config.to_dict()
    return where | {"config": own}


def export_merged(group: Group, config: Config, task: Task, labels: Labels | None, folder: Path) -> Drift:
    """Fold the adapter into the weights, save an ordinary transformers model, reload it and compare logits (trap 13).

    `group` is used up: its model is merged in place.

    Raises:
        VerificationError: the reloaded model differs beyond the bound for its dtype.
    """
    if config.adapter.method in BOTTLENECK:
        raise ConfigError(
            f"adapter.method: a {config.adapter.method} adapter is a network between the layers; it can't be folded "
            "into the weights.",
            IN_ENGINE,
        )
    if config.adapter.method in PROMPTS:
        raise ConfigError(
            f"adapter.method: what {config.adapter.method} trains are virtual tokens before the text; they can't be "
            "folded into the weights.",
            "Export it without --merged and load the adapter with peft, or train lora.",
        )
    batch = task.probe(group.model)
    trained = _logits(group.model, batch, task.forward)
    model: Any = group.model
    if isinstance(model, PeftModel):
        model = _merge(model)
    engine_head = isinstance(model, MeanPooled)
    task.as_plain(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    task.processor.save_pretrained(str(folder))
    write_labels(labels, folder)
    write_merged_card(folder / "README.md", config, task.auto, labels, engine_head)
    plain = task.plain(str(folder)).to(next(model.parameters()).device)
    found = _logits(plain, batch, task.plain_logits)
    return _judge(trained, found, group, "The merged model reloaded in plain transformers")


def compare_on_probe(group: Group, task: Task, folder: Path) -> Drift:
    """A merged model against this one as it is, rounded weights and all, on the seeded random input."""
    batch = task.probe(group.model)
    plain = task.plain(str(folder)).to(next(group.model.parameters()).device)
    return judge_batches(_logits(group.model, batch, task.forward), _logits(plain, batch, task.plain_logits))


def _merge(model: PeftModel) -> Any:
    """Fold the adapter in.

    Fully trained modules take the place of peft's wrappers first: some methods leave these there (layernorm), or give
    a head of several parts a weight that it has not (loha). Embeddings that share their weight with the output head
    part from it, where only one of the two was trained: else its update would enter both (trap 13).
    """
    base: Any = model.get_base_model()
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper) and module.active_adapters:
            base.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    ends: list[Any] = list(embeddings_of(base))
    for end in ends:
        layer: Any = end.get_base_layer() if isinstance(end, BaseTunerLayer) else None
        if layer is not None and all(e is not None for e in ends) and ends[0].weight is ends[1].weight:
            layer.weight = nn.Parameter(layer.weight.detach().clone())
    merge: Any = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise ConfigError("peft has no way to fold this adapter into the weights.", "Export it without --merged.")
    try:
        return merge(safe_merge=True)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError, TypeError) as error:
        raise ConfigError(f"peft can't merge this adapter: {error}", "Export it without --merged.") from error


def _logits(model: nn.Module, batch: Batch, forward: Callable[[nn.Module, Batch], Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad(), matched(model):
        return forward(model, batch)


def _judge(trained: Tensor, found: Tensor, group: Group, what: str) -> Drift:
    """Compare logits; positions that are padding in both are left in, they must agree too."""
    bound = BOUNDS.get(group.backbone.model.dtype, max(BOUNDS.values()))
    drift = judge_batches(trained, found)
    if not drift.relative <= bound:
        raise VerificationError(
            f"{what} gives other logits than the trained one: largest difference {drift.relative:.2e} of the largest "
            f"logit, bound {bound:.0e}; KL {drift.kl:.2e}, top-1 agreement {drift.top1_agreement:.1%}.",
            "Do not use it; report this with the config.",
        )
    return drift
