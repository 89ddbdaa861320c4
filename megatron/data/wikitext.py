"""WikiText-103 and enwik8, the standard benchmark corpora of language models, with their official splits.

They are downloaded, or read from a local copy (`--from FILE`). WikiText-103 is tokenised as its papers do (arXiv 1609.07843,
2108.12409): words are split at white space, an end-of-document token follows every line, blank lines included; a document is an
article, so shuffling documents keeps each text together. enwik8 has 90, 5 and 5 million bytes.
"""

from __future__ import annotations

import io
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from megatron.data.corpus_request import CorpusRequest, PreparedCorpus, PreparedSplits
from megatron.data.indexed_writer import IndexedWriter
from megatron.data.token_format import data_file, dtype_for_vocab, index_file
from megatron.data.tokenizer_base import EOD_TEXT, Tokenizer
from megatron.data.tokenizers import CharLevelTokenizer, HFTokenizer, build_tokenizer
from megatron.errors import DataError
from megatron.files import atomic_open, read_json, sha256_of, write_json, write_text

WIKITEXT_URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ENWIK8_URL = "https://mattmahoney.net/dc/enwik8.zip"
ENWIK8_BYTES = (90_000_000, 5_000_000, 5_000_000)
_SPLITS = ("train", "valid", "test")
_LARGEST = 1 << 30  # bytes of an unpacked file; the largest has half of it
_HEADING = re.compile(r" = [^=].*[^=] = \n?")
_UNKNOWN = "<unk>"


def prepare_wikitext103(request: CorpusRequest) -> PreparedCorpus:
    """`DIR/wikitext103/{train,valid,test}_text_document.{bin,idx}`, and `tokenizer.json` unless another is requested."""

    def make(folder: Path, archive: Path) -> dict[str, Any]:
        if request.tokenizer_type is None:
            write_text(folder / "tokenizer.json", word_level(_lines(archive, "train")))
            words = read_json(folder / "tokenizer.json")["model"]["vocab"]
            return _write_splits(folder, archive, len(words), lambda text: _words(text, words))
        tokenizer = build_tokenizer(request.tokenizer_type, request.vocab_file, request.merge_file)

        def line(text: str) -> list[int]:
            return [*tokenizer.tokenize_piece(text), tokenizer.eod]

        return _write_splits(folder, archive, tokenizer.vocab_size, line)

    return _prepared("wikitext103", request, WIKITEXT_URL, HFTokenizer.name, make)


def prepare_enwik8(request: CorpusRequest) -> PreparedCorpus:
    """`DIR/enwik8/{train,valid,test}_text_document.{bin,idx}`: one document each, of bytes unless a tokenizer is requested."""

    def make(folder: Path, archive: Path) -> dict[str, Any]:
        with _opened(archive, "enwik8") as handle:
            data = handle.read()
        if len(data) != sum(ENWIK8_BYTES):
            raise DataError("this is not enwik8", where=str(archive), why=f"it has {len(data):,} bytes instead of 100,000,000")
        tokenizer: Tokenizer = CharLevelTokenizer()
        if request.tokenizer_type is not None:
            tokenizer = build_tokenizer(request.tokenizer_type, request.vocab_file, request.merge_file)
        tokens, start = {}, 0
        for name, size in zip(_SPLITS, ENWIK8_BYTES, strict=True):
            split_bytes, start = data[start : start + size], start + size
            ids = np.frombuffer(split_bytes, np.uint8) if request.tokenizer_type is None else tokenizer.tokenize(split_bytes.decode("utf-8"))
            tokens[name] = _write(folder, name, tokenizer.vocab_size, [ids])
        return {"documents": 3, "bytes": len(data), "split_tokens": tokens, "vocab_size": tokenizer.vocab_size}

    return _prepared("enwik8", request, ENWIK8_URL, CharLevelTokenizer.name, make)


def _prepared(
    name: str, request: CorpusRequest, url: str, default_tokenizer: str, make: Callable[[Path, Path], dict[str, Any]]
) -> PreparedSplits:
    """Return the complete corpus on disk, or build it and write its receipt."""
    folder, started = request.data_dir / name, time.monotonic()
    receipt_path = folder / "receipt.json"
    kind = request.tokenizer_type or default_tokenizer
    vocab = folder / "tokenizer.json" if request.tokenizer_type is None and default_tokenizer == HFTokenizer.name else request.vocab_file
    identity = [kind, str(request.vocab_file), str(request.merge_file)]
    receipt = None if request.force else _valid(receipt_path, identity)
    created = receipt is None
    if receipt is None:
        folder.mkdir(parents=True, exist_ok=True)
        receipt_path.unlink(missing_ok=True)
        archive = request.source or _downloaded(url, folder)
        receipt = {"corpus": name, "tokenizer": identity, "undecodable_files": 0, **make(folder, archive)}
        receipt["tokens"] = sum(receipt["split_tokens"].values())
        receipt["sha256"] = {file.name: sha256_of(file) for file in _files(folder)}
        receipt["seconds"] = round(time.monotonic() - started, 2)
        write_json(receipt_path, receipt)
    merges = None if request.merge_file is None else Path(request.merge_file)
    return PreparedSplits(folder, kind, None if vocab is None else Path(vocab), merges, receipt, created)


