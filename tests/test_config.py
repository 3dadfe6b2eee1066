"""The declaration itself, and the configurations that come with the project."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from peft_engine.config import Config
from peft_engine.config_reading import json_schema, load_config
from peft_engine.config_yaml import parse

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCHEMA = ROOT / "configs" / "schema.json"
NAMES = {path.stem for path in CONFIGS}


def test_each_task_has_a_configuration_for_each_way_of_training() -> None:
    methods = {(config.task, config.adapter.method) for config in map(load_config, CONFIGS)}
    assert methods == {(t, m) for t in ("causal-lm", "text-classification") for m in ("lora", "full", "head", "bitfit")}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_loads_and_validates_against_the_schema_file(path: Path) -> None:
    config = load_config(path)
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    Draft202012Validator(schema).validate(parse(path.read_text(encoding="utf-8"), path.name).tree)
    assert config.output == f"runs/{path.stem}"
    assert config.model.hub_id or "/" in config.model.path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_headed_by_the_schema_comment_and_its_command(path: Path) -> None:
    first, second, *_ = path.read_text(encoding="utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=schema.json"
    assert second == f"# Run: peft-engine train configs/{path.name}"


def test_schema_file_is_current() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == json_schema(), "peft-engine schema > configs/schema.json"


def test_quickstart_is_what_the_design_says() -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert (config.task, config.adapter.method, config.adapter.rank) == ("text-classification", "lora", 8)
    assert config.data.limit.model_dump() == {"train": 4000, "eval": 1000, "test": 2000}
    assert config.training.learning_rate == 1e-3


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from peft_engine.config_reading import load_config, to_yaml;"
        f"to_yaml(load_config({str(CONFIGS[0])!r}));"
        "print([m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_setting_is_documented() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, inner in part["properties"].items():
            assert len(inner["description"]) > 10, name
            assert not re.search(r"\bTODO\b", inner["description"])


def test_config_made_in_python_is_checked_too() -> None:
    good = {"task": "causal-lm", "model": {"path": "m"}, "data": {"train": "t"}, "output": "o"}
    assert Config.model_validate(good).adapter.rank == 16
    with pytest.raises(ValidationError, match=r"data\.labels: applies to tasks text-classification, "):
        Config.model_validate(good | {"data": {"train": "t", "labels": ["a", "b"]}})
    with pytest.raises(ValidationError, match=r"budget\.usd_per_hour"):
        Config.model_validate(good | {"budget": {"max_usd": 1.0}})


def test_names_of_the_files() -> None:
    assert {"quickstart", "tiny", "causal-lm-text", "causal-lm-lora"} <= NAMES
