"""From the values of the files to typed ones: `--set`, unknown keys, types. Nothing here knows what keys mean."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron.config import key_types
from megatron.config.catalog import KeyInfo, catalog
from megatron.config.frozen import thaw
from megatron.config.nested import find, is_open, names_inside, odd_numbers, place_of
from megatron.config.problems import Problems
from megatron.config.run_sections import DTYPE_NAMES
from megatron.config.spellings import EXTRA, assign
from megatron.config.yaml_reader import BAD_YAML, Source, normalise_key, parse_scalar, yaml_problem
from megatron.registry import nearest

# NeoX takes a hyphen for an underscore, and one of its files has 1.0e_8 as a number.
_EXPONENT = re.compile(r"([0-9.]+[eE])_([0-9]+)")
_SLIP = 0.85  # similarity to one of our keys from which a name is taken for a misspelling


def apply_overrides(source: Source, overrides: Mapping[str, Any], labels: Mapping[str, str], problems: Problems) -> None:
    """Override the files by command-line values. Dotted keys reach into dictionaries, text is read as YAML."""
    for raw_key, raw_value in overrides.items():
        head, _, rest = str(raw_key).removeprefix(f"{EXTRA}.").partition(".")
        key, place = normalise_key(head), labels.get(raw_key, "--set")
        info = catalog().get(key)
        if info is not None and info.status == "alias" and not rest:
            head, _, rest = info.reason.partition(".")
            key = head
        try:
            value = _parse_override(raw_value, info if not rest else None)
        except BAD_YAML as error:
            message = f"the value of {raw_key} is not valid YAML: {raw_value!r:.80}"
            hint = f"text that begins like YAML needs quotes inside the shell's: --set '{raw_key}=\"...\"'"
            problems.add(message, place, hint, why=yaml_problem(error))
            continue
        dotted = f"{key}.{rest}" if rest else key
        if rest and not isinstance(source.values.get(key) or {}, dict):
            problems.add(f"{raw_key}: {key} is not a dictionary", place)
            continue
        # No message may name a line whose value is replaced.
        for name in [n for n in source.places if n == dotted or n.startswith(f"{dotted}.")]:
            del source.places[name]
        assign(source, dotted, value, place)


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
            odd = list(odd_numbers(key, raw))
            for dotted, message in odd:
                problems.add(message, place_of(source, dotted.partition("[")[0]))
            value, fits = (None, False) if odd else _check(info, raw, source, problems)
            if fits:
                good[key] = value
            else:
                bad.add(key)
    return good, bad


def _check(info: KeyInfo, value: Any, source: Source, problems: Problems) -> tuple[Any, bool]:
    """The value of a key or entry in its type, and whether it and all its own entries fit."""
    if info.name == EXTRA and isinstance(value, dict):
        _check_extra(value, source, problems)
    if isinstance(value, dict) and (names_inside(info.name) or is_open(info.name)):
        value, fits = _check_entries(info.name, value, source, problems)
        if not fits:
            return None, False
    try:
        return _adapter(info.name).validate_python(key_types.fit(value, info.annotation)), True
    except ValidationError as error:
        problems.add(*_type_problem(info, value, error, place_of(source, info.name)))
        return None, False


def _check_entries(dotted: str, values: dict[str, Any], source: Source, problems: Problems) -> tuple[dict[str, Any], bool]:
    """The dictionary `dotted` with its entries in their types, and whether all of them fit."""
    fitted, good = dict(values), True
    for name, value in values.items():
        info = find(f"{dotted}.{name}")
        if info is None and not is_open(dotted):
            place, hint = place_of(source, f"{dotted}.{name}"), nearest(str(name), list(names_inside(dotted)))
            problems.add(f"unknown key {dotted}.{name}", place, hint)
            good = False
        elif info is not None and value is not None:
            match = _EXPONENT.fullmatch(value) if isinstance(value, str) and key_types.accepts(info.annotation, float) else None
            number = float(f"{match.group(1)}-{match.group(2)}") if match else value
            fitted[name], fits = _check(info, number, source, problems)
            good = good and fits
    return fitted, good


def _check_extra(values: dict[str, Any], source: Source, problems: Problems) -> None:
    """Report entries of `deepspeed_extra_args` that are nearly keys."""
    for name in values:
        if near := difflib.get_close_matches(normalise_key(str(name)), list(catalog()), 1, _SLIP):
            problems.add(f"unknown key {EXTRA}.{name}", place_of(source, f"{EXTRA}.{name}"), f"did you mean '{near[0]}'?")


@functools.cache
def _adapter(dotted: str) -> TypeAdapter[Any]:
    info = find(dotted)
    assert info is not None  # only known names are checked
    parts = (info.annotation, *info.limits)
    annotation: Any = Annotated[parts] if info.limits else info.annotation
    return TypeAdapter(annotation, config=ConfigDict(strict=True))


def _has_near(key: str) -> bool:
    return nearest(key, list(catalog())).startswith("did you mean")


def _type_problem(info: KeyInfo, value: Any, error: ValidationError, place: str) -> tuple[str, str, str]:
    first = error.errors(include_url=False)[0]
    whole = first["type"] in ("missing", "too_long")  # a list of the wrong length, not an entry of it
    inside = "" if whole else "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
    allowed = key_types.choices(info.annotation)
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
    """Would a text be a value of the key without its quotes? Most texts are not even YAML then."""
    if not isinstance(value, str):
        return False
    try:
        _adapter(info.name).validate_python(key_types.fit(parse_scalar(value), info.annotation))
    except BAD_YAML:  # ValidationError is a ValueError
        return False
    return True


def _parse_override(value: Any, info: KeyInfo | None) -> Any:
    if not isinstance(value, str):
        return thaw(value)
    parsed = parse_scalar(value)
    if info is not None and key_types.accepts(info.annotation, str) and not isinstance(parsed, (str, type(None))):
        return value  # a name such as 12 or 2024-01-01 stays text if the key is text
    return parsed
