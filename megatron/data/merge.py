"""Merges corpora into one and keeps the document boundaries (NeoX's own merge fails or loses them)."""

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
        DataError: the folder has none.
    """
    prefixes = sorted(str(path)[:-4] for path in folder.glob("*.idx") if path.with_suffix(".bin").is_file())
    if not prefixes:
        raise DataError("the folder holds no corpus", where=str(folder), why="no pair of .bin and .idx files")
    return prefixes


def merge_corpora(prefixes: Sequence[str], output: str, checksums: bool = True) -> IndexedDataset:
    """Write the sequences of all corpora, in the order given, to `output.bin` and `.idx`.

    Corpora of u16 and of int32 tokens may be mixed; the result is int32.

    Args:
        prefixes: paths of the corpora without suffix.
        output: path of the result without suffix.
        checksums: write `output.sums.json` too.

    Raises:
        DataError: a corpus is damaged, has another tokenizer than the first, holds no tokens, or is the output itself.
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
            writer.add_corpus(corpus.sizes, corpus.document_boundaries(), corpus.blocks())
    if tokenizer is not None:
        write_meta(output, tokenizer, merged_from=[Path(prefix).name for prefix in prefixes])
    if checksums:
        write_checksums(output)
    return IndexedDataset(output)


def _common_tokenizer(prefixes: Sequence[str]) -> dict[str, Any] | None:
    """The tokenizer that all corpora share; None if one of them has no record of it."""
    metas = [read_meta(prefix) for prefix in prefixes]
    recorded = [(prefix, meta["tokenizer"]) for prefix, meta in zip(prefixes, metas, strict=True) if meta is not None]
    for prefix, tokenizer in recorded:
        if tokenizer["fingerprint"] != recorded[0][1]["fingerprint"]:
            raise DataError(
                "the corpora were made with different tokenizers",
                where=prefix,
                why=f"{tokenizer['type']} of {tokenizer['vocab_size']} entries; {recorded[0][0]}: "
                f"{recorded[0][1]['type']} of {recorded[0][1]['vocab_size']} entries",
                hint="prepare them with one tokenizer",
            )
    return recorded[0][1] if len(recorded) == len(prefixes) else None
