"""Other ways to write a key, brought to the one that counts: aliases, `deepspeed_extra_args`, keys that NeoX dropped."""

from __future__ import annotations

import copy
from typing import Any

from megatron.config.catalog import catalog
from megatron.config.frozen import thaw
from megatron.config.problems import Problems
from megatron.config.yaml_reader import Source, normalise_key

EXTRA = "deepspeed_extra_args"


def resolve_aliases(source: Source, problems: Problems) -> None:
    """Move NeoX's derived copies (`lr`, `zero_stage`, ...) to the key they copy; two different values are an error."""
    for key in [k for k in source.values if k in catalog() and catalog()[k].status == "alias"]:
        value, place = source.values.pop(key), source.places[key]
        target = catalog()[key].reason
        present = lookup(source.values, target)
        if value is not None and present is None:
            assign(source, target, value, place)
        elif value not in (None, present):
            message = f"{key} is {value!r} but {target} is {present!r}, and they are the same setting"
            where = source.places.get(target) or source.places.get(target.split(".")[0], "")
            problems.add(message, f"{place} and {where}", f"keep {target}")


def move_extra_arguments(source: Source, problems: Problems) -> None:
    """Move entries of `deepspeed_extra_args` that are keys here to the top level; the others stay."""
    extra = source.values.get(EXTRA)
    if not isinstance(extra, dict):
        return
    rest = {}
    for raw_key, value in extra.items():
        key, place = normalise_key(str(raw_key)), source.places.get(f"{EXTRA}.{raw_key}", source.places.get(EXTRA, ""))
        if key not in catalog() or key == EXTRA:
            rest[raw_key] = value
        elif source.values.get(key) not in (None, value):
            message = f"{key} is {source.values[key]!r} and {value!r} in {EXTRA}, and they are the same setting"
            problems.add(message, f"{source.places.get(key, '')} and {place}", f"remove it from {EXTRA}")
        else:
            source.values[key] = value
            inner = {k.removeprefix(f"{EXTRA}."): v for k, v in source.places.items() if k.startswith(f"{EXTRA}.{raw_key}.")}
            source.places |= {key: place, **inner}
    source.values[EXTRA] = rest
    if not rest:
        del source.values[EXTRA]


def translate_old_keys(source: Source) -> None:
    """Replace keys that NeoX itself no longer knows by those that took their place, unless these are given too.

    They need another key's value: a share of the learning rate becomes a rate, a number of steps a share of the schedule. Where
    that value is missing they are refused.
    """
    values = source.values
    optimizer = values.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    lr = params.get("lr") if isinstance(params, dict) else values.get("lr")
    steps = values.get("lr_decay_iters") or values.get("train_iters")
    if _numbers(values.get("decay_lr_to"), lr) and "min_lr" not in values:
        _replace(source, "decay_lr_to", "min_lr", values["decay_lr_to"] * lr)
    if _numbers(values.get("warmup_iters"), steps) and steps and "warmup" not in values:
        _replace(source, "warmup_iters", "warmup", values["warmup_iters"] / steps)
    # "groupedquery" adds nothing to num_kv_heads, nor "multihead" to its absence; "multiquery" alone is one key/value head.
    kind, grouped = values.get("attention_type"), bool(values.get("num_kv_heads"))
    if (kind, grouped) in (("groupedquery", True), ("multihead", False)):
        del values["attention_type"], source.places["attention_type"]
    elif (kind, grouped) == ("multiquery", False):
        _replace(source, "attention_type", "num_kv_heads", 1)


def _numbers(*values: Any) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _replace(source: Source, old: str, new: str, value: Any) -> None:
    del source.values[old]
    source.values[new], source.places[new] = value, source.places.pop(old)


def lookup(values: dict[str, Any], dotted: str) -> Any:
    """The value of a (dotted) key, None if there is none."""
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def assign(source: Source, dotted: str, value: Any, place: str) -> None:
    """Set a (dotted) key; a missing dictionary starts from the key's default, so one entry can be changed alone."""
    head, *rest = dotted.split(".")
    source.places[dotted] = place
    if not rest:
        source.values[head] = value
        return
    if not isinstance(source.values.get(head), dict):
        info = catalog().get(head)
        source.values[head] = thaw(info.default) if info is not None and info.default else {}
        source.places[head] = place
    else:
        source.values[head] = copy.deepcopy(source.values[head])
    node, name = source.values[head], head
    for part in rest[:-1]:
        name = f"{name}.{part}"
        if not isinstance(node.get(part), dict):
            node[part], source.places[name] = {}, place
        node = node[part]
    node[rest[-1]] = value
