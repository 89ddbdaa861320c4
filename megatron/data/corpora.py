"""Built-in corpora: `prepare_data.py NAME` builds their token files.

`pystdlib` is the source text of Python's standard library: real text that exists on every machine, enough to see a small
model learn. Its files are read in sorted order, its tokenizer is trained on them, and a receipt records the result, so that a
second run can verify that nothing is left to do. A killed run is resumed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import platform
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.data.corpus_request import CorpusRequest, PreparedCorpus
from megatron.data.encode import EncodeJob, EncodeOptions, encode_rows
from megatron.data.indexed import IndexedDataset
from megatron.data.rows import RowPosition, Row
from megatron.data.token_format import data_file, index_file
from megatron.data.tokenizers import HFTokenizer, build_tokenizer
from megatron.data.train_tokenizer import train_byte_level_bpe
from megatron.data.wikitext import prepare_enwik8, prepare_wikitext103
from megatron.errors import DataError
from megatron.files import read_json, sha256_of, write_json, write_text

PYSTDLIB_VOCABULARY = 4096
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Corpora that NeoX downloads; these names get a better error than "unknown".
NEOX_CORPORA = frozenset(
    {
        "arxiv",
        "books1",
        "books3",
        "c4",
        "c4_openwebtext",
        "enron",
        "europarl",
        "freelaw",
        "github",
        "hackernews",
        "nih",
        "openwebtext2",
        "pile",
        "pile_subset",
        "pubmed",
        "stackexchange",
        "ubuntu_irc",
        "youtube_subtitles",
    }
)


def prepare(name: str, request: CorpusRequest) -> PreparedCorpus:
    """Build the corpus `name`, or return the complete one on disk.

    Raises:
        DataError: unknown name, a wrong tokenizer, or a folder that cannot be written.
    """
    if name in CORPORA:
        try:
            return CORPORA[name](request)
        except OSError as error:
            where = error.filename or str(request.data_dir)
            raise DataError("the corpus cannot be written", where=where, why=error.strerror) from None
    if name in NEOX_CORPORA:
        raise DataError(
            f"dataset {name!r} is not built in",
            why=f"built in are {', '.join(CORPORA)}",
            hint="turn your copy into token files with tools/datasets/preprocess_data.py --input FILE",
        )
    near = difflib.get_close_matches(name, [*CORPORA, *sorted(NEOX_CORPORA)], n=3)
    raise DataError(
        f"dataset {name!r} is unknown",
        why=f"nearest: {', '.join(near)}" if near else None,
        hint=f"built in: {', '.join(CORPORA)}; for your own text use tools/datasets/preprocess_data.py",
    )


def prepare_pystdlib(request: CorpusRequest) -> PreparedCorpus:
    """`DIR/pystdlib/pystdlib_text_document.{bin,idx}`, `tokenizer.json` (unless another is requested) and `receipt.json`."""
    folder = request.data_dir / "pystdlib"
    prefix, receipt_path = folder / "pystdlib_text_document", folder / "receipt.json"
    own_tokenizer = request.tokenizer_type is None or (request.tokenizer_type == HFTokenizer.name and request.vocab_file is None)
    tokenizer_type = HFTokenizer.name if own_tokenizer else str(request.tokenizer_type)
    vocab_file = folder / "tokenizer.json" if own_tokenizer else _optional_path(request.vocab_file)
    merge_file = None if own_tokenizer else _optional_path(request.merge_file)
    receipt = None if request.force else _valid_receipt(receipt_path, tokenizer_type, vocab_file, merge_file)
    created = receipt is None
    if receipt is None:
        if not own_tokenizer:
            build_tokenizer(tokenizer_type, vocab_file, merge_file)  # report a mistake before creating the folder
        folder.mkdir(parents=True, exist_ok=True)
        # Remove the receipt first: an interrupted run must not leave one that describes other files.
        receipt_path.unlink(missing_ok=True)
        receipt = _build_pystdlib(prefix, tokenizer_type, vocab_file, merge_file, own_tokenizer)
        write_json(receipt_path, receipt)
        (folder / "tokenizer.progress.json").unlink(missing_ok=True)
        for leftover in folder.glob(".*.tmp"):  # of killed runs
            leftover.unlink(missing_ok=True)
    return PreparedCorpus(prefix, tokenizer_type, vocab_file, merge_file, receipt, created)


def python_sources(root: Path) -> Iterator[Path]:
    """The `.py` files under `root` in the order of their relative paths, without installed packages and tests."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _build_pystdlib(
    prefix: Path, tokenizer_type: str, vocab_file: Path | None, merge_file: Path | None, own_tokenizer: bool
) -> dict[str, Any]:
    started = time.monotonic()
    root = Path(sysconfig.get_path("stdlib"))
    texts, undecodable = _read_sources(root)
    source = _Texts(texts)
    if own_tokenizer and vocab_file is not None:
        _train_own_tokenizer(vocab_file, texts, source.identity())
    vocabulary, merges = (None if file is None else str(file) for file in (vocab_file, merge_file))
    job = EncodeJob(tokenizer_type, vocabulary, merges, append_eod=True)
    # A commit every second: the complete job takes about ten.
    options = EncodeOptions(log_interval=1000, commit_seconds=1.0)
    summary = encode_rows(job, source.after, str(prefix).removesuffix("_text_document"), options)
    tokenizer = build_tokenizer(tokenizer_type, vocab_file, merge_file)
    return {
        "corpus": "pystdlib",
        "python": platform.python_version(),
        "documents": len(texts),
        "undecodable_files": undecodable,
        "bytes": source.total_bytes,
        "tokens": summary.tokens["text_document"],
        "tokenizer_type": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "sha256": {file.name: sha256_of(file) for file in (data_file(prefix), index_file(prefix))},
        "seconds": round(time.monotonic() - started, 2),
    }


