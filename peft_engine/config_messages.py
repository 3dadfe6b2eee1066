"""What a fault in a configuration says: what was got, what was expected, what to do; in plain words."""

import difflib
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from peft_engine.config import Config
from peft_engine.config_faults import Fault, KeyPath, dotted
from peft_engine.config_names import ADVICE, EXPECTED, KEYS, NOT_YET, VALUES
from peft_engine.config_yaml import Origin, show

Schema = dict[str, Any]
MEMBER = re.compile(r"(literal|dict|list)\[|((constrained-)?(str|int|float|bool)|[A-Z]\w*Config)$")
"""pydantic's names of union members."""


@functools.cache
def full_schema() -> Schema:
    """pydantic's JSON schema of `Config`."""
    return Config.model_json_schema()


def resolve(schema: Schema) -> Schema:
    """Follows a `$ref`; for a section that may be null, gives the section."""
    if "$ref" in schema:
        section: Schema = full_schema()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        return section
    for option in schema.get("anyOf", ()):
        if "$ref" in option:
            return resolve(option)
    return schema


def nests(schema: Schema) -> bool:
    """Whether there can be keys below: a section, a mapping, or anything at all."""
    inner = resolve(schema)
    return not inner or "properties" in inner or "additionalProperties" in inner


def child(schema: Schema, part: str | int) -> Any:
    """The schema one step down; None where there is no such place."""
    for choice in schema.get("anyOf", [schema]):
        option = resolve(choice)
        if isinstance(part, int):
            if "prefixItems" in option or "items" in option:
                items = option.get("prefixItems", [])
                return items[part] if part < len(items) else option.get("items")
        elif part in option.get("properties", {}):
            return option["properties"][part]
        elif isinstance(option.get("additionalProperties"), dict):
            names = option.get("propertyNames", {}).get("enum")
            return option["additionalProperties"] if names is None or part in names else None
        elif option.get("additionalProperties") is True:
            return {}
    return None


def at(path: KeyPath) -> Schema | None:
    """The schema at a path from the root."""
    schema: Schema | None = full_schema()
    for part in path:
        schema = child(schema, part) if schema is not None else None
    return schema


def leaves(schema: Schema | None = None, above: KeyPath = ()) -> Iterator[KeyPath]:
    """Paths of all sections and settings, in the order of their declaration."""
    for name, inner in resolve(schema or full_schema()).get("properties", {}).items():
        yield (*above, name)
        yield from leaves(resolve(inner), (*above, name)) if "properties" in resolve(inner) else ()


def expected(schema: Schema, many: bool = False) -> str:
    """What a setting takes, in words."""
    if "$ref" in schema or "properties" in schema:
        return "a section: its settings indented below it"
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "const" in schema:
        return show(schema["const"])
    if "anyOf" in schema:
        return " or ".join(expected(option, many) for option in schema["anyOf"])
    kind = schema.get("type")
    if kind in ("integer", "number"):
        noun = (
            ("whole numbers" if many else "a whole number") if kind == "integer" else "numbers" if many else "a number"
        )
        low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
        high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
        bounds = [f"of at least {low:g}"] if low is not None else [f"above {above:g}"] if above is not None else []
        bounds += (
            [f"at most {high:g}"] if high is not None else [f"below {_number(below)}"] if below is not None else []
        )
        return " ".join([noun, " and ".join(bounds)]).strip()
    if kind == "array":
        fixed = schema.get("prefixItems")
        if fixed:
            return f"a list of {len(fixed)} {expected(fixed[0], many=True)}"
        return f"a list of {expected(schema['items'], many=True)}"
    if kind == "object":
        values = schema.get("additionalProperties")
        return f"a mapping of names to {expected(values, many=True)}" if isinstance(values, dict) else "a mapping"
    words = {"boolean": "true or false", "null": "null", "string": "texts" if many else "text"}
    return words.get(str(kind), "a value")


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value >= 1e6 else f"{value:g}"


def got(value: Any, origin: Origin | None) -> str:
    """A value as it was written, and what it is."""
    if value is None:
        return "got nothing (null)"
    if isinstance(value, Mapping):
        return f"got {show(value)} (a mapping)"
    kind = "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a number"
    kind = "a switch" if isinstance(value, bool) else kind
    written = origin.written if origin and origin.written and not isinstance(value, str) else show(value)
    return f"got {written} ({kind})"


def wrong_value(path: KeyPath, value: Any, origin: Origin | None) -> str:
    """The text for a value of the wrong type or out of bounds."""
    schema, name = at(path) or {}, dotted(path)
    asked = EXPECTED.get(re.sub(r"\[\d+\]", "[]", name)) or expected(schema)
    word = (show(value) if not isinstance(value, str) else value).lower()
    if word in NOT_YET.get(name, "").split():
        return f"{got(value, origin)}, which is not in this version; this version has {asked.removeprefix('one of ')}"
    hint = _hint(path, value, origin, schema, word)
    return f"{got(value, origin)}, expected {asked}" + (f"; {hint}" if hint else "")


