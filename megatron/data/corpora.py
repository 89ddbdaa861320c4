"""Built-in corpora: `prepare_data.py NAME` makes token files of one without a download.

`pystdlib` is the source text of Python's own standard library: real text that lies on every machine, enough to see a small
model learn. Its files are taken in sorted order, its tokenizer is trained on them, and a receipt says what was made, so that a
second run can prove that nothing is left to do. A run that was killed is gone on with.
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
from megatron.data.rows import Place, Row
from megatron.data.token_format import data_file, index_file
from megatron.data.tokenizers import HFTokenizer, build_tokenizer
from megatron.data.train_tokenizer import train_byte_level_bpe
from megatron.data.wikitext import prepare_enwik8, prepare_wikitext103
from megatron.errors import DataError
from megatron.files import read_json, sha256_of, write_json, write_text

PYSTDLIB_VOCABULARY = 4096
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# What NeoX downloads besides; the names deserve a better answer than "unknown".
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
    """Make the corpus `name`, or find it whole.

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
    """`DIR/pystdlib/pystdlib_text_document.{bin,idx}`, `tokenizer.json` (unless another is asked for) and `receipt.json`."""
    folder = request.data_dir / "pystdlib"
    prefix, receipt_path = folder / "pystdlib_text_document", folder / "receipt.json"
    own = request.tokenizer_type is None or (request.tokenizer_type == HFTokenizer.name and request.vocab_file is None)
    tokenizer_type = HFTokenizer.name if own else str(request.tokenizer_type)
    vocab_file = folder / "tokenizer.json" if own else _optional_path(request.vocab_file)
    merge_file = None if own else _optional_path(request.merge_file)
    receipt = None if request.force else _valid_receipt(receipt_path, tokenizer_type, vocab_file, merge_file)
    made = receipt is None
    if receipt is None:
        if not own:
            build_tokenizer(tokenizer_type, vocab_file, merge_file)  # a mistake is told before a folder is made
        folder.mkdir(parents=True, exist_ok=True)
        # The receipt goes first: an interrupted run must not leave one that speaks of other files.
        receipt_path.unlink(missing_ok=True)
        receipt = _make_pystdlib(prefix, tokenizer_type, vocab_file, merge_file, own)
        write_json(receipt_path, receipt)
        (folder / "tokenizer.progress.json").unlink(missing_ok=True)
        for left in folder.glob(".*.tmp"):  # of killed runs
            left.unlink(missing_ok=True)
    return PreparedCorpus(prefix, tokenizer_type, vocab_file, merge_file, receipt, made)


def python_sources(root: Path) -> Iterator[Path]:
    """The `.py` files under `root` in the order of their relative paths; installed packages and tests are left out."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _make_pystdlib(
    prefix: Path, tokenizer_type: str, vocab_file: Path | None, merge_file: Path | None, own: bool
) -> dict[str, Any]:
    started = time.monotonic()
    root = Path(sysconfig.get_path("stdlib"))
    texts, undecodable = _read_sources(root)
    source = _Texts(texts)
    if own and vocab_file is not None:
        _own_tokenizer(vocab_file, texts, source.identity())
    vocabulary, merges = (None if file is None else str(file) for file in (vocab_file, merge_file))
    job = EncodeJob(tokenizer_type, vocabulary, merges, append_eod=True)
    # One point to go on from every second: the whole takes some ten.
    options = EncodeOptions(log_interval=1000, commit_seconds=1.0)
    done = encode_rows(job, source.behind, str(prefix).removesuffix("_text_document"), options)
    tokenizer = build_tokenizer(tokenizer_type, vocab_file, merge_file)
    return {
        "corpus": "pystdlib",
        "python": platform.python_version(),
        "documents": len(texts),
        "undecodable_files": undecodable,
        "bytes": source.total_bytes,
        "tokens": done.tokens["text_document"],
        "tokenizer_type": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "sha256": {file.name: sha256_of(file) for file in (data_file(prefix), index_file(prefix))},
        "seconds": round(time.monotonic() - started, 2),
    }


class _Texts:
    """Texts in memory as rows that can be read from any place on."""

    def __init__(self, texts: Sequence[str], start: int = 0) -> None:
        self.texts, self.start, self.done_bytes = texts, start, 0
        self.total_bytes = sum(len(text.encode()) for text in texts)

    def behind(self, place: Place) -> _Texts:
        """The texts behind a place."""
        return _Texts(self.texts, place.rows)

    def identity(self) -> str:
        """Of all texts."""
        digest = hashlib.sha256()
        for text in self.texts:
            digest.update(hashlib.sha256(text.encode()).digest())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        self.done_bytes = sum(len(text.encode()) for text in self.texts[: self.start])
        for number in range(self.start, len(self.texts)):
            data = self.texts[number].encode()
            self.done_bytes += len(data)
            yield Row(f"text {number}", data, is_json=False, place=Place(0, number + 1))


def _own_tokenizer(vocab_file: Path, texts: Sequence[str], identity: str) -> None:
    """Train it, unless an interrupted run did so from the same texts."""
    note = vocab_file.with_name("tokenizer.progress.json")
    try:
        made = read_json(note)
        if made == {"texts": identity, "sha256": sha256_of(vocab_file), "vocab_size": PYSTDLIB_VOCABULARY}:
            return
    except (OSError, ValueError):
        pass
    write_text(vocab_file, train_byte_level_bpe(texts, PYSTDLIB_VOCABULARY))
    write_json(note, {"texts": identity, "sha256": sha256_of(vocab_file), "vocab_size": PYSTDLIB_VOCABULARY})


def _read_sources(root: Path) -> tuple[list[str], int]:
    """Texts of all files that are not empty, in order, and the number of files that their own encoding cannot read."""
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
        raise DataError("no Python sources were found", where=str(root), why="the standard library has no readable .py file")
    return texts, undecodable


def _valid_receipt(path: Path, tokenizer_type: str, vocab_file: Path | None, merge_file: Path | None) -> dict[str, Any] | None:
    """The receipt, if the files beside it are those it describes and were made with the same tokenizer; else None."""
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
