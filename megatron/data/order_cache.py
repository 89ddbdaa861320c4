"""Caches large sample indexes next to the data, under NeoX's names, with a sidecar that identifies their data and settings.

NeoX trusts a file by its name, which lacks the split and the corpus, and loads what an interrupted build left. Here a cache is
used only if its sidecar names the same documents, sizes, seed, length and counts, and the digest of each array matches;
anything else is rebuilt. A read-only folder costs time, never correctness.

The ranks of a host share it: one builds while the others wait for the lock, and all of them map the same files, so that the
index is in memory only once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.order import CHUNK, Documents, SampleIndex, build_sample_index, count_tokens, epochs_for, sizes_of
from megatron.data.packing import PACKED, build_padded_index
from megatron.data.token_format import index_file
from megatron.errors import DataError
from megatron.files import atomic_open, read_json, sha256_of, write_json

ARRAYS = ("doc_idx", "sample_idx", "shuffle_idx")
_MOST_ENTRIES, _MOST_PASSES = 1 << 26, 1000  # beyond both limits the number of steps is a typo
SMALL = 4_000_000  # documents plus samples; below it building takes about a second and nothing is cached
log = logging.getLogger(__name__)


def cached_sample_index(
    prefix: str | Path,
    name: str,
    documents: Documents,
    sizes: NDArray[Any],
    seq_length: int,
    num_samples: int | None,
    seed: int,
    epochs: int | None = None,
    small: int = SMALL,
    pack_impl: str = PACKED,
    allow_chopped: bool = True,
    ignored: NDArray[np.bool_] | None = None,
) -> SampleIndex:
    """`build_sample_index` or `build_padded_index`, read from `{prefix}_{name}_indexmap_...` if a valid cache exists.

    Args:
        prefix: path of the corpus without suffix.
        name: `train`, `valid`, `test`, or `train_0` ... for lists.
        epochs: for `packed` only.
        small: documents (times epochs) plus samples up to which no cache is read or written.
        ignored: for the other two packings, see `build_padded_index`.
    """

    def build() -> SampleIndex:
        if pack_impl == PACKED:
            return build_sample_index(documents, sizes, seq_length, num_samples, seed, epochs)
        count = max(1, num_samples or 0)
        return build_padded_index(pack_impl, documents, sizes, seq_length, count, seed, allow_chopped, ignored)

    entries = _entries(documents, sizes, seq_length, num_samples, epochs)
    passes = epochs or epochs_for(max(count_tokens(documents, sizes), 1), seq_length, num_samples or 0)
    if entries > _MOST_ENTRIES and passes > _MOST_PASSES:
        raise DataError(
            f"{num_samples or entries:,} samples of a corpus this small are asked for",
            where=f"{prefix}, {name}",
            why=f"it would be read {passes:,} times, and the order of the samples would not fit into memory",
            hint="lower train_iters, train_epochs, eval_iters or the batch size, or take more text",
        )
    if entries <= small:
        return build()
    chopped = "_ac" if allow_chopped else ""
    count = num_samples if epochs is None else None
    stem = f"{prefix}_{name}_indexmap_{count}ns_{seq_length}sl_{seed}s_{pack_impl}pi{chopped}"
    key = {
        "documents_sha256": _digest(documents, sizes),
        "seq_length": seq_length,
        "num_samples": num_samples,
        "seed": seed,
        "epochs": epochs,
        "pack_impl": pack_impl,
        "allow_chopped": allow_chopped,
        "ignored_sha256": None if ignored is None else hashlib.sha256(np.packbits(ignored).tobytes()).hexdigest(),
    }
    with _lock(prefix):
        index = _load(stem, key, seq_length)
        if index is None:
            index = build()
            _save(stem, key, index)
            # The built arrays are private memory; the files just written are shared with the other ranks.
            index = _load(stem, key, seq_length) or index
    return index


@contextlib.contextmanager
def _lock(prefix: str | Path) -> Iterator[None]:
    """One process at a time per corpus if the file system has locks; else all build the same index, and writing is atomic."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(open(index_file(prefix), "rb")), fcntl.LOCK_EX)
        yield


def _entries(documents: Documents, sizes: NDArray[Any], seq_length: int, num_samples: int | None, epochs: int | None) -> int:
    tokens = count_tokens(documents, sizes)
    passes = epochs or epochs_for(max(tokens, 1), seq_length, num_samples or 0)
    return passes * (len(documents) + tokens // max(seq_length, 1))


def _digest(documents: Documents, sizes: NDArray[Any]) -> str:
    """SHA-256 of the document ids and their sizes: changes with the split, the corpus and its order."""
    digest = hashlib.sha256(repr(documents).encode() if isinstance(documents, range) else b"")
    for at in range(0, len(documents), CHUNK):
        if not isinstance(documents, range):
            digest.update(np.asarray(documents[at : at + CHUNK], dtype="<i8").tobytes())
        digest.update(np.asarray(sizes_of(documents, sizes, at), dtype="<i8").tobytes())
    return digest.hexdigest()


def _load(stem: str, key: dict[str, Any], seq_length: int) -> SampleIndex | None:
    """The cached index, or None if it is absent, stale or damaged."""
    try:
        sidecar = read_json(Path(f"{stem}.json"))
        if sidecar.get("key") != key:
            log.warning("sample index cache %s belongs to other data or settings: rebuilding it", stem)
            return None
        if any(sha256_of(f"{stem}_{array}.npy") != sidecar["sha256"][array] for array in ARRAYS):
            log.warning("sample index cache %s is damaged: rebuilding it", stem)
            return None
        arrays = [np.load(f"{stem}_{array}.npy", mmap_mode="r", allow_pickle=False) for array in ARRAYS]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        log.warning("sample index cache %s cannot be read (%s): rebuilding it", stem, error)
        return None
    return SampleIndex(arrays[0], arrays[1], arrays[2], seq_length)


def _save(stem: str, key: dict[str, Any], index: SampleIndex) -> None:
    """Arrays first, sidecar last, so that a sidecar never describes arrays that do not exist."""
    try:
        Path(f"{stem}.json").unlink(missing_ok=True)
        digests = {}
        for array in ARRAYS:
            with atomic_open(f"{stem}_{array}.npy") as handle:
                np.save(handle, getattr(index, array), allow_pickle=False)
            digests[array] = sha256_of(f"{stem}_{array}.npy")
        write_json(f"{stem}.json", {"key": key, "sha256": digests})
    except OSError as error:
        log.warning("sample index cache %s cannot be written (%s): it is rebuilt at each start", stem, error)
