"""From what the files say to typed values: aliases, `--set`, unknown keys, types. Nothing here knows what keys mean."""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron.config import kinds
from megatron.config.catalog import KeyInfo, catalog
from megatron.config.frozen import thaw
from megatron.config.nested import check_inside, find, is_open, names_inside, odd_numbers, place_of
from megatron.config.problems import Problems
from megatron.config.run_sections import DTYPE_NAMES
from megatron.config.yaml_reader import BAD_YAML, Source, normalise_key, parse_scalar, yaml_problem
from megatron.registry import nearest

_EXTRA = "deepspeed_extra_args"
_SLIP = 0.85  # likeness from which a name of DeepSpeed's own is taken for a slip


def resolve_aliases(source: Source, problems: Problems) -> None:
    """Move NeoX's derived copies (`lr`, `zero_stage`, ...) to the key they copy; two different values are an error."""
    for key in [k for k in source.values if k in catalog() and catalog()[k].status == "alias"]:
        value, place = source.values.pop(key), source.places[key]
        if value is None:
            continue
        target = catalog()[key].reason
        present = _lookup(source.values, target)
        if present is not None and present != value:
            where = source.places.get(target) or source.places.get(target.split(".")[0], "")
            message = f"{key} is {value!r} but {target} is {present!r}, and they are the same setting"
            problems.add(message, f"{place} and {where}", f"keep {target}")
        elif present is None:
            _assign(source, target, value, place)


def move_extra_arguments(source: Source, problems: Problems) -> None:
    """Entries of `deepspeed_extra_args` that are keys here act as if they stood at the top level; the others are left there."""
    extra = source.values.get(_EXTRA)
    if not isinstance(extra, dict):
        return
    left = {}
    for raw_key, value in extra.items():
        key, place = normalise_key(str(raw_key)), source.places.get(f"{_EXTRA}.{raw_key}", source.places.get(_EXTRA, ""))
        if key not in catalog() or key == _EXTRA:
            left[raw_key] = value
        elif source.values.get(key) not in (None, value):
            message = f"{key} is {source.values[key]!r} and {value!r} in {_EXTRA}, and they are the same setting"
            problems.add(message, f"{source.places.get(key, '')} and {place}", f"remove it from {_EXTRA}")
        else:
            source.values[key] = value
            moved = {k.removeprefix(f"{_EXTRA}."): v for k, v in source.places.items() if k.startswith(f"{_EXTRA}.{raw_key}.")}
            source.places |= {key: place, **moved}
    if left:
        source.values[_EXTRA] = left
    else:
        del source.values[_EXTRA]


def apply_overrides(source: Source, overrides: Mapping[str, Any], labels: Mapping[str, str], problems: Problems) -> None:
    """Put command-line values over the files. Dotted keys reach into dictionaries, text is read as YAML."""
    for raw_key, raw_value in overrides.items():
        head, _, rest = str(raw_key).removeprefix(f"{_EXTRA}.").partition(".")
        key, place = normalise_key(head), labels.get(raw_key, "--set")
        info = catalog().get(key)
        if info is not None and info.status == "alias" and not rest:
            head, _, rest = info.reason.partition(".")
            key = head
        try:
            value = _parse_override(raw_value, info if not rest else None)
        except BAD_YAML as error:
            problems.add(
                f"the value of {raw_key} is not valid YAML: {raw_value!r:.80}",
                place,
                f"text that begins like YAML needs quotes inside the shell's: --set '{raw_key}=\"...\"'",
                why=yaml_problem(error),
            )
            continue
        dotted = f"{key}.{rest}" if rest else key
        if rest and not isinstance(source.values.get(key) or {}, dict):
            problems.add(f"{raw_key}: {key} is not a dictionary", place)
            continue
        _forget(source, dotted)
        _assign(source, dotted, value, place)


def check_values(source: Source, problems: Problems) -> tuple[dict[str, Any], set[str]]:
    """The values that are known and of the right type, and the names of the keys that are not."""
    good: dict[str, Any] = {}
    bad: set[str] = set()
    for key, raw in source.values.items():
        info = catalog().get(key)
        if info is None:
            hint = nearest(key, list(catalog())) if _has_near(key) else "see configs/arguments.md for every key"
            problems.add(f"unknown key {key}", source.places.get(key, ""), hint)
            bad.add(key)
        elif raw is not None:
            good[key], fits = _check(info, raw, source, problems)
            if not fits:
                del good[key]
                bad.add(key)
    return good, bad


