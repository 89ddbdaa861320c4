"""Packs our own modules into one Python file: the source text of exactly those definitions that the exported model needs.

There is no second model implementation: an exported folder runs the text of `megatron/model`, the mixers of
`megatron/layers`, the plain torch forms of `megatron/ops` and the classes of `export/hf_model.py`, concatenated without the
imports between them. The definitions are selected by following names from the entry classes.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron.errors import ExportError
from megatron.export.source import ROOT, ModuleSource, Statement, check_resolved, parse_source, read_source

ALLOWED = frozenset({"torch", "transformers"})
"""Third-party packages that a packed file may import."""


@dataclass(frozen=True)
class PackPlan:
    """What to pack.

    Attributes:
        entries: (module, name) pairs to start from; additional mixers are entries too.
        title: first line of the packed file's docstring.
        replaced: module -> replacement text (the registry becomes a table of the packed mixers).
        siblings: module -> name of the sibling file that holds it (`configuration_metala`).
    """

    entries: tuple[tuple[str, str], ...]
    title: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    siblings: Mapping[str, str] = field(default_factory=dict)


class _Packer:
    """Follows names from the entries and collects the selected definitions."""

    def __init__(self, plan: PackPlan) -> None:
        self.plan = plan
        self.sources: dict[str, ModuleSource] = {}
        self.order: list[str] = []
        self.selected: dict[str, set[int]] = {}
        self.outside: dict[str, tuple[str, str]] = {}
        self.sibling_names: dict[str, set[str]] = {}
        self.owner: dict[str, str] = {}
        self.re_exported: set[str] = set()

    def source(self, module: str) -> ModuleSource:
        if module not in self.sources:
            text = self.plan.replaced.get(module)
            self.sources[module] = read_source(module) if text is None else parse_source(module, text)
        return self.sources[module]

    def need(self, module: str, name: str) -> None:
        """Select the definition of `name` in `module` and its dependencies."""
        if module in self.plan.siblings:
            self.sibling_names.setdefault(self.plan.siblings[module], set()).add(name)
            self._own(name, module)
            return
        source = self.source(module)
        statements = source.binding(name)
        if not statements:
            if name in source.inside:  # re-exported from another of our modules
                self.re_exported.add(module)
                self.need(*source.inside[name])
                return
            raise ExportError(f"'{name}' is not defined in {module}", hint="a name that is packed must be a plain definition")
        for statement in statements:
            self._select(source, statement)

    def _select(self, source: ModuleSource, statement: Statement) -> None:
        selected_lines = self.selected.setdefault(source.module, set())
        if statement.line in selected_lines:
            return
        selected_lines.add(statement.line)
        self._refuse_lazy(statement)
        for name in sorted(statement.names):
            self._own(name, source.module)
        for name in sorted(statement.uses):
            if name in source.inside:
                self._need_import(source, name)
            elif name in source.outside:
                self._hoist(source.module, name, source.outside[name])
            elif source.binding(name):
                self.need(source.module, name)
        if source.module not in self.order:
            self.order.append(source.module)
            for other in source.registered():
                self._select(source, other)

    def _need_import(self, source: ModuleSource, bound: str) -> None:
        module, name = source.inside[bound]
        if bound != name:
            raise ExportError(f"'{name}' is imported under another name ('{bound}') and cannot be packed", where=source.module)
        self.need(module, name)

    def _own(self, name: str, module: str) -> None:
        first = self.owner.setdefault(name, module)
        if first != module or name in self.outside:
            raise ExportError(
                f"two definitions of '{name}' in one packed file",
                where=f"{first if first != module else self.outside[name][1]} and {module}",
                hint="rename one of them",
            )

    def _hoist(self, module: str, bound: str, target: tuple[str, str]) -> None:
        top = target[0].split(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ExportError(
                f"{module} imports '{top}', which an exported folder must not depend on", hint="keep it out of packed code"
            )
        first = self.outside.setdefault(bound, target)
        if first[0] != target[0] or bound in self.owner:
            raise ExportError(f"'{bound}' means two things in one packed file", where=f"{first[1]} and {module}")

    def _refuse_lazy(self, statement: Statement) -> None:
        for module in statement.lazy:
            if module.split(".")[0] not in ALLOWED | sys.stdlib_module_names:
                raise ExportError(f"an import of '{module}' inside a definition", where=f"{statement.module}:{statement.line}")

    def modules(self) -> list[str]:
        """The selected modules, each after those it imports from."""
        done: list[str] = []
        visited: set[str] = set()

        def visit(module: str) -> None:
            if module in visited or module not in self.selected.keys() | self.re_exported:
                return
            visited.add(module)
            for target, _ in self.source(module).inside.values():
                visit(target)
            if module in self.selected:
                done.append(module)

        for module in self.order:
            visit(module)
        return done


def pack(plan: PackPlan) -> str:
    """The packed file's text.

    Raises:
        ExportError: two definitions share a name, an import is not allowed in an export, a name stays unresolved, or a
            module has side effects at import.
    """
    packer = _Packer(plan)
    for module, name in plan.entries:
        packer.need(module, name)
    modules = packer.modules()
    for module in modules:
        if module.split(".")[0] == ROOT and (effects := packer.source(module).effects()):
            raise ExportError("a packed module must only contain definitions", where=f"{module}:{effects[0].line}")
    head = "\n\n".join(block for block in (_head(plan, modules), _imports(packer)) if block)
    text = "\n\n\n".join([head, *(_section(packer, module) for module in modules)]) + "\n"
    check_resolved(text, plan.title)
    return text


def _head(plan: PackPlan, modules: Iterable[str]) -> str:
    listed = textwrap.fill(", ".join(modules), 110, break_long_words=False, break_on_hyphens=False)
    return (
        f'"""{plan.title}\n\nPacked from the sources of the trainer of this model; change them there, not here.\n'
        f'Modules: {listed}\n"""\n\nfrom __future__ import annotations'
    )


def _imports(packer: _Packer) -> str:
    own: set[str] = set()
    others: set[str] = set()
    for path, statement in packer.outside.values():
        (own if path.split(".")[0] in sys.stdlib_module_names else others).add(statement)
    sibling_imports = {f"from .{file} import {name}" for file, names in packer.sibling_names.items() for name in names}
    return "\n\n".join("\n".join(_merged(block)) for block in (own, others, sibling_imports) if block)


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
    path = module.replace(".", "/") + ".py" if module.startswith(ROOT) else module
    text = "\n".join(f"# {line}".rstrip() for line in [f"---- {path}", *source.doc.splitlines()])
    last = -1
    for index, statement in enumerate(source.statements):
        if statement.line in packer.selected[module]:
            gap = statement.gap if index == last + 1 and index else 2
            text += "\n" * (gap + 1) + statement.text
            last = index
    return text
