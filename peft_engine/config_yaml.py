"""YAML for settings: strict, and every value remembers the line it came from.

Unlike YAML 1.1, `1e-4` is a number, only true and false are switches (`no` is text), and a key given twice is a fault.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from peft_engine.config_faults import Fault, KeyPath
from peft_engine.errors import ConfigError

MAX_NODES = 100_000
"""More values than this are no configuration (aliases that multiply themselves)."""

INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
NULL = re.compile(r"~|null|Null|NULL|")
TAG = "tag:yaml.org,2002:"
SYNTAX_HELP = {
    "\\t": "YAML is indented with spaces, not tabs.",
    "mapping values are not allowed": "Check the indentation; a value that holds a colon and a space needs quotes.",
    "could not find expected ':'": "A setting is written `key: value`.",
    "undefined alias": "A value that begins with * needs quotes.",
    "expected a single document": "Write one configuration per file, without --- in between.",
}


@dataclass(frozen=True)
class Origin:
    """Where a value stands (`line 7`, or `--set a.b`) and how it was written there."""

    label: str
    written: str | None = None


@dataclass
class Parsed:
    """A tree of plain values, where each came from, and the faults found on the way."""

    tree: Any
    origins: dict[KeyPath, Origin]
    faults: list[Fault]


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern in (("null", NULL), ("bool", BOOL), ("int", INT), ("float", FLOAT)):
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(TAG + _tag, _whole, None)
    _Dumper.add_implicit_resolver(TAG + _tag, _whole, None)


def parse(text: str, name: str, label: str | None = None) -> Parsed:
    """Reads one YAML document.

    Args:
        name: of the file (or the option) in messages.
        label: origin of every value; None takes the line numbers.

    Raises:
        ConfigError: not YAML, with line and column.
    """
    parsed = Parsed(None, {}, [])
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            parsed.tree = _build(node, (), parsed, label, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark and label is None else ""
        fix = next((advice for sign, advice in SYNTAX_HELP.items() if sign in problem), "Correct it there.")
        raise ConfigError(f"{name}{place}: not valid YAML: {problem}.", fix) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        problem = (
            f"{name}, line {line}, column {column}: not valid YAML: the character U+{ord(text[error.position]):04X}"
        )
        raise ConfigError(f"{problem} is not allowed.", "Remove it.") from None
    except RecursionError:
        raise ConfigError(f"{name}: not a configuration: nested too deep.", "Correct it.") from None
    return parsed


def _build(node: yaml.Node, path: KeyPath, into: Parsed, label: str | None, above: tuple[yaml.Node, ...]) -> Any:
    """The plain value of a node; notes its origin and its faults in `into`."""
    if node in above or len(into.origins) > MAX_NODES:
        raise yaml.MarkedYAMLError(None, None, "an alias (*) that holds itself or multiplies", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if node.tag not in (f"{TAG}map", f"{TAG}seq"):
        raise yaml.MarkedYAMLError(None, None, f"the tag {node.tag} has no meaning here", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, item in enumerate(node.value):
            into.origins[(*path, i)] = _origin(label, item, item)
            items.append(_build(item, (*path, i), into, label, (*above, node)))
        return items
    built: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        where = _origin(label, key_node, value_node)
        if not isinstance(key, str):
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
            child = (*path, str(shown))
            into.origins[child] = where
            into.faults.append(Fault(child, 'a key must be text; put it in quotes: "..."'))
            continue
        child = (*path, key)
        if key in built:
            into.faults.append(Fault(child, f"given twice, first on {into.origins[child].label}; keep one"))
        into.origins[child] = where
        built[key] = _build(value_node, child, into, label, (*above, node))
    return built


def _origin(label: str | None, at: yaml.Node, value: yaml.Node) -> Origin:
    written = value.value if isinstance(value, yaml.ScalarNode) else None
    return Origin(label or f"line {at.start_mark.line + 1}", written)


def _scalar(node: yaml.ScalarNode) -> Any:
    text, kind = node.value, node.tag.removeprefix(TAG)
    if kind == "str":
        return text
    if kind == "null" and NULL.fullmatch(text):
        return None
    if kind == "bool" and BOOL.fullmatch(text):
        return text.lower() == "true"
    if kind == "int" and INT.fullmatch(text) and len(text) < 1000:
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    if kind == "float" and (FLOAT.fullmatch(text) or INT.fullmatch(text)):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    raise yaml.MarkedYAMLError(None, None, f"can't read {text[:40]!r} as {node.tag}", node.start_mark)


def from_python(source: Any) -> Parsed:
    """The same for a dict given in Python: tuples become lists, paths text."""
    parsed = Parsed(None, {}, [])
    parsed.tree = _plain(source, (), parsed)
    return parsed


def _plain(value: Any, path: KeyPath, into: Parsed) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                into.faults.append(Fault((*path, str(key)), f"a key must be text, got {key!r}"))
        return {key: _plain(item, (*path, key), into) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, i), into) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is not None and not isinstance(value, bool | int | float | str):
        kind = type(value).__name__
        into.faults.append(Fault(path, f"got a {kind}, expected text, a number, true, false, null, a list or a dict"))
        return None
    return value


def dump(tree: Any) -> str:
    """Plain values as YAML that `parse` reads back to the same values."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def show(value: Any, limit: int = 60) -> str:
    """A value on one line as YAML writes it, cut at `limit` characters."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False)
    text = " ".join(text.removesuffix("\n").removesuffix("\n...").split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
