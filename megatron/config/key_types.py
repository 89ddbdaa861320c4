"""Types as text (`Union[int, List[int]]`, `int | None`) -> Python annotations, and harmless conversions of values to them.

The table of NeoX's keys and the mixers' `Config` classes give types as text. They are read through the syntax tree; nothing is
evaluated. `fit` accepts what is harmless (10000.0 for a whole number, the letter case of a choice); pydantic's strict mode
refuses everything else.
"""

from __future__ import annotations

import ast
import functools
import types
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

_NAMES: dict[str, Any] = {
    "int": int, "float": float, "str": str, "bool": bool, "dict": dict[str, Any], "list": list[Any],
    "tuple": tuple[Any, ...], "Any": Any, "None": None,
}  # fmt: skip

_WORDS: dict[Any, str] = {
    tuple: "a list", list: "a list", dict: "a dictionary", int: "a whole number", float: "a number", str: "text",
    bool: "true or false",
}  # fmt: skip


@functools.cache
def parse_type(text: str) -> Any:
    """The annotation that `text` writes; an unknown construct counts as `Any`."""
    return _from_node(ast.parse(text, mode="eval").body)


def _from_node(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return None if node.value is None else Any
    if isinstance(node, ast.Name):
        return _NAMES.get(node.id, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_from_node(node.left), _from_node(node.right)]  # noqa: UP007 - built at run time
    if isinstance(node, ast.Subscript) and isinstance(node.value, (ast.Name, ast.Attribute)):
        head = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _subscript(head, inner)
    return Any


def _subscript(head: str, inner: list[ast.expr]) -> Any:
    if head == "Literal":
        return Literal[tuple(ast.literal_eval(item) for item in inner)]
    parts = [_from_node(item) for item in inner]
    if head == "Optional":
        return Optional[parts[0]]  # noqa: UP045 - built at run time
    if head == "Union":
        return Union[tuple(parts)]  # noqa: UP007 - built at run time
    if head.lower() == "list":
        return list[parts[0]]  # type: ignore[valid-type]
    return Any


def members(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union (None included), or the annotation alone; limits (`Annotated`) are taken off."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return tuple(get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)


def choices(annotation: Any) -> tuple[Any, ...]:
    """Every value of the `Literal`s in an annotation."""
    return tuple(v for m in members(annotation) if get_origin(m) is Literal for v in get_args(m))


def accepts(annotation: Any, kind: Any) -> bool:
    """Is `kind` (such as `str` or `float`) one of the alternatives?"""
    return any(m is kind or get_origin(m) is kind for m in members(annotation))


def fit(value: Any, annotation: Any) -> Any:
    """`value` after harmless conversions towards `annotation`."""
    if isinstance(value, str) and not accepts(annotation, str):
        for choice in choices(annotation):
            if isinstance(choice, str) and choice.lower() == value.lower():
                return choice
    if isinstance(value, float) and value.is_integer() and accepts(annotation, int) and not accepts(annotation, float):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and accepts(annotation, float):
        return value if accepts(annotation, int) else float(value)
    if isinstance(value, list) and accepts(annotation, tuple):
        return tuple(value)
    return value


def type_name(annotation: Any) -> str:
    """In words: `a whole number`, `a list`, `'a' or 'b'`."""
    parts: list[str] = []
    for member in members(annotation):
        origin, arguments = get_origin(member) or member, get_args(member)
        if origin is Literal:
            parts += map(repr, arguments)
        elif origin is tuple and len(arguments) == 2 and arguments[1] is not ...:
            parts.append("a list of two numbers")
        elif origin not in (None, type(None)):
            parts.append(_WORDS.get(origin, getattr(origin, "__name__", str(origin))))
    return " or ".join(dict.fromkeys(parts)) or "any"
