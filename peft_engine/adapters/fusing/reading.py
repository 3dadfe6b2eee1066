"""What a module's forward does, read from its source: which children get the same input, what becomes of the logits."""

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

from .state import once_each


@once_each
def forward_tree(cls: type[nn.Module]) -> ast.FunctionDef | None:
    """The syntax tree of `cls.forward`, decorators looked through; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    found = tree.body[0]
    return found if isinstance(found, ast.FunctionDef) else None


def _calls_and_stores(block: list[ast.stmt]) -> list[tuple[tuple[int, int], str, str]]:
    """(position, child, name) for `self.child(name)`, (position, "", name) for a new value of a name."""
    events = []
    for node in (n for statement in block for n in ast.walk(statement)):
        if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            child, read = attribute_of_self(node.func), node.args[0]
            if child and isinstance(read, ast.Name):
                events.append(((node.lineno, node.col_offset), child, read.id))
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            # a value is stored after the right-hand side was computed
            events.append(((node.end_lineno or node.lineno, 10_000), "", node.id))
    return sorted(events)


@once_each
def shared_inputs(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Names of children that `cls.forward` calls with one and the same variable, in order of the calls.

    Only calls in the same block count (the branches of an `if` exclude each other), and only until the variable gets a
    new value: `self.q_proj(x)`, `self.k_proj(x)`, `self.v_proj(x)` give one group.
    """
    tree = forward_tree(cls)
    if tree is None:
        return ()
    groups: list[tuple[str, ...]] = []
    for block in _blocks(tree):
        open_groups: dict[str, list[str]] = {}
        closed: list[list[str]] = []
        for _, child, name in _calls_and_stores(block):
            if child:
                open_groups.setdefault(name, []).append(child)
            elif name in open_groups:
                closed.append(open_groups.pop(name))
        groups += [tuple(dict.fromkeys(g)) for g in [*closed, *open_groups.values()] if len(set(g)) > 1]
    return tuple(groups)


@once_each
def weights_read(cls: type[nn.Module]) -> frozenset[str]:
    """Names of children whose weight `cls.forward` reads itself: T5 looks at a dtype, others multiply by themselves."""
    tree = forward_tree(cls)
    nodes = [] if tree is None else [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    paths = [attribute_of_self(node) or "" for node in nodes]
    return frozenset(path.removesuffix(".weight") for path in paths if path.endswith(".weight"))


def _blocks(tree: ast.FunctionDef) -> list[list[ast.stmt]]:
    """Runs of simple statements that are executed one after the other."""
    runs: list[list[ast.stmt]] = []
    bodies: list[list[ast.stmt]] = [tree.body]
    while bodies:
        run: list[ast.stmt] = []
        for statement in bodies.pop():
            inner = [getattr(statement, part, None) for part in ("body", "orelse", "finalbody")]
            inner = [body for body in inner if body]
            if inner:
                runs.append(run)
                run = []
                bodies += inner  # type: ignore[arg-type]
            else:
                run.append(statement)
        runs.append(run)
    return [run for run in runs if run]


def attribute_of_self(node: ast.expr) -> str | None:
    """ "child" for `self.child`, "config.scale" for `self.config.scale`, None for anything else."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.insert(0, node.attr)
        node = node.value
    return ".".join(path) if path and isinstance(node, ast.Name) and node.id == "self" else None


def value_of(module: nn.Module, path: str) -> Any:
    """`module.a.b` for the path "a.b"."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