class _Texts:
    """Texts in memory as rows that can be read from any position."""

    def __init__(self, texts: Sequence[str], start: int = 0) -> None:
        self.texts, self.start, self.done_bytes = texts, start, 0
        self.total_bytes = sum(len(text.encode()) for text in texts)

    def after(self, position: RowPosition) -> _Texts:
        """The texts after a position."""
        return _Texts(self.texts, position.rows)

    def identity(self) -> str:
        """SHA-256 of all texts."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        self.done_bytes = sum(len(text.encode()) for text in self.texts[: self.start])
        for number in range(self.start, len(self.texts)):
            data = self.texts[number].encode()
            self.done_bytes += len(data)
            yield Row(f"text {number}", data, is_json=False, position=RowPosition(0, number + 1))


def _train_own_tokenizer(vocab_file: Path, texts: Sequence[str], identity: str) -> None:
    """Train the corpus's tokenizer, unless an interrupted run already trained it on the same texts."""
    progress_path = vocab_file.with_name("tokenizer.progress.json")
    try:
        recorded = read_json(progress_path)
        if recorded == {"texts": identity, "sha256": sha256_of(vocab_file), "vocab_size": PYSTDLIB_VOCABULARY}:
            return
    except (OSError, ValueError):
        pass
    write_text(vocab_file, train_byte_level_bpe(texts, PYSTDLIB_VOCABULARY))
    write_json(progress_path, {"texts": identity, "sha256": sha256_of(vocab_file), "vocab_size": PYSTDLIB_VOCABULARY})


def _read_sources(root: Path) -> tuple[list[str], int]:
    """The texts of all non-empty files, in order, and the number of files that their declared encoding cannot decode."""
    texts, undecodable = [], 0
    for path in python_sources(root):
        data = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            text = data.decode(encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError):
            undecodable += 1
            continue
        if text.strip():
            texts.append(text.replace("\r\n", "\n").replace("\r", "\n"))
    if not texts:
        raise DataError("there are no Python sources", where=str(root), why="the standard library has no readable .py file")
    return texts, undecodable


def _valid_receipt(path: Path, tokenizer_type: str, vocab_file: Path | None, merge_file: Path | None) -> dict[str, Any] | None:
    """The receipt, if it describes the files next to it and the same tokenizer; else None."""
    try:
        receipt: dict[str, Any] = read_json(path)
        prefix = path.parent / "pystdlib_text_document"
        if any(receipt["sha256"][file.name] != sha256_of(file) for file in (data_file(prefix), index_file(prefix))):
            return None
        tokenizer = build_tokenizer(tokenizer_type, vocab_file, merge_file)
        IndexedDataset(prefix)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None
    return receipt if receipt.get("tokenizer_fingerprint") == tokenizer.fingerprint() else None


def _optional_path(path: str | None) -> Path | None:
    return None if path is None else Path(path)


CORPORA: dict[str, Callable[[CorpusRequest], PreparedCorpus]] = {
    "pystdlib": prepare_pystdlib,
    "wikitext103": prepare_wikitext103,
    "enwik8": prepare_enwik8,
}
