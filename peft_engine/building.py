"""What a run trains: its data tokenised, its backbone with members on it, their optimizers."""

from typing import Any

import torch

from .adapters.fusing import fuse, row_seeds
from .adapters.group import Group, MemberSpec
from .adapters.methods import adapt
from .backbone import LINEAR_TYPES, positions_of
from .config import Config
from .data.batching import BatchPlan
from .data.encoding import EncodedSet, cache_folder
from .data.loading import encode_split
from .data.splitting import Splits
from .errors import ConfigError
from .runtime import Runtime
from .tasks import Task
from .training.optim import make_optimizer
from .training.state import Trainee


def encode_splits(task: Task, splits: Splits, config: Config) -> dict[str, EncodedSet]:
    """Every split that there is, tokenised (from the cache where it holds them)."""
    found = {}
    for name in ("train", "eval", "test"):
        split = getattr(splits, name)
        if split is not None:
            found[name] = encode_split(
                split, task.encode, task.fingerprint(), config.data.max_dropped, cache_folder(config.data.cache)
            )
    return found


def build_group(
    task: Task, config: Config, runtime: Runtime, data: dict[str, EncodedSet], specs: list[MemberSpec] | None = None
) -> Group:
    """The backbone on its device with the members of `specs` (one, of the config, by default)."""
    backbone = task.load(runtime.device)
    refuse_too_long(backbone.model, data)
    specs = specs or [MemberSpec("default", config.training.seed, config.training.learning_rate)]
    group = adapt(backbone, config, specs)
    refuse_mixed_dtypes(group, runtime)
    if config.kernels != "off":
        group.fused = fuse(group.model, config.kernels)
        group.rows = row_seeds(group.model)
    if config.training.gradient_checkpointing:
        if not backbone.model.supports_gradient_checkpointing:
            raise ConfigError(
                f"training.gradient_checkpointing: {type(backbone.model).__name__} does not support it.",
                "Set it to false.",
            )
        # the reentrant kind gives frozen embeddings' adapters no gradient (trap 6)
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    return group


def make_trainees(group: Group, data: EncodedSet, config: Config, runtime: Runtime) -> list[Trainee]:
    """Members with their optimizer and data order, at step 0."""
    settings = config.training
    micro = (
        settings.batch_size
        if settings.micro_batch_size == "auto"
        else min(settings.micro_batch_size, settings.batch_size)
    )
    return [
        Trainee(
            member,
            make_optimizer(member, config, runtime.device),
            BatchPlan(data.lengths, settings.batch_size, member.spec.seed, config.data.group_by_length),
            micro,
        )
        for member in group.members
    ]


def refuse_mixed_dtypes(group: Group, runtime: Runtime) -> None:
    """Trained tensors are fp32; inside a narrower backbone, anything but LoRA's own products needs autocast."""
    dtypes = {p.dtype for p in group.backbone.model.parameters() if not p.requires_grad}
    narrow = dtypes - {torch.float32}
    own = [name for name in group.members[0].tensors if ".lora_" not in name]
    split = [m for m in group.model.modules() if not isinstance(m, LINEAR_TYPES) and len(_own_dtypes(m)) > 1]
    if split and runtime.device.type == "cpu":  # autocast mends this on CUDA, and linear layers everywhere
        raise ConfigError(
            f"model.dtype: biases of {type(split[0]).__name__} train in float32 beside {narrow.pop()} weights.",
            "Set model.dtype: float32.",
        )
    if narrow and own and runtime.precision == "fp32":
        raise ConfigError(
            f"model.dtype: {own[0]} trains in float32 inside a {narrow.pop()} backbone, "
            "and training.precision is fp32.",
            "Set model.dtype: float32, or training.precision: bf16.",
        )


def _own_dtypes(module: Any) -> set[torch.dtype]:
    return {p.dtype for p in module.parameters(recurse=False)}


def refuse_too_long(model: Any, data: dict[str, EncodedSet]) -> None:
    """Sequences must fit the model's positions."""
    positions = positions_of(model)
    longest = max((int(d.lengths.max()) for d in data.values() if len(d)), default=0)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_length: the longest sequence has {longest} tokens, the model has {positions} positions.",
            f"Set data.max_length: {positions}.",
        )
