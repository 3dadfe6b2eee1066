"""`export`: a run's adapter verified, its merged model, or GGUF files; each held against what was trained."""

import json
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from .adapters.files import read_adapter
from .adapters.lora import moves_weights
from .backbone import load_settings
from .config import Config
from .config_reading import load_config
from .data.encoding import EncodedSet, cache_folder
from .data.loading import encode_split, load_splits, without_looking
from .drift import MAX_KL, Drift, HeldOut, compare, held_out
from .errors import ConfigError, DataError, EngineError
from .exporting import compare_on_probe, export_merged, verify_adapter
from .gguf_files import ADAPTER, MODEL, refuse_without_gguf, why_no_adapter, write_adapter, write_model
from .opening import Opened, open_run
from .quantised import stored_kind
from .run_directory import IN_FULL, PLAIN, find_run, storage_errors, write_whole
from .runtime import versions
from .tasks import Task
from .tasks.items import item_kind

MERGE = "merge.json"
Base = Literal["full precision", "dequantised"]


@dataclass
class Candidate:
    """A merged model on one base: its folder, how far its reload is from what was merged, and from what was trained."""

    base: Base
    folder: Path
    drift: Drift
    apart: HeldOut | None = None

    def distance(self) -> float:
        """Smaller is nearer to the trained model; what is no number is farthest."""
        assert self.apart is not None
        found = self.apart.relative if self.apart.kl is None else self.apart.kl
        return found if math.isfinite(found) else math.inf


def export(
    path: str | Path,
    *,
    merged: bool = False,
    gguf: bool = False,
    target: str | Path | None = None,
    max_kl: float | None = None,
    overrides: tuple[str, ...] = (),
) -> tuple[Path, Drift]:
    """Verify a run's adapter in plain peft, or write the merged model and verify it in plain transformers.

    A merged model is also held against what was trained, on rows of the run's data. Where the backbone was rounded for
    training (`model.frozen_compute`) it is not the same, because the adapter goes onto the model's own weights. Where
    it was quantised (`model.quantization`) there are two bases, these and the dequantised ones: both are tried, and the
    one whose outputs are nearer to the trained model's is written (trap 12).

    Args:
        merged: fold the adapter into the weights and write an ordinary model folder, with the figures in merge.json.
        gguf: the merged model as `model.gguf`, and a LoRA adapter as `adapter.gguf`, both read again and compared.
        target: where; `<run>/merged` or `<run>/gguf` by default. For adapters: a copy of the folder, or none.
        max_kl: bound of a merged model's mean KL(trained ‖ merged), nats per token, word or row; 0.05 by default.

    Returns:
        The folder, and how far the reloaded model's logits are from the trained one's.

    Raises:
        VerificationError: beyond a bound; no folder is left then.
    """
    found, config = find_run(path, overrides)
    whole = merged or gguf
    _refuse_other_weights(found, config)
    if merged and gguf:
        raise ConfigError("--merged and --gguf: one folder holds one form.", "Export twice.")
    _check_max_kl(max_kl, whole)
    folder = Path(target).expanduser() if target else found / ("merged" if merged else "gguf" if gguf else "adapter")
    if (target or whole) and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty.", "Name another folder with --to, or delete it.")
    if gguf:
        refuse_without_gguf(config)
    if whole:
        return folder, _export_whole(path, overrides, folder, max_kl, gguf)
    opened = open_run(path, (*overrides, *_as_adapter(config)))
    drift = verify_adapter(opened.group, opened.config, opened.task, found / "adapter")
    if _start_left_a_rest(config):
        apart = _hold_adapter_against_trained(path, overrides, opened)
        apart.refuse("adapter on the model's own weights")
        drift = replace(drift, held_out=apart)
    if target:
        with storage_errors(folder):
            shutil.copytree(found / "adapter", folder, dirs_exist_ok=True)
    return folder, drift


def _refuse_other_weights(folder: Path, asked: Config) -> None:
    """What is exported is held against the run as it was trained: on other weights that would be another run."""
    own = load_config(folder / "config.yaml")
    for name in ("quantization", "frozen_compute"):
        was, now = getattr(own.model, name), getattr(asked.model, name)
        if was != now:
            raise ConfigError(
                f"export: got model.{name}={now}, and what comes out is held against the run as trained, with {was}.",
                "Leave it out: a merged model is tried on the model's own weights anyway.",
            )


