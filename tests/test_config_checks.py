"""Checks between settings."""

from typing import Any, get_args

import pytest

from peft_engine.config import TaskName
from peft_engine.config_checks import TASK_ONLY, TASKS, _parallel
from peft_engine.config_reading import load_config
from peft_engine.config_yaml import parse
from peft_engine.errors import ConfigError


def tree(task: str, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"task": task, "model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}
    for name, settings in sections.items():
        new = parse(settings, "f").tree if isinstance(settings, str) else settings
        base[name] = base.get(name, {}) | new if isinstance(new, dict) else new
    return base


def faults(task: str, **sections: Any) -> list[str]:
    """The messages, or none where the configuration loads."""
    try:
        load_config(tree(task, **sections))
    except ConfigError as error:
        return [line.removeprefix("settings: ") for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize("method", ["full", "head", "bitfit"])
def test_lora_settings_need_lora(method: str) -> None:
    settings = (
        "{rank: 16, alpha: 32, dropout: 0.1, targets: all-linear, layers: [0], rank_pattern: {a: 1}, "
        "alpha_pattern: {a: 1}, modules_to_save: [x], rslora: true, dora: true, init: pissa, bias: all, "
        "lora_plus_ratio: 16, options: {layers_pattern: h}}"
    )
    given = parse(settings, "f").tree
    found = faults("causal-lm", adapter={"method": method, **given})
    assert {line.split(":")[0] for line in found} == {f"adapter.{name}" for name in given}
    assert all(f" only, and the method is {method}; remove it" in line for line in found)


def test_settings_that_ask_for_nothing_may_stand() -> None:
    assert not faults("causal-lm", adapter="{method: head, dora: false, rank_pattern: {}, bias: none, layers: null}")
    assert not faults("causal-lm", model={"pooling": "auto"}, data={"labels": None, "label_type": "auto"})
    assert not faults("text-classification", evaluation={"generate_rows": 0}, data={"supervise": "auto"})


@pytest.mark.parametrize(
    ("task", "section", "settings", "name"),
    [
        ("causal-lm", "model", "{pooling: mean}", "model.pooling"),
        ("causal-lm", "data", "{labels: [a, b]}", "data.labels"),
        ("causal-lm", "data", "{label_type: single}", "data.label_type"),
        ("causal-lm", "data", "{columns: {label: x}}", "data.columns.label"),
        ("text-classification", "data", "{supervise: last}", "data.supervise"),
        ("text-classification", "data", "{columns: {messages: x}}", "data.columns.messages"),
        ("text-classification", "evaluation", "{generate_rows: 5}", "evaluation.generate_rows"),
    ],
)
def test_settings_of_the_other_task(task: str, section: str, settings: str, name: str) -> None:
    (line,) = faults(task, **{section: settings})
    owners = ", ".join(TASK_ONLY[name])
    tasks = f"tasks {owners}" if ", " in owners else f"task {owners}"
    assert line == f"{name}: applies to {tasks} only, and the task is {task}; remove it"
    assert not any(faults(owner, **{section: settings}) for owner in TASK_ONLY[name])


@pytest.mark.parametrize("setting", ["early_stopping: {patience: 2}", "restore_best: true", "eval_every: 5"])
def test_what_needs_an_evaluation_split(setting: str) -> None:
    (line,) = faults("causal-lm", training=f"{{{setting}}}", data="{split: {eval: 0}}")
    assert line == (
        f"training.{setting.split(':')[0]}: needs an evaluation split, and there is none; "
        "give data.eval, or a data.split.eval above 0"
    )
    assert not faults("causal-lm", training=f"{{{setting}}}")
    assert not faults("causal-lm", training=f"{{{setting}}}", data="{eval: e, split: {eval: 0}}")


def test_splits_leave_something_to_train_on() -> None:
    (line,) = faults("causal-lm", data="{split: {eval: 0.5, test: 0.5}}")
    assert line == "data.split: eval 0.5 and test 0.5 leave nothing to train on; their sum must be below 1"
    assert not faults("causal-lm", data="{eval: e, split: {eval: 0.5, test: 0.5}}")


@pytest.mark.parametrize("name", ["eval", "test"])
def test_measuring_on_the_training_data(name: str) -> None:
    (line,) = faults("causal-lm", data={name: "t"})
    assert line.startswith(f"data.{name}: got t, the same as data.train")


@pytest.mark.parametrize(
    ("task", "section", "settings", "message"),
    [
        ("causal-lm", "budget", "{max_usd: 2}", "budget.max_usd: needs budget.usd_per_hour, the price of this machine"),
        ("causal-lm", "budget", "{max_usd: 2, usd_per_hour: 0}", "budget.max_usd: needs budget.usd_per_hour"),
        ("text-classification", "data", "{labels: [a, b, a]}", "data.labels: got a more than once"),
        ("text-classification", "data", "{labels: [1, '1']}", "data.labels: got 1 more than once"),
        ("text-classification", "data", "{labels: [a]}", "data.labels: got 1 class(es), expected two or more"),
        ("text-classification", "data", "{labels: [a, b], label_type: regression}", "data.labels: regression has no"),
        ("causal-lm", "adapter", "{targets: []}", "adapter.targets: names no module"),
        ("causal-lm", "adapter", "{targets: [all-linear]}", "adapter.targets: all-linear stands alone"),
        ("causal-lm", "adapter", "{targets: 'q_proj, v_proj'}", "expected a list; write [q_proj, v_proj]"),
        ("causal-lm", "adapter", "{targets: '*.q'}", "adapter.targets: got '*.q', expected a regular expression"),
        ("causal-lm", "adapter", "{targets: .*q, layers: [1]}", "adapter.layers: can't be combined with a regular"),
        ("causal-lm", "adapter", "{rank_pattern: {'(': 1}}", "adapter.rank_pattern.(: got '(', expected a regular"),
        ("causal-lm", "training", "{warmup: 1.5}", "training.warmup: got 1.5; from 1 up it is a number of steps"),
        ("causal-lm", "training", "{warmup: 100, steps: 50}", "training.warmup: got 100 steps of warm-up in 50 steps"),
        (
            "causal-lm",
            "training",
            "{micro_batch_size: 32}",
            "training.micro_batch_size: got 32, more than training.batch",
        ),
        ("causal-lm", "training", "{optimizer: adafactor, betas: [0.8, 0.9]}", "training.betas: has no effect with"),
        (
            "image-classification",
            "data",
            "{near_duplicates: drop}",
            "data.near_duplicates: got drop, and of images only",
        ),
        ("causal-lm", "model", "{path: ''}", "model.path: got an empty text, expected a name or a path"),
    ],
)
def test_contradictions(task: str, section: str, settings: str, message: str) -> None:
    (line,) = faults(task, **{section: settings})
    assert message in line


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("budget", "{max_usd: 2, usd_per_hour: 1}"),
        ("adapter", "{targets: '.*\\.(q|v)_proj'}"),
        ("adapter", "{targets: [q_proj], layers: [0, 1]}"),
        ("adapter", "{init: pissa, dora: true, rslora: true}"),
        ("adapter", "{init: pissa_niter_16}"),
        ("training", "{warmup: 10, steps: 50}"),
        ("training", "{micro_batch_size: 16}"),
    ],
)
def test_what_goes_together(section: str, settings: str) -> None:
    assert not faults("causal-lm", **{section: settings})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{r: 3}", "adapter.options.r: is a setting of its own here; write adapter.rank"),
        (
            "{target_modules: [q]}",
            "adapter.options.target_modules: is a setting of its own here; write adapter.targets",
        ),
        ("{use_dora: true}", "adapter.options.use_dora: is a setting of its own here; write adapter.dora"),
        ("{inference_mode: true}", "adapter.options.inference_mode: is set by the engine; remove it"),
        ("{exclude_module: [q]}", "peft's LoraConfig has no such field; nearest: exclude_modules"),
        ("{use_dor: true}", "peft's LoraConfig has no such field; nearest: adapter.dora"),
        ("{zzz: 1}", "peft's LoraConfig has no such field; it has "),
        ("{kasa_config: {}}", "adapter.options.kasa_config: can't be used: its loss term is not part of the engine's"),
        ("{layers_pattern: h}", "adapter.options: peft refuses these settings: When `layers_pattern` is specified"),
    ],
)
def test_options_are_checked_against_peft(options: str, message: str) -> None:
    (line,) = faults("causal-lm", adapter=f"{{options: {options}}}")
    assert message in line


