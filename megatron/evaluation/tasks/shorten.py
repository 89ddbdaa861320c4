"""Shortens a document to a token budget around its answer, as JRT's harness does (arXiv 2407.05483, `cutting_context`).

Half of the budget precedes the anchor. Three consequences of that rule are surprising, and part of the published results:
a document that fits is still shortened if its anchor is beyond half the budget; a document without its anchor
loses everything but its end; an example with an anchor of at most one character is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """The tokenizer that counts the budget; `encode` adds no special tokens."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]

    def __deepcopy__(self, memo: object) -> Tokens:
        return self  # lm-eval copies a task's settings, which contain it


@dataclass(frozen=True)
class Excerpt:
    """A shortened document.

    Attributes:
        text: the excerpt.
        has_anchor: the document contains its anchor (or needs none).
        tokens: tokens of the complete document.
        length: tokens of the excerpt.
    """

    text: str
    has_anchor: bool
    tokens: int
    length: int


def anchor_position(text: str, anchors: Sequence[str], alternatives: Sequence[str] = ()) -> int:
    """Index of the first character of the earliest anchor, ignoring case; else of the first alternative found; else -1."""
    positions = [match.start() for anchor in anchors if (match := re.search(re.escape(anchor), text, re.IGNORECASE))]
    for other in () if positions else alternatives:
        if match := re.search(re.escape(other), text, re.IGNORECASE):
            return match.start()
    return min(positions, default=-1)


def shorten(
    text: str,
    anchors: Sequence[str],
    tokens: Tokens,
    budget: int,
    alternatives: Sequence[str] = (),
    tok_pos: int | None = None,
) -> Excerpt | None:
    """Shorten `text`; None if the example must be dropped.

    Args:
        text: the document.
        anchors: strings to keep; empty: the beginning of the document.
        tokens: tokenizer that counts the budget.
        budget: maximum number of tokens.
        alternatives: used if no anchor occurs (`alt_answers` of a record).
        tok_pos: token position in the record, for a text without anchor and alternatives.
    """
    if any(len(anchor) <= 1 for anchor in anchors):
        return None
    text = text.strip()
    ids = tokens.encode(text)
    position = anchor_position(text, anchors, alternatives) if anchors else 0
    at = len(tokens.encode(text[:position])) if position else 0  # -1 leaves all but the last character
    if position < 0 and tok_pos is not None and at > budget:
        at = tok_pos
    start = max(0, at - budget // 2)
    excerpt_ids = ids[start : min(len(ids), start + budget)]
    return Excerpt(tokens.decode(excerpt_ids), position >= 0, len(ids), len(excerpt_ids))
