"""Rows of a Hugging Face dataset: `hf:NAME?split=train&name=CONFIG&streaming=true`, from the hub or from a folder on disk.

Code of a dataset is never executed. Parameters: split (train), name, revision, data_files, streaming (false), shuffle (a
seed; with streaming, within a buffer of buffer_size rows, 10,000 by default).
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
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [key for key in parameters if key not in _PARAMETERS]
    numbers = [key for key in ("shuffle", "buffer_size") if not parameters.get(key, "0").isdigit()]
    if not name or unknown or numbers or parameters.get("streaming", "false") not in ("true", "false"):
        raise DataError(
            "the dataset cannot be read from its name",
            where=spec,
            why=f"parameters that are unknown or no numbers: {', '.join(unknown + numbers) or 'none, but see streaming'}",
            hint=f"hf:NAME?split=train&streaming=true; parameters: {', '.join(_PARAMETERS)}",
        )
    return name, parameters


def read_hub(spec: str, keys: Sequence[str], skip: int = 0) -> Iterator[tuple[str, tuple[bytes, ...]]]:
    """Yield (`spec:row`, the text of each key) for the rows from number `skip` on.

    Raises:
        DataError: the package `datasets` is missing, the dataset cannot be loaded, or a field is missing or is not text.
    """
    rows = _open(spec)
    try:
        remaining = rows.select(range(skip, len(rows))) if hasattr(rows, "select") else rows.skip(skip)
        for number, record in enumerate(remaining, start=skip):
            yield f"{spec}:row {number}", tuple(_text(record, key, f"{spec}:row {number}") for key in keys)
    except DataError:
        raise
    except Exception as error:  # the library lets through whatever its readers and the network raise
        raise DataError("the dataset cannot be read", where=spec, why=f"{type(error).__name__}: {error}") from None


def _open(spec: str) -> Any:
    name, parameters = parse(spec)
    try:
        import datasets
    except ImportError:
        hint = "pip install datasets (requirements: the extra `datasets`)"
        raise DataError("reading a Hugging Face dataset needs the package datasets", where=spec, hint=hint) from None
    split, streaming = parameters.get("split", "train"), parameters.get("streaming") == "true"
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(name)
            rows = rows[split] if isinstance(rows, datasets.DatasetDict) else rows
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            options = {key: parameters[key] for key in ("name", "revision", "data_files") if key in parameters}
            rows = datasets.load_dataset(name, split=split, streaming=streaming, **options)
        if "shuffle" in parameters:
            buffer = {"buffer_size": int(parameters.get("buffer_size", 10000))} if streaming else {}
            rows = rows.shuffle(seed=int(parameters["shuffle"]), **buffer)
    except Exception as error:  # the library lets through whatever its readers and the network raise
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
    texts = value if isinstance(value, list) else [value or ""]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"field {key!r} is not text", where=where, why="it must be a string or a list of strings")
    return "\n\n".join(texts).encode("utf-8", errors="surrogatepass")
