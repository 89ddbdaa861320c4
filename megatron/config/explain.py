"""Answers "what is this key?" for one key (`--explain`) and for a whole run (`--print-config`).

`python -m megatron.config.explain` writes the pages of `pages.py`.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from megatron.config.catalog import KeyInfo, catalog
from megatron.config.frozen import thaw
from megatron.config.neox_keys import refused_values
from megatron.config.nested import find, is_open, names_inside
from megatron.config.schema import RunConfig
from megatron.config.yaml_reader import normalise_key
from megatron.errors import ConfigError
from megatron.registry import nearest


def explain(key: str, run: RunConfig | None = None) -> str:
    """Documentation, type, default, status and origin of one key, and its value in `run`.

    Raises:
        ConfigError: there is no such key.
    """
    head, dot, rest = key.partition(".")
    name = f"{normalise_key(head)}{dot}{rest}"
    outer, _, last = name.rpartition(".")
    info = find(name) or (catalog().get(name.split(".")[0]) if is_open(outer) else None)
    if info is None:
        known = list(names_inside(outer)) if outer in catalog() or find(outer) else list(catalog())
        raise ConfigError(f"there is no key {name}", hint=nearest(last, known))
    lines = [f"{info.name} ({info.origin}{', section ' + info.section if info.section else ''})"]
    lines += [f"  {info.doc}"] if info.doc else []
    lines += [f"  type:    {info.type_name}", f"  default: {json.dumps(thaw(info.default))}"]
    lines.append(f"  status:  {info.status_text}")
    for value, reason in refused_values().get(info.name, {}).items():
        lines.append(f"           not {value}: {reason}")
    if run is not None:
        lines.append(f"  here:    {_value_here(info, run)}")
    return "\n".join(lines)


def print_config(run: RunConfig) -> str:
    """The merged configuration as YAML with the origin of each value as a comment; it can be read back."""
    lines = [f"# {run.name}: every key that differs from its default"]
    for key, value in run.flat().items():
        text = f"{key}: {_flow(value)}"
        lines.append(f"{text}  # {_origin(key, run)}")
    lines += [f"# warning: {warning}" for warning in run.warnings]
    return "\n".join(lines) + "\n"


def _origin(key: str, run: RunConfig) -> str:
    """Where a key comes from; entries of a dictionary that come from the command line are named."""
    own = str(run.provenance.get(key, "default"))
    inside = [
        f"{name.partition('.')[2]}: {place}"
        for name, place in run.provenance.items()
        if name.startswith(f"{key}.") and str(place).startswith("--") and place != own
    ]
    return "; ".join([own, *inside])


def _value_here(info: KeyInfo, run: RunConfig) -> str:
    if info.status == "alias":
        return f"see {info.reason} ({run.provenance.get(info.reason, 'default')})"
    try:
        head, *rest = info.name.split(".")
        value = thaw(run.get(head))
        for name in rest:
            value = value[name]
    except (KeyError, TypeError):
        value = thaw(info.default)
    return f"{json.dumps(value)}  ({run.provenance.get(info.name, 'default')})"


def _flow(value: Any) -> str:
    """One-line YAML; JSON would do but for floats such as 1e-05, which other YAML readers take for text."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def main() -> None:
    """Write all generated pages."""
    from megatron.config.pages import write_pages  # not needed to explain a key

    print(f"wrote {', '.join(map(str, write_pages()))} ({len(catalog())} keys)")


if __name__ == "__main__":
    main()
