"""What the message says for one fault in an otherwise good configuration."""

from typing import Any

import pytest

from peft_engine.config_messages import leaves
from peft_engine.config_names import ADVICE, EXPECTED, KEYS, NOT_YET, VALUES
from peft_engine.config_reading import load_config
from peft_engine.config_yaml import from_python, parse
from peft_engine.errors import ConfigError

BASE = {"task": "text-classification", "model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}
NAMES = {".".join(map(str, path)) for path in leaves()}


def said(name: str, value: Any) -> str:
    """The one message for this setting; the value is YAML."""
    tree = from_python(BASE).tree
    *above, last = name.split(".")
    node = tree
    for part in above:
        node = node.setdefault(part, {})
    node[last] = parse(value, "f").tree if isinstance(value, str) else value
    with pytest.raises(ConfigError) as caught:
        load_config(tree)
    (line,) = str(caught.value).splitlines()
    return line.removeprefix("settings: ")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("training.learning_rat", "nearest: learning_rate"),
        ("training.learningRate", "nearest: learning_rate"),
        ("training.learning-rate", "nearest: learning_rate"),
        ("learning_rate", "nearest: training.learning_rate (in another section)"),
        ("training.rank", "nearest: adapter.rank (in another section)"),
        ("training.quantisation", "nearest: model.quantization (in another section)"),
        ("training.lr", "nearest: learning_rate"),
        ("lr", "nearest: training.learning_rate (in another section)"),
        ("adapter.r", "nearest: rank"),
        ("adapter.lora_alpha", "nearest: alpha"),
        ("adapter.lora_dropout", "nearest: dropout"),
        ("adapter.target_modules", "nearest: targets"),
        ("training.num_train_epochs", "nearest: epochs"),
        ("training.per_device_train_batch_size", "nearest: micro_batch_size"),
        ("data.max_seq_length", "nearest: max_length"),
        ("training.max_seq_length", "nearest: data.max_length (in another section)"),
        ("base_model", "nearest: model.path (in another section)"),
        ("model.name", "nearest: path"),
        ("seed", "nearest: data.seed or training.seed (in another section)"),
        ("data.limits", "nearest: limit"),
        ("data.limit.evl", "nearest: eval"),
        ("data.columns.lable", "nearest: label"),
        ("training.early_stopping_patience", "nearest: training.early_stopping.patience"),
        ("trainer", "nearest: training"),
        ("budget.zzz", "budget has max_usd, max_hours, usd_per_hour"),
        ("zzz", "the file has device, task, model"),
        ("training.gradient_accumulation_steps", "batch_size counts the sequences of a whole optimizer step"),
        ("model.token", "set HF_TOKEN in the environment"),
    ],
)
def test_unknown_key(name: str, nearest: str) -> None:
    line = said(name, {})
    assert line.startswith(f"{name}: unknown key; ")
    assert nearest in line
    assert line.endswith(nearest) or not nearest.startswith("nearest")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "adapter.alpha",
            "'3'",
            "got '3' (text), expected a number above 0; write the plain number, without quotes: 3",
        ),
        ("training.batch_size", "1_000", "got '1_000' (text), expected a whole number of at least 1; write the plain "),
        ("adapter.rank", "true", "got true (a switch), expected a whole number of at least 1"),
        ("adapter.rank", "8.0", "got 8.0 (a number), expected a whole number of at least 1; write 8"),
        ("adapter.rank", "8.5", "got 8.5 (a number), expected a whole number of at least 1"),
        ("adapter.rank", "0", "got 0 (a number), expected a whole number of at least 1"),
        ("adapter.rank", "null", "got nothing (null), expected a whole number of at least 1"),
        ("adapter.alpha", "true", "got true (a switch), expected a number above 0"),
        ("adapter.dropout", "1", "got 1 (a number), expected a number of at least 0 and below 1"),
        ("training.seed", "-1", "got -1 (a number), expected a whole number of at least 0 and below 4,294,967,296"),
        ("training.seed", str(2**70), "expected a whole number of at least 0 and below 4,294,967,296"),
        ("data.max_dropped", "1.1", "got 1.1 (a number), expected a number of at least 0 and at most 1"),
        ("training.learning_rate", ".inf", "got .inf (a number), expected a number above 0; it must be finite"),
        ("training.learning_rate", "1e-4x", "got 1e-4x (text), expected a number above 0"),
        ("training.betas", "[0.9]", "got [0.9] (a list), expected a list of 2 numbers of at least 0 and below 1"),
        ("training.micro_batch_size", "0", "got 0 (a number), expected auto or a whole number of at least 1"),
        ("training.restore_best", "yes", "got 'yes' (text), expected true or false; write true, without quotes"),
        ("training.restore_best", "1", "got 1 (a number), expected true or false; write true"),
        ("training.steps", "None", "got None (text), expected a whole number of at least 1 or null; write null"),
        (
            "training.schedule",
            "cosin",
            "got cosin (text), expected one of constant, linear, cosine, wsd; nearest: cosine",
        ),
        (
            "training.optimizer",
            "adamw_torch",
            "one of adamw, sgd, adafactor, adamw8bit, paged_adamw, paged_adamw8bit; write adamw",
        ),
        ("adapter.method", "LoRA", "got LoRA (text), expected one of lora, full, head, bitfit, houlsby, pfeiffer,"),
        ("adapter.method", "dora", "; write lora, with adapter.dora: true"),
        (
            "adapter.init",
            "pisa",
            "got pisa (text), expected one of default, gaussian, orthogonal, olora, pissa, pissa_niter_N",
        ),
        ("adapter.layers", "3", "got 3 (a number), expected a list of layer numbers from 0, {first: N}, {last: N}"),
        ("adapter.targets", "{}", "got {} (a mapping), expected text or a list of texts"),
        ("adapter.modules_to_save", "head", "got head (text), expected a list of texts; write it as a list: [head]"),
        ("adapter", "lora", "got lora (text), expected a section: its settings indented below it"),
        ("model.path", "123", 'got 123 (a number), expected text; quote it: path: "123"'),
        ("model.revision", "true", 'got true (a switch), expected text or null; quote it: revision: "true"'),
        ("device", "gpu", "got gpu (text), expected one of auto, cuda, mps, cpu; write cuda"),
        ("task", "sft", "dpo, orpo, kto, reward; write causal-lm"),
        ("kernels", "false", "got false (a switch), expected one of auto, triton, torch, off"),
    ],
)
def test_wrong_value(name: str, value: str, message: str) -> None:
    assert message in said(name, value)
    assert said(name, value).startswith(f"{name}: got ")


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("adapter.targets", "[q, 1]", "adapter.targets[1]: got 1 (a number), expected text"),
        ("adapter.layers", "[0, -1]", "adapter.layers[1]: got -1 (a number), expected a whole number of at least 0"),
        ("adapter.rank_pattern", "{q: 0}", "adapter.rank_pattern.q: got 0 (a number), expected a whole number"),
        ("data.labels", "[a, true]", "data.labels[1]: got true (a switch), expected text or a whole number"),
        ("training.betas", "[0.9, '1']", "training.betas[1]: got '1' (text), expected a number"),
        (
            "training.early_stopping",
            "{}",
            "training.early_stopping.patience: required, but not given; expected a whole",
        ),
        ("data.columns", "{text: 3}", "data.columns.text: got 3 (a number), expected text; quote it"),
    ],
)
def test_wrong_value_inside_names_its_place(name: str, value: str, place: str) -> None:
    assert said(name, value).startswith(place)


