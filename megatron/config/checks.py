"""Checks of a run that is about to start: refused keys and values, unknown mixers, broken cross rules.

Reading a configuration for anything else skips them. Warnings about ignored keys are made here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron import registry
from megatron.config import pattern
from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.neox_keys import refused_values
from megatron.config.problems import Problems
from megatron.config.rules import RULES
from megatron.config.schema import RunConfig
from megatron.errors import DataError


def check_run(run: RunConfig, problems: Problems, *, unknown_keys: bool = False) -> None:
    """Add every refused key, refused value and broken rule to `problems`."""
    refused = _refused(run, problems)
    for violation in (violation for rule in RULES for violation in rule(run)):
        if not (violation.missing and unknown_keys) and not refused & set(violation.keys):
            problems.add(violation.message, place_of(run, *violation.keys), violation.hint)
    _check_mixers(run, problems)
    _check_layer_options(run, problems)


def require_data(run: RunConfig) -> None:
    """Refuse to train from a model file without the site file that names its data.

    Raises:
        DataError: no data is named. Later, a missing tokenizer would be reported instead.
    """
    data = run.data
    if not (data.data_path or data.train_data_paths or data.train_stream or data.synthetic):
        raise DataError(
            "no training data is named",
            hint="add a file that names data, tokenizer and folders, such as configs/local_setup.yml "
            "(python prepare_data.py pystdlib makes what it names), or set data_path",
        )


def ignored_keys(values: Mapping[str, Any], provenance: Mapping[str, str]) -> tuple[str, ...]:
    """One line for every ignored key that is not at its default."""
    lines = []
    for key, value in values.items():
        info = catalog().get(key)
        if info is None or info.status != "ignored" or key == "world_size" or thaw(value) == thaw(info.default):
            continue
        lines.append(f"{key} is ignored ({provenance.get(key, 'default')}): {info.reason}")
    return tuple(lines)


_SHORTEST_SHARD, _SHORTEST_WIDE_SHARD, _WIDE = 16_384, 8_192, 2_048


def short_shards(get: Callable[[str], Any]) -> tuple[str, ...]:
    """A line for context-parallel shards so short that the exchange of states takes more than about 4 % of a layer's time.

    Estimated for one H100 per rank, 300 GB/s inside a node and 40 GB/s between nodes.

    Args:
        get: key -> value.
    """
    size, tokens, width = get("context_parallel_size"), get("seq_length") or 0, get("hidden_size") or 0
    shortest = _SHORTEST_WIDE_SHARD if width >= _WIDE else _SHORTEST_SHARD
    if size == 1 or tokens // size >= shortest:
        return ()
    return (
        f"context_parallel_size {size} leaves {tokens // size:,} tokens per rank: below {shortest:,} (hidden_size {width:,})"
        " the exchange of states is estimated to take more than 4 % of a layer on H100s; docs/guides/long-sequences.md",
    )


def place_of(run: RunConfig, *keys: str) -> str:
    """`file:line` of keys; derived and default values have none."""
    # `optimizer.params.lr` is more exact than `optimizer`, so a dictionary counts only if none of its entries has a place.
    exact = [key for key in keys if not any(k.startswith(f"{key}.") and k in run.provenance for k in keys)]
    places = [str(run.provenance.get(key, "default")) for key in exact]
    return ", ".join(dict.fromkeys(p for p in places if p != "default" and not p.startswith("derived")))


def _refused(run: RunConfig, problems: Problems) -> set[str]:
    """Report refused values and refused keys that are not at their default; return the keys."""
    refused: set[str] = set()
    for key, info in catalog().items():
        if info.section == "layers" or info.status != "refused":
            continue
        value = run.unused.get(key) if not info.section else run.get(key)
        if value is not None and thaw(value) != thaw(info.default):
            problems.add(f"{key}: {thaw(value)!r} is not supported", place_of(run, key), why=info.reason)
            refused.add(key)
    for key, reasons in refused_values().items():
        value = run.get(key)
        if value in reasons:
            problems.add(f"{key}: {value} is not supported", place_of(run, key), why=reasons[value])
            refused.add(key)
    return refused


def _check_mixers(run: RunConfig, problems: Problems) -> None:
    """Every mixer of `attention_config` must exist; those of NeoX are reported as not built."""
    known = registry.layer_names()
    for name in dict.fromkeys(_layer_types(run)):
        if name in known:
            continue
        message = f"the token mixer '{name}' is not built" if name in pattern.NEOX_TYPES else f"unknown token mixer '{name}'"
        problems.add(f"attention_config: {message}", place_of(run, "attention_config"), registry.nearest(name, known))


def _check_layer_options(run: RunConfig, problems: Problems) -> None:
    """Options of a mixer that no layer uses are a mistake: they have no effect."""
    first_names = {n: registry.layer_info(n).names[0] for n in _layer_types(run) if n in registry.layer_names()}
    for layer, options in run.layers.items():
        if layer not in first_names.values():
            keys = [f"{layer}_{field}" for field in options]
            hint = f"put {layer} into attention_config, or remove the options"
            problems.add(f"{', '.join(keys)}: no layer is {layer}", place_of(run, *keys), hint)


def _layer_types(run: RunConfig) -> tuple[str, ...]:
    try:
        return run.model.layer_types
    except pattern.PatternError:
        return ()  # reported when it was derived
