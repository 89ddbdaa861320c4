"""The layout of NeoX's token files, shared by the reader and the writer.

`.bin` holds the tokens one after another. `.idx`, little-endian: 9 bytes magic, u64 version 1, u8 dtype code, u64 N, u64 D,
i32 sizes[N] (tokens), i64 offsets[N] (bytes into `.bin`), i64 doc_idx[D] (sequences before each document boundary, from 0).

The legacy format (`data_impl: cached`): 8 bytes magic, u64 version 1, dtype code, bytes per token, N, S, D, then all i64:
dim_offsets[N + 1], data_offsets[N + 1] (tokens), sizes[S], doc_idx[D].

Beside a pair may lie what NeoX does not know and does not mind: `.meta.json` (which tokenizer made it) and `.sums.json`
(checksums).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
LEGACY_MAGIC = b"TNTIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
LEGACY_HEADER = struct.Struct("<8s6Q")
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f4", "f8", "u2"), start=1)
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
BLOCK = 1 << 24  # elements looked at in one piece: bounds the memory of every scan

Tokens = Sequence[int] | NDArray[Any]


def dtype_for_vocab(vocab_size: int | None) -> np.dtype[Any]:
    """The token type NeoX chooses: u16 below 65,500 entries, else (also if the size is not known) i32."""
    return DTYPES[8] if vocab_size is not None and vocab_size < 65500 else DTYPES[4]


def data_file(prefix: str | Path) -> Path:
    """`PREFIX.bin`."""
    return Path(f"{prefix}.bin")


def index_file(prefix: str | Path) -> Path:
    """`PREFIX.idx`."""
    return Path(f"{prefix}.idx")


def meta_file(prefix: str | Path) -> Path:
    """`PREFIX.meta.json`, see `fingerprint.py`."""
    return Path(f"{prefix}.meta.json")


def sums_file(prefix: str | Path) -> Path:
    """`PREFIX.sums.json`, see `checksums.py`."""
    return Path(f"{prefix}.sums.json")


def drop_sidecars(prefix: str | Path) -> None:
    """Remove what is said about a pair that is about to be replaced."""
    for path in (meta_file(prefix), sums_file(prefix)):
        path.unlink(missing_ok=True)
