"""What a run trains: its data tokenised, its backbone with members on it, their optimizers."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import processes
from .adapters.data_start import DataStart
from .adapters.fusing import FrozenRecord, fuse, row_seeds
from .adapters.group import Group, MemberSpec
from .adapters.methods import adapt
from .adapters.neftune import Neftune
from .adapters.new_rows import with_new_tokens
from .adapters.peft_methods import refuse_failing, virtual_tokens
from .adapters.routers import told_of_balance, without_balance_loss
from .adapters.selecting import select_trainable
from .adapters.sharding import blocks, shard
from .adapters.warm_start import start_from
from .backbone import LINEAR_TYPES, positions_of
from .config import Config
from .data.batching import BatchPlan
from .data.encoding import EncodedSet, cache_folder
from .data.loading import encode_split
from .data.packing import Packing
from .data.splitting import Splits
from .errors import ConfigError
from .levers.activations import LEAST, ActivationOffload
from .levers.checkpointing import checkpoint_layers
from .levers.lane import CudaLane
from .levers.layers import StreamedLayers
from .quantised import compute_dtype, told
from .runtime import Runtime
from .tasks import Task
from .tasks.base import Batch, to_device
from .tasks.preparing import for_training
from .training.ema import Average
from .training.isolation import batches_packs, prove_isolation, refuse_leaky
from .training.optim import make_optimizer
from .training.state import Trainee

CALIBRATION_ROWS = 16
"""Rows of the first training batch that errors and outliers of frozen linears are measured on."""


def encode_splits(task: Task, splits: Splits, config: Config) -> dict[str, EncodedSet]:
    """Every split that there is, tokenised (from the cache where it holds them): by the first process, for all. What is
    streamed is not sent: every process opens the store on disk, which the first to lock it builds."""

    def encoded() -> dict[str, EncodedSet]:
        cache, limit = cache_folder(config.data.cache), config.data.max_dropped
        given = {name: getattr(splits, name) for name in ("train", "eval", "test")}
        return {
            name: encode_split(split, task.encode, task.fingerprint(), limit, cache)
            for name, split in given.items()
            if split is not None
        }

    found = encoded() if config.data.streaming else processes.from_first(encoded)
    found["train"] = for_training(found["train"], splits, task, config)
    return found


def build_group(
    task: Task,
    config: Config,
    runtime: Runtime,
    data: dict[str, EncodedSet],
    specs: list[MemberSpec] | None = None,
    record: FrozenRecord | None = None,
) -> Group:
    """The backbone on its device with the members of `specs` (one, of the config, by default).

    Args:
        record: what was decided about frozen linears when this run began; None decides now.
    """
    refuse_levers(config, runtime)
    backbone = with_new_tokens(task.load(runtime.device), task.processor, config)
    if said := told(backbone.model, config.model, compute_dtype(config, runtime.device)):
        backbone.decisions["quantization"] = said
    had_balance = without_balance_loss(backbone.model)
    if config.data.packing:
        refuse_leaky(backbone.model, config.data.pack_tokens or config.data.max_length)
    specs = specs or [MemberSpec("default", config.training.seed, config.training.learning_rate)]
    group = adapt(backbone, config, specs, _data_start(task, config, runtime, data["train"]))
    refuse_too_long(group.model, data)
    refuse_failing(group, lambda model: task.forward(model, task.probe(group.backbone.model)))
    group.started_from = start_from(group, config, getattr(task, "labels", None))
    select_trainable(group, config.training)
    if had_balance:
        backbone.decisions["balance_loss"] = told_of_balance(group)
    if config.training.neftune_alpha is not None:
        group.noise = Neftune(backbone.model, config.training.neftune_alpha)
    refuse_mixed_dtypes(group, runtime)
    if runtime.sharded:
        shard(group, runtime)
    if config.model.offload == "layers":
        stream_layers(group, runtime.device)
    processes.copy_first([t.data for member in group.members for t in member.all_tensors().values()])
    if config.kernels != "off":
        fuse_group(group, task, config, runtime, data["train"], record)
    if config.training.gradient_checkpointing:
        chosen = checkpoint_layers(backbone.model, config.training.gradient_checkpointing)
        backbone.decisions["gradient_checkpointing"] = chosen
    if config.training.activation_offload == "cpu":
        group.offload = ActivationOffload(group.model, CudaLane(runtime.device))
        backbone.decisions["activation_offload"] = f"cpu: saved tensors of {LEAST:,} bytes and more"
    if config.training.optimizer_in_backward:
        backbone.decisions["optimizer_in_backward"] = "each tensor is updated as soon as its gradient is there"
    if config.data.packing:
        for member in group.members:
            prove_isolation(group, member, task, runtime)
    return group


def refuse_levers(config: Config, runtime: Runtime) -> None:
    """Levers that need a card, or one process, before anything is loaded."""
    refuse_layers_here(config, runtime.device)
    if config.training.activation_offload == "cpu" and runtime.device.type != "cuda":
        raise ConfigError(
            f"training.activation_offload: got cpu, and the device is {runtime.device.type}: only a CUDA card has "
            "memory apart from the host's.",
            "Set it to none.",
        )
    if config.training.optimizer_in_backward and (runtime.world > 1 or runtime.accelerator.scaler is not None):
        reason = "processes add up theirs" if runtime.world > 1 else "fp16's loss scale looks at all of them"
        raise ConfigError(
            f"training.optimizer_in_backward updates a tensor once its gradient is there, and {reason}.",
            "Set it to false.",
        )


def refuse_layers_here(config: Config, device: torch.device) -> None:
    if config.model.offload == "layers" and device.type != "cuda":
        raise ConfigError(
            f"model.offload: got layers, and the device is {device.type}: only a CUDA card has memory apart from the "
            "host's.",
            "Set model.offload: none.",
        )


def stream_layers(group: Group, device: torch.device) -> None:
    """Move the model to the card but for its frozen layers, which stay on the host until they run (`model.offload`)."""
    model: Any = group.backbone.model
    layers = list(blocks(model))
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    kept = {tensor for member in group.members for tensor in member.all_tensors().values()}
    kept |= {parameter for parameter in model.parameters() if parameter not in inside}
    streamed = StreamedLayers(layers, kept, CudaLane(device), device)
    group.model.to(device)  # embeddings, the head, what stands outside of layers
    group.backbone.decisions["offload"] = f"{len(layers)} layers, {streamed.host_bytes:,} bytes on the host"


def fuse_group(
    group: Group,
    task: Task,
    config: Config,
    runtime: Runtime,
    data: EncodedSet,
    record: FrozenRecord | None = None,
) -> None:
    """Fuse the model, and freeze its linears as `model.frozen_compute` says, in place. Adapters must have their start:
    some of them are made of the weights.

    Args:
        record: what was decided about frozen linears before; None decides now, on the first training rows.
    """
    settings, spec = config.model, group.members[0].spec

    def calibrate() -> None:
        plan = BatchPlan(data.lengths, config.training.batch_size, spec.seed, config.data.group_by_length)
        batch = to_device(task.collate(data, plan.rows(1)[:CALIBRATION_ROWS]), runtime.device)
        with runtime.accelerator.autocast():
            task.forward(group.model, batch)

    group.activate(group.members[0])
    group.fused = fuse(
        group.model,
        config.kernels if config.kernels != "off" else "auto",
        settings.frozen_compute,
        frozen_outliers=settings.frozen_outliers,
        frozen_error_bound=settings.frozen_error_bound,
        frozen_head=settings.frozen_head,
        dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(runtime.precision),
        calibrate=calibrate,
        record=record,
    )
    group.rows = row_seeds(group.model)


def _data_start(task: Task, config: Config, runtime: Runtime, data: EncodedSet) -> DataStart:
    """The training batches for starts of adapters that are computed from them."""
    settings = config.training

    def batches(seed: int, at_least: int) -> Iterator[tuple[Batch, float]]:
        plan = BatchPlan(data.lengths, settings.batch_size, seed, config.data.group_by_length)
        steps = map(plan.rows, count(1))
        for rows in steps:
            while len(rows) < at_least:
                rows = np.concatenate([rows, next(steps)])
            yield to_device(task.collate(data, rows), runtime.device), float(data.units[rows].sum())

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with runtime.accelerator.autocast():
            return task.loss(task.forward(model, batch), batch)

    return DataStart(batches, task.forward, loss)


def make_trainees(group: Group, data: EncodedSet, config: Config, runtime: Runtime) -> list[Trainee]:
    """Members with their optimizer and data order, at step 0."""
    settings = config.training
    micro = (
        settings.batch_size
        if settings.micro_batch_size == "auto"
        else min(settings.micro_batch_size, settings.batch_size)
    )
    packing = None
    if config.data.packing:
        together = batches_packs(group.backbone.model)
        packing = Packing(config.data.pack_tokens or config.data.max_length, together)
    return [
        Trainee(
            member,
            make_optimizer(member, config, runtime.device),
            BatchPlan(
                data.lengths,
                settings.batch_size,
                member.spec.seed,
                config.data.group_by_length,
                packing,
                data.mixture,
            ),
            micro,
            Average.of(member, settings.ema_decay) if settings.ema_decay is not None else None,
        )
        for member in group.members
    ]


def refuse_mixed_dtypes(group: Group, runtime: Runtime) -> None:
    """Trained tensors are fp32; inside a narrower backbone, anything but LoRA's own products needs autocast."""
    frozen = [p for p in group.backbone.model.parameters() if not p.requires_grad]
    dtypes = {p.dtype for p in frozen if p.is_floating_point()}  # codes are integers
    narrow = dtypes - {torch.float32}
    own = [name for name in group.members[0].all_tensors() if ".lora_" not in name]
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
    return {p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()}


def refuse_too_long(model: Any, data: dict[str, EncodedSet]) -> None:
    """Sequences must fit the model's positions."""
    positions, taken = positions_of(model), virtual_tokens(model)
    if positions is not None:
        positions -= taken
    longest = max((d.longest for d in data.values()), default=0)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"data.max_length: the longest sequence has {longest} tokens, the model has {positions} positions"
            + (f" beside the adapter's {taken}." if taken else "."),
            f"Set data.max_length: {positions}.",
        )