def test_options_peft_takes() -> None:
    assert not faults("causal-lm", adapter="{options: {lora_bias: true, exclude_modules: [q_proj]}}")
    (line,) = faults("causal-lm", adapter="{dora: true, options: {lora_bias: true}}")
    assert "lora_bias=True is not supported for DoRA" in line


def test_each_of_our_names_for_peft_fields_exists_in_both() -> None:
    from peft_engine.config_messages import at
    from peft_engine.config_methods import ADAPTER_SETTINGS, ENGINE_SETS, names, peft_names, peft_type
    from peft_engine.config_options import ALWAYS_ENGINE, OUR_NAMES, peft_config_class

    for method in filter(peft_type, names()):
        theirs = set(peft_config_class(method).__dataclass_fields__)
        # layers are named to peft as targets; some of its methods have no field for them
        assert {*OUR_NAMES, *ALWAYS_ENGINE, *ENGINE_SETS.get(method, ()), *peft_names(method)} - {
            "layers_to_transform"
        } <= theirs, method
    settings = [*OUR_NAMES.values(), *(f"adapter.{name}" for name in ADAPTER_SETTINGS), *TASK_ONLY]
    assert all(at(tuple(name.split("."))) is not None for name in settings)


def test_checks_see_past_other_faults() -> None:
    found = faults("causal-lm", adapter="{method: ia4, dora: 3}", budget="{max_usd: 1, usd_per_hour: x}", training=3)
    assert [line.split(":")[0] for line in found] == [
        "adapter.method",
        "adapter.dora",
        "training",
        "budget.usd_per_hour",
        "budget.max_usd",
    ]


