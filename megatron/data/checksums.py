"""Checksums of a pair of token files, in blocks: a flipped bit in the tokens is still a token, so only a checksum can find it.

`PREFIX.sums.json` holds the SHA-256 of every block of both files. Opening a corpus compares the lengths, the ends of `.bin`
and a small `.idx`, which finds files of different corpora under one name; `verify_blocks` reads everything. A pair without the
file is as good as NeoX's own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.data.token_format import data_file, index_file, sums_file
from megatron.errors import DataError
from megatron.files import open_regular, read_json, write_json

BLOCK_BYTES = 1 << 24
_QUICK_BLOCKS = 4  # of the index, when a corpus is opened: 64 MiB, some 40 ms


def _sums(path: Path, block: int) -> Iterator[str]:
    with os.fdopen(open_regular(path), "rb") as handle:
        while data := handle.read(block):
            yield hashlib.sha256(data).hexdigest()


def write_checksums(prefix: str | Path, block: int = BLOCK_BYTES) -> None:
    """Make `PREFIX.sums.json` for the pair as it is now."""
    record: dict[str, Any] = {"format": 1, "block_bytes": block}
    for kind, path in (("bin", data_file(prefix)), ("idx", index_file(prefix))):
        record[kind] = {"bytes": path.stat().st_size, "sha256": list(_sums(path, block))}
    write_json(sums_file(prefix), record)


def _record(prefix: str | Path) -> dict[str, Any] | None:
    """The checksums, proved to be complete; None if there is no such file."""
    path = sums_file(prefix)
    try:
        record: dict[str, Any] = read_json(path)
        block = record["block_bytes"]
        whole = record["format"] == 1 and type(block) is int and block > 0
        for kind in ("bin", "idx"):
            length, sums = record[kind]["bytes"], record[kind]["sha256"]
            whole = whole and type(length) is int and type(sums) is list and len(sums) == -(-length // block)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _useless(path, repr(error)) from None
    if not whole:
        raise _useless(path, "its numbers do not fit each other")
    return record


def _useless(path: Path, why: str) -> DataError:
    return DataError(
        "the file of checksums is damaged",
        where=str(path),
        why=why,
        hint="delete it, or make it again with tools/data.py verify --write-checksums if the token files are known to be right",
    )


def _check(path: Path, entry: dict[str, Any], block: int, numbers: list[int] | None = None) -> None:
    """Compare the blocks `numbers` (None: all) of one file with their sums."""
    length = path.stat().st_size
    if length != entry["bytes"]:
        raise _differs(path, f"it has {length} bytes, {entry['bytes']} were written")
    with os.fdopen(open_regular(path), "rb") as handle:
        for number in range(len(entry["sha256"])) if numbers is None else numbers:
            handle.seek(number * block)
            if hashlib.sha256(handle.read(min(block, length))).hexdigest() != entry["sha256"][number]:
                end = min((number + 1) * block, length)
                raise _differs(path, f"bytes {number * block}..{end - 1} (block {number}) are not those that were written")


def _differs(path: Path, why: str) -> DataError:
    return DataError(
        "the file is not the one its checksums were made of",
        where=str(path),
        why=why,
        hint="copy or prepare the corpus again; if the files were replaced on purpose, delete the .sums.json beside them",
    )


def check_ends(prefix: str | Path) -> None:
    """The quick check when a corpus is opened; nothing to do without checksums.

    Raises:
        DataError: a length differs, or the first or last block of `.bin`, or a block of an index of at most 64 MiB.
    """
    record = _record(prefix)
    if record is None:
        return
    block, count = record["block_bytes"], len(record["bin"]["sha256"])
    _check(data_file(prefix), record["bin"], block, sorted({0, count - 1}) if count else [])
    few = len(record["idx"]["sha256"]) * block <= _QUICK_BLOCKS * BLOCK_BYTES
    _check(index_file(prefix), record["idx"], block, None if few else [])


def verify_blocks(prefix: str | Path) -> bool:
    """Compare both files whole with their checksums; False if there are none.

    Raises:
        DataError: names the file and the bytes that differ.
    """
    record = _record(prefix)
    if record is None:
        return False
    for kind, path in (("bin", data_file(prefix)), ("idx", index_file(prefix))):
        _check(path, record[kind], record["block_bytes"])
    return True