def _files(folder: Path) -> list[Path]:
    prefixes = [folder / f"{name}_text_document" for name in _SPLITS]
    return [file for prefix in prefixes for file in (data_file(prefix), index_file(prefix))]


def _valid(path: Path, identity: list[str]) -> dict[str, Any] | None:
    """The receipt, if it describes the files next to it and the same tokenizer; else None."""
    try:
        receipt: dict[str, Any] = read_json(path)
        complete = all(receipt["sha256"][file.name] == sha256_of(file) for file in _files(path.parent))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return receipt if complete and receipt.get("tokenizer") == identity else None


def _downloaded(url: str, folder: Path) -> Path:
    """The archive at `url`, in `folder`; downloaded once."""
    target = folder / url.rpartition("/")[2]
    if target.is_file():
        return target
    try:
        with urllib.request.urlopen(url, timeout=60) as response, atomic_open(target) as handle:
            shutil.copyfileobj(response, handle, 1 << 20)
    except (OSError, urllib.error.URLError, ValueError) as error:
        hint = f"bring the file {target.name} here by other means and name it: --from PATH"
        raise DataError("the corpus cannot be downloaded", where=url, why=str(error), hint=hint) from None
    return target


def _opened(source: Path, ending: str) -> IO[bytes]:
    """The file whose name ends with `ending`: `source` itself, or a member of the folder or archive `source`."""
    try:
        if source.is_dir():
            paths = sorted(path for path in source.rglob("*") if path.name.endswith(ending))
            if paths:
                return paths[0].open("rb")
        elif zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                names = [name for name in archive.namelist() if name.endswith(ending)]
                if names:
                    return io.BytesIO(_unpacked(archive, names[0], source))
        elif source.name.endswith(ending):
            return source.open("rb")
    except (OSError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # RuntimeError: encrypted, or unknown
        raise DataError("the corpus cannot be read", where=str(source), why=str(error)) from None
    hint = "--from takes the archive, the unpacked folder or the file itself"
    raise DataError("the corpus is not here", where=str(source), why=f"nothing in it is called {ending}", hint=hint)


def _unpacked(archive: zipfile.ZipFile, name: str, source: Path) -> bytes:
    """A member of an archive; refuses one larger than any of these corpora, whatever the archive's table says."""
    with archive.open(name) as member:
        data = member.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise DataError("the corpus is not the one it is called", where=f"{source}, {name}", why="it has more than 1 GiB")
    return data


def _lines(source: Path, split: str) -> Iterator[str]:
    with _opened(source, f"wiki.{split}.tokens") as handle:
        try:
            yield from io.TextIOWrapper(handle, encoding="utf-8", newline="\n")
        except UnicodeDecodeError as error:
            raise DataError(
                "the corpus is not UTF-8", where=str(source), why=f"byte 0x{error.object[error.start]:02x}"
            ) from None


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The text of each article, from its heading ` = Title = ` to the next; text before the first heading is an article too."""
    article: list[str] = []
    for line in lines:
        if article and _HEADING.fullmatch(line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line)
    if article:
        yield "".join(article)


def word_level(lines: Iterable[str]) -> str:
    """The JSON of a tokenizer whose vocabulary is the words of `lines`, most frequent first; others become `<unk>`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line.split())
    counts.pop(_UNKNOWN, None)
    ordered = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    vocabulary = {word: number for number, word in enumerate([EOD_TEXT, _UNKNOWN, *ordered])}
    backend = Backend(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([EOD_TEXT])
    return str(backend.to_str())


def _words(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Ids of an article's words, with an end-of-document token after each line."""
    unknown, eod = vocabulary[_UNKNOWN], vocabulary[EOD_TEXT]
    return [i for line in text.splitlines() for i in [*(vocabulary.get(word, unknown) for word in line.split()), eod]]


def _write_splits(folder: Path, archive: Path, vocab_size: int, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    size = documents = 0
    tokens: dict[str, int] = {}

    def encoded(split: str) -> Iterator[Any]:
        nonlocal size, documents
        for text in articles(_lines(archive, split)):
            size += len(text.encode())
            documents += 1
            yield encode(text)

    for split in _SPLITS:
        tokens[split] = _write(folder, split, vocab_size, encoded(split))
    return {"documents": documents, "bytes": size, "split_tokens": tokens, "vocab_size": vocab_size}


def _write(folder: Path, split: str, vocab_size: int, documents: Iterable[Any]) -> int:
    with IndexedWriter(folder / f"{split}_text_document", dtype_for_vocab(vocab_size)) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    return writer.total_tokens
