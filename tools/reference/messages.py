"""Finds every error message in the source: calls of the classes of `megatron/errors.py`, cross rules and problems of a YAML.

A message is a template: what stands in braces is filled in when the error is raised, under the name that the code has for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron import errors
from tools.reference.templates import alternatives, has_words

ROOT = Path(__file__).resolve().parents[2]
CLASSES: Mapping[str, type[errors.UserError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, errors.UserError)
}
# Parts of a message that are passed by position, for each callable that makes one.
_POSITIONS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(CLASSES, ("what",)),
    "LostRank": ("what",),
    "Violation": ("keys", "what", "hint"),
    "problems.add": ("what", "where", "hint"),
    "BatchError": ("what",),
    "PatternError": ("what",),
}
_CLASS_OF = {
    "Violation": "ConfigError",
    "problems.add": "ConfigError",
    "BatchError": "ConfigError",
    "PatternError": "ConfigError",
}
_CLASS_OF["LostRank"] = "TrainingError"
_NAMES = {"message": "what", "place": "where"}


@dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        cls: name of the class in `megatron/errors.py`.
        file: path of the source from the root.
        what: alternatives of the first line.
        why: alternatives of the cause.
        hint: alternatives of what to try.
    """

    cls: str
    file: str
    what: tuple[str, ...]
    why: tuple[str, ...]
    hint: tuple[str, ...]


def sources() -> list[Path]:
    """Every file whose code can raise a message."""
    folders = ("megatron", "linear_neox", "tools")
    other = {"layer_templates", "bench", "reference"}  # code of a template, measurements, and the writers of these pages
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if not other & set(path.parts)]
    return [*files, *sorted(ROOT.glob("*.py"))]


def messages() -> list[Message]:
    """All messages, by file, in the order of the source."""
    return [message for path in sources() for message in _of_file(path)]


def _of_file(path: Path) -> Iterator[Message]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for scope, calls, assignments in _scopes(tree):
        outer = [] if isinstance(scope, ast.Module) else list(_assignments(tree, ()))
        for node, blocks in calls:
            values = partial(_values, node, blocks, assignments, outer)
            texts = {
                name: alternatives(value, values) for name, value in _parts(node).items() if name in ("what", "why", "hint")
            }
            what, why, hint = (tuple(filter(has_words, texts.get(name, ()))) for name in ("what", "why", "hint"))
            if what:
                name = _callee(node)
                yield Message(_CLASS_OF.get(name, name), path.relative_to(ROOT).as_posix(), what, why, hint)


def _callee(node: ast.Call) -> str:
    """The name that `_POSITIONS` has for what is called, or an empty one."""
    if isinstance(node.func, ast.Name):
        return node.func.id
    if isinstance(node.func, ast.Attribute):
        owner = getattr(node.func.value, "id", getattr(node.func.value, "attr", ""))
        return f"{owner}.{node.func.attr}" if node.func.attr == "add" else node.func.attr
    return ""


def _parts(node: ast.Call) -> dict[str, ast.expr]:
    """The expressions of a call by `what`, `why`, `hint`."""
    named = dict(zip(_POSITIONS[_callee(node)], (a for a in node.args if not isinstance(a, ast.Starred)), strict=False))
    return named | {_NAMES.get(k.arg, k.arg): k.value for k in node.keywords if k.arg}


Blocks = tuple[int, ...]
Assignment = tuple[str, ast.expr, Blocks]


def _scopes(tree: ast.Module) -> Iterator[tuple[ast.AST, list[tuple[ast.Call, Blocks]], list[Assignment]]]:
    """Every function, and the module itself: its messages in the order of the source, and its assignments."""
    for scope in ast.walk(tree):
        if isinstance(scope, ast.Module | ast.FunctionDef):
            calls = [(n, blocks) for n, blocks in _nodes(scope, ()) if isinstance(n, ast.Call) and _callee(n) in _POSITIONS]
            if calls:
                yield scope, sorted(calls, key=lambda call: (call[0].lineno, call[0].col_offset)), list(_assignments(scope, ()))


def _nodes(node: ast.AST, blocks: Blocks) -> Iterator[tuple[ast.AST, Blocks]]:
    """Every node inside a scope with the blocks of statements around it; functions in it are scopes of their own."""
    for name, value in ast.iter_fields(node):
        inside = (*blocks, id(value)) if name in ("body", "orelse", "finalbody", "handlers") else blocks
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child, inside
                if not isinstance(child, ast.FunctionDef):
                    yield from _nodes(child, inside)


def _assignments(scope: ast.AST, blocks: Blocks) -> Iterator[Assignment]:
    """(name, value, blocks) of every assignment in a scope."""
    for node, inside in _nodes(scope, blocks):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs += zip(target.elts, node.value.elts, strict=False)
                else:
                    pairs.append((target, node.value))
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            pairs.append((node.target, node.value))
        yield from ((target.id, value, inside) for target, value in pairs if isinstance(target, ast.Name))


def _values(
    call: ast.Call, blocks: Blocks, assignments: Sequence[Assignment], outer: Sequence[Assignment], name: str
) -> list[ast.expr]:
    """The expressions that `name` can stand for in `call`: back to the last assignment that is in a block around the call."""
    values = []
    for target, value, inside in reversed(assignments):
        if target != name or value.lineno > call.lineno:
            continue
        values.append(value)
        if set(inside) <= set(blocks):
            return values[::-1]
    return values[::-1] or [value for target, value, _ in outer if target == name]
