"""Rows of a Hugging Face dataset: `hf:NAME?split=train&name=CONFIG&streaming=true`, from the hub or from a folder on disk.

Nothing of a dataset is ever executed. Parameters: split (train), name, revision, data_files, streaming (false), shuffle (a
seed; with streaming, buffer_size rows, 10,000, are mixed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from megatron.errors import DataError

PREFIX = "hf:"
_PARAMETERS = ("split", "name", "revision", "data_files", "streaming", "shuffle", "buffer_size")


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """The dataset's name and its parameters; a DataError names a parameter that does not exist."""
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    wrong = [key for key in given if key not in _PARAMETERS]
    numbers = [key for key in ("shuffle", "buffer_size") if not given.get(key, "0").isdigit()]
    if not name or wrong or numbers or given.get("streaming", "false") not in ("true", "false"):
        raise DataError(
            "the dataset cannot be read from its name",
            where=spec,
            why=f"parameters that are unknown or no numbers: {', '.join(wrong + numbers) or 'none, but see streaming'}",
            hint=f"hf:NAME?split=train&streaming=true; parameters: {', '.join(_PARAMETERS)}",
        )
    return name, given


def read_hub(spec: str, keys: Sequence[str], skip: int = 0) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """(`spec:row`, the text of each key) for the rows from number `skip` on.

    Raises:
        DataError: the package `datasets` is missing, the dataset cannot be had, or a field is missing or no text.
    """
    rows = _open(spec)
    try:
        rest = rows.select(range(skip, len(rows))) if hasattr(rows, "select") else rows.skip(skip)
        for number, record in enumerate(rest, start=skip):
            yield f"{spec}:row {number}", tuple(_text(record, key, f"{spec}:row {number}") for key in keys)
    except DataError:
        raise
    except Exception as error:  # the library passes on whatever its readers and the network raise
        raise DataError("the dataset cannot be read", where=spec, why=f"{type(error).__name__}: {error}") from None


def _open(spec: str) -> Any:
    name, given = parse(spec)
    try:
        import datasets
    except ImportError:
        hint = "pip install datasets (requirements: the extra `datasets`)"
        raise DataError("reading a Hugging Face dataset needs the package datasets", where=spec, hint=hint) from None
    split, streaming = given.get("split", "train"), given.get("streaming") == "true"
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            options = {key: given[key] for key in ("name", "revision", "data_files") if key in given}
            rows = datasets.load_dataset(name, split=split, streaming=streaming, **options)
        if "shuffle" in given:
            buffer = {"buffer_size": int(given.get("buffer_size", 10000))} if streaming else {}
            rows = rows.shuffle(seed=int(given["shuffle"]), **buffer)
    except Exception as error:  # the library passes on whatever its readers and the network raise
        raise DataError(
            "the dataset cannot be opened",
            where=spec,
            why=f"{type(error).__name__}: {error}",
            hint="check name, split and name= (configuration); without a network give a folder or data_files=",
        ) from None
    return rows


def _text(record: Any, key: str, where: str) -> bytes:
    if key not in record:
        raise DataError(f"the row has no field {key!r}", where=where, why=f"it has {', '.join(sorted(record))}")
    value = record[key]
    parts = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(part, str) for part in parts):
        raise DataError(f"field {key!r} is not text", where=where, why="it must be a string or a list of strings")
    return "\n\n".join(parts).encode("utf-8", errors="surrogatepass")
