"""Imports transformers' model classes without the messages of torchao, which they import where it is installed.

Nothing of torchao is used here, and its messages are not about the user's model: it reports shared libraries that were built
for other Pythons and devices, and it registers two of its enumerations in a way that torch 2.13 deprecates.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping

_Filter = Callable[[logging.LogRecord], bool]


def _is_not_a_library(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load ")


def _is_not_an_enumeration(record: logging.LogRecord) -> bool:
    subject = record.args[0] if isinstance(record.args, tuple) and record.args else None
    return not str(getattr(subject, "__module__", "")).startswith("torchao.")


_FILTERS: Mapping[str, _Filter] = {"torchao": _is_not_a_library, "torch.utils._pytree": _is_not_an_enumeration}


def import_model_classes() -> None:
    """Import `transformers.modeling_utils`; the loggers are as before when it returns."""
    for name, keep in _FILTERS.items():
        logging.getLogger(name).addFilter(keep)
    try:
        importlib.import_module("transformers.modeling_utils")
    finally:
        for name, keep in _FILTERS.items():
            logging.getLogger(name).removeFilter(keep)