def _start_left_a_rest(config: Config) -> bool:
    """Whether a part of the weights went into the adapter before the rest was rounded: on the model's own weights, for
    which the file is, the rounding of that rest is missing."""
    rounded = config.model.quantization != "none" or config.model.frozen_compute != "full"
    return rounded and config.adapter.method == "lora" and moves_weights(config.adapter.init)


def _hold_adapter_against_trained(path: str | Path, overrides: tuple[str, ...], plain: Opened) -> HeldOut:
    """The adapter on the model's own weights, on the run's rows."""
    opened = open_run(path, overrides)
    try:
        split, data = _held_out_rows(opened.config, opened.task)
    except EngineError as error:
        raise _unreadable(error) from error
    size = opened.config.evaluation.batch_size or opened.config.training.batch_size
    with plain.group.evaluating(plain.group.members[0]) as own, opened.group.evaluating(opened.group.members[0]) as one:
        return compare(one, own, opened.task, data, split, size, opened.runtime, MAX_KL)


def _unreadable(error: EngineError) -> DataError:
    said = f"export: what comes out is held against what was trained, on the run's rows: {error.problem}"
    return DataError(said, "Restore the data.")


def _as_adapter(config: Config) -> tuple[str, ...]:
    """What an adapter file is for: the base as it is quantised, unfused, as plain peft has it (but that outside of the
    engine bitsandbytes' int8 rounds activations in evaluation on a CPU); the model's own weights where the start moved
    a part of them into the adapter."""
    if config.adapter.method == "lora" and moves_weights(config.adapter.init):
        return IN_FULL
    quantised = config.model.quantization != "none" or stored_kind(load_settings(config.model)) is not None
    return (*PLAIN, "kernels=off") if quantised else PLAIN


