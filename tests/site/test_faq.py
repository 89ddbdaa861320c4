"""A message that the FAQ quotes in a heading is one that the code can print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.reference.messages import messages, sources

ROOT = Path(__file__).resolve().parents[2]
HEADINGS = [line[4:] for line in (ROOT / "docs/faq.md").read_text(encoding="utf-8").splitlines() if line.startswith("### ")]
FOREIGN = {"CUDA out of memory", "trust_remote_code"}  # PyTorch's and transformers' words


def quotes() -> list[str]:
    """The quoted messages of all headings, without numbers and dots that stand for something."""
    found = [quote.replace("`", "") for heading in HEADINGS for quote in re.findall(r"\"([^\"]+)\"", heading)]
    return [quote for quote in found if quote not in FOREIGN]


@pytest.mark.slow
def test_quoted_messages_exist() -> None:
    templates = [re.split(r"\{[^{}]*\}", text.replace("`", "")) for message in messages() for text in message.what]
    patterns = [re.compile(".+".join(map(re.escape, parts))) for parts in templates if len(" ".join(parts).split()) >= 2]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources()).replace("`", "")
    for quote in quotes():
        parts = [part.strip() for part in re.split(r"[\d.:;,]+|nan|'[^']*'", quote)]
        own = [part for part in parts if len(part.split()) >= 2]  # what stands between the values
        assert any(pattern.fullmatch(quote) for pattern in patterns) or (own and all(part in code for part in own)), quote


def test_the_faq_has_enough_entries() -> None:
    assert len(HEADINGS) >= 25 and len(quotes()) >= 20 and len(set(HEADINGS)) == len(HEADINGS)
