"""Garbage collection in a long run: objects that exist before the first step are frozen, that is, never visited.

A full collection happens when the objects that survived since the last one are a quarter of all old ones. Torch and its
dependencies create half a million: reference cycles among later objects would wait for thousands of steps, and the collection
that comes then visits everything in the middle of a step.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Context of a training: the collector ignores objects that exist now until it ends."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