def test_what_fsdp_can_not_share_out() -> None:
    assert not faults("causal-lm", training="{parallel: fsdp}")
    assert not faults("causal-lm", training="{parallel: ddp}", adapter="{method: full}")
    (found,) = faults("causal-lm", training="{parallel: fsdp}", adapter="{method: full}")
    assert found == ("training.parallel: fsdp shares out frozen weights, and adapter.method full trains all; write ddp")
    (found,) = _parallel({"training": {"parallel": "fsdp"}, "model": {"frozen_compute": "int8"}})
    assert "model.frozen_compute changes them" in found.text


def test_the_list_of_tasks_for_the_command_line_is_that_of_the_declaration():
    assert set(TASKS) == set(get_args(TaskName))


@pytest.mark.parametrize(
    ("task", "sections", "told"),
    [
        ("causal-lm", {"adapter": "{method: full}"}, "model.frozen_compute: got int8, and adapter.method full freezes"),
        ("causal-lm", {"kernels": "off"}, "model.frozen_compute: got int8, which is one of the fused kernels"),
        ("dpo", {}, "model.frozen_compute: got int8; task dpo trains in the loop of TRL"),
        (
            "causal-lm",
            {"model": "{frozen_compute: bf16, frozen_outliers: smooth}"},
            "model.frozen_outliers: got smooth",
        ),
        (
            "causal-lm",
            {"model": "{frozen_compute: full, frozen_outliers: smooth}"},
            "model.frozen_outliers: has no effect",
        ),
        ("causal-lm", {"model": "{frozen_compute: full, frozen_head: int8}"}, "model.frozen_head: has no effect"),
        (
            "causal-lm",
            {"model": "{frozen_compute: full, frozen_error_bound: 0.1}"},
            "model.frozen_error_bound: has no effect",
        ),
        ("seq2seq", {"model": "{frozen_head: int8}"}, "model.frozen_head: is read by the loss of task causal-lm only"),
        (
            "causal-lm",
            {"model": "{frozen_head: int8}", "adapter": "{method: head}"},
            "model.frozen_head: got int8, and",
        ),
        ("causal-lm", {"model": "{frozen_compute: bf16, frozen_head: int8}"}, "model.frozen_head: got int8 beside"),
        (
            "causal-lm",
            {"training": "{parallel: fsdp}"},
            "training.parallel: fsdp shares out weights as they are stored",
        ),
        ("causal-lm", {}, None),
        ("causal-lm", {"model": "{frozen_compute: auto, frozen_outliers: columns, frozen_head: int8}"}, None),
    ],
)
def test_what_goes_with_frozen_compute(task: str, sections: dict[str, Any], told: str | None) -> None:
    given = dict(sections)
    model = {"path": "m", "frozen_compute": "int8", **parse(given.pop("model", "{}"), "f").tree}
    found = faults(task, model=model, **given)
    assert len(found) == (1 if told else 0), found
    assert all(line.startswith(told or "") for line in found)


