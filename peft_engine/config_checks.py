"""Checks that need more than one setting: what does not apply to a method or task, and what contradicts itself.

`Config` runs them for everybody; `config_reading` runs them once more on files that have other faults, so that all are
reported together.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from peft_engine.config_frozen import frozen_faults
from peft_engine.config_memory import memory_faults
from peft_engine.config_methods import ADAPTER_SETTINGS, BOTTLENECK, PROMPTS, SETTINGS, WHOLE_TENSORS, owners
from peft_engine.config_options import option_faults
from peft_engine.config_preference import preference_faults

KeyPath = tuple[str | int, ...]
Tree = Mapping[str, Any]

CLASSES = ("text-classification", "image-classification")
LABELLED = (*CLASSES, "token-classification")
"""Tasks with class names."""
TEXT = ("causal-lm", "text-classification", "token-classification", "seq2seq")
PREFERENCE = ("dpo", "orpo", "kto", "reward")
TASKS = (*TEXT, "image-classification", *PREFERENCE)
"""All of `config.TaskName`, for what must not wait for pydantic."""
TASK_ONLY: dict[str, tuple[str, ...]] = {
    "model.pooling": ("text-classification",),
    "model.new_tokens": ("causal-lm", "seq2seq"),
    "data.label_type": CLASSES,
    "data.labels": LABELLED,
    "data.class_weights": LABELLED,
    "data.columns.label": (*CLASSES, "kto"),
    "data.columns.text": ("causal-lm", "text-classification"),
    "data.columns.text_pair": ("text-classification",),
    "data.columns.choices": ("text-classification",),
    "data.columns.tokens": ("token-classification",),
    "data.columns.tags": ("token-classification",),
    "data.columns.source": ("seq2seq",),
    "data.columns.target": ("seq2seq",),
    "data.columns.image": ("image-classification",),
    "data.columns.messages": ("causal-lm",),
    "data.columns.tools": ("causal-lm", *PREFERENCE),
    "data.columns.prompt": ("causal-lm", *PREFERENCE),
    "data.columns.completion": ("causal-lm", "kto"),
    "data.columns.chosen": ("dpo", "orpo", "reward"),
    "data.columns.rejected": ("dpo", "orpo", "reward"),
    "data.max_length": (*TEXT, *PREFERENCE),
    "data.supervise": ("causal-lm",),
    "data.packing": ("causal-lm",),
    "data.pack_tokens": ("causal-lm",),
    "data.streaming": ("causal-lm", "text-classification", "seq2seq"),
    "data.group_by_length": TEXT,
    "data.image_size": ("image-classification",),
    "data.augment.image": ("image-classification",),
    "data.augment.text": TEXT,
    "evaluation.generate_rows": ("causal-lm", "seq2seq"),
    "evaluation.max_new_tokens": ("causal-lm", "seq2seq"),
    "evaluation.num_beams": ("seq2seq",),
    "preference": PREFERENCE,
    "preference.beta": ("dpo", "orpo", "kto"),
    "training.neftune_alpha": TEXT,
    "training.ema_decay": (*TEXT, "image-classification"),
    "training.trainable": (*TEXT, "image-classification"),
    "training.frozen": (*TEXT, "image-classification"),
}
NEUTRAL: tuple[Any, ...] = (None, False, 0, "auto", "none", {}, [])
"""Values that ask for nothing, so that they may stand where the setting does not apply."""


@dataclass(frozen=True)
class Fault:
    """One mistake at one setting; the path leads from the root of the file."""

    path: KeyPath
    text: str


def dotted(path: KeyPath) -> str:
    """`("adapter", "targets", 0)` as `adapter.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def lookup(tree: Tree, name: str) -> Any:
    """The value at a dotted name; None where it or a section above it is missing."""
    node: Any = tree
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node


def inapplicable(values: Tree) -> dict[str, str]:
    """Settings without effect under this method, task and optimizer: dotted name → why, and what to do."""
    found = {}
    method, task = lookup(values, "adapter.method"), lookup(values, "task")
    if method in SETTINGS:
        own = {*SETTINGS[method], *(() if method in WHOLE_TENSORS else ("options",))}
        for name in (*ADAPTER_SETTINGS, "options"):
            if name not in own:
                found[f"adapter.{name}"] = _not_of_method(method, name)
    if task is not None:
        for name, owners in TASK_ONLY.items():
            if task not in owners and name.rpartition(".")[0] not in found:  # a section is named once
                tasks = f"task {owners[0]}" if len(owners) == 1 else f"tasks {', '.join(owners)}"
                found[name] = f"applies to {tasks} only, and the task is {task}; remove it"
    if lookup(values, "training.optimizer") == "adafactor":
        found["training.betas"] = "has no effect with optimizer adafactor; remove it"
    return found


def _not_of_method(method: str, name: str) -> str:
    """Why a setting of `adapter` has no effect with a method."""
    others = owners(name)
    if name in ("rank", "alpha", "dropout") and method not in (*WHOLE_TENSORS, *BOTTLENECK, *PROMPTS):
        return (
            f"means something else, or nothing, for adapter.method {method}; remove it "
            f"(what peft has for {method} goes under adapter.options, by peft's own names)"
        )
    which = f"adapter.method {others[0]}" if len(others) == 1 else "other methods"
    return (
        f"applies to {which} only, and the method is {method}; remove it "
        f"(on the command line: --set 'adapter={{method: {method}}}')"
    )


def cross_faults(given: Tree, values: Tree) -> list[Fault]:
    """All faults between settings.

    Args:
        given: only what was set by the user, nested as in the file; every value has its declared type.
        values: the same with all defaults filled in; required settings may be missing.
    """
    faults = []
    for name, reason in inapplicable(values).items():
        if lookup(given, name) not in NEUTRAL:
            faults.append(Fault(tuple(name.split(".")), reason))
    for check in (
        _empty_text,
        _splits,
        _streaming,
        _labels,
        _sources,
        _class_weights,
        _preference,
        _augment,
        _targets,
        _layers,
        _new_tokens,
        _patterns,
        _selection,
        _start_from,
        _steps,
        _budget,
        _packing,
        _attention,
        _parallel,
    ):
        faults.extend(check(values))
    faults.extend(Fault(("model", name), text) for name, text in frozen_faults(values))
    faults.extend(Fault(path, text) for path, text in memory_faults(values))
    return [*faults, *_options(values)]


def _empty_text(values: Tree) -> Iterator[Fault]:
    for name in ("model.path", "data.train", "data.eval", "data.test", "output"):
        if isinstance(lookup(values, name), str) and not lookup(values, name).strip():
            yield Fault(tuple(name.split(".")), "got an empty text, expected a name or a path")
    if lookup(values, "data.train") == []:
        yield Fault(("data", "train"), "got an empty list, expected at least one {path, weight}")


def _splits(values: Tree) -> Iterator[Fault]:
    if lookup(values, "task") == "image-classification" and lookup(values, "data.near_duplicates") == "drop":
        text = "got drop, and of images only equal ones are found, which never stay in train; write report"
        yield Fault(("data", "near_duplicates"), text)
    evaluation, test = lookup(values, "data.eval"), lookup(values, "data.test")
    for name, source in (("eval", evaluation), ("test", test)):
        if source is not None and _same(source) in map(_same, train_sources(values)):
            yield Fault(
                ("data", name),
                f"got {source}, the same as data.train: the result would be measured on what was learned; "
                f"leave data.{name} out to have it split off (data.split.{name})",
            )
    eval_share = lookup(values, "data.split.eval") if evaluation is None else 0.0
    test_share = lookup(values, "data.split.test") if test is None else 0.0
    if eval_share + test_share >= 1.0:
        text = f"eval {eval_share} and test {test_share} leave nothing to train on; their sum must be below 1"
        yield Fault(("data", "split"), text)
    if evaluation is None and eval_share == 0:
        for name in ("early_stopping", "restore_best", "eval_every"):
            if lookup(values, f"training.{name}") not in (None, False):
                text = "needs an evaluation split, and there is none; give data.eval, or a data.split.eval above 0"
                yield Fault(("training", name), text)


def _streaming(values: Tree) -> Iterator[Fault]:
    """What needs all rows at once, or is not looked at row by row."""
    if not lookup(values, "data.streaming"):
        return
    if isinstance(lookup(values, "data.train"), list):
        text = "reads one file, and data.train is a mixture; write its parts into one file, or set it to false"
        yield Fault(("data", "streaming"), text)
    if lookup(values, "data.subset") is not None:
        yield Fault(("data", "subset"), "is for hub data sets, and data.streaming reads files; remove it")
    for name, value in (lookup(values, "data.clean") or {}).items():
        if value not in ("refuse", "keep"):
            text = f"got {value}, which data.streaming does not do; clean the file first, or set streaming to false"
            yield Fault(("data", "clean", name), text)
    if lookup(values, "data.class_weights") not in (None, "none"):
        text = "counts the classes of all rows, which data.streaming does not; remove it, or set streaming to false"
        yield Fault(("data", "class_weights"), text)
    if any((lookup(values, "data.augment.text") or {}).values()):
        text = "changes rows that are held in memory, and data.streaming holds none; remove it, or set that to false"
        yield Fault(("data", "augment", "text"), text)
    if lookup(values, "data.near_duplicates") == "drop":
        text = "got drop, and data.streaming only reports near duplicates; set report or off, or streaming to false"
        yield Fault(("data", "near_duplicates"), text)


def train_sources(values: Tree) -> list[str]:
    """Paths of `data.train`: one, or those of a mixture."""
    train = lookup(values, "data.train")
    if isinstance(train, list):
        return [part["path"] for part in train if isinstance(part, Mapping) and "path" in part]
    return [train] if train is not None else []


def _same(source: Any) -> str:
    """A file or folder by its resolved path, however it is written; a hub name as it is."""
    path = os.path.expanduser(str(source))
    return os.path.realpath(path) if os.path.exists(path) else str(source)


def _labels(values: Tree) -> Iterator[Fault]:
    labels = lookup(values, "data.labels")
    if labels is None:
        return
    names = [str(label) for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        yield Fault(("data", "labels"), f"got {', '.join(twice)} more than once; each class is named once")
    elif len(names) < 2 and lookup(values, "data.label_type") != "multi":
        yield Fault(
            ("data", "labels"), f"got {len(names)} class(es), expected two or more; null finds them in the data"
        )
    if lookup(values, "data.label_type") == "regression":
        yield Fault(("data", "labels"), "regression has no classes; remove it, or set data.label_type: single")


def _sources(values: Tree) -> Iterator[Fault]:
    train = lookup(values, "data.train")
    paths = train_sources(values) if isinstance(train, list) else []
    task = lookup(values, "task")
    for i, part in enumerate(train if isinstance(train, list) and task in PREFERENCE else []):
        if isinstance(part, Mapping) and part.get("weight", 1.0) != 1.0:
            told = f"applies to the tasks that train in our own loop, and the task is {task}; remove it"
            yield Fault(("data", "train", i, "weight"), told)
    for i, path in enumerate(paths):
        if _same(path) in map(_same, paths[:i]):
            text = f"got {path} a second time; name it once, with a weight"
            yield Fault(("data", "train", i, "path"), text)


def _preference(values: Tree) -> Iterator[Fault]:
    task, adapter = lookup(values, "task"), lookup(values, "adapter")
    if task in PREFERENCE and adapter:
        for name, text in preference_faults(task, adapter):
            yield Fault(("adapter", name), text)
    if task in PREFERENCE and lookup(values, "data.clean.contradictory") not in (None, "keep"):
        text = f"several answers to a prompt are what task {task} learns from; set it to keep"
        yield Fault(("data", "clean", "contradictory"), text)


def _class_weights(values: Tree) -> Iterator[Fault]:
    path, weights = ("data", "class_weights"), lookup(values, "data.class_weights")
    kind, labels = lookup(values, "data.label_type"), lookup(values, "data.labels")
    if weights == "none" or weights is None:
        return
    if kind in ("multi", "regression"):
        yield Fault(path, f"weighs rows of one class each, and data.label_type is {kind}; remove it")
    elif isinstance(weights, Mapping):
        names = [str(label) for label in labels or []]
        for name in weights:
            if names and name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names[:10])}"
                yield Fault((*path, name), f"is no class of data.labels; {hint}")


def _augment(values: Tree) -> Iterator[Fault]:
    text = lookup(values, "data.augment.text")
    if text and any(text.values()) and lookup(values, "data.packing"):
        told = "changes lengths, and data.packing lays sequences out by them; leave one of the two out"
        yield Fault(("data", "augment", "text"), told)


def _targets(values: Tree) -> Iterator[Fault]:
    targets, path = lookup(values, "adapter.targets"), ("adapter", "targets")
    if not targets:
        yield Fault(path, "names no module; write all-linear, a regular expression or a list of names")
    elif isinstance(targets, list):
        if "all-linear" in targets:
            yield Fault(path, "all-linear stands alone; write targets: all-linear, without a list")
    elif re.fullmatch(r"\w+(\.\w+)*(\s*,\s*\w+(\.\w+)*)+", targets):
        names = ", ".join(part.strip() for part in targets.split(","))
        yield Fault(path, f"got the text {targets}, expected a list; write [{names}]")
    elif targets != "all-linear":
        yield from _regex(path, targets)
        if lookup(values, "adapter.layers") is not None:
            text = "can't be combined with a regular expression in adapter.targets; name the layers in the expression"
            yield Fault(("adapter", "layers"), text)


def _layers(values: Tree) -> Iterator[Fault]:
    layers = lookup(values, "adapter.layers")
    if layers == []:
        yield Fault(("adapter", "layers"), "names no layer; null adapts all")
    if isinstance(layers, Mapping) and (layers.get("first") is None) == (layers.get("last") is None):
        yield Fault(("adapter", "layers"), "expected either first or last, such as {last: 6}")


def _new_tokens(values: Tree) -> Iterator[Fault]:
    tokens, method, path = lookup(values, "model.new_tokens"), lookup(values, "adapter.method"), ("model", "new_tokens")
    twice = sorted({token for token in tokens if tokens.count(token) > 1})
    if twice:
        yield Fault(path, f"got {', '.join(twice)} more than once")
    if tokens and method not in ("lora", "full"):
        yield Fault(path, f"{method} would not train their rows; use adapter.method lora or full")
    if tokens and "trainable_token_indices" in (lookup(values, "adapter.options") or {}):
        yield Fault(path, "sets adapter.options.trainable_token_indices itself; remove one of the two")


def _patterns(values: Tree) -> Iterator[Fault]:
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in lookup(values, f"adapter.{name}"):
            yield from _regex(("adapter", name, pattern), pattern)


def _selection(values: Tree) -> Iterator[Fault]:
    for name in ("trainable", "frozen"):
        for number, pattern in enumerate(lookup(values, f"training.{name}") or ()):
            yield from _regex(("training", name, number), pattern)
    if lookup(values, "training.trainable") == []:
        yield Fault(("training", "trainable"), "got an empty list, which would train nothing; null trains all")


def _start_from(values: Tree) -> Iterator[Fault]:
    init = lookup(values, "adapter.init")
    if lookup(values, "adapter.start_from") is not None and str(init).startswith(("pissa", "olora")):
        yield Fault(
            ("adapter", "start_from"),
            f"can't be combined with adapter.init {init}, which begins at weights of its own and moves them out of the "
            "frozen ones; remove init (a run that used it is saved as an adapter of twice its rank for the original "
            "weights: take adapter.rank and adapter.alpha from r and lora_alpha of its adapter_config.json)",
        )


def _regex(path: KeyPath, pattern: str) -> Iterator[Fault]:
    try:
        re.compile(pattern)
    except re.error as error:
        yield Fault(path, f"got {pattern!r}, expected a regular expression: {error}")


def _steps(values: Tree) -> Iterator[Fault]:
    warmup, steps = lookup(values, "training.warmup"), lookup(values, "training.steps")
    micro, batch = lookup(values, "training.micro_batch_size"), lookup(values, "training.batch_size")
    if warmup >= 1 and warmup != int(warmup):
        yield Fault(("training", "warmup"), f"got {warmup}; from 1 up it is a number of steps and must be whole")
    elif warmup >= 1 and steps is not None and warmup >= steps:
        text = f"got {int(warmup)} steps of warm-up in {steps} steps of training; the peak rate is never reached"
        yield Fault(("training", "warmup"), f"{text}; write a smaller number, or a share such as 0.03")
    if isinstance(micro, int) and micro > batch:
        text = f"got {micro}, more than training.batch_size ({batch}), which counts the sequences of a whole step"
        yield Fault(("training", "micro_batch_size"), f"{text}; raise batch_size, or lower this")


def _budget(values: Tree) -> Iterator[Fault]:
    if lookup(values, "budget.max_usd") is not None and not lookup(values, "budget.usd_per_hour"):
        yield Fault(("budget", "max_usd"), "needs budget.usd_per_hour, the price of this machine")


def _packing(values: Tree) -> Iterator[Fault]:
    packing = lookup(values, "data.packing")
    if lookup(values, "data.pack_tokens") is not None and not packing:
        yield Fault(("data", "pack_tokens"), "has no effect without data.packing: true; set that, or remove this")


def _parallel(values: Tree) -> Iterator[Fault]:
    """What FSDP2 can't share out."""
    if lookup(values, "training.parallel") != "fsdp":
        return
    path = ("training", "parallel")
    if lookup(values, "adapter.method") == "full":
        yield Fault(path, "fsdp shares out frozen weights, and adapter.method full trains all; write ddp")
    for name, plain in (("model.quantization", "none"), ("model.frozen_compute", "full")):
        if lookup(values, name) not in (None, plain):
            yield Fault(path, f"fsdp shares out weights as they are stored, and {name} changes them; write ddp")


def _attention(values: Tree) -> Iterator[Fault]:
    if lookup(values, "model.attention") != "flash_attention_2":
        return
    device, precision, dtype = (lookup(values, n) for n in ("device", "training.precision", "model.dtype"))
    if device not in ("auto", "cuda"):
        yield Fault(("model", "attention"), f"flash_attention_2 runs on CUDA only, and device is {device}; write sdpa")
    elif precision == "fp32" and dtype in ("auto", "float32"):
        yield Fault(("model", "attention"), "flash_attention_2 computes in 16 bits; set training.precision: bf16")


def _options(values: Tree) -> Iterator[Fault]:
    method, adapter = lookup(values, "adapter.method"), lookup(values, "adapter")
    if adapter["options"] and method in SETTINGS and method not in WHOLE_TENSORS:
        for key, text in option_faults(method, adapter, lookup(values, "training.steps")):
            yield Fault(("adapter", "options", *([key] if key else [])), text)
