"""Splits one of our modules into top-level statements: their text with comments, the names they bind, the names they use.

`export/pack.py` selects the statements that the exported model needs and writes them verbatim into one file. Reading
uses the syntax tree and never imports, so the packed text is the tested text.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from megatron.errors import ExportError
from megatron.registry import outside_modules

ROOT = "megatron"


@dataclass(frozen=True)
class Statement:
    """One top-level statement.

    Attributes:
        module: its module.
        line: its first line.
        names: names it binds.
        uses: names it loads.
        text: its source, with the comments above it.
        lazy: modules that its body imports.
        gap: blank lines above it, at most two.
        decorators: names of called decorators (`@path(...)`), which may register the definition.
    """

    module: str
    line: int
    names: frozenset[str]
    uses: frozenset[str]
    text: str
    lazy: tuple[str, ...] = ()
    gap: int = 2
    decorators: tuple[str, ...] = ()


@dataclass
class ModuleSource:
    """A parsed module.

    Attributes:
        module: dotted name.
        doc: its docstring.
        statements: its statements, in order.
        outside: bound name -> (full dotted path, import statement), for imports from other packages.
        inside: bound name -> (one of our modules, name there), for imports from our modules.
    """

    module: str
    doc: str = ""
    statements: list[Statement] = field(default_factory=list)
    outside: dict[str, tuple[str, str]] = field(default_factory=dict)
    inside: dict[str, tuple[str, str]] = field(default_factory=dict)

    def binding(self, name: str) -> list[Statement]:
        """The statements that bind `name`, in order; more than one if a name is built in steps."""
        return [statement for statement in self.statements if name in statement.names]

    def registered(self) -> list[Statement]:
        """Definitions under one of our called decorators: looked up at run time by a key, not by name."""
        return [statement for statement in self.statements if any(name in self.inside for name in statement.decorators)]

    def effects(self) -> list[Statement]:
        """Statements that bind nothing: side effects at import."""
        return [statement for statement in self.statements if not statement.names]


def module_path(module: str) -> Path | None:
    """The file of one of our modules, without importing it or its parents; None if the module does not exist.

    The module of a user's mixer may be elsewhere (`registry.outside_modules`); it is already imported.
    """
    if module.split(".")[0] != ROOT:
        file = getattr(sys.modules.get(module), "__file__", None) or getattr(importlib.util.find_spec(module), "origin", None)
        return None if file is None else Path(file)
    root = importlib.util.find_spec(ROOT)
    assert root is not None and root.submodule_search_locations
    base = Path(next(iter(root.submodule_search_locations))).joinpath(*module.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def read_source(module: str) -> ModuleSource:
    """Parse the module `module` (dotted name); raises an ExportError if it does not exist."""
    path = module_path(module)
    if path is None and module in outside_modules():
        raise ExportError(
            f"a mixer of '{module}' cannot be packed",
            why="its class is not defined in a file",
            hint="put it into a .py file and import it",
        )
    if path is None:
        raise ExportError(f"no module '{module}' to pack", hint="the import that names it is wrong")
    return parse_source(module, path.read_text(encoding="utf-8"))


def parse_source(module: str, text: str) -> ModuleSource:
    """Parse the text of a module."""
    tree, lines = ast.parse(text, filename=module), text.splitlines()
    source = ModuleSource(module, ast.get_docstring(tree) or "")
    previous_end = 0
    for index, node in enumerate(tree.body):
        start, end = previous_end, node.end_lineno or node.lineno
        previous_end = end
        if index == 0 and source.doc:
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            _record_import(source, node)
        elif _is_guard(node):
            continue
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and source.statements:
            _extend_last(source, lines[start:end])  # the string that documents the constant above it
        elif not _binds_all(node):
            source.statements.append(_piece(module, node, lines[start:end]))
    return source


def _record_import(source: ModuleSource, node: ast.Import | ast.ImportFrom) -> None:
    if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            raise ExportError("a relative import cannot be packed", where=f"{source.module}:{node.lineno}")
        if origin == "__future__":
            return
        for alias in node.names:
            bound = alias.asname or alias.name
            if home := _home(origin, alias.name):
                source.inside[bound] = (home, alias.name)
            else:
                shown = alias.name if bound == alias.name else f"{alias.name} as {bound}"
                source.outside[bound] = (f"{origin}.{alias.name}", f"from {origin} import {shown}")
        return
    for alias in node.names:
        if alias.name.split(".")[0] == ROOT:
            raise ExportError(
                f"'import {alias.name}' cannot be packed", where=f"{source.module}:{node.lineno}", hint="use `from ... import`"
            )
        bound = alias.asname or alias.name.split(".")[0]
        shown = f" as {alias.asname}" if alias.asname else ""
        source.outside[bound] = (alias.name, f"import {alias.name}{shown}")


def _home(origin: str, name: str) -> str | None:
    """Our module that `from origin import name` refers to, None for other packages.

    A user's mixer may import the contract from the public package, which has a table of the defining modules.
    """
    if origin.split(".")[0] == ROOT or origin in outside_modules():
        return origin
    home: str | None = getattr(sys.modules.get(origin), "HOMES", {}).get(name)
    return home


def _is_guard(node: ast.stmt) -> bool:
    """Whether a statement is `if TYPE_CHECKING:` or `if __name__ == ...:`, which are not packed."""
    if not isinstance(node, ast.If):
        return False
    names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
    return bool(names & {"TYPE_CHECKING", "__name__"})


def _binds_all(node: ast.stmt) -> bool:
    return "__all__" in set(_bound_names(node))


def _extend_last(source: ModuleSource, lines: list[str]) -> None:
    last = source.statements.pop()
    text = last.text + "\n" + "\n".join(lines).rstrip()
    source.statements.append(replace(last, text=text))


def _bound_names(node: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds, inside `if`, `try` and `with` too."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
        return
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name.split(".")[0] for alias in child.names)


def _lazy_imports(node: ast.stmt) -> Iterator[str]:
    for child in ast.walk(node):
        if isinstance(child, ast.ImportFrom):
            yield child.module or "."
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)


def _without_registration(node: ast.stmt, lines: list[str]) -> tuple[ast.stmt, list[str]]:
    """A class without the decorator `register_mixer`: a packed file has an explicit table of mixers."""
    first = (node.end_lineno or node.lineno) - len(lines) + 1  # number of the first of `lines`
    for decorator in list(getattr(node, "decorator_list", ())):
        if ast.unparse(decorator).split(".")[-1] == "register_mixer":
            lines = [line for number, line in enumerate(lines, first) if number != decorator.lineno]
            assert isinstance(node, ast.ClassDef)
            node.decorator_list.remove(decorator)
            break
    return node, lines


def _piece(module: str, node: ast.stmt, lines: list[str]) -> Statement:
    node, lines = _without_registration(node, lines)
    uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    text = "\n".join(lines).strip("\n").rstrip()
    gap = min(2, next((i for i, line in enumerate(lines) if line.strip()), 0))
    calls = [d.func for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)]
    called = [f.id for f in calls if isinstance(f, ast.Name)]
    names = frozenset(_bound_names(node))
    return Statement(module, node.lineno, names, frozenset(uses), text, tuple(_lazy_imports(node)), gap, tuple(called))


def check_resolved(text: str, where: str) -> None:
    """Raise an ExportError if packed `text` loads a global name that is neither bound in it nor built in."""
    top = symtable.symtable(text, where, "exec")
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    bound |= set(dir(builtins)) | {"__name__", "__file__", "__doc__"}

    def walk(table: symtable.SymbolTable) -> Iterator[str]:
        for symbol in table.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or table is top) and symbol.get_name() not in bound:
                yield symbol.get_name()
        for child in table.get_children():
            yield from walk(child)

    if missing := sorted(set(walk(top))):
        raise ExportError(f"the packed file would lack {', '.join(missing)}", where=where)