def _hint(path: KeyPath, value: Any, origin: Origin | None, schema: Schema, word: str) -> str:
    name, options = dotted(path), schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    if word in VALUES.get(name, {}):
        return f"write {VALUES[name][word]}"
    if isinstance(value, str):
        if re.fullmatch(r"none|nil|nan|null|", word) and "null" in kinds:
            return "write null"
        if "boolean" in kinds and word in ("yes", "on", "no", "off", "true", "false"):
            return f"write {'true' if word in ('yes', 'on', 'true') else 'false'}, without quotes"
        if kinds & {"integer", "number"} and re.fullmatch(r"[-+]?[\d_,.]*\d[\d_,.]*(e[-+]?\d+)?", word):
            plain = word.replace("_", "").replace(",", "")
            return f"write the plain number, without quotes: {plain}"
        choices = [str(choice) for option in options for choice in option.get("enum", ())]
        near = difflib.get_close_matches(word, choices, n=1)
        if near:
            return f"nearest: {near[0]}"
        if "array" in kinds and "string" not in kinds:
            return f"write it as a list: [{value}]"
        return ""
    free_text = any(option.get("type") == "string" and not option.keys() & {"const", "enum"} for option in options)
    if isinstance(value, bool | int | float) and free_text and path:
        written = origin.written if origin and origin.written else show(value)
        return f'quote it: {"- " if isinstance(path[-1], int) else f"{path[-1]}: "}"{written}"'
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be finite"
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kinds == {"boolean"} and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    return ""


def unknown_key(path: KeyPath) -> str:
    """The text for a key that does not exist: where it belongs, or what comes nearest."""
    key, section = str(path[-1]), path[:-1]
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").replace(" ", "_")
    schema = resolve(at(section) or {})
    siblings = list(schema.get("properties", {})) or schema.get("propertyNames", {}).get("enum", [])
    if plain in ADVICE:
        return f"unknown key; {ADVICE[plain]}"
    if plain in siblings:
        return f"unknown key; nearest: {plain}"
    alias = KEYS.get(dotted((*section, plain)), KEYS.get(plain))
    if alias:
        return f"unknown key; {_nearest([alias], section)}"
    near = difflib.get_close_matches(plain, siblings, n=1, cutoff=0.75)
    if near:
        return f"unknown key; nearest: {near[0]}"
    names = [dotted(path) for path in leaves()]
    elsewhere = [name for name in names if name.rsplit(".", 1)[-1] == plain]
    if not elsewhere:
        near = difflib.get_close_matches(plain, siblings, n=1)
        if near:
            return f"unknown key; nearest: {near[0]}"
        last = {name.rsplit(".", 1)[-1]: name for name in names}
        elsewhere = [last[found] for found in difflib.get_close_matches(plain, last, n=1, cutoff=0.75)]
    if elsewhere:
        return f"unknown key; {_nearest(elsewhere, section)}"
    return f"unknown key; {dotted(section) or 'the file'} has {', '.join(siblings)}"


def _nearest(names: list[str], section: KeyPath) -> str:
    """Dotted names as seen from a section: short for a sibling, and said to be elsewhere where they are."""
    above = dotted(section)
    if names[0].rpartition(".")[0] == above:
        return f"nearest: {names[0].rpartition('.')[2]}"
    inside = above and names[0].startswith(f"{above}.")
    return f"nearest: {' or '.join(names)}" + ("" if inside else " (in another section)")


def missing(path: KeyPath) -> str:
    """The text for a required setting that is not there."""
    schema = at(path) or {}
    about = " ".join(schema.get("description", "").split())
    asked = expected(schema)
    return f"required, but not given; expected {asked}" + (f". {about}" if about else "")


def faults_of(error: ValidationError, tree: Any, origins: Mapping[KeyPath, Origin]) -> list[Fault]:
    """pydantic's findings as faults of ours, one for each setting."""
    texts: dict[KeyPath, str] = {}
    for found in error.errors(include_url=False, include_context=False):
        path, key_wrong = _own_path(found["loc"])
        if found["type"] == "missing" and not (path and isinstance(path[-1], int)):
            texts[path] = missing(path)
        elif found["type"] == "extra_forbidden" or key_wrong or at(path) is None:
            texts[path] = unknown_key(path)
        elif path:
            path = path[:-1] if found["type"] == "missing" else path
            value: Any = tree
            for part in path:
                value = value[part]
            texts[path] = wrong_value(path, value, origins.get(path))
    deepest = [path for path in texts if not any(other[: len(path)] == path != other for other in texts)]
    return [Fault(path, texts[path]) for path in deepest]


def _own_path(loc: tuple[str | int, ...]) -> tuple[KeyPath, bool]:
    """pydantic's location without its names of union members; whether the key itself is the fault."""
    path: list[str | int] = []
    schema: Schema | None = full_schema()
    named = False  # the union's member was just named
    for part in loc:
        if part == "[key]":
            return tuple(path), True
        if isinstance(part, str) and MEMBER.match(part) and not named and schema and "anyOf" in schema:
            named = True
            continue
        named = False
        below = child(schema, part) if schema is not None else None
        union = schema is not None and "anyOf" in resolve(schema)
        if below is None and union and isinstance(part, str):
            continue
        path.append(part)
        schema = below
    return tuple(path), False
