"""The run directory: refused where it would overwrite, locked while in use, written so that a fault loses nothing."""

import contextlib
import difflib
import errno
import fcntl
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .config import Config
from .config_frozen import BOUND
from .config_reading import load_config
from .errors import ConfigError, EngineError, StorageError

OWN = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "failure.json",
    "dropped.jsonl",
    "frozen.safetensors",
    "checkpoints",
    "adapter",
    "merged",
    "trackers",
)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}


FREE_ON_RESUME = {
    "output",
    "budget",
    "evaluation",
    "report_to",
    "data.cache",
    "training.micro_batch_size",
    "training.parallel",
    "training.log_every",
    "training.save_every",
    "training.save_total_limit",
}
"""Settings that may change on resume, because the weights don't depend on them."""


class RunDirectory:
    """`<output>/` of a run. Use as a context manager: it holds a lock on the folder.

    Args:
        writes: false in all but the first of several processes: they read, and writing does nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path).expanduser()
        self.writes = writes
        self._lock: int | None = None

    checkpoints = property(lambda self: self.path / "checkpoints")
    adapter = property(lambda self: self.path / "adapter")
    metrics = property(lambda self: self.path / "metrics.jsonl")

    def holds_run(self) -> bool:
        return any((self.path / name).exists() for name in OWN)

    def refuse_occupied(self, *, resume: bool, overwrite: bool) -> None:
        """Before anything is loaded: is this a place to write to?

        Raises:
            ConfigError: it holds a run and neither flag was given, or it is a file.
            StorageError: it can't be written.
        """
        if not self.writes:
            return
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output: {self.path} is a file.", "Name a folder.")
        if self.holds_run() and not resume and not overwrite:
            raise ConfigError(
                f"output: {self.path} already holds a run.",
                "Go on with --resume, replace it with --overwrite, or name another output.",
            )
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()

    def __enter__(self) -> "RunDirectory":
        if not self.writes:
            return self
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.fstat(lock).st_nlink > 0  # else its owner deleted it after we opened it
            except BlockingIOError:
                free = False
            if not free:
                os.close(lock)
                raise StorageError(
                    f"output: another process is writing to {self.path}.", "Wait for it, or name another output."
                )
        self._lock = lock
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Delete the files of an earlier run, and nothing else that stands in the folder."""
        if not self.writes:
            return
        with storage_errors(self.path):
            for name in OWN:
                target = self.path / name
                shutil.rmtree(target) if target.is_dir() and not target.is_symlink() else target.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """A reader never sees half of it."""
        if not self.writes:
            return
        with storage_errors(self.path / name):
            write_whole(self.path / name, text)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(plain(content), indent=2, default=str) + "\n")

    def forget_failure(self) -> None:
        """The run ended well after all: what an earlier session wrote of its failure is no longer true."""
        if self.writes:
            (self.path / "failure.json").unlink(missing_ok=True)

    def append_metrics(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return
        with storage_errors(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(row)) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drop rows after `step`: the resumed run writes them again."""
        if not self.writes or not self.metrics.exists():
            return
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a last line cut off by a crash
                row = json.loads(line)
                if row["step"] <= step:
                    rows.append(line)
        self.write_text("metrics.jsonl", "".join(f"{line}\n" for line in rows))


def command() -> str:
    """The command line of this process, without the machine's paths; `python -m NAME` where it was begun so."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    begun = ["python", "-m", module.name.removesuffix(".__main__")] if module else [Path(sys.argv[0]).name]
    return shlex.join([*begun, *sys.argv[1:]])


def plain(content: Any) -> Any:
    """`content` as strict JSON has it: numbers that are not finite become null."""
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_other_settings(config: Config, directory: RunDirectory) -> None:
    """A resumed run must have the settings it began with, but for those that the weights don't depend on."""
    path = directory.path / "config.yaml"
    if not path.is_file():
        return
    old, new = flat(load_config(path).model_dump(mode="json")), flat(config.model_dump(mode="json"))
    changed = [
        k
        for k in new
        if old.get(k) != new[k] and not any(k == free or k.startswith(f"{free}.") for free in FREE_ON_RESUME)
    ]
    if changed:
        shown = "; ".join(f"{k} was {old.get(k)!r}, is {new[k]!r}" for k in changed[:5])
        raise ConfigError(
            f"--resume: {shown}.", "Resume with the settings the run began with, or start anew with --overwrite."
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


NOT_ROUNDED = (
    "model.frozen_compute=full",
    "model.frozen_outliers=auto",
    "model.frozen_head=full",
    f"model.frozen_error_bound={BOUND}",
)
NOT_QUANTISED = ("model.quantization=none", "model.double_quantization=true", "model.quantization_skip=[]")
PLAIN = (*NOT_ROUNDED, "model.offload=none")
"""Adapters are for the weights as they are loaded, not for rounded ones: on these they are verified and merged."""
IN_FULL = (*PLAIN, *NOT_QUANTISED)
"""The model's own weights, neither rounded nor quantised."""
WITHOUT_A_CARD = ("training.activation_offload=none", "training.optimizer=adamw")
"""In place of what a CPU can't train with: a run that is used trains nothing."""


def find_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, Config]:
    """The folder and the settings of a finished run.

    Args:
        path: the run directory, or the config whose `output` it is.

    Raises:
        ConfigError: there is no finished run.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        folder = Path(load_config(folder, overrides).output).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"There is no run {folder}.", f"Give a run directory, or the config of a run.{_near_runs(folder)}"
        )
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} holds no run (no config.yaml).",
            f"Give a run directory, or the config of a run.{_near_runs(folder)}",
        )
    if not (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} holds a run that did not end (no adapter/).", "Finish it with train --resume.")
    if "model.frozen_compute=full" in overrides:  # what only means something beside another format goes with it
        overrides = (*overrides, *NOT_ROUNDED)
    if "model.quantization=none" in overrides:
        overrides = (*overrides, *NOT_QUANTISED)
    if any(one.startswith("device=") for one in overrides):
        overrides = (*WITHOUT_A_CARD, *overrides)
    found = load_config(folder / "config.yaml", overrides)
    _refuse_other_rounding(found, load_config(folder / "config.yaml"))
    return folder, found


def _refuse_other_rounding(asked: Config, own: Config) -> None:
    """A run is used as it was trained, or on the model's own weights."""
    for main, plain, part in (("frozen_compute", "full", "frozen_"), ("quantization", "none", "quantization")):
        names = [main, *(name for name in type(own.model).model_fields if part in name and name != main)]
        other = [name for name in names if getattr(asked.model, name) != getattr(own.model, name)]
        if other and getattr(asked.model, main) != plain:
            raise ConfigError(
                f"model.{other[0]}: got {getattr(asked.model, other[0])}, and the run was trained with "
                f"{getattr(own.model, other[0])}.",
                f"Leave it as it was, or set model.{main}={plain} for the model's own weights.",
            )


def _near_runs(folder: Path) -> str:
    """Finished runs beside or in a folder that is none."""
    places = [place for place in (folder, folder.parent) if place.is_dir()]
    runs = sorted(str(path.parent) for place in places for path in place.glob("*/adapter"))
    near = difflib.get_close_matches(str(folder), runs, n=3, cutoff=0.5) or runs[:3]
    return f" Runs near it: {', '.join(near)}." if near else ""


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a fault leaves what stood there.

    What is no ordinary file, such as /dev/stdout, is written as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a StorageError that names the place."""
    try:
        yield
    except Exception as error:
        # safetensors has a type of its own, the tokenizers library has none
        told = isinstance(error, OSError | SafetensorError) or type(error) is Exception
        known = explain_storage(error, path) if told else None
        if known is None:
            raise
        raise known from error


def explain_storage(error: Exception, path: Path | None = None) -> EngineError | None:
    """What a user should know of a fault of the disk; None where it is none."""
    number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
    place = path or getattr(error, "filename", None) or "A file"
    if number in FULL:
        return StorageError(
            f"{place}: no space left on the device, or over a limit ({error}).",
            "Free space, or name another place. A training run goes on with --resume.",
        )
    if number in DENIED:
        return StorageError(
            f"{place}: can't be written or read ({error}).", "Check permissions, or name another place."
        )
    if isinstance(error, NotADirectoryError | FileExistsError):
        return ConfigError(f"{place} has a file where a folder must be ({error}).", "Name another place.")
    return None


def _errno_in(text: str) -> int | None:
    """safetensors reports "(os error 28)"."""
    _, found, rest = text.partition("(os error ")
    return int(rest.partition(")")[0]) if found and rest.partition(")")[0].isdigit() else None
