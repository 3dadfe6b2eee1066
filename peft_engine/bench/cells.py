"""Which cells a suite has, what decides each one's result, and what they are called."""

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..config_reading import load_config
from ..config_writing import to_yaml
from ..config_yaml import parse
from ..errors import ConfigError
from .suite import Suite

Kind = Literal["baseline", "tuning", "final"]
SCHEMA = "peft-engine cell 1"
UNTRAINED = ("batch_size", "precision", "deterministic")  # what counts of `training` where nothing is trained
NEVER = 10**9  # steps between checkpoints: a cell saves at its end
TUNING_TEST_ROWS = 8  # nothing looks at them, but a run has a test split
WHOLE = 2**26  # bytes: of larger files the size and both ends stand for the content


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        method: name in the suite; "baseline" for the untouched model.
        config: resolved settings, without `output`.
        tokens: budget in tokens, where the suite has it so; the cell turns it into steps.
        key: sha256 of what decides the result (`_cell`): settings, and the content of the files that they name.
    """

    kind: Kind
    method: str
    seed: int
    learning_rate: float | None
    config: Mapping[str, Any]
    tokens: int | None
    key: str

    @property
    def name(self) -> str:
        """Of its files, without the ending."""
        rate = "none" if self.learning_rate is None else f"{self.learning_rate:g}"
        return f"{self.method}-{self.kind}-{self.seed}-{rate}-{self.key[:8]}"

    @property
    def title(self) -> str:
        """For people."""
        if self.kind == "baseline":
            return "baseline"
        tail = f"rate-{self.learning_rate:g}" if self.kind == "tuning" else f"seed-{self.seed}"
        return f"{self.method}/{tail}"

    def matches(self, pattern: str) -> bool:
        """Whether a pattern, `lora`, `lora-final` or `*-final-0-*`, names this cell: as a whole or up to a dash."""
        return fnmatchcase(self.name, pattern) or fnmatchcase(self.name, f"{pattern}-*")


def baseline_cell(suite: Suite) -> Cell:
    """The model as it is, with its new head as the first seed starts it where the task has one."""
    return _cell(suite, "baseline", "baseline", suite.seeds[0], None)


def tuning_cells(suite: Suite, method: str) -> list[Cell]:
    """A cell per learning rate, rising; none where there is nothing to choose."""
    rates = suite.rates(method)
    if len(rates) == 1:
        return []
    return [_cell(suite, "tuning", method, suite.tuning.seed, rate) for rate in rates]


def final_cells(suite: Suite, method: str, rate: float) -> list[Cell]:
    """A cell per seed."""
    return [_cell(suite, "final", method, seed, rate) for seed in suite.seeds]


def method_faults(suite: Suite) -> list[str]:
    """Resolve every method's settings once: the faults of all methods."""
    faults: list[str] = []
    for name in ["baseline", *suite.methods]:
        try:
            settings_of(suite, "final", name, suite.seeds[0], None if name == "baseline" else suite.rates(name)[0])
        except ConfigError as error:
            where = "config" if name == "baseline" else f"methods.{name}"
            text = str(error).replace("settings: ", f"{where}: ")
            faults += [line for line in text.splitlines() if line.partition(": ")[2] not in " ".join(faults)]
    return faults


def settings_of(suite: Suite, kind: Kind, method: str, seed: int, rate: float | None) -> dict[str, Any]:
    """The resolved settings of a run, without `output`. Raises ConfigError where they don't go together."""
    tree = copy.deepcopy(suite.config)
    training = tree.setdefault("training", {})
    if method == "baseline":
        tree["adapter"] = {"method": "full"}
        training = tree["training"] = {k: v for k, v in training.items() if k in UNTRAINED}
    else:
        own = suite.methods[method]
        tree["adapter"] = copy.deepcopy(own.adapter)
        training |= copy.deepcopy(own.training)
        if own.model:
            tree["model"] = tree.get("model", {}) | copy.deepcopy(own.model)
        if own.kernels is not None:
            tree["kernels"] = own.kernels
    share = suite.tuning.share if kind == "tuning" else 1.0
    if method == "baseline":
        pass  # it trains nothing
    elif suite.budget.steps is not None:
        training["steps"] = max(1, round(suite.budget.steps * share))
    elif suite.budget.epochs is not None:
        training["epochs"] = suite.budget.epochs * share
    training |= {"seed": seed, "save_every": NEVER}
    if rate is not None:
        training["learning_rate"] = rate
    data = tree.setdefault("data", {})
    data.setdefault("near_duplicates", "off")  # they would only be reported
    if kind == "tuning":
        data["limit"] = (data.get("limit") or {}) | {"test": TUNING_TEST_ROWS}
        tree["evaluation"] = {k: v for k, v in (tree.get("evaluation") or {}).items() if k != "generate_rows"}
    found: dict[str, Any] = parse(to_yaml(load_config({**tree, "output": "unset"})), "cell").tree
    del found["output"]
    return found


def _cell(suite: Suite, kind: Kind, method: str, seed: int, rate: float | None) -> Cell:
    config = settings_of(suite, kind, method, seed, rate)
    share = suite.tuning.share if kind == "tuning" else 1.0
    tokens = None if suite.budget.tokens is None else max(1, round(suite.budget.tokens * share))
    if kind == "baseline":
        tokens = None
    text = suite.general_text if kind != "tuning" else None
    decides = {
        "schema": SCHEMA,
        "kind": kind,
        "method": method,
        "config": config,
        "tokens": tokens,
        "general_text": text and text.model_dump(mode="json"),
        "files": {path: file_digest(path) for path in _files(config, [text.path] if text else [])},
    }
    key = hashlib.sha256(canonical(decides)).hexdigest()
    return Cell(kind, method, seed, rate, config, tokens, key)


def canonical(content: Any) -> bytes:
    """JSON whose bytes depend on nothing but the content."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _files(config: Mapping[str, Any], more: Iterable[str]) -> list[str]:
    train = config["data"]["train"]
    sources = [train] if isinstance(train, str) else [source["path"] for source in train]
    given = [config["model"]["path"], *sources, config["data"].get("eval"), config["data"].get("test"), *more]
    return sorted({path for path in given if path})


def file_digest(path: str) -> str | None:
    """sha256 of a file, or of a folder's files with their names; None where nothing local has that name (a hub id)."""
    place = Path(path).expanduser().absolute()
    if not place.exists():
        return None
    files = [place] if place.is_file() else sorted(_inside(place))
    facts = [(file, file.stat()) for file in files]
    return _digest(place, tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in facts))


@cache
def _digest(place: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    """Files, sizes and times of change: all cells of a suite read them once."""
    digest = hashlib.sha256()
    for file, size, _ in files:
        digest.update(f"{file.relative_to(place)}\0{size}\0".encode())
        with file.open("rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
            else:
                digest.update(content.read(2**20))
                content.seek(-(2**20), 2)
                digest.update(content.read())
    return digest.hexdigest()


def _inside(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())
