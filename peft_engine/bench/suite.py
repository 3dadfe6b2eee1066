"""What a benchmark suite says: one task and budget, many methods, their learning rates and seeds."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ..config import Count, Section, Seed
from ..config_faults import KeyPath, dotted
from ..config_yaml import Parsed, dump, from_python, parse
from ..errors import ConfigError

Rate = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=40)]

TAKEN = {
    "output": "each cell has a work folder of its own",
    "adapter": "say it under methods",
    "report_to": "cells are recorded in the results",
    "budget.max_usd": "a cell that stops early can't be compared",
    "budget.max_hours": "a cell that stops early can't be compared",
    "budget.max_kwh": "a cell that stops early can't be compared",
    "training.seed": "say it under seeds",
    "training.learning_rate": "say it under methods or tuning, as learning_rates",
    "training.steps": "say it under budget",
    "training.epochs": "say it under budget",
    "training.early_stopping": "the budget is the same for every method",
    "training.restore_best": "all cells end with their last weights",
    "training.save_every": "a cell is one session: it saves at its end",
}
"""Settings of a run that a suite decides in its own way."""
SAME = {"batch_size", "precision"}
"""Of `training`: what must be the same for all methods, beside what is taken."""
SMALLER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mean_squared_error", "mean_absolute_error")
"""Of all metrics; of the others more is better."""
COUNTS = {"rows", "tokens", "words", "words_lost", "entities", "chance", "generated_rows"}
"""What stands beside the metrics and says nothing of how good a method is."""


class RunBudget(Section):
    """How long each final run trains: exactly one of three."""

    steps: Count | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split."""
    tokens: Count | None = None
    """Tokens of training rows, padding not counted; rounded to whole steps of the data's mean length."""

    @model_validator(mode="after")
    def _one(self) -> "RunBudget":
        if sum(value is not None for value in (self.steps, self.epochs, self.tokens)) != 1:
            raise ValueError("expected exactly one of steps, epochs and tokens")
        return self


class Tuning(Section):
    """The search of learning rates: on the evaluation split, with a seed of its own."""

    seed: Seed = 1000
    """Seed of the search; not among `seeds`."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Length of a search run as a share of the budget, with the whole schedule in it."""
    learning_rates: Annotated[list[Rate], Field(min_length=1)] = [1e-4, 3e-4, 1e-3, 3e-3]
    """Grid of the methods that name none."""


class Method(Section):
    """One way of fine-tuning."""

    adapter: dict[str, Any]
    """Settings of `adapter` in a config."""
    learning_rates: Annotated[list[Rate], Field(min_length=1)] | None = None
    """Grid to search; one value is taken as it is. null is that of `tuning`."""
    training: dict[str, Any] = {}
    """Settings of `training` that this method needs otherwise than all others."""
    model: dict[str, Any] = {}
    """Settings of `model` that this method needs otherwise."""
    kernels: Literal["auto", "triton", "torch", "off"] | None = None
    """As in a config; null is the suite's."""


class GeneralText(Section):
    """Text that training knows nothing of: what a model forgets shows in its loss there."""

    path: str
    """A file with a column `text`, or with `tokens` (lists of words), or plain text."""
    rows: Count = 64
    """Windows that are read."""
    max_length: Annotated[int, Field(ge=2)] = 256
    """Tokens of a window."""


class Published(Section):
    """Where published figures for the same methods stand."""

    path: str
    """YAML file, as benchmarks/published/*.yaml."""
    task: str | None = None
    """Only the figures of this task; null is all."""
    metrics: dict[str, str] = {}
    """The publication's name of a metric → the engine's; `per_class.CLASS.f1` is one class's."""


class Suite(Section):
    """A benchmark. Paths are relative to the current directory."""

    name: Name
    """Of the results folder."""
    title: str
    """Heading of the report."""
    description: str = ""
    """What it is for, in a few sentences."""
    config: dict[str, Any]
    """Settings as in a config file, shared by all cells."""
    budget: RunBudget
    """The same for every method."""
    reference: str = "full"
    """Method that the others are compared with."""
    primary: str | None = None
    """Metric that methods are ranked by, and learning rates chosen by where evaluations while training have it (else by
    loss); null is the task's own."""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0, 1, 2]
    """Of the final cells: initialisation, data order, dropout."""
    tuning: Tuning = Tuning()
    """How learning rates are found."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    """By name."""
    general_text: GeneralText | None = None
    """Causal LM: measure forgetting on it."""
    published: Published | None = None
    """Figures that others published for the same methods: the report shows them beside ours."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Stated limit of the whole suite on the machine that it was made for."""
    usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Price of the machine, for cells whose config.budget names none; the report takes it, no cell's key holds it."""
    price_source: str = ""
    """Where that price stands, with the day; needed with one."""

    def rates(self, method: str) -> list[float]:
        """Learning rates of a method, rising."""
        return sorted(self.methods[method].learning_rates or self.tuning.learning_rates)

    @model_validator(mode="after")
    def _consistent(self) -> "Suite":
        faults = [*_taken(self.config, "config"), *self._repeated()]
        sections = ("model", "data", "training", "evaluation", "budget")
        faults += [
            f"config.{name}: got {self.config[name]!r}, expected settings written `key: value`"
            for name in sections
            if not isinstance(self.config.get(name, {}), dict)
        ]
        for name, method in self.methods.items():
            faults += _taken({"training": method.training}, f"methods.{name}")
            faults += [
                f"methods.{name}.training.{key}: must be the same for every method; say it under config"
                for key in sorted(SAME & set(method.training))
            ]
        if self.reference not in self.methods:
            faults.append(f"reference: got {self.reference}, expected one of the methods: {', '.join(self.methods)}")
        if self.primary in COUNTS:
            faults.append(
                f"primary: got {self.primary}, which is no metric; name one, such as loss, or null: the task's own"
            )
        if "baseline" in self.methods:
            faults.append("methods.baseline: this name is the untouched model's; name it otherwise")
        if self.tuning.seed in self.seeds:
            faults.append(f"tuning.seed: {self.tuning.seed} is among seeds; take another")
        if self.usd_per_hour is not None and not self.price_source.strip():
            faults.append("price_source: is missing; say where usd_per_hour is from")
        if self.general_text and self.config.get("task") != "causal-lm":
            faults.append("general_text: measures language models; set it to null, or config.task: causal-lm")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def _repeated(self) -> list[str]:
        lists: dict[str, Sequence[float]] = {"seeds": self.seeds, "tuning.learning_rates": self.tuning.learning_rates}
        lists |= {f"methods.{n}.learning_rates": m.learning_rates or [] for n, m in self.methods.items()}
        return [f"{name}: {values} repeats itself" for name, values in lists.items() if len(set(values)) < len(values)]


