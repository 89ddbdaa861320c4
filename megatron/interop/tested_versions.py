"""The releases of transformers that exported folders were proved with, and the line that a folder says outside of them.

Packed into the configuration file of every folder with code of its own: it needs nothing but transformers. `config.json`
carries the range as `proved_transformers`, so that a folder keeps the range of its own day.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers.utils import logging

PROVED_TRANSFORMERS = ("5.16.0", "5.24.0")
"""Lowest and newest release; the range in `requirements/requirements.txt` is the same, a test compares them."""


def say_if_unproved(installed: str, lowest: str, newest: str) -> str | None:
    """What to tell a person whose transformers is older or newer than what a folder was proved with.

    Args:
        installed: the version at hand, such as `5.25.0`.
        lowest: the oldest proved version.
        newest: the newest proved version; a patch release counts as its minor release.

    Returns:
        One line, None inside the range.
    """
    at_hand, first, last = _minor_release(installed), _minor_release(lowest), _minor_release(newest)
    if first <= at_hand <= last:
        return None
    return (
        f"this model was proved with transformers {lowest} to {newest}, and {installed} is installed: outputs may differ "
        f'without an error; pip install "transformers>={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"'
    )


def _minor_release(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (-1, -1)


def warn_if_unproved(proved: Any) -> None:
    """Say the line of `say_if_unproved` for the installed transformers, once per process.

    Args:
        proved: (lowest, newest) as `config.json` holds them; anything else, such as None in an older folder, is silent.
    """
    if isinstance(proved, (list, tuple)) and len(proved) == 2:
        line = say_if_unproved(transformers.__version__, str(proved[0]), str(proved[1]))
        if line:
            logging.get_logger().warning_once(line)
