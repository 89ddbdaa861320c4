"""Label files: a second pair of token files, aligned token by token with the text, that says which tokens count in the loss.

A label is the token itself, or a negative number where the loss is masked (NeoX writes -100).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.indexed import IndexedDataset
from megatron.data.order import CHUNK, Documents
from megatron.errors import DataError

IGNORED = -100


def is_unmarked(labels: NDArray[np.integer] | None) -> bool:
    """Whether a document has labels and none of them is masked: the marker before which it is masked does not occur in it."""
    return labels is not None and len(labels) > 0 and not (labels == IGNORED).any()


class Labels:
    """The labels of a corpus.

    Args:
        indexed: the label files.
        text: the corpus they belong to.

    Raises:
        DataError: the two do not have the same sequences of the same lengths.
    """

    def __init__(self, indexed: IndexedDataset, text: IndexedDataset) -> None:
        indexed.require_integers()
        if len(indexed) != len(text):
            raise DataError(
                f"the label file has {len(indexed)} sequences and the corpus {len(text)}",
                where=indexed.prefix,
                why=f"labels align token by token with {text.prefix}",
            )
        for at in range(0, len(text), CHUNK):
            differs = indexed.sizes[at : at + CHUNK] != text.sizes[at : at + CHUNK]
            if differs.any():
                wrong = at + int(np.argmax(differs))
                raise DataError(
                    f"sequence {wrong} has {indexed.sizes[wrong]} labels and {text.sizes[wrong]} tokens",
                    where=indexed.prefix,
                    why=f"labels align token by token with {text.prefix}",
                )
        self.indexed = indexed

    def ignored(self, documents: Documents, length: int) -> NDArray[np.bool_]:
        """[d] bool: True where none of the document's first `length` labels counts in the loss."""
        return np.array(
            [not (self.indexed.get(int(d), 0, self._head(int(d), length)) >= 0).any() for d in documents], dtype=bool
        )

    def _head(self, document: int, length: int) -> int:
        return min(int(self.indexed.sizes[document]), length)
