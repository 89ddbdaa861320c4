"""The registry of token mixers: files in `megatron/layers/`, and entry points of the group `megatron.layers`.

A mixer's file is parsed, not imported, so that `deepy.py` can check a YAML in a fraction of a second without
importing torch; it is imported when a model is built. There is no list to edit: a new file is a new mixer. A notebook
registers a class with `register_layer`, for its own process only.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError

_FOLDER = Path(__file__).parent / "layers"
_COMMON = {"hidden_size", "num_heads", "layer_index"}


@dataclass(frozen=True)
class OptionInfo:
    """One field of a mixer's `Config`, as written in its file.

    Attributes:
        type: its annotation.
        default: its default.
        doc: its documentation.
    """

    type: str
    default: Any
    doc: str


@dataclass(frozen=True)
class LayerInfo:
    """A registered mixer.

    Attributes:
        module: dotted name of its module.
        class_name: its class.
        names: its names in `attention_config`.
        options: its options by field name.
        neox_keys: field -> GPT-NeoX key that sets it.
        uses_heads: the mixer depends on the number of heads.
        context_parallel: the mixer can read a shard of a row.
    """

    module: str
    class_name: str
    names: tuple[str, ...]
    options: dict[str, OptionInfo]
    neox_keys: dict[str, str]
    uses_heads: bool = True
    context_parallel: bool = False


def nearest(name: str, known: list[str], count: int = 3) -> str:
    """A hint such as `did you mean 'metala'?`, or the known names if none is close."""
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
    """The base classes of `node` in the same file, nearest first; `Mixer.Config` counts as `Mixer`."""
    names = [base.value if isinstance(base, ast.Attribute) and base.attr == "Config" else base for base in node.bases]
    direct = [classes[name.id] for name in names if isinstance(name, ast.Name) and name.id in classes]
    return direct + [further for base in direct for further in _bases(base, classes)]


def _config_of(node: ast.ClassDef) -> ast.ClassDef | None:
    return next((c for c in node.body if isinstance(c, ast.ClassDef) and c.name == "Config"), None)


def _inherited(nodes: list[ast.ClassDef], name: str) -> Any:
    """The value of a class attribute in the nearest class that sets it."""
    return next((value for value in (_class_attribute(node, name) for node in nodes) if value is not None), None)


def _all_options(configs: list[ast.ClassDef]) -> dict[str, OptionInfo]:
    """Options of a `Config` and its base classes (passed nearest first), in the order of the dataclass's fields.

    A field that is redefined without a docstring inherits its documentation; `no_options` removes inherited fields.
    """
    options: dict[str, OptionInfo] = {}
    for config in reversed(configs):
        for name, own in _options(config).items():
            inherited = options.get(name)
            options[name] = own if own.doc or inherited is None else replace(own, doc=inherited.doc)
    fixed = _inherited(configs, "no_options") or ()
    return {name: option for name, option in options.items() if name not in fixed}


def _read(path: Path, module: str) -> list[LayerInfo]:
    """The mixers of a file: its classes that define `names`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return [_read_class(node, classes, module) for node in classes.values() if _class_attribute(node, "names")]


def _read_class(node: ast.ClassDef, classes: dict[str, ast.ClassDef], module: str) -> LayerInfo:
    lineage = [node, *_bases(node, classes)]
    config = next((c for c in map(_config_of, lineage) if c is not None), None)
    owners = [] if config is None else [c for c in map(_config_of, _bases(config, classes)) if c is not None]
    configs = [] if config is None else [config, *owners]
    neox_keys = _inherited(configs, "neox_keys") or {}
    uses_heads = _inherited(lineage, "uses_heads") is not False
    names, context = tuple(_class_attribute(node, "names")), _inherited(lineage, "context_parallel") is True
    return LayerInfo(module, node.name, names, _all_options(configs), neox_keys, uses_heads, context)


_registered: dict[str, Any] = {}  # name -> class, in this process only


