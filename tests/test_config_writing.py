"""Configurations written out: YAML, schema, the commented start."""

import json
import re
from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from peft_engine.config import Config, TaskName
from peft_engine.config_reading import json_schema, load_config, starter, to_yaml
from peft_engine.config_yaml import parse
from peft_engine.errors import ConfigError

TASKS = get_args(TaskName)
BASE: dict[str, Any] = {"model": {"path": "some/model"}, "data": {"train": "t"}, "output": "o"}


def accepts(tree: Any) -> bool:
    return bool(Draft202012Validator(json_schema()).is_valid(tree))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["lora", "full", "head", "bitfit"])
def test_yaml_round_trip_is_exact(tmp_path: Any, task: str, method: str) -> None:
    config = load_config(BASE | {"task": task, "adapter": {"method": method}, "training": {"optimizer": "adafactor"}})
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert to_yaml(again) == to_yaml(config)
    assert accepts(parse(to_yaml(config), "f").tree)


def test_round_trip_of_awkward_values(tmp_path: Any) -> None:
    tree = {
        "task": "text-classification",
        "model": {"path": "no", "revision": "1e-4"},
        "adapter": {
            "targets": r".*\.(q|v): #x",
            "rank_pattern": {"^a\\.b$": 3, "1": 2},
            "options": {"exclude_modules": ["on", "12"], "fan_in_fan_out": False},
        },
        "data": {"train": "ä b.csv", "labels": ["yes", "no", 3, "null", " a "], "cache": None},
        "training": {"learning_rate": 1e-5, "betas": [0.1 + 0.2, 0], "early_stopping": {"patience": 2}},
        "output": "~",
    }
    config = load_config(tree)
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path).data.labels == ["yes", "no", 3, "null", " a "]


def test_yaml_holds_every_setting_that_applies_and_no_other() -> None:
    text = to_yaml(load_config(BASE | {"task": "causal-lm", "adapter": {"method": "head"}}))
    tree = parse(text, "f").tree
    assert tree["adapter"] == {"method": "head", "start_from": None}
    assert "pooling" not in tree["model"]
    assert "labels" not in tree["data"]
    assert set(tree) == set(Config.model_fields) - {"preference"}
    assert tree["training"]["betas"] == [0.9, 0.999]


def test_schema_is_valid_and_strict() -> None:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(schema)) == schema
    assert all(part["additionalProperties"] is False for part in (schema, *schema["$defs"].values()))
    assert schema["$defs"]["AdapterConfig"]["properties"]["rank"]["description"].startswith("Rank r of each update")


@pytest.mark.parametrize(
    ("change", "good"),
    [
        ({}, True),
        ({"budget": None}, True),
        ({"training": {"learning_rate": 1e-4, "betas": [0.9, 0.99]}}, True),
        ({"bogus": 1}, False),
        ({"model": None}, False),
        ({"training": {"learning_rat": 1}}, False),
        ({"training": {"batch_size": 0}}, False),
        ({"training": {"batch_size": "3"}}, False),
        ({"training": {"betas": [0.9]}}, False),
        ({"adapter": {"method": "ia4"}}, False),
        ({"adapter": {"init": "pisa"}}, False),
        ({"data": {"train": "t", "packing": True}}, True),
        ({"data": {"train": "t", "packing": "bfd"}}, False),
        ({"data": {"train": [{"path": "t", "weight": 2.0}, {"path": "u"}]}}, True),
        ({"data": {"train": [{"file": "t"}]}}, False),
        ({"data": {"train": "t", "columns": {"txt": "a"}}}, False),
    ],
)
def test_schema_agrees_with_the_loader(change: dict[str, Any], good: bool) -> None:
    tree = BASE | {"task": "causal-lm"} | change
    assert accepts(tree) is good
    if good:
        load_config(tree)
    else:
        with pytest.raises(ConfigError):
            load_config(tree)


@pytest.mark.parametrize("task", TASKS)
def test_starter_loads_and_validates(tmp_path: Any, task: str) -> None:
    path = tmp_path / "start.yaml"
    path.write_text(starter(task, "org/model", path.name), encoding="utf-8")
    config = load_config(path)
    plain = BASE | {"task": task, "model": {"path": "org/model"}, "output": f"runs/{task}"}
    assert config == load_config(plain | {"data": {"train": "train.jsonl"}})
    assert accepts(parse(path.read_text(encoding="utf-8"), "f").tree)
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second == "# Run: peft-engine train start.yaml"


@pytest.mark.parametrize("task", TASKS)
def test_starter_shows_each_default_as_it_is(tmp_path: Any, task: str) -> None:
    text = starter(task, "org/model")
    path = tmp_path / "all.yaml"
    path.write_text(re.sub(r"^( *)#(?=\w+: )", r"\1", text, flags=re.MULTILINE), encoding="utf-8")
    assert text.count("#rank: 16") == 1
    path_plain = tmp_path / "start.yaml"
    path_plain.write_text(text, encoding="utf-8")
    assert load_config(path) == load_config(path_plain)
    assert parse(path.read_text(encoding="utf-8"), "f").tree["training"]["schedule"] == "cosine"


@pytest.mark.parametrize(("name", "task"), [("pooling", "text-classification"), ("supervise", "causal-lm")])
def test_starter_leaves_out_what_does_not_apply(name: str, task: str) -> None:
    assert [other for other in TASKS if f"#{name}:" in starter(other, "m")] == [task]


def test_starter_quotes_and_refuses() -> None:
    assert "  path: '123'\n" in starter("causal-lm", "123")
    with pytest.raises(ConfigError, match="got causal-ml, expected one of causal-lm, text-classification"):
        starter("causal-ml", "m")
    assert max(map(len, starter("causal-lm", "m").splitlines())) <= 120
