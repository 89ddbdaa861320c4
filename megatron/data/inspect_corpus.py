"""Statistics, a length histogram and a full verification of a corpus, for tools/data.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.checksums import verify_blocks
from megatron.data.fingerprint import read_meta
from megatron.data.indexed import IndexedDataset
from megatron.data.tokenizer_base import Tokenizer
from megatron.errors import DataError
from megatron.files import atomic_open

_PERCENTILES = (1, 10, 25, 50, 75, 90, 99)


def corpus_statistics(corpus: IndexedDataset) -> dict[str, Any]:
    """Counts, and the distribution of lengths in tokens per sequence."""
    sizes = corpus.sizes
    return {
        "prefix": corpus.prefix,
        "format": "TNTIDX" if corpus.legacy else "MMIDIDX",
        "dtype": corpus.dtype.name,
        "sequences": len(corpus),
        "documents": len(corpus.doc_idx) - 1 if len(corpus.doc_idx) > 1 else None,
        "tokens": corpus.total_tokens,
        "bytes": corpus.bin_path.stat().st_size + corpus.idx_path.stat().st_size,
        "empty_sequences": int((sizes == 0).sum()),
        "length": {
            "min": int(sizes.min()),
            "mean": corpus.total_tokens / len(corpus),
            "max": int(sizes.max()),
            "percentiles": dict(zip(map(str, _PERCENTILES), np.percentile(sizes, _PERCENTILES).tolist(), strict=True)),
        },
        "meta": read_meta(corpus.prefix),
    }


def histogram(sizes: NDArray[np.int32], path: Path) -> None:
    """Write a histogram (PNG) of the lengths with bins that double.

    Raises:
        DataError: matplotlib is missing, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise DataError("a histogram needs the package matplotlib", hint="pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = 2.0 ** np.arange(0, np.ceil(np.log2(max(2, int(sizes.max()) + 1))) + 1)
    counts, edges = np.histogram(sizes, bins=np.concatenate([[0], steps]))
    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    axes.bar(range(len(counts)), counts, width=0.95)
    axes.set_xticks(range(len(counts)), [f"{int(edge)}" for edge in edges[:-1]], rotation=60)
    axes.set_xlabel("tokens per sequence (from this number to the next)")
    axes.set_ylabel("sequences")
    axes.set_title(f"{len(sizes)} sequences, {int(sizes.sum(dtype=np.int64))} tokens")
    figure.tight_layout()
    try:
        with atomic_open(path) as handle:
            figure.savefig(handle, format="png")
    except OSError as error:
        raise DataError("the histogram cannot be written", where=str(path), why=error.strerror) from None
    finally:
        pyplot.close(figure)


def excerpt(corpus: IndexedDataset, sequence: int, length: int, tokenizer: Tokenizer | None) -> str:
    """The first `length` tokens of a sequence, as text, or as ids without a tokenizer."""
    tokens = corpus.get(sequence, 0, min(length, int(corpus.sizes[sequence]) if 0 <= sequence < len(corpus) else 0)).tolist()
    return str(tokens) if tokenizer is None else tokenizer.detokenize(tokens)


def verify(prefix: str, vocab_size: int | None = None) -> dict[str, Any]:
    """Verify a pair completely: index, lengths, checksums (if it has any) and the range of the tokens.

    Args:
        prefix: path of the pair without suffix.
        vocab_size: entries of the tokenizer; None: those of `.meta.json`, if it exists.

    Raises:
        DataError: names the file and the position of the first error.
    """
    corpus = IndexedDataset(prefix)
    meta = read_meta(prefix)
    checked = verify_blocks(prefix)
    if vocab_size is None and meta is not None:
        vocab_size = int(meta["tokenizer"]["vocab_size"])
    # Labels are negative where the loss is masked, so the range is checked for token files only.
    labels = meta is not None and Path(prefix).name.endswith("label_document")
    if vocab_size is not None and not labels:
        corpus.check_vocabulary(vocab_size)
    return {
        "prefix": prefix,
        "sequences": len(corpus),
        "tokens": corpus.total_tokens,
        "checksums": "right" if checked else "none: a flipped bit in the tokens cannot be found",
        "vocabulary": vocab_size if not labels else None,
    }
