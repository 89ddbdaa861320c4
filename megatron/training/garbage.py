"""Memory of a long run: what is there before the first step is set apart from Python's collector.

A full collection happens when the objects that survived since the last one are a quarter of all old ones. Torch and its
companions leave half a million behind: circles among later objects would wait for thousands of steps, and the collection
that comes then walks over everything in the middle of a step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Around a training: objects that exist now are not looked at until it is over."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