def _export_whole(
    path: str | Path, overrides: tuple[str, ...], folder: Path, max_kl: float | None, gguf: bool
) -> Drift:
    """The merged model in `folder`, or nothing there: a model that fails its verification does not stay."""
    inside = folder.is_dir()  # an empty one, perhaps "." or a mount, which can't be replaced
    part = folder / ".part" if inside else folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        tried = [
            Candidate(base, part / str(i), _merge(path, overrides, base, part / str(i), folder, max_kl))
            for i, base in enumerate(_bases(path, overrides))
        ]
        record = _hold_against_trained(path, overrides, tried, max_kl)
        best = min(tried, key=Candidate.distance)
        assert best.apart is not None
        best.apart.refuse()
        result = best.folder
        with storage_errors(folder):
            if gguf:
                result = part / "gguf"
                result.mkdir()
                record["gguf"] = _write_gguf(path, overrides, best.folder, result, _why_no_base(tried))
            write_whole(result / MERGE, json.dumps(record, indent=2, allow_nan=False) + "\n")
            if inside:
                for one in result.iterdir():
                    os.replace(one, folder / one.name)
            else:
                os.replace(result, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    others: dict[str, HeldOut] = {}
    if len(tried) > 1:
        others = {one.base: one.apart for one in tried if one.apart is not None}
    return replace(best.drift, held_out=best.apart, base=best.base, bases=others)


def _why_no_base(tried: list[Candidate]) -> str | None:
    """Why nobody has a GGUF file of the base that the adapter is for; None where the model's own weights are near."""
    own = next((one for one in tried if one.base == "full precision"), None)
    if own is None:
        return "it is for weights that the checkpoint stores quantised, which llama.cpp can't read"
    assert own.apart is not None
    return None if own.apart.within() else f"on the model's own weights it is not what was trained: {own.apart.told()}"


def _write_gguf(
    path: str | Path, overrides: tuple[str, ...], merged: Path, target: Path, no_base: str | None
) -> dict[str, Any]:
    """model.gguf, and adapter.gguf where the adapter has a form and a base there; what merge.json says."""
    found, config = find_run(path, overrides)
    record: dict[str, Any] = {MODEL: write_model(merged, target / MODEL)}
    tensors, settings = read_adapter(found / "adapter")
    why = no_base or why_no_adapter(settings, tensors)
    if why is None:
        record[ADAPTER] = write_adapter(tensors, settings, load_settings(config.model), target / ADAPTER)
    else:
        record[ADAPTER] = f"not written: {why}"
    return record


def _bases(path: str | Path, overrides: tuple[str, ...]) -> list[Base]:
    """Weights that the adapter can be folded into."""
    _, config = find_run(path, overrides)
    if stored_kind(load_settings(config.model)) is not None:
        return ["dequantised"]
    return ["full precision", "dequantised"] if config.model.quantization != "none" else ["full precision"]


def _open_on(path: str | Path, overrides: tuple[str, ...], base: Base) -> Opened:
    if base == "full precision":
        return open_run(path, (*overrides, *IN_FULL))
    return open_run(path, (*overrides, *PLAIN), dequantised=True)


def _merge(
    path: str | Path, overrides: tuple[str, ...], base: Base, part: Path, folder: Path, max_kl: float | None
) -> Drift:
    """Write the merged model; the run that it was made of is let go on return."""
    opened = _open_on(path, overrides, base)
    if max_kl is not None and item_kind(opened.task) == "values":
        raise ConfigError(
            "--max-kl: a model whose outputs are numbers has no probabilities to compare.", "Leave it out."
        )
    with storage_errors(folder):
        return export_merged(opened.group, opened.config, opened.task, opened.labels, part)


def _hold_against_trained(
    path: str | Path, overrides: tuple[str, ...], tried: list[Candidate], max_kl: float | None
) -> dict[str, Any]:
    """Compare every merged model with the run as it was trained; what merge.json says."""
    opened = open_run(path, overrides)
    task, config, bound = opened.task, opened.config, MAX_KL if max_kl is None else max_kl
    try:
        split, data = _held_out_rows(config, task)
    except EngineError as error:
        if len(tried) > 1:  # figures of a reload alone don't tell which base is nearer
            raise _unreadable(error) from error
        note = f"the run's rows can't be read: {error.problem}"
        only = tried[0]
        same = only.base == "full precision" and opened.group.fused is None  # what was merged is what was trained
        found = only.drift if same else compare_on_probe(opened.group, task, only.folder)
        only.apart = held_out(found, task, "probe", 0, 0, bound, note=note)
    else:
        size = config.evaluation.batch_size or config.training.batch_size
        for one in tried:
            merged = task.plain(str(one.folder)).to(opened.runtime.device).eval()
            with opened.group.evaluating(opened.group.members[0]) as model:
                one.apart = compare(model, merged, task, data, split, size, opened.runtime, bound)
            del merged
    frozen = opened.group.fused.record if opened.group.fused else None
    best = min(tried, key=Candidate.distance)
    assert best.apart is not None
    drift = best.drift
    record = {
        "schema": "peft-engine merge 1",
        "base": config.model.path,
        "frozen_compute": (frozen.format if frozen else None) or "full",
        "quantization": config.model.quantization,
        "onto": best.base,
        "reloaded": {"relative": drift.relative, "kl": drift.kl, "top1_agreement": drift.top1_agreement},
        "held_out": best.apart.to_json(),
        "versions": versions(),
    }
    if len(tried) > 1:
        record["candidates"] = {one.base: one.apart.to_json() for one in tried if one.apart is not None}
    return record


def _held_out_rows(config: Config, task: Task) -> tuple[str, EncodedSet]:
    """The test split, else that for evaluation, else the training rows. Raises EngineError where they can't be read."""
    splits = load_splits(without_looking(config))
    name, split = next((name, one) for name in ("test", "eval", "train") if (one := getattr(splits, name)) is not None)
    limit, cache = config.data.max_dropped, cache_folder(config.data.cache)
    return name, encode_split(split, task.encode, task.fingerprint(), limit, cache)


def _check_max_kl(max_kl: float | None, merged: bool) -> None:
    if max_kl is None:
        return
    if not merged:
        raise ConfigError("--max-kl: only a merged model is compared so.", "Add --merged, or leave it out.")
    if not (math.isfinite(max_kl) and max_kl >= 0):
        raise ConfigError(f"--max-kl: got {max_kl}, expected a number of nats, 0 or more.", "Write it like 0.1.")
