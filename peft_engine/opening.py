"""A finished run, opened for use: its adapter on its backbone, whose weights are what they were in training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adapters.files import load_adapter
from .adapters.fusing import FrozenRecord, fuse, row_seeds
from .adapters.fusing.frozen_record import FILE, read_record
from .adapters.group import Group
from .adapters.lora import move_weights_again, moves_weights
from .adapters.new_rows import with_new_tokens
from .adapters.quantised_start import lora_layers
from .building import refuse_layers_here, stream_layers
from .config import Config
from .config_checks import LABELLED
from .data.labels import Labels
from .errors import StorageError
from .exporting import LABELS, read_labels
from .quantised import Format, dequantise, full_weights, quantised_linears
from .run_directory import find_run
from .runtime import Runtime, start
from .tasks import Task, make_task


@dataclass
class Opened:
    """A run's adapter on its backbone, ready for use."""

    folder: Path
    config: Config
    labels: Labels | None
    task: Task
    runtime: Runtime
    group: Group


def open_run(path: str | Path, overrides: tuple[str, ...] = (), *, dequantised: bool = False) -> Opened:
    """Load the adapter of a run.

    Args:
        path: the run directory, or the config whose `output` it is.
        dequantised: quantised linears become plain ones with the numbers that they stand for; nothing is fused.

    Raises:
        ConfigError: there is no finished run, or its weights were rounded to a format that this device lacks.
        StorageError: its adapter is damaged, or not this model's; what was decided about frozen linears is missing.
    """
    folder, config = find_run(path, overrides)
    labels = read_labels(folder / "adapter")
    if labels is None and config.task in LABELLED:
        raise StorageError(f"{folder / 'adapter' / LABELS} is missing.", "Restore it, or train again.")
    runtime = start(config)
    refuse_layers_here(config, runtime.device)
    task = make_task(config, labels)
    backbone = with_new_tokens(task.load(runtime.device), task.processor, config)
    linears = list(quantised_linears(backbone.model))
    formats = dequantise(backbone.model, backbone.model.dtype) if dequantised else {}
    group = load_adapter(backbone, config, folder / "adapter")
    if linears:
        _round_as_trained(group, config, linears, formats)
    if config.model.offload == "layers":
        stream_layers(group, runtime.device)
    if config.model.frozen_compute != "full":
        _freeze_as_trained(group, config, read_record(folder / FILE, of_run(folder, "digests").get("frozen")))
    if linears and not dequantised and config.kernels != "off":
        _fuse(group, config)
    return Opened(folder, config, labels, task, runtime, group)


def of_run(folder: Path, *names: str) -> Any:
    """What run.json says under these names. Raises StorageError where it says nothing."""
    path = folder / "run.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for name in names:
            found = found[name]
        return found
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} can't be read: {error}.", "Restore it, or run train --resume, which writes it anew."
        ) from error


def _round_as_trained(group: Group, config: Config, linears: list[str], formats: dict[str, Format]) -> None:
    """Where the start moved a part of the weights into the adapter, what is left of them was quantised."""
    if config.adapter.method != "lora" or not moves_weights(config.adapter.init):
        return
    name = group.members[0].spec.name
    adapted = [linear for linear in linears if linear in lora_layers(group.model, name)]
    base: Any = group.model.get_base_model()  # type: ignore[operator]
    move_weights_again(group.model, name, adapted, full_weights(base, config.model, adapted), formats)


def _freeze_as_trained(group: Group, config: Config, record: FrozenRecord) -> None:
    """Round the weights that were rounded in training, so that outputs are those that were trained.

    Raises:
        ConfigError: this device lacks the format.
    """
    if record.format is None:
        return
    if config.adapter.method == "lora" and moves_weights(config.adapter.init):
        move_weights_again(group.model, group.members[0].spec.name, record.frozen)
    _fuse(group, config, record)


def _fuse(group: Group, config: Config, record: FrozenRecord | None = None) -> None:
    group.fused = fuse(group.model, "torch" if config.kernels == "torch" else "auto", record=record)
    group.rows = row_seeds(group.model)
