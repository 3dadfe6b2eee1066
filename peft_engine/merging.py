"""Adapter arithmetic: several LoRA adapters of one backbone into one, through peft's `add_weighted_adapter`.

    cat     exactly Σ wᵢ·Δᵢ, at the sum of the ranks
    svd     its best approximation at one rank (Eckart, Young 1936)
    linear  Σ √wᵢ·Bᵢ times Σ √wᵢ·Aᵢ: peft's cheap form, which mixes one adapter's B with another's A
    others  TIES (Yadav et al. 2023), DARE (Yu et al. 2024), magnitude pruning; on the factors, or `_svd` on Δ

How far the result is from Σ wᵢ·Δᵢ is measured on the written file and told.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters.files import SETTINGS, WEIGHTS, read_adapter, refuse_difference
from .adapters.lora import moves_weights
from .backbone import on_card
from .config import Config
from .config_methods import MERGES
from .config_reading import to_yaml
from .data.labels import Labels
from .errors import ConfigError, StorageError, VerificationError
from .exporting import read_labels, write_labels
from .run_directory import command, find_run, storage_errors
from .runtime import seed_everything, start, versions
from .tasks import make_task
from .training.checkpoint import digest_file

FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B")
RESULT, AGAIN = "merge_result", "merge_again"


@dataclass(frozen=True)
class Source:
    """A run that is merged: its folder, weight, settings, class names, and what its adapter holds."""

    path: str
    weight: float
    folder: Path
    config: Config
    labels: Labels | None
    backbone: str
    record: dict[str, Any]
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def head(self) -> dict[str, Tensor]:
        """Tensors that are no LoRA factors: modules trained in full."""
        return {name: t for name, t in self.tensors.items() if not any(part in name for part in FACTORS)}


def merge(
    sources: Sequence[tuple[str, float]],
    target: str | Path,
    *,
    method: str = "cat",
    density: float | None = None,
    rank: int | None = None,
    head: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Merge runs' LoRA adapters, and write a folder that `evaluate`, `predict`, `generate` and `export` take for a run.

    Args:
        sources: (run directory, weight) of two or more finished lora runs of one backbone and task. Weights may be
            negative and need not add up to 1.
        target: folder to write. Its `adapter/` loads in plain peft; its config.yaml is the first run's, with the
            merged adapter's rank and alpha.
        method: one of MERGES.
        density: share of values that ties, dare and magnitude_prune keep.
        rank: of the result of the svd methods; the largest of the sources' by default.
        head: the run whose fully trained modules (a classifier) the result gets, where they differ.
        seed: of what DARE drops.

    Returns:
        {"folder", "rank", "distance"}: distance is ‖Δ - Σ wᵢ·Δᵢ‖ / ‖Σ wᵢ·Δᵢ‖ over all modules (Frobenius).

    Raises:
        ConfigError: what is given does not fit together, or peft refuses it.
        StorageError: a source can't be read, or the target not written.
        VerificationError: the written file does not hold what was merged.
    """
    folder = Path(target).expanduser()
    _refuse_arguments(sources, folder, method, density, rank)
    found = [_read(path, weight) for path, weight in sources]
    first = found[0]
    _refuse_strangers(found)
    kept = _choose_head(found, head)
    runtime = start(first.config)
    task = make_task(on_card(first.config), first.labels)
    backbone = task.load(runtime.device)
    if backbone.weights_digest != first.backbone:
        raise ConfigError(
            f"model.path: {first.config.model.path} no longer holds the weights that {first.path} was trained on.",
            "Restore the model.",
        )
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with storage_errors(folder), tempfile.TemporaryDirectory(prefix="peft-engine-") as scratch:
        try:
            model = _load(backbone.model, found, Path(scratch))
            seed_everything(seed)
            tensors, settings = _combine(model, found, method, density, rank)
            settings.modules_to_save = first.settings.get("modules_to_save")
            settings.task_type = first.settings.get("task_type")
            _write_adapter(part / "adapter", {**tensors, **kept}, settings)
            distance = _verify(model, found, part / "adapter", {**tensors, **kept})
            task.processor.save_pretrained(str(part / "adapter"))
            write_labels(first.labels, part / "adapter")
            record = _record(found, method, density, distance, seed)
            (part / "adapter" / "README.md").write_text(_card(first.config, record), encoding="utf-8")
            (part / "config.yaml").write_text(to_yaml(_config(first.config, folder, settings.r)), encoding="utf-8")
            (part / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
            os.replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return {"folder": str(folder), "rank": settings.r, "distance": distance}


def _refuse_arguments(
    sources: Sequence[tuple[str, float]], folder: Path, method: str, density: float | None, rank: int | None
) -> None:
    prunes = method.startswith(("ties", "dare", "magnitude"))
    if len(sources) < 2:
        raise ConfigError(f"merge: got {len(sources)} run(s), expected two or more.", "Name them as RUN=WEIGHT.")
    for path, weight in sources:
        if not abs(weight) <= torch.finfo(torch.float32).max:
            said = f"merge: got weight {weight} for {path}, expected a finite number that fp32 holds."
            raise ConfigError(said, "Take one like 0.5.")
    if method not in MERGES:
        raise ConfigError(f"merge: got method {method!r}, expected one of {', '.join(MERGES)}.", "Use cat.")
    if prunes != (density is not None):
        said = "needs a density, the share of values to keep" if prunes else "takes no density"
        raise ConfigError(f"merge: {method} {said}.", "Add --density 0.5." if prunes else "Leave --density out.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"merge: density {density} must be above 0 and at most 1.", "Take 0.5.")
    if rank is not None and not method.endswith("svd"):
        raise ConfigError(f"merge: the rank follows from the sources with {method}.", "Leave --rank out, or use svd.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty.", "Name another folder with --to, or delete it.")


def _read(path: str, weight: float) -> Source:
    folder, config = find_run(path)
    if config.adapter.method != "lora":
        raise ConfigError(
            f"merge: {path} was trained with adapter.method {config.adapter.method}.", "Only lora adapters merge."
        )
    rounded = config.model.quantization != "none" or config.model.frozen_compute != "full"
    if rounded and moves_weights(config.adapter.init):
        raise ConfigError(
            f"merge: {path} began with {config.adapter.init} over rounded weights: what it was trained on is what the "
            "start left of them, which no other run has.",
            "Leave it out, or export it with --merged.",
        )
    record_path = folder / "run.json"
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        backbone = record["digests"]["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{record_path} can't be read: {error}.", "Restore it.") from error
    tensors, settings = read_adapter(folder / "adapter")
    source = Source(path, weight, folder, config, read_labels(folder / "adapter"), backbone, record, tensors, settings)
    extra = [name for name in source.head if not _of_saved_module(name, settings.get("modules_to_save") or [])]
    if settings.get("use_dora") or extra or settings.get("target_parameters"):
        why = "it uses DoRA" if settings.get("use_dora") else f"it also trained {', '.join(extra[:3]) or 'parameters'}"
        raise ConfigError(f"merge: {path} can't be merged: {why}, which is no sum of LoRA updates.", "Leave it out.")
    return source


def _of_saved_module(name: str, modules: Sequence[str]) -> bool:
    above = name.rpartition(".")[0]
    return any(above.endswith(f".{module}") or f".{module}." in above for module in modules)


def _refuse_strangers(found: Sequence[Source]) -> None:
    first = found[0]
    for other in found[1:]:
        said = None
        if other.backbone != first.backbone:
            said = "other weights of the backbone"
        elif other.config.task != first.config.task:
            said = f"task {first.config.task}, {other.config.task}"
        elif other.labels != first.labels:
            said = "other classes, or the same in another order"
        if said:
            raise ConfigError(
                f"merge: {first.path} and {other.path} do not fit together: {said}.", "Merge what has the same base."
            )


def _choose_head(found: Sequence[Source], head: str | None) -> dict[str, Tensor]:
    """The modules trained in full, which can't be added up: equal in all, or those of the run that was named."""
    chosen = next((source for source in found if source.path == head), None)
    if head is not None and chosen is None:
        raise ConfigError(f"merge: --head {head} is none of the runs.", "Name one as it is named among them.")
    first = found[0]
    for other in found[1:]:
        refuse_difference(first.head, other.head, f"The modules trained in full of {other.path}")
    different = [
        name for name in first.head if any(not torch.equal(first.head[name], other.head[name]) for other in found)
    ]
    if different and chosen is None:
        raise ConfigError(
            f"merge: the runs trained {different[0]} in full, each its own; such modules can't be added up.",
            f"Say whose to take: --head {first.path}.",
        )
    return (chosen or first).head


def _load(model: Any, found: Sequence[Source], scratch: Path) -> PeftModel:
    """The backbone with the LoRA parts of all sources, by the names of `_name`."""
    peft: PeftModel | None = None
    for number, source in enumerate(found):
        place = scratch / str(number)
        place.mkdir()
        factors = {name: t for name, t in source.tensors.items() if name not in source.head}
        save_file(factors, place / WEIGHTS)
        # without its task peft adds no head of its own to modules_to_save
        plain = {**source.settings, "modules_to_save": None, "task_type": None}
        (place / SETTINGS).write_text(json.dumps(plain), encoding="utf-8")
        if peft is None:
            peft = PeftModel.from_pretrained(model, str(place), adapter_name=_name(number))
        else:
            peft.load_adapter(str(place), adapter_name=_name(number))
    assert peft is not None
    return peft


def _name(number: int) -> str:
    return f"merge_{number}"


def _combine(
    model: Any, found: Sequence[Source], method: str, density: float | None, rank: int | None
) -> tuple[dict[str, Tensor], LoraConfig]:
    """The merged factors by the names of the file, and settings that scale them by 1."""
    names = [_name(number) for number in range(len(found))]
    weights = [source.weight for source in found]
    if method.endswith("svd"):
        _refuse_rank(model, names, rank or max(model.peft_config[name].r for name in names))
    try:
        model.add_weighted_adapter(names, weights, RESULT, combination_type=method, density=density, svd_rank=rank)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(f"merge: peft refuses this: {' '.join(str(error).split())}", "Use cat, or svd.") from error
    settings: LoraConfig = model.peft_config[RESULT]
    found_tensors = get_peft_model_state_dict(model, adapter_name=RESULT, save_embedding_layers=False)
    tensors = {
        name: _widened(name, tensor.detach().cpu().float(), settings.r) for name, tensor in found_tensors.items()
    }
    broken = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if broken is not None:
        raise ConfigError(
            f"merge: {broken} of the sum is not finite; the weights were {', '.join(f'{w:g}' for w in weights)}.",
            "Take smaller weights, or leave out a run whose adapter is not finite.",
        )
    # the scales are in the factors; with rslora's, peft would apply sqrt(rank) once more
    settings.use_rslora, settings.lora_alpha = False, settings.r
    settings.inference_mode = True
    return tensors, settings


def _refuse_rank(model: nn.Module, names: Sequence[str], rank: int) -> None:
    """A product of B and A has no higher rank than its module is narrow."""
    widths = {}
    for name, layer in model.named_modules():
        for a, b in [pair for n in names if isinstance(layer, LoraLayer) and (pair := _factors(layer, n))]:
            widths[name.removeprefix("base_model.model.")] = min(b.flatten(1).shape[0], a.flatten(1).shape[1])
    narrow = min(widths, key=widths.__getitem__)
    if rank > widths[narrow]:
        raise ConfigError(
            f"merge: rank {rank} is more than svd can give {narrow}, {widths[narrow]} wide.",
            f"Take --rank {widths[narrow]} or less, or cat.",
        )


def _widened(name: str, tensor: Tensor, rank: int) -> Tensor:
    """Zeros up to the rank of the config, where a module's own rank (`rank_pattern`) was lower."""
    dim = 0 if "_A" in name.rpartition("lora_")[2] else 1
    missing = rank - tensor.shape[dim]
    if missing <= 0:
        return tensor.contiguous()
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()


def _write_adapter(folder: Path, tensors: dict[str, Tensor], settings: LoraConfig) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings.save_pretrained(str(folder))


def _verify(model: Any, found: Sequence[Source], folder: Path, tensors: dict[str, Tensor]) -> float:
    """Load the written adapter in peft and compare it, bit by bit, then measure its distance from Σ wᵢ·Δᵢ in fp64."""
    model.load_adapter(str(folder), adapter_name=AGAIN)
    loaded = get_peft_model_state_dict(model, adapter_name=AGAIN, save_embedding_layers=False)
    wrong = [n for n in tensors if n not in loaded or not torch.equal(loaded[n].detach().cpu().float(), tensors[n])]
    if wrong:
        raise VerificationError(f"{folder / WEIGHTS}: peft reads {wrong[0]} otherwise than merged.", "Report this.")
    difference = size = 0.0
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            wanted = sum(
                source.weight * delta
                for number, source in enumerate(found)
                if (delta := _delta(layer, _name(number))) is not None
            )
            have = _delta(layer, AGAIN)
            if isinstance(wanted, Tensor) and have is not None:
                difference += float((have - wanted).square().sum())
                size += float(wanted.square().sum())
    distance = float((difference / size) ** 0.5) if size else 0.0
    if not math.isfinite(distance):
        raise VerificationError(
            f"{folder / WEIGHTS}: its distance from the weighted sum is {distance}.", "Report this."
        )
    return distance


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor] | None:
    """A and B of one adapter; None for a layer that it does not have."""
    if adapter in layer.lora_A:
        return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return None


def _delta(layer: Any, adapter: str) -> Tensor | None:
    """scale·B·A of one adapter, fp64 (out, in); kernels of convolutions flattened."""
    found = _factors(layer, adapter)
    if found is None:
        return None
    a, b = found
    return layer.scaling[adapter] * (b.detach().double().flatten(1) @ a.detach().double().flatten(1))


def _config(config: Config, folder: Path, rank: int) -> Config:
    tree = config.model_dump(mode="json", exclude_unset=True)
    adapter = {k: v for k, v in tree.get("adapter", {}).items() if k in ("method", "dropout", "targets", "layers",
                                                                          "modules_to_save")}  # fmt: skip
    tree |= {"output": str(folder), "adapter": {**adapter, "rank": rank, "alpha": float(rank)}}
    # frozen linears in full precision: no run was trained with the sum on rounded ones
    tree["model"] = {k: v for k, v in tree.get("model", {}).items() if not k.startswith("frozen_")}
    return Config.model_validate(tree)


def _record(found: Sequence[Source], method: str, density: float | None, distance: float, seed: int) -> dict[str, Any]:
    first = found[0]
    return {
        "task": first.config.task,
        "method": "lora",
        "merged": {
            "method": method,
            "density": density,
            "seed": seed,
            "distance": distance,
            "sources": [
                {"path": s.path, "weight": s.weight, "sha256": digest_file(s.folder / "adapter" / WEIGHTS)}
                for s in found
            ],
        },
        "data": first.record.get("data", {}),
        "digests": {"backbone": first.backbone},
        "versions": versions(),
        "command": command(),
    }


def _card(config: Config, record: dict[str, Any]) -> str:
    merged = record["merged"]
    lines = [
        "---",
        f"base_model: {config.model.hub_id or config.model.path}",
        "library_name: peft",
        f"tags: [{config.task}, lora, merge, peft-engine]",
        "---",
        f"# Merged LoRA adapter for {config.task}",
        "",
        f"Base model: `{config.model.path}`. Made with peft's `add_weighted_adapter`, method `{merged['method']}`"
        + (f", density {merged['density']}, seed {merged['seed']}" if merged["density"] is not None else "")
        + ".",
        "",
        "| source | weight | sha256 of its weights |",
        "| --- | --- | --- |",
        *(f"| `{s['path']}` | {s['weight']} | `{s['sha256']}` |" for s in merged["sources"]),
        "",
        f"Relative distance from the weighted sum of the updates: {merged['distance']:.2e}.",
        "",
        "It loads with `peft.PeftModel.from_pretrained(base, THIS_FOLDER)`.",
    ]
    return "\n".join(lines) + "\n"