def _check(info: KeyInfo, raw: Any, source: Source, problems: Problems) -> tuple[Any, bool]:
    """The value of a key in its type, entries of dictionaries included, and whether it is as it should be."""
    odd = list(odd_numbers(info.name, raw))
    for dotted, message in odd:
        problems.add(message, place_of(source, dotted.partition("[")[0]))

    def one(inner: KeyInfo, value: Any, place: str) -> tuple[Any, bool]:
        try:
            return _adapter(inner.name).validate_python(kinds.fit(value, inner.annotation)), True
        except ValidationError as error:
            problems.add(*_type_problem(inner, value, error, place))
            return None, False

    if odd:
        return None, False
    if info.name == _EXTRA and isinstance(raw, dict):
        _check_extra(raw, source, problems)
    if isinstance(raw, dict) and (names_inside(info.name) or is_open(info.name)):
        raw, fits = check_inside(info.name, raw, source, one, problems)
        if not fits:
            return None, False
    return one(info, raw, source.places.get(info.name, ""))


def _check_extra(values: dict[str, Any], source: Source, problems: Problems) -> None:
    """Entries that were left in `deepspeed_extra_args` because they are no keys: those that nearly are one are slips."""
    for name in values:
        if near := difflib.get_close_matches(normalise_key(str(name)), list(catalog()), 1, _SLIP):
            problems.add(f"unknown key {_EXTRA}.{name}", place_of(source, f"{_EXTRA}.{name}"), f"did you mean '{near[0]}'?")


@functools.cache
def _adapter(dotted: str) -> TypeAdapter[Any]:
    info = find(dotted)
    assert info is not None  # only names that were found are checked
    parts = (info.annotation, *info.limits)
    annotation: Any = Annotated[parts] if info.limits else info.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def _has_near(key: str) -> bool:
    return nearest(key, list(catalog())).startswith("did you mean")


def _type_problem(info: KeyInfo, value: Any, error: ValidationError, place: str) -> tuple[str, str, str]:
    first = error.errors(include_url=False)[0]
    whole = first["type"] in ("missing", "too_long")  # a list of the wrong length, not an entry of it
    inside = "" if whole else "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    allowed = kinds.choices(info.annotation)
    if first["type"] == "literal_error" or (allowed and isinstance(value, str)):
        words = [str(choice) for choice in allowed]
        meant = DTYPE_NAMES.get(str(value).lower(), "")
        hint = f"did you mean '{meant}'?" if meant in words else nearest(str(value), words)
        return f"{info.name} is {value!r}, which is not one of {', '.join(words)}", place, hint
    if first["type"].startswith(("greater", "less")):
        return f"{info.name}{inside} is {first['input']!r}: {first['msg'].removeprefix('Input ')}", place, ""
    hint = f"{info.name}: {info.doc}"
    if inside:
        return f"{info.name}{inside} is {first['input']!r}: {first['msg'].removeprefix('Input ')}", place, hint
    if value in ("None", ""):
        hint = "write null to leave it unset"
    elif _fits_unquoted(info, value):
        hint = "write it without quotes"
    return f"{info.name} must be {info.type_name}, got {value!r}", place, hint


def _fits_unquoted(info: KeyInfo, value: Any) -> bool:
    """Whether a text would be a value of the key without its quotes; most texts are not even YAML then."""
    if not isinstance(value, str):
        return False
    try:
        _adapter(info.name).validate_python(kinds.fit(parse_scalar(value), info.annotation))
    except BAD_YAML:  # ValidationError is a ValueError
        return False
    return True


def _parse_override(value: Any, info: KeyInfo | None) -> Any:
    if not isinstance(value, str):
        return thaw(value)
    parsed = parse_scalar(value)
    if info is not None and kinds.accepts(info.annotation, str) and not isinstance(parsed, (str, type(None))):
        return value  # a name such as 12 or 2024-01-01 stays text where text is wanted
    return parsed


def _lookup(values: dict[str, Any], dotted: str) -> Any:
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node


def _assign(source: Source, dotted: str, value: Any, place: str) -> None:
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


def _forget(source: Source, dotted: str) -> None:
    """Drop the places of what is about to be replaced, so that no message names a line that no longer counts."""
    for key in [k for k in source.places if k == dotted or k.startswith(f"{dotted}.")]:
        del source.places[key]
