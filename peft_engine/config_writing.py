"""Writes settings: a configuration as YAML, the JSON schema for editors, and a commented start."""

import copy
import difflib
import textwrap
from typing import Any, get_args

from peft_engine.config import Config, TaskName
from peft_engine.config_checks import inapplicable
from peft_engine.config_faults import KeyPath, dotted
from peft_engine.config_messages import expected, full_schema, resolve
from peft_engine.config_yaml import dump, from_python, show
from peft_engine.errors import ConfigError

ROWS = {
    "causal-lm": "Each row has messages (a chat), or prompt and completion, or text.",
    "text-classification": "Each row has a text and a label: a class, a list of classes, or a number.",
    "token-classification": "Each row has tokens (words) and tags, one per word.",
    "seq2seq": "Each row has a source and a target text.",
    "image-classification": "A folder of one folder per class, or rows with an image (path) and a label.",
    "dpo": "Each row has a prompt, a chosen and a rejected answer.",
    "orpo": "Each row has a prompt, a chosen and a rejected answer.",
    "kto": "Each row has a prompt, a completion, and a label: true where the completion is good.",
    "reward": "Each row has a chosen and a rejected text or conversation, and may have a prompt.",
}


def to_yaml(config: Config) -> str:
    """All settings with their values, as YAML that `load_config` reads back to an equal configuration.

    Settings without effect under the configuration's method and task are left out.
    """
    tree = from_python(config.model_dump()).tree
    for name in inapplicable(tree):
        *above, last = name.split(".")
        node = tree
        for part in above:
            node = node[part]
        node.pop(last, None)
    return dump(tree)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, for validators and editors."""
    schema = copy.deepcopy(full_schema())
    for part in (schema, *schema["$defs"].values()):
        part["description"] = " ".join(part.get("description", "").split()) or part["title"]
        for name, inner in part["properties"].items():
            inner["description"] = " ".join(inner.get("description", "").split())
            inner.pop("title", None)
            if "$ref" in inner and name not in part.get("required", ()):
                inner["anyOf"] = [{"$ref": inner.pop("$ref")}, {"type": "null"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def starter(task: str, model: str, file: str = "config.yaml") -> str:
    """A commented configuration: every setting that applies, with its text; defaults stand behind a `#`.

    Args:
        model: hub id or local folder.
        file: the name it will have, for the command in its head.

    Raises:
        ConfigError: no such task.
    """
    tasks = get_args(TaskName)
    if task not in tasks:
        near = difflib.get_close_matches(task, tasks, n=1)
        fix = f"Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"task: got {task}, expected one of {', '.join(tasks)}.", fix)
    filled = {
        "task": task,
        "model.path": model,
        "adapter.method": "lora",
        "data.train": "train.jsonl",
        "output": f"runs/{task}",
    }
    head = [
        "# yaml-language-server: $schema=schema.json",
        f"# Run: peft-engine train {file}",
        "#",
        "# Completion and checks in an editor: peft-engine schema > schema.json",
        "# A line #key: value shows a default: take the # away to change it.",
        "# Paths are relative to the current directory.",
        f"# Data: {ROWS[task]}",
    ]
    skip = set(inapplicable({"task": task, "adapter": {"method": "lora"}}))
    return "\n".join([*head, *_section(full_schema(), (), filled, skip)]) + "\n"


def _section(schema: dict[str, Any], above: KeyPath, filled: dict[str, str], skip: set[str]) -> list[str]:
    """The lines of a section's settings."""
    indent = "  " * len(above)
    lines = []
    for key, inner in schema["properties"].items():
        name = dotted((*above, key))
        if name in skip:
            continue
        about = " ".join(inner.get("description", "").split())
        if "enum" in inner:
            about = f"{about} {expected(inner).capitalize()}."
        elif "anyOf" in inner and resolve(inner) is not inner:
            about = f"{about} Its settings: {', '.join(resolve(inner)['properties'])}."
        if not above:
            lines.append("")
        lines += textwrap.wrap(about, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if name in filled:
            lines.append(f"{indent}{key}: {show(filled[name], 10_000)}")
        elif "$ref" in inner:
            lines += [f"{indent}{key}:", *_section(resolve(inner), (*above, key), filled, skip)]
        else:
            lines.append(f"{indent}#{key}: {show(inner['default'], 10_000)}")
    return lines
