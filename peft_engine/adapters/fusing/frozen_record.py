"""What was decided about a model's frozen linears, on disk: a run that is resumed or used later computes as it trained.

One safetensors file: the decisions as JSON in its metadata, the vectors against outliers as tensors.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peft_kernels._frozen_units import Format

from ...config_frozen import BOUND
from ...errors import StorageError
from .outliers import Lever, Outliers

FILE = "frozen.safetensors"
"""Its name in a run directory."""
SCHEMA = "peft-engine frozen 1"


@dataclass
class FrozenRecord:
    """What was decided about a model's frozen linears; enough to do it again without a calibration batch.

    Attributes:
        format: None where all stay in full precision.
        why: how the format was chosen.
        lever, bound: against outliers, and of the error.
        head: whether the loss reads the output head in int8.
        frozen: names of the linears in that format, below peft's wrappers.
        kept_full: name → why it is not.
        errors: name → ‖y_format − y‖ / ‖y‖ on the calibration batch.
        outliers: name → what its layer does about outliers, for those that do anything.
        rows: of the layers' inputs, that was measured on; 0 for random numbers.
    """

    format: Format | None
    why: str
    lever: Lever = "none"
    bound: float = BOUND
    head: bool = False
    frozen: list[str] = field(default_factory=list)
    kept_full: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    outliers: dict[str, Outliers] = field(default_factory=dict)
    rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """All but the vectors."""
        return {name: value for name, value in vars(self).items() if name != "outliers"}

    def vectors(self) -> dict[str, torch.Tensor]:
        """What its layers do about outliers, by "layer:kind", on the CPU."""
        pairs = {f"{name}:{kind}": v for name, one in self.outliers.items() for kind, v in vars(one).items()}
        return {key: v.detach().cpu().clone() for key, v in pairs.items() if v is not None}

    def digest(self) -> str:
        """sha256 of everything in it: run.json and checkpoints hold it, so that another run's file is told."""
        found = hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode())
        for key, vector in sorted(self.vectors().items()):
            found.update(f"{key} {vector.dtype} ".encode() + vector.numpy().tobytes())
        return found.hexdigest()


def write_record(record: FrozenRecord, path: Path) -> None:
    """Write the file; a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    save_file(record.vectors(), part, {"schema": SCHEMA, "decisions": json.dumps(record.to_json())})
    part.replace(path)


def read_record(path: Path, digest: str | None = None) -> FrozenRecord:
    """Read the file.

    Args:
        digest: what `FrozenRecord.digest` must be; None takes any.

    Raises:
        StorageError: it is missing, damaged, of another kind, or of another run.
    """
    fix = (
        "Restore it from where the run was made; with --set model.frozen_compute=full the model's own weights are used."
    )
    if not path.is_file():
        raise StorageError(f"{path} is missing: it says which weights were rounded in training, and how.", fix)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if metadata.get("schema") != SCHEMA:
            raise ValueError(f"its schema is {metadata.get('schema')!r}, expected {SCHEMA!r}")
        record = FrozenRecord(**json.loads(metadata["decisions"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} can't be read: {error}", fix) from error
    vectors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(":")
        vectors.setdefault(name, {})[kind] = tensor
    record.outliers = {name: Outliers(**found) for name, found in vectors.items()}
    if digest is not None and record.digest() != digest:
        raise StorageError(f"{path} is not what this run wrote: it was changed, or is another run's.", fix)
    return record
