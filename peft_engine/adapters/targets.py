"""Which modules an adapter goes on. A name that matches nothing is an error (trap 21)."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from ..backbone import Backbone, linear_names
from ..config import AdapterConfig, LayersConfig
from ..errors import ConfigError
from ..quantised import quantised_linears

TAKES_GROUPS = ("ia3", "loha", "lokr")
"""Methods that peft has for grouped convolutions of any width. For lora the rank must be a multiple of the groups, and
it could not be merged."""


def find_targets(backbone: Backbone, settings: AdapterConfig, norms: bool = False) -> list[str]:
    """Full names of the modules to adapt, in model order.

    `all-linear` is every Linear and Conv1D outside the head; in a model that has none, every convolution, but for
    grouped ones (depthwise ones are) where the method is not in `TAKES_GROUPS`.

    Args:
        norms: let `all-linear` stand for the norms.

    Raises:
        ConfigError: a target, a layer or a pattern matches nothing.
    """
    names = [name for name, _ in backbone.model.named_modules() if name]
    every = norm_names(backbone.model) if norms else linear_names(backbone.model)
    linear = [name for name in every if not _inside(name, backbone.head_modules)]
    left_out = 0
    if not linear and not norms:
        convolutions = {
            name: module for name, module in backbone.model.named_modules() if isinstance(module, nn.Conv2d)
        }
        outside = [name for name in convolutions if not _inside(name, backbone.head_modules)]
        linear = [n for n in outside if settings.method in TAKES_GROUPS or convolutions[n].groups == 1]
        left_out = len(outside) - len(linear)
    if settings.targets == "all-linear":
        found = linear
        if not found:
            raise ConfigError(
                f"adapter.targets: all-linear finds no {'norm' if norms else 'Linear, Conv1D or Conv2d'} outside the "
                f"head of {type(backbone.model).__name__}.",
                "Name modules that it has, or use adapter.method: full.",
            )
        if isinstance(backbone.model.get_submodule(found[0]), nn.Conv2d):
            told = f"all-linear found none, so {len(found)} convolutions are adapted"
            grouped = f"; {left_out} grouped ones, which {settings.method} can't take, are left out"
            backbone.decisions["adapter.targets"] = told + (grouped if left_out else "")
    elif isinstance(settings.targets, str):
        found = _by_expression(settings.targets, names, linear)
    else:
        found = _by_endings(settings.targets, names, linear)
    if settings.layers is not None:
        found = in_layers(found, settings.layers)
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
        ConfigError: a name matches no module, or one that is quantised.
    """
    names = [name for name, _ in backbone.model.named_modules() if name]
    rounded = quantised_linears(backbone.model)
    for ending in asked:
        if not any(_ends_with(name, ending) for name in names):
            raise _nothing("adapter.modules_to_save", ending, names)
        inside = [n for n in rounded if _inside(n, [name for name in names if _ends_with(name, ending)])]
        if inside:
            raise ConfigError(
                f"adapter.modules_to_save: {ending} holds {inside[0]}, which is quantised and can't be trained.",
                f"Add it to model.quantization_skip: [{ending}]",
            )
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


def in_layers(found: list[str], asked: list[int] | LayersConfig) -> list[str]:
    """Those of `found` in the layers asked for: by index from 0, or so many at one end of the stack.

    Raises:
        ConfigError: a layer holds no target.
    """
    there = sorted({n for n in map(_layer, found) if n is not None})
    if isinstance(asked, LayersConfig):
        count = asked.first or asked.last or 0
        if count > len(there):
            raise ConfigError(
                f"adapter.layers: {'first' if asked.first else 'last'}: {count}, but targets are in {len(there)} "
                "layers only.",
                "Correct adapter.layers.",
            )
        layers = there[:count] if asked.first else there[-count:]
    else:
        layers = asked
    for layer in layers:
        if layer not in there:
            raise ConfigError(
                f"adapter.layers: no target is in layer {layer}; layers are 0 to {max(there, default=-1)}.",
                "Correct adapter.layers.",
            )
    return [name for name in found if _layer(name) in layers]


def norm_names(model: nn.Module) -> list[str]:
    """Full names of norms: parts without parts, whose parameters are a one-dimensional weight and perhaps a bias."""
    return [
        name
        for name, module in model.named_modules()
        if not any(module.children())
        and (own := dict(module.named_parameters(recurse=False)))
        and own.keys() <= {"weight", "bias"}
        and "weight" in own
        and own["weight"].dim() == 1
    ]


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
