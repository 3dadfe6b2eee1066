"""Checkpoints: complete or not there, never half, never pickled.

`step-N/` is written beside its place and renamed into it; MANIFEST.json (sha256 of every file, and of every trained
tensor) is written last. Random state needs no file: it is a function of (seed, step), see `runtime.seed_everything`,
and so is the data order (`data.batching`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.files import refuse_difference
from ..errors import ConfigError, StorageError
from .ema import Average
from .optim import page_again
from .state import Trainee

MANIFEST = "MANIFEST.json"
STATE = "state.json"
SEPARATOR = "::"  # between a parameter's index and the name (or names) of its optimizer state


def save_checkpoint(folder: Path, step: int, trainees: list[Trainee], run_state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-N` and delete older ones beyond `keep`; the new one is complete before any is deleted."""
    final = folder / f"step-{step}"
    if (final / MANIFEST).is_file():
        return final  # the same step of the same run: replacing it would leave a moment without it
    part = folder / f".step-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    digests: dict[str, dict[str, str]] = {}
    averages: dict[str, dict[str, str]] = {}
    state: dict[str, Any] = {"run": run_state, "members": {}}
    for trainee in trainees:
        name = trainee.member.spec.name
        tensors = {key: t.detach().cpu().contiguous() for key, t in trainee.member.tensors.items()}
        digests[name] = {key: digest_tensor(t) for key, t in tensors.items()}
        save_file(tensors, part / f"{name}.adapter.safetensors")
        if trainee.average is not None:
            averages[name] = _save_average(trainee.average, part / f"{name}.average.safetensors")
        if trainee.best_tensors:
            save_file(trainee.best_tensors, part / f"{name}.best.safetensors")
        if trainee.member.allocation:
            save_file(trainee.member.allocation.to_tensors(), part / f"{name}.allocation.safetensors")
        flat, scalars = _flatten_optimizer(trainee.optimizer)
        save_file(flat, part / f"{name}.optimizer.safetensors")
        state["members"][name] = {
            "trainee": trainee.to_json(),
            "optimizer": scalars,
            "initial": _digest_all(trainee.member.initial),
            "kept": _digest_all(trainee.member.kept),
        }
    (part / STATE).write_text(json.dumps(state))
    files = {path.name: digest_file(path) for path in sorted(part.iterdir())}
    manifest = {"step": step, "files": files, "tensors": digests, "averages": averages}
    (part / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*part.iterdir(), part):
        _flush(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    _flush(folder)
    _clean(folder, keep)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    steps = [p for p in folder.glob("step-*") if p.name[5:].isdigit() and (p / MANIFEST).is_file()]
    return sorted(steps, key=lambda p: int(p.name[5:]))


def _clean(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a crash left of others.

    Each is renamed first, so that one half deleted never looks complete.
    """
    for old in complete_checkpoints(folder)[:-keep]:
        os.replace(old, folder / f".{old.name}.part")
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part)


def load_checkpoint(checkpoint: Path, trainees: list[Trainee]) -> dict[str, Any]:
    """Put every member back where it was, and compare the live tensors with the manifest (trap 11).

    Returns:
        The `run_state` it was saved with.

    Raises:
        StorageError: a file is missing or altered, or its tensors are not exactly those of this run.
    """
    manifest = verify_files(checkpoint)
    state = read_state(checkpoint)
    names = [trainee.member.spec.name for trainee in trainees]
    if names != list(state["members"]):
        raise ConfigError(
            f"{checkpoint} holds members {list(state['members'])}, this run has {names}.",
            "Resume with the config it began with.",
        )
    for trainee in trainees:
        name = trainee.member.spec.name
        saved = state["members"][name]
        _restore(trainee.member.tensors, checkpoint / f"{name}.adapter.safetensors", manifest["tensors"][name])
        if trainee.average is not None:
            expected = manifest.get("averages", {}).get(name, {})
            _restore(trainee.average.tensors, checkpoint / f"{name}.average.safetensors", expected)
        if saved.get("kept", {}) != _digest_all(trainee.member.kept):
            raise ConfigError(
                f"{checkpoint}: the tensors that do not train are not those the run began with.",
                "Resume on the same machine and versions, with the same adapter.start_from.",
            )
        if saved["initial"] != _digest_all(trainee.member.initial):
            raise ConfigError(
                f"{checkpoint}: this machine starts adapter.init from other values than the run did.",
                "Resume on the same machine and versions.",
            )
        if trainee.member.allocation:
            trainee.member.allocation.restore(load_file(checkpoint / f"{name}.allocation.safetensors"))
        optimizer = _read_optimizer(checkpoint / f"{name}.optimizer.safetensors", saved["optimizer"])
        trainee.optimizer.load_state_dict(optimizer)
        page_again(trainee.optimizer)
        trainee.restore(saved["trainee"])
        best = checkpoint / f"{name}.best.safetensors"
        trainee.best_tensors = load_file(best) if best.name in manifest["files"] else {}
    run_state: dict[str, Any] = state["run"]
    return run_state


def _save_average(average: Average, path: Path) -> dict[str, str]:
    tensors = {name: tensor.cpu().contiguous() for name, tensor in average.tensors.items()}
    save_file(tensors, path)
    return _digest_all(tensors)


def _restore(live: Mapping[str, Tensor], path: Path, expected: dict[str, str]) -> None:
    """Copy a file's tensors into the live ones, and compare those with the manifest (trap 11)."""
    tensors = load_file(path)
    refuse_difference(dict(live), tensors, str(path.parent))
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(tensors[key])
    found = _digest_all(live)
    wrong = [key for key in found if found[key] != expected.get(key)]
    if wrong:
        raise StorageError(
            f"{path.parent}: {len(wrong)} tensors were not restored as saved, {wrong[0]} first.",
            "Resume from an older checkpoint.",
        )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises StorageError where it is missing or altered."""
    _verify_file(checkpoint, STATE, _read_manifest(checkpoint)["files"].get(STATE))
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
    return state


def verify_files(checkpoint: Path) -> dict[str, Any]:
    """The manifest, after every file's sha256 was compared with it."""
    manifest = _read_manifest(checkpoint)
    for name, digest in manifest["files"].items():
        _verify_file(checkpoint, name, digest)
    return manifest


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if isinstance(manifest["files"], dict) and isinstance(manifest["tensors"], dict):
            return dict(manifest)
    except (ValueError, KeyError, TypeError):
        pass
    raise StorageError(f"{path} can't be read: it is no manifest.", _older(checkpoint))


def _verify_file(checkpoint: Path, name: str, digest: str | None) -> None:
    path = checkpoint / name
    if not path.is_file() or digest_file(path) != digest:
        raise StorageError(
            f"{path} is {'altered' if path.is_file() else 'missing'}: its sha256 is not the one in {MANIFEST}.",
            _older(checkpoint),
        )


def _older(checkpoint: Path) -> str:
    return f"Delete {checkpoint} to resume from the checkpoint before it."


def digest_tensor(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous()
    head = f"{flat.dtype}{tuple(flat.shape)}".encode()
    return hashlib.sha256(head + flat.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_all(tensors: Any) -> dict[str, str]:
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors and as JSON."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in _leaves(state["state"]):
        if isinstance(value, Tensor):
            tensors[key] = value.detach().cpu().contiguous().clone()
        else:
            scalars[key] = value
    rest = {key: value for key, value in state.items() if key not in ("state", "param_groups")}
    assert not rest, f"optimizer state of an unknown form: {list(rest)}"
    return tensors, {"scalars": scalars, "param_groups": state["param_groups"]}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested dicts by their joined keys (bitsandbytes keeps its 8-bit state in a dict of its own)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}{SEPARATOR}")
        else:
            yield f"{prefix}{key}", value


def _read_optimizer(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    try:
        leaves: dict[str, Any] = {**load_file(path), **saved["scalars"]}
    except SafetensorError as error:
        raise StorageError(f"{path} can't be read: {error}.", "Resume from an older checkpoint.") from error
    state: dict[int, dict[str, Any]] = {}
    for key, value in leaves.items():
        index, *names, last = key.split(SEPARATOR)
        place = state.setdefault(int(index), {})
        for name in names:
            place = place.setdefault(name, {})
        place[last] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in saved["param_groups"]]
    return {"state": state, "param_groups": groups}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