@pytest.mark.parametrize(
    ("task", "sections", "told"),
    [
        ("causal-lm", {}, None),
        ("seq2seq", {"model": "{quantization: int8, quantization_skip: [wo]}"}, None),
        ("causal-lm", {"model": "{double_quantization: false}", "adapter": "{init: loftq}"}, None),
        ("causal-lm", {"adapter": "{method: full}"}, "model.quantization: got nf4, and adapter.method full trains"),
        (
            "causal-lm",
            {"adapter": "{method: loha}"},
            "model.quantization: got nf4, and adapter.method loha is not",
        ),
        ("causal-lm", {"adapter": "{method: bitfit}"}, "model.quantization: got nf4, and adapter.method bitfit"),
        ("causal-lm", {"adapter": "{bias: lora_only}"}, "adapter.bias: got lora_only; training biases over quantised"),
        ("causal-lm", {"adapter": "{init: lora-ga}"}, "adapter.init: lora-ga reads the gradient of weights"),
        ("causal-lm", {"model": "{frozen_compute: int8}"}, "model.frozen_compute: got int8 beside quantization nf4"),
        (
            "causal-lm",
            {"model": "{quantization: int8, double_quantization: false}"},
            "model.double_quantization: is for nf4 and fp4",
        ),
        (
            "causal-lm",
            {"model": "{quantization: none, quantization_skip: [o_proj]}"},
            "model.quantization_skip: has no effect with quantization none",
        ),
        (
            "causal-lm",
            {"model": "{quantization: none, double_quantization: false}"},
            "model.double_quantization: has no effect",
        ),
        ("causal-lm", {"model": "{quantization_skip: ['(']}"}, "model.quantization_skip[0]: got '(', expected a"),
        (
            "causal-lm",
            {"model": "{quantization: int8}", "adapter": "{dora: true}"},
            "adapter.dora: peft's DoRA loses the scales of int8",
        ),
        ("causal-lm", {"adapter": "{dora: true}"}, None),
        ("kto", {}, "model.quantization: got nf4; task kto trains in the loop of TRL"),
        ("causal-lm", {"training": "{parallel: fsdp}"}, "training.parallel: fsdp shares out weights as they are"),
    ],
)
def test_what_goes_with_quantization(task: str, sections: dict[str, Any], told: str | None) -> None:
    given = dict(sections)
    model = {"path": "m", "quantization": "nf4", **parse(given.pop("model", "{}"), "f").tree}
    found = faults(task, model=model, **given)
    assert len(found) == (1 if told else 0), found
    assert all(line.startswith(told or "") for line in found)
