"""A small `tokenizer.json` and variants of it, as people have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

SENTENCE = "the cat sat on the mat "
DOCUMENTS = [SENTENCE * 30, "hello world", "Zz Zz", "x"]
LENGTHS = [181, 10, 5, 1]


def backend() -> Backend:
    """Byte pairs of one sentence: 270 ids, 0 ends a document, 1 pads."""
    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([SENTENCE * 20], trainer)
    return made


def write(
    path: Path, change: Callable[[Backend], Any] | None = None, edit: Callable[[dict[str, Any]], Any] | None = None
) -> Path:
    """Save it to `path`, changed through the library or in the JSON."""
    made = backend()
    if change is not None:
        change(made)
    content = json.loads(made.to_str())
    if edit is not None:
        edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def around(before: str = "", after: str = "") -> Callable[[Backend], Any]:
    """A change that makes a template of tokens with blanks between; new ones are added."""

    def change(made: Backend) -> None:
        names = [*before.split(), *after.split()]
        made.add_special_tokens([name for name in dict.fromkeys(names) if made.token_to_id(name) is None])
        special = [(name, made.token_to_id(name)) for name in dict.fromkeys(names)]
        made.post_processor = processors.TemplateProcessing(f"{before} $A {after}".strip(), special_tokens=special)

    return change
