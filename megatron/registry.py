"""Names of token mixers, found by looking at the folder `megatron/layers/` and at the entry points `megatron.layers`.

A mixer's file is read as text (its syntax tree), so that `deepy.py` can check a YAML in a fraction of a second without
importing torch; the file is imported when a model is built. There is no list to edit: a new file is a new mixer.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

_FOLDER = Path(__file__).parent / "layers"
_COMMON = {"hidden_size", "num_heads", "layer_index"}


@dataclass(frozen=True)
class OptionInfo:
    """One field of a mixer's `Config`, as written in its file."""

    type: str
    default: Any
    doc: str


@dataclass(frozen=True)
class LayerInfo:
    """Where a mixer lives: module, class, its names in `attention_config`, its options, and which of them NeoX's keys set.

    uses_heads: whether the number of heads means anything to it.
    """

    module: str
    class_name: str
    names: tuple[str, ...]
    options: dict[str, OptionInfo]
    neox_keys: dict[str, str]
    uses_heads: bool = True


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """A hint such as `did you mean 'metala'?`, or the known names when nothing is near."""
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "known: " + ", ".join(sorted(known))


def _class_attribute(node: ast.ClassDef, name: str) -> Any:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name and item.value:
            return ast.literal_eval(item.value)
        if isinstance(item, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in item.targets):
            return ast.literal_eval(item.value)
    return None


def _options(node: ast.ClassDef) -> dict[str, OptionInfo]:
    """Annotated fields of a `Config` class; the string that follows a field is its documentation."""
    options: dict[str, OptionInfo] = {}
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)) or item.target.id in _COMMON:
            continue
        if ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        doc = ""
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            doc = " ".join(str(following.value.value).split())
        default = ast.literal_eval(item.value) if item.value is not None else None
        options[item.target.id] = OptionInfo(ast.unparse(item.annotation), default, doc)
    return options


def _bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> list[ast.ClassDef]:
    """The classes of the same file that `node` inherits from, the nearest first; `Mixer.Config` counts as `Mixer`."""
    names = [base.value if isinstance(base, ast.Attribute) and base.attr == "Config" else base for base in node.bases]
    direct = [classes[name.id] for name in names if isinstance(name, ast.Name) and name.id in classes]
    return direct + [further for base in direct for further in _bases(base, classes)]


def _config_of(node: ast.ClassDef) -> ast.ClassDef | None:
    return next((c for c in node.body if isinstance(c, ast.ClassDef) and c.name == "Config"), None)


def _inherited(nodes: list[ast.ClassDef], name: str) -> Any:
    """The value of a class attribute where it is set first."""
    return next((value for value in (_class_attribute(node, name) for node in nodes) if value is not None), None)


def _all_options(configs: list[ast.ClassDef]) -> dict[str, OptionInfo]:
    """Options of a `Config` and of those it inherits from (given nearest first), in the order of the dataclass's fields.

    A field that is set anew without a string after it keeps its documentation; `no_options` takes inherited fields out.
    """
    options: dict[str, OptionInfo] = {}
    for config in reversed(configs):
        for name, own in _options(config).items():
            inherited = options.get(name)
            options[name] = own if own.doc or inherited is None else replace(own, doc=inherited.doc)
    fixed = _inherited(configs, "no_options") or ()
    return {name: option for name, option in options.items() if name not in fixed}


def _read(path: Path, module: str) -> list[LayerInfo]:
    """The mixers of a file: its classes with `names` of their own."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    infos = []
    for node in classes.values():
        names = _class_attribute(node, "names")
        if not names:
            continue
        lineage = [node, *_bases(node, classes)]
        config = next((c for c in map(_config_of, lineage) if c is not None), None)
        owners = [] if config is None else [c for c in map(_config_of, _bases(config, classes)) if c is not None]
        configs = [] if config is None else [config, *owners]
        neox_keys = _inherited(configs, "neox_keys") or {}
        uses_heads = _inherited(lineage, "uses_heads") is not False
        infos.append(LayerInfo(module, node.name, tuple(names), _all_options(configs), neox_keys, uses_heads))
    return infos


@functools.cache
def _table() -> dict[str, LayerInfo]:
    """name -> where. A name claimed twice is refused: which class would run must never depend on file order."""
    infos: list[LayerInfo] = []
    for path in sorted(_FOLDER.glob("*.py")):
        if path.stem not in ("__init__", "base"):
            infos += _read(path, f"megatron.layers.{path.stem}")
    for entry in importlib.metadata.entry_points(group="megatron.layers"):
        spec = importlib.util.find_spec(entry.module)
        if spec and spec.origin:
            infos += _read(Path(spec.origin), entry.module)
    table: dict[str, LayerInfo] = {}
    for info in infos:
        for name in info.names:
            if name in table:
                raise ConfigError(
                    f"two token mixers are called '{name}'",
                    where=f"{table[name].module} and {info.module}",
                    hint="rename one of them in its `names`",
                )
            table[name] = info
    return table


def layer_names() -> list[str]:
    """Every name that may stand in `attention_config`, sorted."""
    return sorted(_table())


def layer_options() -> dict[str, dict[str, OptionInfo]]:
    """Mixer name -> its options. The YAML key of an option is `<first name of the mixer>_<field>`."""
    return {info.names[0]: info.options for info in _table().values()}


def layer_info(name: str) -> LayerInfo:
    """Where the mixer `name` lives; an unknown name raises ConfigError with the nearest known ones."""
    if name not in _table():
        raise ConfigError(f"unknown token mixer '{name}'", hint=nearest(name, layer_names()))
    return _table()[name]


def layer_class(name: str) -> Any:
    """Import and return the mixer class registered under `name`."""
    info = layer_info(name)
    return getattr(importlib.import_module(info.module), info.class_name)
