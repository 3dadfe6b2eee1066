"""Reads settings from YAML, checks all of them, and reports every fault at once with its line."""

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_engine.config import Config
from peft_engine.config_checks import cross_faults
from peft_engine.config_faults import Fault, KeyPath, Tree, dotted
from peft_engine.config_messages import at, faults_of, full_schema, nests, resolve, unknown_key
from peft_engine.config_writing import json_schema, starter, to_yaml
from peft_engine.config_yaml import Origin, Parsed, from_python, parse, show
from peft_engine.errors import ConfigError

__all__ = ["json_schema", "load_config", "starter", "to_yaml"]

SUFFIXES = (".yaml", ".yml", ".json")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads and checks a configuration.

    Paths in it are relative to the current directory, not to the file.

    Args:
        source: a YAML (or JSON) file, or the same as a nested dict.
        overrides: `a.b=value`, the value in YAML; a later one wins. Replaces a whole section with `a={...}`.

    Raises:
        ConfigError: with all faults, each with its line in the file, or the override it came from.
    """
    name = "settings" if isinstance(source, Mapping) else str(source)
    parsed = from_python(source) if isinstance(source, Mapping) else parse(_text(Path(source)), name)
    if parsed.tree is None:
        raise ConfigError(f"{name}: is empty.", "A start: peft-engine init prints a configuration with comments.")
    if not isinstance(parsed.tree, dict):
        problem = f"{name}: got {show(parsed.tree)}, expected settings written `key: value`, one per line."
        raise ConfigError(problem, "See configs/quickstart.yaml.")
    for override in overrides:
        _override(parsed, override)
    _open_sections(parsed.tree, full_schema())
    config, faults = _check(parsed)
    if faults:
        raise ConfigError(_report(name, faults, parsed.origins))
    assert config is not None
    return config


def _check(parsed: Parsed) -> tuple[Config | None, list[Fault]]:
    """The configuration, or all its faults. Settings at fault are left out when the others are compared."""
    config = None
    faults = list(parsed.faults)
    own: list[Fault] = []
    try:
        config = Config.model_validate(parsed.tree)
    except ValidationError as error:
        own = faults_of(error, parsed.tree, parsed.origins)
    known = {fault.path for fault in faults}
    faults += [fault for fault in own if fault.path not in known]
    if config is None:
        given = copy.deepcopy(parsed.tree)
        for fault in faults:
            _remove(given, fault.path)
        faults += cross_faults(given, _with_defaults(given))
    return config, faults


def _text(path: Path) -> str:
    """The file's text; what keeps it from being read is said with the remedy."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        folders = [folder for folder in (path.parent, Path("configs")) if folder.is_dir()]
        files = [file for folder in folders for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES]
        stems = difflib.get_close_matches(path.stem, {file.stem for file in files}, n=3)
        near = [str(file) for file in files if file.stem in stems]
        fix = f"Near names: {', '.join(near)}." if near else "A start: peft-engine init prints a configuration."
        raise ConfigError(f"{path}: there is no such file.", fix) from None
    except IsADirectoryError:
        inside = [file for file in (path / "config.yaml", *sorted(path.glob("*.y*ml"))) if file.is_file()]
        fix = f"Did you mean {inside[0]}?" if inside else "Name a YAML file."
        raise ConfigError(f"{path}: is a folder, expected a YAML file.", fix) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{str(path)[:200]}: can't be read: {reason}.", "Expected the path of a YAML file.") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = f"{path}, line {line}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x})."
        raise ConfigError(problem, "Save the file as UTF-8.") from None


def _override(parsed: Parsed, text: str) -> None:
    """Puts `a.b=value` into the tree; its origin is the option instead of a line."""
    name, equals, value = text.partition("=")
    path: KeyPath = tuple(name.strip().split("."))
    label = f"--set {name.strip()}"
    if not equals or not all(path):
        raise ConfigError(f"--set {text}: not of the form a.b=value.", "For example: --set training.learning_rate=1e-4")
    new = parse(value, label, label)
    node = parsed.tree
    for n, part in enumerate(path[:-1], start=1):
        if not isinstance(node.get(part), dict):
            schema = at(path[:n])
            if schema is None or not nests(schema):
                bad = path[:n] if schema is None else path
                said = unknown_key(bad) if schema is None else f"{dotted(path[:n])} is no section"
                parsed.faults.append(Fault(bad, said))
                parsed.origins[bad] = Origin(label)
                return
            if node.get(part) is not None:
                return  # what stands there is reported as no section
            node[part] = {}
        node = node[part]
    node[path[-1]] = new.tree
    for old in [old for old in parsed.origins if old[: len(path)] == path]:
        del parsed.origins[old]
    parsed.faults[:] = [fault for fault in parsed.faults if fault.path[: len(path)] != path]
    parsed.faults += [Fault((*path, *fault.path), fault.text) for fault in new.faults]
    parsed.origins[path] = Origin(label, value.strip())
    parsed.origins |= {(*path, *inner): origin for inner, origin in new.origins.items()}


def _open_sections(tree: dict[str, Any], schema: Mapping[str, Any]) -> None:
    """A section header with nothing below it, or a required section that is missing, is an empty section."""
    for name, inner in schema.get("properties", {}).items():
        if "$ref" in inner:
            if name in schema.get("required", ()):
                tree.setdefault(name, {})
            if name in tree and tree[name] is None:
                tree[name] = {}
            if isinstance(tree.get(name), dict):
                _open_sections(tree[name], resolve(inner))


def _remove(tree: Any, path: KeyPath) -> None:
    """Takes out the setting that a path leads into; a list item takes its list along."""
    for part in path[:-1]:
        below = tree.get(part)
        if not isinstance(below, dict):
            tree.pop(part, None)
            return
        tree = below
    tree.pop(path[-1], None)


def _with_defaults(given: Tree, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings that were given, and the defaults of all others that have one."""
    values = {}
    for name, inner in (schema or full_schema())["properties"].items():
        if "$ref" in inner:
            values[name] = _with_defaults(given.get(name) or {}, resolve(inner))
        elif name in given:
            values[name] = given[name]
        elif "default" in inner:
            values[name] = inner["default"]
    return values


def _report(name: str, faults: Sequence[Fault], origins: Mapping[KeyPath, Origin]) -> str:
    """One line per fault, in the order of the file."""

    def origin(path: KeyPath) -> str:
        return next((origins[path[:n]].label for n in range(len(path), 0, -1) if path[:n] in origins), "")

    def order(fault: Fault) -> tuple[bool, int]:
        label = origin(fault.path)
        return not label.startswith("line"), int(label.split()[1]) if label.startswith("line") else 0

    lines = []
    for fault in sorted(faults, key=order):
        label = origin(fault.path)
        if label.startswith("--set"):
            place = label if label == f"--set {dotted(fault.path)}" else f"{label}: {dotted(fault.path)}"
        else:
            place = ", ".join(filter(None, [name, label])) + f": {dotted(fault.path)}"
        lines.append(f"{place}: {fault.text}")
    return "\n".join(lines)
