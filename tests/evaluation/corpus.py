"""A tiny corpus on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.data.indexed_writer import IndexedWriter


def write_corpus(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """`.bin` and `.idx` of these token lists; returns the prefix."""
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return str(prefix)
