"""Writes one Python file out of our own modules: the text of every definition that the exported model needs, nothing else.

There is no second modelling implementation: what runs in an exported folder is the text of `megatron/model`, the mixers of
`megatron/layers`, the plain torch forms of `megatron/ops` and the shell of `export/hf_model.py`, put one below the other with
the imports between them taken out. Which definitions are needed is found by following names from the entry classes.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron.errors import ExportError
from megatron.export.source import ROOT, Piece, Source, check_resolved, parse_source, read_source

ALLOWED = frozenset({"torch", "transformers"})
"""Packages, besides Python's own, that a packed file may import."""


@dataclass(frozen=True)
class PackPlan:
    """What to pack.

    entries: (module, name) pairs from which needed definitions are found; extra mixers are entries too.
    replaced: module -> text that stands in for it (the registry becomes a table of the packed mixers).
    siblings: module -> name of the file beside the packed one that holds it (`configuration_metala`).
    title: first line of the packed file's docstring.
    """

    entries: tuple[tuple[str, str], ...]
    title: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    siblings: Mapping[str, str] = field(default_factory=dict)


class _Packer:
    """Follows names from the entries; holds what was chosen."""

    def __init__(self, plan: PackPlan) -> None:
        self.plan = plan
        self.sources: dict[str, Source] = {}
        self.order: list[str] = []
        self.kept: dict[str, set[int]] = {}
        self.outside: dict[str, tuple[str, str]] = {}
        self.sibling_names: dict[str, set[str]] = {}
        self.owner: dict[str, str] = {}

    def source(self, module: str) -> Source:
        if module not in self.sources:
            text = self.plan.replaced.get(module)
            self.sources[module] = read_source(module) if text is None else parse_source(module, text)
        return self.sources[module]

    def need(self, module: str, name: str) -> None:
        """Keep the definition of `name` in `module` and all it needs."""
        if module in self.plan.siblings:
            self.sibling_names.setdefault(self.plan.siblings[module], set()).add(name)
            self._own(name, module)
            return
        source = self.source(module)
        pieces = source.binding(name)
        if not pieces:
            if name in source.inside:  # handed on from another module of ours
                self.need(*source.inside[name])
                return
            raise ExportError(f"'{name}' is not defined in {module}", hint="a name that is packed must be a plain definition")
        for piece in pieces:
            self._keep(source, piece)

    def _keep(self, source: Source, piece: Piece) -> None:
        kept = self.kept.setdefault(source.module, set())
        if piece.line in kept:
            return
        kept.add(piece.line)
        self._refuse_lazy(piece)
        for name in sorted(piece.names):
            self._own(name, source.module)
        for name in sorted(piece.uses):
            if name in source.inside:
                self._need_import(source, name)
            elif name in source.outside:
                self._hoist(source.module, name, source.outside[name])
            elif source.binding(name):
                self.need(source.module, name)
        if source.module not in self.order:
            self.order.append(source.module)
            for other in source.registered():
                self._keep(source, other)

    def _need_import(self, source: Source, bound: str) -> None:
        module, name = source.inside[bound]
        if bound != name:
            raise ExportError(f"'{name}' is imported under another name ('{bound}') and cannot be packed", where=source.module)
        self.need(module, name)

    def _own(self, name: str, module: str) -> None:
        first = self.owner.setdefault(name, module)
        if first != module or name in self.outside:
            raise ExportError(
                f"two definitions of '{name}' meet in one packed file",
                where=f"{first if first != module else self.outside[name][1]} and {module}",
                hint="rename one of them",
            )

    def _hoist(self, module: str, bound: str, target: tuple[str, str]) -> None:
        top = target[0].split(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ExportError(
                f"{module} imports '{top}', which an exported folder must not need", hint="keep it out of what is packed"
            )
        first = self.outside.setdefault(bound, target)
        if first[0] != target[0] or bound in self.owner:
            raise ExportError(f"'{bound}' means two things in one packed file", where=f"{first[1]} and {module}")

    def _refuse_lazy(self, piece: Piece) -> None:
        for module in piece.lazy:
            if module.split(".")[0] not in ALLOWED | sys.stdlib_module_names:
                raise ExportError(f"an import of '{module}' inside a definition", where=f"{piece.module}:{piece.line}")

    def modules(self) -> list[str]:
        """Chosen modules, each after those it imports from."""
        done: list[str] = []

        def visit(module: str) -> None:
            if module in done or module not in self.kept:
                return
            for target, _ in self.source(module).inside.values():
                visit(target)
            done.append(module)

        for module in self.order:
            visit(module)
        return done


def pack(plan: PackPlan) -> str:
    """The packed file's text.

    Raises:
        ExportError: two definitions share a name, an import cannot leave the project, a name stays unresolved, or a needed
            module acts when it is imported.
    """
    packer = _Packer(plan)
    for module, name in plan.entries:
        packer.need(module, name)
    modules = packer.modules()
    for module in modules:
        if module.split(".")[0] == ROOT and (effects := packer.source(module).effects()):
            raise ExportError("a packed module must only define things", where=f"{module}:{effects[0].line}")
    head = "\n\n".join(part for part in (_head(plan, modules), _imports(packer)) if part)
    text = "\n\n\n".join([head, *(_section(packer, module) for module in modules)]) + "\n"
    check_resolved(text, plan.title)
    return text


def _head(plan: PackPlan, modules: Iterable[str]) -> str:
    listed = textwrap.fill(", ".join(modules), 110, break_long_words=False, break_on_hyphens=False)
    return (
        f'"""{plan.title}\n\nPacked from the sources of the trainer that made this model; change them there, not here.\n'
        f'Modules: {listed}\n"""\n\nfrom __future__ import annotations'
    )


def _imports(packer: _Packer) -> str:
    own: set[str] = set()
    others: set[str] = set()
    for path, statement in packer.outside.values():
        (own if path.split(".")[0] in sys.stdlib_module_names else others).add(statement)
    near = {f"from .{file} import {name}" for file, names in packer.sibling_names.items() for name in names}
    return "\n\n".join("\n".join(_merged(block)) for block in (own, others, near) if block)


def _merged(statements: Iterable[str]) -> list[str]:
    """Import statements in order, one per module."""
    plain, named = [], dict[str, list[str]]()
    for statement in sorted(statements):
        head, word, name = statement.partition(" import ")
        if word:
            named.setdefault(head, []).append(name)
        else:
            plain.append(statement)
    return plain + [f"{head} import {', '.join(names)}" for head, names in named.items()]


def _section(packer: _Packer, module: str) -> str:
    source = packer.source(module)
    place = module.replace(".", "/") + ".py" if module.startswith(ROOT) else module
    text = "\n".join(f"# {line}".rstrip() for line in [f"---- {place}", *source.doc.splitlines()])
    last = -1
    for index, piece in enumerate(source.pieces):
        if piece.line in packer.kept[module]:
            gap = piece.gap if index == last + 1 and index else 2
            text += "\n" * (gap + 1) + piece.text
            last = index
    return text
