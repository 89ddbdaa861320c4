"""The record of a corpus's tokenizer, stored next to the token files, and the identity of a run's training data.

Token ids mean nothing without their tokenizer. `PREFIX.meta.json` is written with the pair; training and resuming compare it
with the configured tokenizer.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedDataset
from megatron.data.order import CHUNK
from megatron.data.token_format import data_file, index_file, meta_file
from megatron.data.tokenizers import Tokenizer
from megatron.errors import DataError
from megatron.files import read_json, write_json

log = logging.getLogger(__name__)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The stored description of a tokenizer."""
    return {
        "type": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint(),
        "files": [path.name for path in tokenizer.files()],
    }


def write_meta(prefix: str | Path, tokenizer: Mapping[str, Any], **more: Any) -> None:
    """Write `PREFIX.meta.json` for the current content of the pair.

    Args:
        prefix: path of the pair without suffix.
        tokenizer: `describe(tokenizer)`.
        more: further entries, such as the number of documents.
    """
    lengths = {path.suffix[1:] + "_bytes": path.stat().st_size for path in (data_file(prefix), index_file(prefix))}
    write_json(meta_file(prefix), {"format": 1, "tokenizer": dict(tokenizer), **lengths, **more})


def read_meta(prefix: str | Path) -> dict[str, Any] | None:
    """The record of a pair; None if it has none, or (with a warning) if it describes files of other lengths.

    Raises:
        DataError: the record is damaged.
    """
    path = meta_file(prefix)
    try:
        meta: dict[str, Any] = read_json(path)
        lengths, tokenizer = [meta["bin_bytes"], meta["idx_bytes"]], meta["tokenizer"]
        kinds = {"type": str, "vocab_size": int, "fingerprint": str, "files": list}
        if not all(isinstance(tokenizer[key], kind) for key, kind in kinds.items()) or len(tokenizer["fingerprint"]) != 64:
            raise TypeError("its record of the tokenizer is not one")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        hint = "delete it to go without the check, or prepare the corpus again"
        raise DataError("the record of a corpus is damaged", where=str(path), why=repr(error), hint=hint) from None
    if lengths != [data_file(prefix).stat().st_size, index_file(prefix).stat().st_size]:
        log.warning("%s describes token files of other lengths and is ignored", path)
        return None
    return meta


def check_fingerprint(data_prefix: str | Path, tokenizer: Tokenizer) -> bool:
    """Check that a corpus was made with `tokenizer`; False (and a warning) if it has no record.

    Raises:
        DataError: it was made with another tokenizer.
    """
    meta = read_meta(data_prefix)
    if meta is None:
        log.warning("%s: no record of its tokenizer; assuming the configured one", data_prefix)
        return False
    recorded, configured = meta["tokenizer"], describe(tokenizer)
    if recorded["fingerprint"] != configured["fingerprint"]:
        raise DataError(
            "the corpus was made with another tokenizer",
            where=str(data_prefix),
            why=f"{_name(recorded)} made it, {_name(configured)} is configured",
            hint="correct tokenizer_type, vocab_file and merge_file, or prepare the corpus again",
        )
    return True


def _name(record: Mapping[str, Any]) -> str:
    files = " + ".join(record.get("files") or ["no file"])
    return f"{record.get('type')} ({files}, {record.get('vocab_size')} entries, {str(record['fingerprint'])[:12]})"


def data_identity(prefixes: Sequence[str | Path], tokenizer: Tokenizer) -> dict[str, Any]:
    """The identity of a run's training data, for its checkpoint: tokenizer, and counts and digest of each corpus; no paths."""
    corpora = []
    for prefix in prefixes:
        indexed, digest = IndexedDataset(prefix), hashlib.sha256()
        for at in range(0, len(indexed), CHUNK):
            digest.update(np.asarray(indexed.sizes[at : at + CHUNK], dtype="<i4").tobytes())
        corpora.append({"sequences": len(indexed), "tokens": indexed.total_tokens, "sizes_sha256": digest.hexdigest()})
    return {"tokenizer": describe(tokenizer), "corpora": corpora}


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check at resume that tokenizer and corpora are those of the checkpoint (their paths may differ).

    Raises:
        DataError: names what changed.
    """
    if saved["tokenizer"]["fingerprint"] != now["tokenizer"]["fingerprint"]:
        raise DataError(
            "the checkpoint was trained with another tokenizer",
            why=f"then {_name(saved['tokenizer'])}, now {_name(now['tokenizer'])}",
            hint="configure the same tokenizer, or start a new run from the weights (finetune: true) to continue with another one",
        )
    if saved["corpora"] != now["corpora"]:
        before, after = saved["corpora"], now["corpora"]
        wrong = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
        raise DataError(
            f"training corpus {wrong} is not the one of the checkpoint",
            why=f"then {_numbers(before, wrong)}, now {_numbers(after, wrong)}",
            hint="give the same data, or start a new run from the weights (finetune: true): the cursor is meaningless in other data",
        )


def _numbers(corpora: Sequence[Mapping[str, Any]], number: int) -> str:
    if number >= len(corpora):
        return "no such corpus"
    return f"{corpora[number]['sequences']} sequences, {corpora[number]['tokens']} tokens"