@pytest.mark.parametrize(("name", "value"), [(name, word) for name, words in NOT_YET.items() for word in words.split()])
def test_not_in_this_version(name: str, value: str) -> None:
    line = said(name, value)
    assert line.startswith(f"{name}: got {value} (")
    assert "which is not in this version; this version has " in line


def test_not_in_this_version_says_what_there_is() -> None:
    assert "this version has lora, full, head, bitfit, houlsby" in said("adapter.method", "reft")
    assert said("model.quantization", "fp8").endswith("this version has none, nf4, fp4, int8")
    assert said("model.quantization", "4bit").endswith("write nf4")
    assert "it is taken as it is stored" in said("model.quantization", "gptq")
    assert "not in this version; budget has max_usd and max_hours" in said("budget.max_kwh", "3")


def test_the_original_spelling_is_shown_to_be_quoted(tmp_path: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: causal-lm\nmodel:\n  path: m\n  revision: 12e45\ndata: {train: t}\noutput: 007\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, second = str(caught.value).splitlines()
    assert first.endswith(
        'line 4: model.revision: got 12e45 (a number), expected text or null; quote it: revision: "12e45"'
    )
    assert second.endswith('line 6: output: got 007 (a number), expected text; quote it: output: "007"')


def test_long_values_are_cut() -> None:
    assert len(said("adapter.alpha", "x" * 10_000)) < 200


def test_whole_numbers_do_for_numbers() -> None:
    assert load_config(BASE | {"adapter": {"alpha": 3}, "training": {"learning_rate": 1}}).adapter.alpha == 3


def test_tables_name_only_settings_that_exist() -> None:
    assert set(KEYS.values()) <= NAMES | {"data.columns.text", "data.columns.label"}
    assert set(NOT_YET) | set(VALUES) | set(EXPECTED) <= NAMES | {"data.train[]"}  # an item of a list
    assert not {name.rsplit(".", 1)[-1] for name in NAMES} & set(ADVICE)
