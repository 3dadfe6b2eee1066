"""Which modules an adapter goes on. A name that matches nothing is an error (trap 21)."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from ..backbone import Backbone, linear_names
from ..config import AdapterConfig
from ..errors import ConfigError


def find_targets(backbone: Backbone, settings: AdapterConfig) -> list[str]:
    """Full names of the modules to adapt, in model order.

    Raises:
        ConfigError: a target, a layer or a pattern matches nothing.
    """
    names = [name for name, _ in backbone.model.named_modules() if name]
    linear = [name for name in linear_names(backbone.model) if not _inside(name, backbone.head_modules)]
    if settings.targets == "all-linear":
        found = linear
    elif isinstance(settings.targets, str):
        found = _by_expression(settings.targets, names, linear)
    else:
        found = _by_endings(settings.targets, names, linear)
    if settings.layers is not None:
        found = _in_layers(found, settings.layers)
    for field, pattern in _patterns(settings):
        if not any(matches_pattern(pattern, name) for name in found):
            raise ConfigError(
                f"adapter.{field}: {pattern!r} matches none of the {len(found)} adapted modules.",
                f"Adapted are modules that end in: {', '.join(sorted(_endings(found)))}.",
            )
    return found


def shorten(targets: list[str], backbone: Backbone) -> list[str]:
    """The last name components, where they select exactly `targets`; else the full names."""
    short = sorted(_endings(targets))
    selected = {name for name, _ in backbone.model.named_modules() if name.rpartition(".")[2] in short}
    return short if selected == set(targets) else targets


def find_modules_to_save(backbone: Backbone, asked: Iterable[str]) -> list[str]:
    """Names of modules to train in full: those asked for, and the task's new head.

    Raises:
        ConfigError: a name matches no module.
    """
    names = [name for name, _ in backbone.model.named_modules() if name]
    for ending in asked:
        if not any(_ends_with(name, ending) for name in names):
            raise _nothing("adapter.modules_to_save", ending, names)
    return sorted({*asked, *backbone.new_modules})


def matches_pattern(pattern: str, name: str) -> bool:
    """peft's rule for `rank_pattern` and `alpha_pattern`: the expression matches the whole name or its end at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _patterns(settings: AdapterConfig) -> list[tuple[str, str]]:
    return [("rank_pattern", p) for p in settings.rank_pattern] + [("alpha_pattern", p) for p in settings.alpha_pattern]


def _by_expression(expression: str, names: list[str], linear: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.fullmatch(expression, name)]
    except re.error as error:
        raise ConfigError(
            f"adapter.targets: {expression!r} is no regular expression ({error}).", "A list gives module-name endings."
        ) from error
    if not found:
        raise _nothing("adapter.targets", expression, linear)
    return found


def _by_endings(endings: list[str], names: list[str], linear: list[str]) -> list[str]:
    if not endings:
        raise ConfigError(
            "adapter.targets: got an empty list.", "Use all-linear, or name module endings such as q_proj."
        )
    for ending in endings:
        if not any(_ends_with(name, ending) for name in names):
            raise _nothing("adapter.targets", ending, linear)
    return [name for name in names if any(_ends_with(name, ending) for ending in endings)]


def _in_layers(found: list[str], layers: list[int]) -> list[str]:
    there = {_layer(name) for name in found} - {None}
    for layer in layers:
        if layer not in there:
            last = max((n for n in there if n is not None), default=-1)
            raise ConfigError(
                f"adapter.layers: no target is in layer {layer}; layers are 0 to {last}.", "Correct adapter.layers."
            )
    return [name for name in found if _layer(name) in layers]


def _layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _inside(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _endings(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def _nothing(field: str, wanted: str, names: list[str]) -> ConfigError:
    endings = sorted(_endings(names))
    near = get_close_matches(wanted.rpartition(".")[2], endings, n=3, cutoff=0.4)
    hint = f"Nearest: {', '.join(near)}." if near else ""
    return ConfigError(
        f"{field}: {wanted!r} matches no module of this model. {hint}".strip(),
        f"Modules that can be adapted end in: {', '.join(endings)}.",
    )
