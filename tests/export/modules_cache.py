"""One private place per test process for the code that transformers copies out of exported folders.

It cannot be one per test: transformers keeps the place as a package (`transformers_modules`) for as long as the process lives.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile

from transformers import dynamic_module_utils


@functools.cache
def use_private_modules_cache() -> str:
    """Send transformers to a temporary folder that goes away with the process; returns it."""
    folder = tempfile.mkdtemp(prefix="hf_modules_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dynamic_module_utils.HF_MODULES_CACHE = folder
    return folder
