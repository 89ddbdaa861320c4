"""The prompts of the recall tasks, once and read twice (JRT-Prompt, arXiv 2407.05483), character by character as published.

A prompt is made from a record whose document may have been cut (`shorten.py`). The small differences between tasks in what is
stripped belong to the published numbers. `key` is written with its first letter in upper case.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]
SWDE_CUE = "Summary of information above..."
_TRIVIA_MARKS = re.compile(r"\[PAR\]|\[DOC\]|\[TLE\]")


def _without_ending(text: str, ending: str) -> str:
    """`text` without every repetition of `ending` at its end, whatever the case."""
    while ending and text.lower().endswith(ending.lower()):
        text = text[: -len(ending)]
    return text


def _label(key: str) -> str:
    return key[:1].upper() + key[1:]


def _closed(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _extraction_twice(key: str, document: str) -> str:
    return f"Information about {_label(key).strip(':')}. {document}\n{document} {_label(key)}:"


def swde(record: Record) -> str:
    """Document and `Key:`."""
    text = _without_ending(record["text"].split(SWDE_CUE)[0], f"{record['key']}:")
    return f"{text.strip().strip('.')}. {_label(record['key'])}:"


def swde_twice(record: Record) -> str:
    """Announced key, document, document, `Key:`."""
    text = _without_ending(record["text"].split(SWDE_CUE)[0], f"{record['key']}:")
    return _extraction_twice(record["key"], _closed(text.strip("\n").strip(".").strip()))


def _fda_document(record: Record) -> str:
    text = _without_ending(record["text"], f"{record['key']}:")
    return _closed(text.strip("\n").strip("."))


def fda(record: Record) -> str:
    """Document and `Key:`."""
    return f"{_fda_document(record)} {_label(record['key'])}:"


def fda_twice(record: Record) -> str:
    """Announced key, document, document, `Key:`."""
    return _extraction_twice(record["key"], _fda_document(record))


def squad(record: Record) -> str:
    """The text, which ends in the middle of a sentence."""
    return str(record["text"]).strip()


def squad_twice(record: Record) -> str:
    """Question, the whole context, then the (perhaps cut) text."""
    return f"{record['question']} {record['context'].split('Question:')[0]}\n{squad(record)}"


def nq(record: Record) -> str:
    """Context and the beginning of the answer's sentence; a question at the context's end is taken off once."""
    question = record["question"].strip()
    return f"{record['context'].strip().removesuffix(question).strip().strip('.')}. {question}"


def drop(record: Record) -> str:
    """As `nq`, the question taken off as often as it stands there, whatever its case."""
    return _cloze(record["context"].strip(), record["question"].strip())


def _cloze(context: str, question: str) -> str:
    return f"{_without_ending(context, question).strip().strip('.')}. {question}"


def _cloze_twice(context: str, question: str, asked: str) -> str:
    document = f"{_without_ending(context, question).strip().strip('.').strip()}."
    return f"{asked} {document}\n{document} {question}"


def nq_twice(record: Record) -> str:
    """The natural question, context, context, the beginning of the answer's sentence."""
    return _cloze_twice(record["context"].strip(), record["question"].strip(), record["orig_question"].strip(":"))


def triviaqa(record: Record) -> str:
    """As `drop`, without the marks of paragraphs, documents and titles; a question in front of a mark and a space stays."""
    return _cloze(_TRIVIA_MARKS.sub("", record["context"].strip()), record["question"].strip())


def triviaqa_twice(record: Record) -> str:
    """As `nq_twice`, without those marks; the natural question stays as it is."""
    context = _TRIVIA_MARKS.sub("", record["context"].strip())
    return _cloze_twice(context, record["question"].strip(), record["orig_question"])


def verbatim(record: Record) -> str:
    """The text with its white space: the Based harness, and VERSION 0 of lm-eval's `swde`, `fda`, `squad_completion`."""
    return str(record["text"])


def stripped(record: Record) -> str:
    """The text without white space around it: VERSION 1 of those tasks (lm-evaluation-harness PR 3795)."""
    return str(record["text"]).strip()


PROMPTS: dict[tuple[str, str], Callable[[Record], str]] = {
    ("swde", "default"): swde,
    ("swde", "twice"): swde_twice,
    ("fda", "default"): fda,
    ("fda", "twice"): fda_twice,
    ("squad", "default"): squad,
    ("squad", "twice"): squad_twice,
    ("nq", "default"): nq,
    ("nq", "twice"): nq_twice,
    ("drop", "default"): drop,
    ("drop", "twice"): nq_twice,
    ("triviaqa", "default"): triviaqa,
    ("triviaqa", "twice"): triviaqa_twice,
    **{(name, "verbatim"): verbatim for name in ("swde", "fda", "squad")},
    **{(name, "stripped"): stripped for name in ("swde", "fda", "squad")},
}