def load_suite(path: str | Path) -> Suite:
    """Read a suite.

    Raises:
        ConfigError: with all faults, each with its line. What a method's settings mean together is checked with the
            cells (`cells.enumerate_cells`).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = sorted(str(file) for file in Path("benchmarks/suites").glob("*.yaml"))
        fix = f"Suites here: {', '.join(near)}." if near else "Give the path of a suite's YAML file."
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}.", fix) from None
    return suite_of(parse(text, str(path)), str(path))


def suite_of(parsed: Parsed | dict[str, Any], name: str = "suite") -> Suite:
    """A suite from what was parsed, or from a dict. Raises ConfigError with all faults."""
    parsed = from_python(parsed) if isinstance(parsed, dict) else parsed
    lines = [f"{_place(name, fault.path, parsed)}: {fault.text}" for fault in parsed.faults]
    if not isinstance(parsed.tree, dict):
        raise ConfigError(f"{name}: expected settings written `key: value`.", "See benchmarks/suites/.")
    try:
        suite = Suite.model_validate(parsed.tree)
    except ValidationError as error:
        for one in error.errors():
            where = tuple(part for part in one["loc"] if part != "[key]")
            if one["type"] == "value_error" and not where:
                lines += [f"{name}: {text}" for text in str(one["ctx"]["error"]).splitlines()]
            else:
                lines.append(f"{_place(name, where, parsed)}: {_said(one, where)}")
    if lines:
        raise ConfigError("\n".join(lines))
    return suite


def recorded(text: str) -> tuple[dict[str, Any] | None, list[str]]:
    """What stands in a results folder's suite.yaml, of whatever version of the engine, and the settings that are
    none of a suite's; None where there are no settings.

    Settings may be missing and others be there. `usd_per_hour` is for the report to check. Raises ConfigError where it
    is not YAML.
    """
    parsed = parse(text, "suite.yaml")
    if not isinstance(parsed.tree, dict):
        return None, []
    wrong = [dotted(fault.path) for fault in parsed.faults]
    try:
        _recorded().model_validate({name: value for name, value in parsed.tree.items() if value is not None})
    except ValidationError as error:
        places = [
            one["loc"] for one in error.errors() if one["type"] != "extra_forbidden" or one["loc"][0] == "published"
        ]
        wrong += [dotted(tuple(part for part in place if part != "[key]")) for place in places]
    return parsed.tree, list(dict.fromkeys(wrong))


@cache
def _recorded() -> type[BaseModel]:
    """A suite's settings one by one: none is needed, and nothing is asked of them together."""
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation(), None) for name, field in Suite.model_fields.items() if name != "usd_per_hour"
    }
    settings = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    return create_model("Recorded", __config__=settings, **fields)


def metrics_in(measured: Mapping[str, Any] | None) -> list[str]:
    """Names of what a record measured on its test rows and methods can be ranked by; a metric may be null."""
    numbers = {n: v for n, v in (measured or {}).items() if n not in COUNTS and not isinstance(v, bool)}
    return [name for name, value in numbers.items() if value is None or isinstance(value, int | float)]


def to_yaml(suite: Suite) -> str:
    """All settings with their values, as `load_suite` reads them back."""
    return dump(from_python(suite.model_dump()).tree)


def _taken(tree: dict[str, Any], place: str) -> list[str]:
    found = []
    for name, reason in TAKEN.items():
        node: Any = tree
        for part in name.split("."):
            node = node.get(part, ...) if isinstance(node, dict) else ...
        if node is not ... and node is not None:
            found.append(f"{place}.{name}: a suite does not take it: {reason}")
    return found


def _place(name: str, path: KeyPath, parsed: Parsed) -> str:
    labels = (parsed.origins[path[:n]].label for n in range(len(path), 0, -1) if path[:n] in parsed.origins)
    label = next(labels, "")
    return ", ".join(part for part in (name, label if label.startswith("line") else "") if part) + f": {dotted(path)}"


def _said(error: Any, where: KeyPath) -> str:
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(where[-1]), _names(where), n=1)
        return f"no such setting{f'; did you mean {near[0]}?' if near else ''}"
    if error["type"] == "missing":
        return "is missing"
    text = str(error["msg"]).removeprefix("Value error, ")
    return text if error["type"] == "value_error" else f"got {error['input']!r}: {text}"


def _names(where: KeyPath) -> list[str]:
    """The settings that could stand at this place."""
    if len(where) == 1:
        return list(Suite.model_fields)
    sections: dict[str, type[BaseModel]] = {
        "budget": RunBudget, "tuning": Tuning, "methods": Method, "general_text": GeneralText,
        "published": Published,
    }  # fmt: skip
    return list(sections[str(where[0])].model_fields)
