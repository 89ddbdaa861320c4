"""Text classification from bytes, as Long Range Arena's Text (arXiv 2011.04006), whose texts are IMDb's reviews.

Sources: a folder, a .jsonl file, or `stdlib`, a data set without a download: pieces of the source files of the running Python's
standard library, labelled by package. Files are divided among the splits as wholes, so that a test piece comes from a
file of which nothing was seen. Which files there are depends on the version of Python.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron.errors import DataError
from megatron.files import parse_json, read_bytes, read_text
from megatron.synthetics.stored import Records, StoredTask, content_digest, share_train
from megatron.synthetics.task import need

STDLIB = "stdlib"
PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
"""Packages of the standard library that every supported Python has, each with 200 kB of source or more."""
_TESTS = frozenset(("test", "tests"))
_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TextBytes(StoredTask):
    """The first `length` - 1 bytes of a text, then the mark; see `StoredTask` for the other parameters.

    Attributes:
        source: `stdlib`; a .jsonl file of `{"text": ..., "label": ...}`; a folder with a folder of .txt files per class; or
            a folder with such files or folders named train, test and optionally valid.
    """

    name: ClassVar[str] = "text_bytes"
    length: int = 4096

    def __post_init__(self) -> None:
        need(bool(self.source), self, "source is missing: stdlib, or the path of a .jsonl file or of a folder")
        need(self.length >= 2, self, "length must be at least 2: a byte and the mark")
        need(min(self.valid_share, self.test_share) >= 0 and self.valid_share + self.test_share < 1, self, "shares are below 1")

    @property
    def mark(self) -> int:
        """After the 256 bytes."""
        return 256

    @property
    def seq_length(self) -> int:
        """As asked for."""
        return self.length

    def read(self) -> Records:
        """See `StoredTask`."""
        if self.source == STDLIB:
            return _stdlib(self.length - 1, self.valid_share, self.test_share)
        rows = list(_with_splits(Path(self.source)))
        if not rows:
            raise DataError("there are no texts", where=self.source, hint="a folder of .txt files per class, or a .jsonl file")
        contents, labels, splits = zip(*rows, strict=True)
        records = Records([content[: self.length - 1] for content in contents], labels, splits)
        return share_train(records, self.valid_share) if any(splits) else records


def _with_splits(path: Path) -> Iterator[tuple[bytes, str, str]]:
    """Content, label and split of every text under a path."""
    if not path.exists():
        raise DataError("the source of texts does not exist", where=str(path), hint="a folder, a .jsonl file, or stdlib")
    splits = {split: at for split in _SPLITS for at in (path / split, path / f"{split}.jsonl") if at.exists()}
    if "train" in splits and "test" not in splits:
        raise DataError("there is a train split without a test split", where=str(path))
    for split, at in splits.items() if "train" in splits else [("", path)]:
        for content, label in _jsonl(at) if at.is_file() else _folders(at):
            yield content, label, split


def _folders(path: Path) -> Iterator[tuple[bytes, str]]:
    for folder in sorted(child for child in path.iterdir() if child.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            yield _bytes(file), folder.name


def _bytes(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise DataError("a text cannot be read", where=str(path), why=str(error)) from None


def _jsonl(path: Path) -> Iterator[tuple[bytes, str]]:
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise DataError("the texts cannot be read", where=str(path), why=str(error)) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _record(line, f"{path}:{number}")


def _record(line: str, where: str) -> tuple[bytes, str]:
    try:
        value: Any = parse_json(line)
    except ValueError as error:
        raise DataError("a line is no JSON", where=where, why=str(error)) from None
    text, label = (value.get("text"), value.get("label")) if isinstance(value, dict) else (None, None)
    if not isinstance(text, str) or type(label) not in (str, int):
        raise DataError("a line is no labelled text", where=where, hint='{"text": "...", "label": "..."}')
    return text.encode(), str(label)


def _stdlib(size: int, valid_share: float, test_share: float) -> Records:
    """Pieces of `size` bytes, in each split as many of every package; a piece that occurs again is left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    shares = {"train": 1 - valid_share - test_share, "valid": valid_share, "test": test_share}
    pieces: dict[tuple[str, str], list[bytes]] = {}
    seen: set[bytes] = set()
    for package in PACKAGES:
        names = [f.relative_to(root) for f in (root / package).rglob("*.py")]
        files = [_bytes(root / name) for name in sorted(names, key=_order_of_name) if not _TESTS & set(name.parts)]
        missing = {split: share * sum(map(len, files)) for split, share in shares.items()}
        if sum(missing.values()) < 100_000:
            raise DataError(f"the standard library has no sources of '{package}'", where=str(root))
        for content in files:
            split = max(missing, key=lambda name: missing[name])
            missing[split] -= len(content)
            for start in range(0, len(content) - size + 1, size):
                piece = content[start : start + size]
                if piece not in seen:
                    seen.add(piece)
                    pieces.setdefault((split, package), []).append(piece)
    rows = []
    for split in _SPLITS:
        groups = [sorted(pieces.get((split, package), []), key=content_digest) for package in PACKAGES]
        smallest = min(len(group) for group in groups)
        rows += [(piece, package, split) for package, group in zip(PACKAGES, groups, strict=True) for piece in group[:smallest]]
    if not rows:
        raise DataError("the standard library has no file as long as an example", why=f"length is {size + 1}")
    found, labels, splits = zip(*rows, strict=True)
    return Records(found, labels, splits)


def _order_of_name(path: Path) -> bytes:
    return content_digest(path.as_posix().encode())
