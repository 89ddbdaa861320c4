"""Shortens a document to a token budget around its answer, as JRT's harness does (arXiv 2407.05483, `cutting_context`).

An anchor is looked for, and half the budget is spent in front of it. Three things of that rule surprise, and published numbers
contain them: a document that would fit is still shortened when its anchor lies beyond half the budget; one whose anchor is not
found loses everything but its end; one with an anchor of at most one character is left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """The tokenizer that a budget is counted with; `encode` adds no special tokens."""

    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]

    def __deepcopy__(self, memo: object) -> Tokens:
        return self  # lm-eval copies a task's settings, which name it


@dataclass(frozen=True)
class Piece:
    """What is left of a document. found: its anchor was there (or none was asked for). tokens: of the whole document."""

    text: str
    found: bool
    tokens: int
    kept: int


def anchor_place(text: str, anchors: Sequence[str], alternatives: Sequence[str] = ()) -> int:
    """First character of the earliest anchor, whatever its case; else of the first alternative that occurs; else -1."""
    places = [match.start() for anchor in anchors if (match := re.search(re.escape(anchor), text, re.IGNORECASE))]
    for other in () if places else alternatives:
        if match := re.search(re.escape(other), text, re.IGNORECASE):
            return match.start()
    return min(places, default=-1)


def cut_text(
    text: str,
    anchors: Sequence[str],
    tokens: Tokens,
    budget: int,
    alternatives: Sequence[str] = (),
    tok_pos: int | None = None,
) -> Piece | None:
    """The piece of `text` that is kept; None when the example is to be left out.

    Args:
        anchors: none of them means the beginning of the document. budget: tokens. alternatives: tried when no anchor occurs
            (`alt_answers` of a record). tok_pos: a record's own token position for a text in which nothing is found.
    """
    if any(len(anchor) <= 1 for anchor in anchors):
        return None
    text = text.strip()
    ids = tokens.encode(text)
    place = anchor_place(text, anchors, alternatives) if anchors else 0
    at = len(tokens.encode(text[:place])) if place else 0  # -1 leaves all but the last character
    if place < 0 and tok_pos is not None and at > budget:
        at = tok_pos
    start = max(0, at - budget // 2)
    kept = ids[start : min(len(ids), start + budget)]
    return Piece(tokens.decode(kept), place >= 0, len(ids), len(kept))
