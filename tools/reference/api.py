"""Pages of the Python API, whose text mkdocstrings takes from the docstrings, and the table of operators."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from linear_neox import HOMES
from megatron import registry
from megatron.ops.dispatch import BACKENDS
from tools.reference.markdown import page, table

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "the public names of linear_neox and megatron"
_LAYER_NAMES = ("Layer", "LayerConfig", "LayerInputs", "Context", "State", "inputs_of", "input_names")
# What the sections of a configuration become: one dataclass per part of the trainer.
_DATACLASSES = (
    "megatron.model.config.ModelConfig",
    "megatron.config.schema.RunConfig",
    "megatron.engine.base.EngineSettings",
    "megatron.engine.schedule.ScheduleConfig",
    "megatron.model.objectives.Objective",
    "megatron.training.options.FitOptions",
    "megatron.reliability.guard_options.GuardOptions",
    "megatron.generation.sample.Sampling",
)


def _directive(name: str, *options: str) -> str:
    """mkdocstrings' block for a dotted name."""
    return "\n".join([f"::: {name}", *(["    options:"] if options else []), *(f"      {option}" for option in options)])


def _public_page() -> str:
    names = [_directive(f"{module}.{name}") for name, module in HOMES.items() if module.startswith("linear_neox")]
    others = [
        f"`{name}` is [`{module}.{name}`]({_page_of(name)})" for name, module in HOMES.items() if "linear_neox" not in module
    ]
    intro = "`import linear_neox as ln`; each name is loaded on first use. [Python API](../../api.md) is the guide."
    return page("linear_neox", SOURCE, intro, "Also public: " + ", ".join(others) + ".", *names)


def _page_of(name: str) -> str:
    """The page of a public name that another package defines."""
    if name in _LAYER_NAMES:
        return "layers.md"
    return "configuration.md" if name in ("ModelConfig", "RunConfig") else "model.md"


def _mixers() -> Iterator[str]:
    """Every mixer of this project with its names."""
    infos = {(info.module, info.class_name): info for info in map(registry.layer_info, registry.layer_names())}
    rows = ((", ".join(f"`{n}`" for n in i.names), f"`{i.class_name}`", f"`{i.module}`") for i in infos.values())
    yield table(("names in `attention_config`", "class", "module"), rows)
    for module, class_name in infos:
        yield _directive(f"{module}.{class_name}", "members: [Config, Inputs]")


def registered_paths() -> dict[str, list[str]]:
    """Operator -> its paths, in the order of `BACKENDS`, from the decorators in the source."""
    paths: dict[str, set[str]] = {}
    for file in sorted((ROOT / "megatron/ops").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", ()):
                if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "path":
                    operator, backend = (ast.literal_eval(argument) for argument in decorator.args)
                    paths.setdefault(operator, set()).add(backend)
    return {operator: [b for b in BACKENDS if b in paths[operator]] for operator in sorted(paths)}


def exported(package: Path) -> tuple[str, list[str]]:
    """(docstring, dotted names) of what a package of operators exports: its functions and classes."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names if not alias.name.isupper()]
    return ast.get_docstring(tree) or "", names


def _operators_page() -> str:
    columns = BACKENDS[1:]
    rows = ((f"`{name}`", *("yes" if b in paths else "" for b in columns)) for name, paths in registered_paths().items())
    intro = (
        "An operator has up to four paths. `kernel_backend` selects one for all operators, or `auto`: the fused kernel "
        "(`triton`) on a GPU, else `torch`. The log of a run names the path of every operator and the reason. "
        "[Kernels](../../kernels.md) describes the paths."
    )
    blocks = [intro, table(("operator", *columns), rows), "## Modules"]
    blocks.append(_directive("megatron.ops.modules", "show_root_heading: false", "heading_level: 3"))
    for package in sorted(path.parent for path in (ROOT / "megatron/ops").glob("*/__init__.py")):
        doc, names = exported(package)
        blocks += [f"## {package.name}", doc, *(_directive(name, "heading_level: 3") for name in names)]
    return page("Operators", SOURCE, *blocks)


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    base = "megatron.layers.base"
    layers = page("Layers", SOURCE, _directive(base, "members: [" + ", ".join(_LAYER_NAMES) + "]"))
    return {
        "reference/api/linear_neox.md": _public_page(),
        "reference/api/layers.md": layers,
        "reference/api/mixers.md": page("Token mixers", SOURCE, *_mixers()),
        "reference/api/operators.md": _operators_page(),
        "reference/api/model.md": page(
            "Model and errors", SOURCE, _directive("megatron.model.lm.LanguageModel"), _directive("megatron.errors")
        ),
        "reference/api/configuration.md": page("Configuration classes", SOURCE, *map(_directive, _DATACLASSES)),
    }
