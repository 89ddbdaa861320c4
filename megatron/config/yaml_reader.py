"""Reads NeoX's YAML and JSON files into plain values, with the line of every key.

Messages name lines (`configs/a.yml:12`), which PyYAML does not keep: the node tree is walked for lines and for keys given twice
before the safe constructor reads it. Differences from YAML 1.1: `1e-4` is a number, and a key with two values is an error.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.config.problems import Problems
from megatron.files import read_text
from megatron.shipped import shipped_config

# What PyYAML raises on bad text: its own errors, ValueError for impossible dates (2024-99-99), and the rest for values that do
# not fit their tag (`!!bool maybe`, `!!timestamp x`).
BAD_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, TypeError)
_MOST_VALUES = 100_000  # values of a file after its anchors are expanded
_LARGEST = 1 << 24  # bytes of a file
_DEEPEST = 8  # levels whose lines are recorded; an anchor that contains itself has no end

_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")


class ConfigLoader(yaml.SafeLoader):
    """PyYAML's safe loader plus numbers such as `1e-4` and `1E5`."""


ConfigLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


@dataclass
class Source:
    """Contents of the files: values by normalised key, the place of every (dotted) key, the raw texts, and warnings."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def normalise_key(key: str) -> str:
    """NeoX's rule: a hyphen in a key equals an underscore."""
    return key.replace("-", "_")


def parse_scalar(text: str) -> Any:
    """The value of a `--set KEY=VALUE` text, by the rules of the files."""
    loader = ConfigLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    _check_size(node)
    return loader.construct_document(node)


def _check_size(root: yaml.Node) -> None:
    """Refuse anchors that expand to millions of values, or contain themselves, before they are constructed.

    Raises:
        YAMLError: too many values, or an endless one.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) in open_nodes:
            raise yaml.YAMLError("an anchor contains itself")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            sizes[id(node)] = 1 + sum(size(part) for item in node.value for part in (item if pairs else (item,)))
            open_nodes.discard(id(node))
        return sizes[id(node)]

    if (count := size(root)) > _MOST_VALUES:
        raise yaml.YAMLError(f"{count:,} values with all anchors expanded; at most {_MOST_VALUES:,} are read")


def resolve_path(name: str | Path, conf_dir: str | Path | None) -> Path:
    """NeoX's rules: `conf_dir` is joined in front, `.yml` is appended unless the name has a known ending."""
    path = Path(conf_dir) / name if conf_dir else Path(name)
    return path if path.suffix in (".yml", ".yaml", ".json") else path.with_name(path.name + ".yml")


def find_config(name: str | Path, conf_dir: str | Path | None) -> Path:
    """The file that `name` means: the one at its path, else the configuration that came with this package under that name."""
    path = resolve_path(name, conf_dir)
    return path if path.exists() else shipped_config(path) or path


def read_files(files: Sequence[str | Path | Mapping[str, Any]], conf_dir: str | Path | None, problems: Problems) -> Source:
    """Read and merge all files; whatever is wrong is added to `problems`. A mapping counts as a file of these values."""
    source = Source()
    for number, name in enumerate(files, 1):
        if isinstance(name, Mapping):
            label = f"mapping-{number}.json"
            source.texts[label] = json.dumps(name, indent=1, default=str)
            _merge(source, *parse_text(source.texts[label], label, problems), problems)
            continue
        path = find_config(name, conf_dir)
        if path != resolve_path(name, conf_dir):
            source.warnings.append(
                f"there is no {resolve_path(name, conf_dir)} here: {path} is read, which came with linear-neox"
            )
        if path.name in source.texts:
            problems.add(
                f"two config files are called {path.name}",
                str(path),
                "rename one: their texts are saved with each checkpoint under their base names",
            )
            continue
        text = _read_text(path, problems)
        if text is not None:
            source.texts[path.name] = text
            _merge(source, *parse_text(text, str(path), problems), problems)
    return source


def parse_text(text: str, label: str, problems: Problems) -> tuple[dict[str, Any], dict[str, str]]:
    """Values and places of one file's text; `label` is the file name used in places."""
    # JSON files may be indented with tabs, which YAML does not allow.
    text = text.replace("\t", "    ") if label.endswith(".json") else text
    try:
        loader = ConfigLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            problems.add(f"the config file is {'empty' if node is None else 'not a list of `key: value` lines'}", label)
            return {}, {}
        _check_size(node)
        places: dict[str, str] = {}
        _walk(node, "", label, places, problems)
        raw = loader.construct_document(node)
    except BAD_YAML as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{label}:{mark.line + 1}" if mark else label
        problems.add(f"not valid YAML: {yaml_problem(error)}", place)
        return {}, {}
    return {normalise_key(str(key)): value for key, value in raw.items()}, places


def yaml_problem(error: BaseException) -> str:
    """The cause in one line of an exception in `BAD_YAML`."""
    known = isinstance(error, (yaml.YAMLError, ValueError, RecursionError))
    cause = getattr(error, "problem", None) or (error if known else "a value that its tag does not allow")
    return str(cause).partition("\n")[0]


def _read_text(path: Path, problems: Problems) -> str | None:
    try:
        return read_text(path, _LARGEST)
    except FileNotFoundError:
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yml", ".json")) if folder.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4)
        here = "did you mean " + " or ".join(close) + "?" if close else "known: " + ", ".join(names[:12])
        if not names:
            here = f"the folder {folder} has no config files"
        if "=" in path.name:
            here = f"--set takes one setting: write --set {path.name.removesuffix('.yml')}"
        problems.add("config file not found", str(path), here)
    except (OSError, ValueError) as error:
        problems.add(f"config file cannot be read: {error}", str(path))
    return None


def _merge(source: Source, values: dict[str, Any], places: dict[str, str], problems: Problems) -> None:
    """Add a file's values. A key of two files is an error unless both values are equal."""
    for key, value in values.items():
        if key in source.values and not _equal(source.values[key], value):
            problems.add(
                f"the key {key} is given twice",
                f"{source.places[key]} and {places[key]}",
                "keep one of them (a hyphen equals an underscore); a file that names data and folders needs no site file",
            )
    source.values.update(values)
    source.places.update(places)


def _equal(first: Any, second: Any) -> bool:
    """The same value of the same type: 1 is not true."""
    return type(first) is type(second) and bool(first == second)


def _walk(node: yaml.MappingNode, prefix: str, label: str, places: dict[str, str], problems: Problems) -> None:
    """Record the place of each key, nested ones with dots, and report a key with two values in one mapping."""
    scalars: dict[str, tuple[str, str]] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        dotted = f"{prefix}{key}" if prefix else normalise_key(key)
        place = f"{label}:{key_node.start_mark.line + 1}"
        scalar = (value_node.tag, value_node.value) if isinstance(value_node, yaml.ScalarNode) else None
        if dotted in places and key != "<<" and (scalar is None or scalars.get(dotted) != scalar):
            problems.add(f"the key {dotted} is given twice", f"{places[dotted]} and {place}", "keep one of them")
        places[dotted] = place
        if scalar is not None:
            scalars[dotted] = scalar
        if isinstance(value_node, yaml.MappingNode) and dotted.count(".") < _DEEPEST:
            _walk(value_node, f"{dotted}.", label, places, problems)
