"""A dictionary that cannot be changed, so that a frozen configuration is frozen all the way down.

It stays a `dict` (JSON, pickling and `**options` keep working); only the methods that write are closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn


class FrozenDict(dict[str, Any]):
    """A read-only `dict`; nested dictionaries are read-only too, nested lists become tuples."""

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