def register_layer(cls: Any) -> None:
    """Register a mixer class in this process; replaces an earlier class of the same name and module.

    Raises:
        ConfigError: another mixer has one of its names; the registry is unchanged.
    """
    before = dict(_registered)
    same = [n for n, old in _registered.items() if (old.__module__, old.__qualname__) == (cls.__module__, cls.__qualname__)]
    for name in same:
        del _registered[name]
    _registered.update(dict.fromkeys(cls.names, cls))
    _table.cache_clear()
    try:
        taken = [name for name in cls.names if before.get(name) is not None and name not in same]
        if taken:
            raise ConfigError(f"two token mixers are called '{taken[0]}'", hint="rename one of them in its `names`")
        _table()
    except ConfigError:
        _registered.clear()
        _registered.update(before)
        _table.cache_clear()
        raise


def _describe(cls: Any) -> LayerInfo:
    """Describe a class at run time; the documentation of its options requires its source."""
    try:
        classes = {base.__name__: _class_node(base) for base in cls.__mro__ if hasattr(base, "names")}
        return _read_class(classes[cls.__name__], classes, cls.__module__)
    except (OSError, TypeError, SyntaxError, ValueError):  # defined interactively, or with a computed default
        pass
    options = {
        f.name: OptionInfo(
            f.type if isinstance(f.type, str) else f.type.__name__, None if f.default is MISSING else f.default, ""
        )
        for f in fields(cls.Config)
        if f.name not in (*_COMMON, *cls.Config.no_options)
    }
    flags = cls.uses_heads, cls.context_parallel
    return LayerInfo(cls.__module__, cls.__name__, tuple(cls.names), options, dict(cls.Config.neox_keys), *flags)


def _class_node(cls: Any) -> ast.ClassDef:
    """The syntax tree of a class.

    Raises:
        OSError: its source is not available.
        TypeError: it was defined in a terminal.
        ValueError: its source location holds another class.
    """
    node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    if not isinstance(node, ast.ClassDef) or node.name != cls.__name__:
        raise ValueError(f"the source of {cls.__name__} is not available")
    return node


def outside_modules() -> set[str]:
    """Modules of mixers outside `megatron/layers/`: of entry points and of `register_layer`."""
    return {info.module for info in _table().values() if not info.module.startswith("megatron.layers.")}


@functools.cache
def _table() -> dict[str, LayerInfo]:
    """name -> mixer. A duplicate name is refused: the class must not depend on the order of files."""
    infos: list[LayerInfo] = []
    for path in sorted(_FOLDER.glob("*.py")):
        if path.stem not in ("__init__", "base"):
            infos += _read(path, f"megatron.layers.{path.stem}")
    for entry in importlib.metadata.entry_points(group="megatron.layers"):
        spec = importlib.util.find_spec(entry.module)
        if spec and spec.origin:
            infos += _read(Path(spec.origin), entry.module)
    infos += [_describe(cls) for cls in dict.fromkeys(_registered.values())]
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
    """All names for `attention_config`, sorted."""
    return sorted(_table())


def context_parallel_names() -> list[str]:
    """Names of the mixers that can read shards of a sequence, sorted."""
    return [name for name in layer_names() if layer_info(name).context_parallel]


def layer_options() -> dict[str, dict[str, OptionInfo]]:
    """Mixer name -> its options. The YAML key of an option is `<first name of the mixer>_<field>`."""
    return {info.names[0]: info.options for info in _table().values()}


def layer_info(name: str) -> LayerInfo:
    """The mixer `name`; an unknown name raises a ConfigError with the nearest known names."""
    if name not in _table():
        raise ConfigError(f"unknown token mixer '{name}'", hint=nearest(name, layer_names()))
    return _table()[name]


def layer_class(name: str) -> Any:
    """Import and return the mixer class called `name`."""
    info = layer_info(name)
    if name in _registered:
        return _registered[name]
    return getattr(importlib.import_module(info.module), info.class_name)
