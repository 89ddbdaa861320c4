"""Turns the expression of a message into a template: what stands in braces is filled in when the error is raised."""

from __future__ import annotations

import ast
from collections.abc import Callable

_LONGEST = 28  # characters of a placeholder
_DEEPEST = 3  # assignments that are followed from name to name
_MOST = 4  # alternatives of one part of a message
_METHODS: tuple[str, ...] = (
    "strip",
    "rstrip",
    "lstrip",
    "split",
    "splitlines",
    "partition",
    "removeprefix",
    "removesuffix",
    "lower",
    "upper",
)
_METHODS += ("replace", "format", "items", "keys", "values", "decode")
Values = Callable[[str], "list[ast.expr]"]
"""Name -> the expressions that it can stand for where the message is made."""


def alternatives(node: ast.expr, values: Values, depth: int = 0) -> tuple[str, ...]:
    """The templates that an expression can have; empty for None and empty texts."""
    if isinstance(node, ast.Constant):
        return (node.value,) if isinstance(node.value, str) and node.value else ()
    if isinstance(node, ast.JoinedStr):
        return ("".join(_piece(part) for part in node.values),)
    if isinstance(node, ast.IfExp):
        return tuple(dict.fromkeys(alternatives(node.body, values, depth) + alternatives(node.orelse, values, depth)))
    if isinstance(node, ast.BoolOp):
        return tuple(dict.fromkeys(text for part in node.values for text in alternatives(part, values, depth)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (alternatives(side, values, depth) or ("",) for side in (node.left, node.right))
        return tuple(a + b for a in left for b in right)[:_MOST]
    if isinstance(node, ast.Name) and depth < _DEEPEST:
        texts = [text for value in values(node.id) for text in alternatives(value, values, depth + 1)]
        return tuple(dict.fromkeys(filter(has_words, texts)))[:_MOST] or (_placeholder(node),)
    return (_placeholder(node),)


def _piece(part: ast.expr) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    return _placeholder(part.value) if isinstance(part, ast.FormattedValue) else ""


def _placeholder(node: ast.expr) -> str:
    """`{name}`: what the code calls a value that is filled in."""
    return "{" + _name_of(node)[:_LONGEST] + "}"


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Call):
        function = node.func
        inner = [a for a in node.args if not isinstance(a, ast.Constant)]
        if isinstance(function, ast.Attribute) and function.attr in ("get", "pop") and node.args:
            return _name_of(node.args[0])
        if isinstance(function, ast.Attribute) and function.attr != "join" and not inner:
            return _name_of(function.value) if function.attr in _METHODS else function.attr.strip("_")
        return _name_of(inner[0]) if inner else _name_of(function)
    if isinstance(node, ast.Subscript):
        return _name_of(node.value)
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        return _name_of(node.generators[0].iter)
    if isinstance(node, ast.IfExp):
        return _name_of(node.body)
    if isinstance(node, ast.BoolOp):
        return _name_of(node.values[0])
    if isinstance(node, ast.BinOp):
        return _name_of(node.left)
    return "..."


def has_words(text: str) -> bool:
    """A template with a word of its own outside braces."""
    outside, depth = "", 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        outside += letter if not depth and letter != "}" else ""
    return any(letter.isalpha() for letter in outside)
