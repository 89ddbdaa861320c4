"""Joins corpora into one, with the document boundaries right (NeoX's own merge fails, or leaves them out)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.checksums import write_checksums
from megatron.data.fingerprint import read_meta, write_meta
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_writer import IndexedWriter
from megatron.errors import DataError


def prefixes_in(folder: Path) -> list[str]:
    """The corpora of a folder, sorted by name.

    Raises:
        DataError: there is none.
    """
    found = sorted(str(path)[:-4] for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    if not found:
        raise DataError("the folder holds no corpus", where=str(folder), why="no pair of .bin and .idx files")
    return found


def merge_corpora(prefixes: Sequence[str], output: str, checksums: bool = True) -> IndexedDataset:
    """Write the sequences of all corpora, in the order given, to `output.bin` and `.idx`.

    u16 and int32 may be mixed: the result is int32.

    Raises:
        DataError: a corpus is damaged, made with another tokenizer than the first, holds no tokens, or is the output itself.
    """
    if not prefixes:
        raise DataError("nothing to merge", why="no corpus is named")
    if Path(output).resolve() in {Path(prefix).resolve() for prefix in prefixes}:
        raise DataError("a corpus cannot be merged into itself", where=output, hint="give another --output-prefix")
    corpora = [IndexedDataset(prefix) for prefix in prefixes]
    for corpus in corpora:
        corpus.require_integers()
    tokenizer = _common_tokenizer(prefixes)
    dtype = np.result_type(*(corpus.dtype for corpus in corpora))
    with IndexedWriter(output, dtype) as writer:
        for corpus in corpora:
            writer.add_corpus(corpus.sizes, corpus.document_borders(), corpus.blocks())
    if tokenizer is not None:
        write_meta(output, tokenizer, merged_from=[Path(prefix).name for prefix in prefixes])
    if checksums:
        write_checksums(output)
    return IndexedDataset(output)


def _common_tokenizer(prefixes: Sequence[str]) -> dict[str, Any] | None:
    """The tokenizer of all; None if one of them does not say."""
    metas = [read_meta(prefix) for prefix in prefixes]
    known = [(prefix, meta["tokenizer"]) for prefix, meta in zip(prefixes, metas, strict=True) if meta is not None]
    for prefix, tokenizer in known:
        if tokenizer["fingerprint"] != known[0][1]["fingerprint"]:
            raise DataError(
                "the corpora were made with different tokenizers",
                where=prefix,
                why=f"{tokenizer['type']} of {tokenizer['vocab_size']} entries; {known[0][0]}: "
                f"{known[0][1]['type']} of {known[0][1]['vocab_size']} entries",
                hint="prepare them with one tokenizer",
            )
    return known[0][1] if len(known) == len(prefixes) else None
