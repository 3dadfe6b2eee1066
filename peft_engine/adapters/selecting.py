"""Which of a method's tensors train: `training.trainable` and `training.frozen`, by regular expressions on their names.

What is taken out keeps its start, and is saved and loaded with the others (traps 14, 15).
"""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from torch import nn

from ..config import TrainingConfig
from ..errors import ConfigError
from .group import Group, Member


def select_trainable(group: Group, settings: TrainingConfig) -> None:
    """Move every member's tensors that must not train from `tensors` to `kept`, and freeze them, in place.

    Raises:
        ConfigError: a pattern finds no tensor (trap 21), nothing is left to train, or what is left could never move.
    """
    if settings.trainable is None and not settings.frozen:
        return
    for member in group.members:
        names = list(member.tensors)
        _refuse_idle("trainable", settings.trainable or (), names)
        _refuse_idle("frozen", settings.frozen, names)
        chosen = {
            name
            for name in names
            if (settings.trainable is None or _found(settings.trainable, name)) and not _found(settings.frozen, name)
        }
        if not chosen:
            raise ConfigError(
                f"training.trainable and training.frozen leave none of the {len(names)} tensors of "
                f"{group.method} to train.",
                f"Their names are of the kind {names[0]}.",
            )
        member.kept = {name: tensor for name, tensor in member.tensors.items() if name not in chosen}
        member.tensors = {name: tensor for name, tensor in member.tensors.items() if name in chosen}
        for tensor in member.kept.values():
            tensor.requires_grad_(False)
        _refuse_stuck(member)
        if group.started_from is None:
            _refuse_random(member, group.backbone.new_modules)


def _found(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_idle(setting: str, patterns: Sequence[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"training.{setting}: {pattern!r} finds none of the {len(names)} tensors that the method trains.",
                f"Nearest: {', '.join(_nearest(pattern, names))}.",
            )


def _nearest(pattern: str, names: list[str]) -> list[str]:
    """Names, or parts of them, that look like a pattern; else the first names."""
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$")
    parts = sorted({part for name in names for part in (name, *name.split(".")) if not part.isdigit()})
    return get_close_matches(plain, parts, n=3, cutoff=0.5) or names[:3]


def _refuse_stuck(member: Member) -> None:
    """LoRA's A has no gradient while its B is zero, and stays where it is when B does not train."""
    stuck = [
        name for name in member.tensors if ".lora_A." in name and _is_zero(member.kept.get(name.replace("_A.", "_B.")))
    ]
    if stuck:
        raise ConfigError(
            f"training.trainable, training.frozen: {stuck[0]} would train while its B stands still at zero, which "
            f"gives it no gradient ({len(stuck)} such).",
            "Train B as well, or start from an adapter that has learned (adapter.start_from).",
        )


def _refuse_random(member: Member, new_modules: Sequence[str]) -> None:
    """A task's new head begins with random weights, and would end with them."""
    for module in new_modules:
        for name, tensor in member.kept.items():
            if f".{module}." in f".{name}" and not _is_zero(tensor):
                raise ConfigError(
                    f"training.trainable, training.frozen: {name} would not train, and is new: it would stay random.",
                    "Let it train, or start from an adapter that has learned it (adapter.start_from).",
                )


def _is_zero(tensor: nn.Parameter | None) -> bool:
    return tensor is not None and not bool(tensor.detach().any())
