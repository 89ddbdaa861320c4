"""From YAML files and the command line to one frozen `RunConfig`; all mistakes are reported together.

Steps: read and merge files, resolve spellings, apply the command line, check names and types, derive, and with `check=True`
check what is refused and the cross rules. `check=False` reads an old NeoX file even if this version cannot run it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron.config import checks
from megatron.config.catalog import catalog
from megatron.config.derive import Draft, derive_all
from megatron.config.problems import Problems
from megatron.config.schema import RunConfig, key_fields, sections
from megatron.config.spellings import move_extra_arguments, resolve_aliases, translate_old_keys
from megatron.config.values import apply_overrides, check_values
from megatron.config.yaml_reader import Source, read_files

# Values in the optimizer dictionary that people look up by their short name.
_INSIDE = {"lr": "optimizer.params.lr", "betas": "optimizer.params.betas", "eps": "optimizer.params.eps"}


def load_config(
    files: Sequence[str | Path | Mapping[str, Any]],
    *,
    conf_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    world_size: int | None = None,
    check: bool = True,
    override_labels: Mapping[str, str] | None = None,
) -> RunConfig:
    """Read, merge, type and derive a configuration.

    Args:
        files: YAML or JSON files; `.yml` may be left out. A file that does not exist is looked up by name among those of this
            package; a mapping of keys is read as a file.
        conf_dir: folder joined in front of every file.
        overrides: values that override the files; dotted keys reach into dictionaries, texts are read as YAML.
        world_size: number of processes, if known; batch sizes are then derived.
        check: also refuse what is not built and apply the cross rules.
        override_labels: provenance of an override, `--set` if it has none (such as `--hostfile`).

    Raises:
        ConfigError: listing every problem with its place.
    """
    problems = Problems()
    if not files:
        problems.add("no config file is given", hint="for example configs/metala-quickstart.yml")
    source = read_files(files, conf_dir, problems)
    problems_before = len(problems.items)
    move_extra_arguments(source, problems)
    resolve_aliases(source, problems)
    translate_old_keys(source)
    apply_overrides(source, overrides or {}, override_labels or {}, problems)
    values, bad = check_values(source, problems)
    draft = Draft(_run_name(files), _split(values)[0], _provenance(source, values), problems)
    derive_all(draft, world_size)
    if any(key in key_fields() for key in bad) or problems_before:
        problems.raise_if_any()
    run = _build(draft, _split(values), source)
    if check:
        checks.check_run(run, problems, unknown_keys=bool(bad))
    problems.raise_if_any()
    return run


def _run_name(files: Sequence[str | Path | Mapping[str, Any]]) -> str:
    if not files or isinstance(files[0], Mapping):
        return "run"
    name = Path(files[0]).name
    return name.removesuffix(".yml").removesuffix(".yaml").removesuffix(".json")


def _split(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]]:
    """Values of the sections, options by mixer, and values of keys that have no section."""
    own: dict[str, Any] = {}
    layers: dict[str, dict[str, Any]] = {}
    unused: dict[str, Any] = {}
    for key, value in values.items():
        info = catalog()[key]
        if info.section == "layers":
            layers.setdefault(info.section_layer, {})[info.layer_field] = value
        elif info.section:
            own[key] = value
        else:
            unused[key] = value
    return own, layers, unused


def _provenance(source: Source, values: dict[str, Any]) -> dict[str, str]:
    """Places of all given values and entries; null counts as not given."""
    return {key: place for key, place in source.places.items() if key.split(".")[0] in values}


def _build(draft: Draft, parts: tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, Any]], source: Source) -> RunConfig:
    """The sections of the derived values, which have the right types already."""
    _, layers, unused = parts
    built: dict[str, Any] = {}
    for section, cls in sections().items():
        built[section] = cls(**{key: draft.values[key] for key in cls.model_fields if key in draft.values})
    provenance = dict.fromkeys(key_fields(), "default") | draft.provenance
    for short, dotted in _INSIDE.items():
        provenance[short] = provenance.get(dotted, "default")
    return RunConfig(
        name=draft.name,
        **built,
        layers=layers,
        unused=unused,
        provenance=provenance,
        config_texts=source.texts,
        warnings=(*source.warnings, *checks.ignored_keys(draft.values | unused, provenance), *checks.short_shards(draft.get)),
    )
