"""The releases of transformers that exports are tested with, and the warning of a folder outside of that range.

Packed into the configuration file of every folder with its own code; needs nothing but transformers. `config.json` holds the
range as `proved_transformers`, so that a folder keeps the range of its export.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers.utils import logging

PROVED_TRANSFORMERS = ("5.16.0", "5.24.0")
"""Lowest and newest release; the range in `requirements/requirements.txt` is the same, a test compares them."""


def say_if_unproved(installed: str, lowest: str, newest: str) -> str | None:
    """The warning for a transformers that is older or newer than those a folder was tested with.

    Args:
        installed: the installed version, such as `5.25.0`.
        lowest: the oldest tested version.
        newest: the newest tested version; a patch release counts as its minor release.

    Returns:
        One line; None inside the range.
    """
    current, first, last = _minor_release(installed), _minor_release(lowest), _minor_release(newest)
    if first <= current <= last:
        return None
    return (
        f"this model was tested with transformers {lowest} to {newest}, and {installed} is installed: outputs may differ "
        f'without an error; pip install "transformers>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"'
    )


def _minor_release(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (-1, -1)


def warn_if_unproved(proved: Any) -> None:
    """Log the warning of `say_if_unproved` for the installed transformers, once per process.

    Args:
        proved: (lowest, newest) from `config.json`; anything else, such as None in an older folder, is ignored.
    """
    if isinstance(proved, (list, tuple)) and len(proved) == 2:
        line = say_if_unproved(transformers.__version__, str(proved[0]), str(proved[1]))
        if line:
            logging.get_logger().warning_once(line)
