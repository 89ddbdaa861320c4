"""What makes a configuration immutable: the base class of its sections, and a read-only dictionary for values inside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class FrozenDict(dict[str, Any]):
    """A read-only `dict`, inner dictionaries included; inner lists become tuples. JSON, pickling and `**` work as usual."""

    def _closed(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("the configuration is frozen; use --set KEY=VALUE or a second YAML file to change it")

    __setitem__ = __delitem__ = __ior__ = _closed
    update = setdefault = pop = popitem = clear = _closed

    def __reduce__(self) -> tuple[Any, ...]:
        # The default way to unpickle or copy a dict subclass is item assignment, which is closed here.
        return (freeze, (dict(self),))


def freeze(value: Any) -> Any:
    """`value` with every dictionary read-only and every list a tuple."""
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value


def thaw(value: Any) -> Any:
    """The reverse of `freeze`: plain dictionaries and lists, as YAML and JSON have them."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(item) for item in value]
    return value


Options = Annotated[dict[str, Any], AfterValidator(freeze)]
Names = tuple[str, ...]


class Section(BaseModel):
    """A frozen, strictly typed group of keys. Field names are flat keys, so a name is unique over all sections."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)


def own(default: Any, doc: str, **bounds: Any) -> Any:
    """A field for a key that GPT-NeoX does not have.

    Args:
        default: its default.
        doc: its documentation, a sentence or more.
        bounds: pydantic's, such as `ge=0`.
    """
    return Field(default=default, description=doc, **bounds)
