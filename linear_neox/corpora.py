"""Data: built-in corpora, token files of your own text, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from megatron.data import corpora
from megatron.data.corpus_request import CorpusRequest, PreparedCorpus
from megatron.data.encode import EncodeJob, EncodeOptions, encode_corpus
from megatron.data.tokenizers import Tokenizer, build_tokenizer
from megatron.evaluation import documents as stream


def prepare_data(name: str = "pystdlib", folder: str | Path = "data", *, source: str | Path | None = None) -> PreparedCorpus:
    """Make the token files of a built-in corpus, or find them whole, as `prepare_data.py` does.

    Args:
        name: pystdlib (the sources of Python's standard library, no download), wikitext103 or enwik8.
        folder: the corpus goes into `folder/NAME/`.
        source: a local copy of what would be downloaded.

    Returns:
        `.data_path`, `.tokenizer_type`, `.vocab_file`, and `.yaml_lines()` for a configuration.

    Raises:
        DataError: an unknown name, or a folder that cannot be written.
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
    """Turn text into the token files that training reads, as `tools/datasets/preprocess_data.py` does.

    Args:
        files: text files, `.jsonl` files with a field `text`, or folders of them.
        prefix: path of the output without its ending.
        tokenizer_type: as of the configuration's key.
        vocab_file: the tokenizer's file.
        merge_file: merges of a GPT-2 BPE.
        workers: processes.

    Returns:
        The value for `data_path`.

    Raises:
        DataError: there is no text, or the tokenizer cannot be read.
    """
    names = [files] if isinstance(files, (str, Path)) else list(files)
    vocabulary, merges = (None if file is None else str(file) for file in (vocab_file, merge_file))
    job = EncodeJob(tokenizer_type, vocabulary, merges, append_eod=True)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    done = encode_corpus(job, [str(name) for name in names], str(prefix), EncodeOptions(workers=workers))
    return f"{prefix}_{next(iter(done.tokens))}"


def read_tokens(
    data_path: str | Path, *, split: str = "969, 30, 1", name: str = "test", limit: int | None = None
) -> NDArray[Any]:
    """The tokens of one split of a corpus, for `perplexity`.

    Args:
        data_path: the pair of token files without its ending.
        split: shares of train, valid and test, as of the key `split`.
        name: train, valid or test.
        limit: tokens at most.

    Raises:
        DataError: no such corpus, or an empty split.
    """
    return stream.split_tokens(str(data_path), split, name, limit)


def load_tokenizer(
    tokenizer_type: str = "HFTokenizer", vocab_file: str | Path | None = None, merge_file: str | Path | None = None
) -> Tokenizer:
    """The tokenizer that the keys of these names describe.

    Args:
        tokenizer_type: HFTokenizer, GPT2BPETokenizer, SPMTokenizer, TiktokenTokenizer, CharLevelTokenizer, ...
        vocab_file: its file, or its folder.
        merge_file: merges of a GPT-2 BPE.

    Raises:
        DataError: it cannot be read.
    """
    return build_tokenizer(tokenizer_type, vocab_file, merge_file)
