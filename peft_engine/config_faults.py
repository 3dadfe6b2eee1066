"""A fault of the settings, and how settings are named and looked up."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """One mistake at one setting; the path leads from the root of the file."""

    path: KeyPath
    text: str


def dotted(path: KeyPath) -> str:
    """`("adapter", "targets", 0)` as `adapter.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def lookup(tree: Tree, name: str) -> Any:
    """The value at a dotted name; None where it or a section above it is missing."""
    node: Any = tree
    for part in name.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None
        node = node[part]
    return node
