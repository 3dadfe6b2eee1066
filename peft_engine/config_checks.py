"""Checks that need more than one setting: what does not apply to a method or task, and what contradicts itself.

`Config` runs them for everybody; `config_reading` runs them once more on files that have other faults, so that all are
reported together.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from peft_engine.config_data_checks import data_faults
from peft_engine.config_faults import Fault, KeyPath, Tree, lookup
from peft_engine.config_frozen import PREFERENCE, frozen_faults
from peft_engine.config_memory import memory_faults
from peft_engine.config_methods import ADAPTER_SETTINGS, BOTTLENECK, PROMPTS, SETTINGS, WHOLE_TENSORS, owners
from peft_engine.config_options import option_faults
from peft_engine.config_preference import preference_faults
from peft_engine.config_quantised import quantised_faults

CLASSES = ("text-classification", "image-classification")
LABELLED = (*CLASSES, "token-classification")
"""Tasks with class names."""
TEXT = ("causal-lm", "text-classification", "token-classification", "seq2seq")
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
        data_faults,
        _preference,
        _targets,
        _layers,
        _new_tokens,
        _patterns,
        _selection,
        _start_from,
        _steps,
        _budget,
        _attention,
        _parallel,
    ):
        faults.extend(check(values))
    faults.extend(Fault(("model", name), text) for name, text in frozen_faults(values))
    faults.extend(Fault(tuple(name.split(".")), text) for name, text in quantised_faults(values))
    faults.extend(Fault(path, text) for path, text in memory_faults(values))
    return [*faults, *_options(values)]


def _empty_text(values: Tree) -> Iterator[Fault]:
    for name in ("model.path", "data.train", "data.eval", "data.test", "output"):
        if isinstance(lookup(values, name), str) and not lookup(values, name).strip():
            yield Fault(tuple(name.split(".")), "got an empty text, expected a name or a path")
    if lookup(values, "data.train") == []:
        yield Fault(("data", "train"), "got an empty list, expected at least one {path, weight}")


def _preference(values: Tree) -> Iterator[Fault]:
    task, adapter = lookup(values, "task"), lookup(values, "adapter")
    if task in PREFERENCE and adapter:
        for name, text in preference_faults(task, adapter):
            yield Fault(("adapter", name), text)
    if task in PREFERENCE and lookup(values, "data.clean.contradictory") not in (None, "keep"):
        text = f"several answers to a prompt are what task {task} learns from; set it to keep"
        yield Fault(("data", "clean", "contradictory"), text)


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
    options = lookup(values, "adapter.options") or {}
    if method == "trainable-tokens" and not options.get("token_indices"):
        yield Fault(("adapter", "options"), "trainable-tokens trains rows of tokens: add token_indices: [their ids]")
    if tokens and "trainable_token_indices" in (lookup(values, "adapter.options") or {}):
        yield Fault(path, "sets adapter.options.trainable_token_indices itself; remove one of the two")


def _patterns(values: Tree) -> Iterator[Fault]:
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in lookup(values, f"adapter.{name}"):
            yield from _regex(("adapter", name, pattern), pattern)


def _selection(values: Tree) -> Iterator[Fault]:
    for name in ("training.trainable", "training.frozen", "model.quantization_skip"):
        for number, pattern in enumerate(lookup(values, name) or ()):
            yield from _regex((*name.split("."), number), pattern)
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


def _parallel(values: Tree) -> Iterator[Fault]:
    """What FSDP2 can't share out."""
    if lookup(values, "training.parallel") != "fsdp":
        return
    path = ("training", "parallel")
    if lookup(values, "adapter.method") == "full":
        yield Fault(path, "fsdp shares out frozen weights, and adapter.method full trains all; write ddp")
    if lookup(values, "model.frozen_compute") not in (None, "full"):
        text = "fsdp shares out weights as they are stored, and model.frozen_compute changes them; write ddp"
        yield Fault(path, text)


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
