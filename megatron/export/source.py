"""One of our modules as pieces: top-level definitions with the comments above them, what they bind, what they use.

`export/pack.py` chooses pieces by what the exported model needs and writes them, word for word, into one file. Reading
goes through the syntax tree and never imports, so the text that is packed is the text that is tested.
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
class Piece:
    """One top-level statement: the names it binds, the names it loads, its text with the comments above it."""

    module: str
    line: int
    names: frozenset[str]
    uses: frozenset[str]
    text: str
    lazy: tuple[str, ...] = ()
    """Modules that its body imports by itself."""
    gap: int = 2
    """Blank lines above it, at most two."""
    decorators: tuple[str, ...] = ()
    """Names of the decorators that are called (`@path(...)`): they may register the definition somewhere."""


@dataclass
class Source:
    """A module: its docstring, its pieces in order, and where its imported names come from.

    outside: bound name -> (full dotted path, import statement) for other packages.
    inside: bound name -> (module of ours, name there).
    """

    module: str
    doc: str = ""
    pieces: list[Piece] = field(default_factory=list)
    outside: dict[str, tuple[str, str]] = field(default_factory=dict)
    inside: dict[str, tuple[str, str]] = field(default_factory=dict)

    def binding(self, name: str) -> list[Piece]:
        """The pieces that bind `name`, in order; more than one for a name that is set in steps."""
        return [piece for piece in self.pieces if name in piece.names]

    def registered(self) -> list[Piece]:
        """Definitions under a called decorator of ours: found at run time by a key, not by their name."""
        return [piece for piece in self.pieces if any(name in self.inside for name in piece.decorators)]

    def effects(self) -> list[Piece]:
        """Statements that bind nothing, thus act when the module is imported."""
        return [piece for piece in self.pieces if not piece.names]


def module_path(module: str) -> Path | None:
    """The file of one of our modules, found without importing it or its parents; None when there is no such module.

    A mixer's module may lie elsewhere (`registry.outside_modules`), and is imported already.
    """
    if module.split(".")[0] != ROOT:
        file = getattr(sys.modules.get(module), "__file__", None) or getattr(importlib.util.find_spec(module), "origin", None)
        return None if file is None else Path(file)
    root = importlib.util.find_spec(ROOT)
    assert root is not None and root.submodule_search_locations
    base = Path(next(iter(root.submodule_search_locations))).joinpath(*module.split(".")[1:])
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)


@cache
def read_source(module: str) -> Source:
    """The pieces of the module `module` (dotted name); a module that does not exist raises ExportError."""
    path = module_path(module)
    if path is None and module in outside_modules():
        raise ExportError(
            f"a mixer of '{module}' cannot be packed",
            why="its class is in no file",
            hint="put it into a .py file and import it",
        )
    if path is None:
        raise ExportError(f"no module '{module}' to pack", hint="the import that names it is wrong")
    return parse_source(module, path.read_text(encoding="utf-8"))


def parse_source(module: str, text: str) -> Source:
    """The pieces of a module given as text."""
    tree, lines = ast.parse(text, filename=module), text.splitlines()
    source = Source(module, ast.get_docstring(tree) or "")
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
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and source.pieces:
            _extend_last(source, lines[start:end])  # the string that documents the constant above it
        elif not _binds_all(node):
            source.pieces.append(_piece(module, node, lines[start:end]))
    return source


def _record_import(source: Source, node: ast.Import | ast.ImportFrom) -> None:
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
    """The module of ours that `from origin import name` means, None for one of another package.

    A mixer of a user may import the contract from the public package, which keeps a table of where its names are defined.
    """
    if origin.split(".")[0] == ROOT or origin in outside_modules():
        return origin
    home: str | None = getattr(sys.modules.get(origin), "HOMES", {}).get(name)
    return home


def _is_guard(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` and `if __name__ == ...:` have no part in a packed file."""
    if not isinstance(node, ast.If):
        return False
    names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
    return bool(names & {"TYPE_CHECKING", "__name__"})


def _binds_all(node: ast.stmt) -> bool:
    return "__all__" in set(_bound_names(node))


def _extend_last(source: Source, lines: list[str]) -> None:
    last = source.pieces.pop()
    text = last.text + "\n" + "\n".join(lines).rstrip()
    source.pieces.append(replace(last, text=text))


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
    """A class without the decorator `register_mixer`: in a packed file the mixers' table is written out."""
    first = (node.end_lineno or node.lineno) - len(lines) + 1  # number of the first of `lines`
    for decorator in list(getattr(node, "decorator_list", ())):
        if ast.unparse(decorator).split(".")[-1] == "register_mixer":
            lines = [line for number, line in enumerate(lines, first) if number != decorator.lineno]
            assert isinstance(node, ast.ClassDef)
            node.decorator_list.remove(decorator)
            break
    return node, lines


def _piece(module: str, node: ast.stmt, lines: list[str]) -> Piece:
    node, lines = _without_registration(node, lines)
    uses = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    text = "\n".join(lines).strip("\n").rstrip()
    gap = min(2, next((i for i, line in enumerate(lines) if line.strip()), 0))
    calls = [d.func for d in getattr(node, "decorator_list", []) if isinstance(d, ast.Call)]
    called = [f.id for f in calls if isinstance(f, ast.Name)]
    names = frozenset(_bound_names(node))
    return Piece(module, node.lineno, names, frozenset(uses), text, tuple(_lazy_imports(node)), gap, tuple(called))


def check_resolved(text: str, where: str) -> None:
    """Raise ExportError when packed `text` loads a global name that is neither bound in it nor built in."""
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
