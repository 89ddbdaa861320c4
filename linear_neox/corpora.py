"""Data: built-in corpora, token files of your text, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron.data import corpora
from megatron.data.corpus_request import CorpusRequest, PreparedCorpus
from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.evaluation import documents


def prepare_data(name: str = "pystdlib", folder: str | Path = "data", *, source: str | Path | None = None) -> PreparedCorpus:
    """Build the token files of a built-in corpus unless they exist, as `prepare_data.py` does.

    Args:
        name: pystdlib (the sources of Python's standard library, no download), wikitext103 or enwik8.
        folder: parent folder; the corpus is written to `folder/NAME/`.
        source: a local copy to use instead of a download.

    Returns:
        `.data_path`, `.tokenizer_type`, `.vocab_file`, and `.yaml_lines()` for a configuration.

    Raises:
        DataError: the name is unknown, or the folder cannot be written.
    """
    request = CorpusRequest(Path(folder), source=None if source is None else Path(source))
    return corpora.prepare(name, request)


def tokenize_files(
    files: str | Path | Sequence[str | Path],
    prefix: str | Path,
    *,
    tokenizer_type: str = "HFTokenizer",
    vocab_file: str | Path | None = None,
    merge_file: str | Path | None = None,
    workers: int = 1,
) -> str:
    """Encode text into token files for training, as `tools/datasets/preprocess_data.py` does.

    Args:
        files: text files, `.jsonl` files with a field `text`, or folders of them.
        prefix: path of the output without suffix.
        tokenizer_type: see the configuration key.
        vocab_file: the tokenizer's file.
        merge_file: merges of a GPT-2 BPE.
        workers: number of processes.

    Returns:
        The value for `data_path`.

    Raises:
        DataError: there is no text, or the tokenizer cannot be read.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    vocabulary, merges = (None if file is None else str(file) for file in (vocab_file, merge_file))
    job = EncodeJob(tokenizer_type, vocabulary, merges, append_eod=True)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    summary = encode_corpus(job, [str(name) for name in names], str(prefix), EncodeOptions(workers=workers))
    return f"{prefix}_{next(iter(summary.tokens))}"


def read_tokens(
    data_path: str | Path, *, split: str = "969, 30, 1", name: str = "test", limit: int | None = None
) -> NDArray[Any]:
    """The tokens of one split of a corpus, for `perplexity`.

    Args:
        data_path: path of the token files without suffix.
        split: shares of train, valid and test, see the key `split`.
        name: train, valid or test.
        limit: maximum number of tokens.

    Raises:
        DataError: the corpus does not exist, or the split is empty.
    """
    return documents.split_tokens(str(data_path), split, name, limit)


def load_tokenizer(
    tokenizer_type: str = "HFTokenizer", vocab_file: str | Path | None = None, merge_file: str | Path | None = None
) -> Tokenizer:
    """Load a tokenizer; the arguments are configuration keys.

    Args:
        tokenizer_type: HFTokenizer, GPT2BPETokenizer, SPMTokenizer, TiktokenTokenizer, CharLevelTokenizer, ...
        vocab_file: its file, or its folder.
        merge_file: merges of a GPT-2 BPE.

    Raises:
        DataError: a file cannot be read.
    """
    return build_tokenizer(tokenizer_type, vocab_file, merge_file)
