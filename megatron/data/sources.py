"""From the paths of a configuration to the datasets of a run: one corpus split in three, or lists of corpora with weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from megatron.data.blend import samples_per_dataset
from megatron.data.datasets import BlendedDataset, Dataset, PackedDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.order import SPLIT_NAMES, require_packed, split_documents
from megatron.data.order_cache import cached_sample_index
from megatron.errors import DataError

log = logging.getLogger(__name__)


def datasets_from_split(
    data_path: str,
    split: str,
    seq_length: int,
    counts: dict[str, int],
    seed: int,
    pack_impl: str = "packed",
    vocab_size: int | None = None,
) -> dict[str, Dataset | None]:
    """`train`, `valid` and `test` from one corpus, by contiguous ranges of documents.

    Args:
        data_path: prefix of the `.bin` / `.idx` pair.
        split: shares, such as `969, 30, 1`.
        counts: samples needed per name (`order.sample_counts`); a name that is absent or 0 gives None, as
            does a valid or test split without documents (with a warning).
        vocab_size: entries of the embedding; a token beyond it is an error when it is met.

    Raises:
        DataError: a file is missing or damaged, or the train split has no documents.
    """
    require_packed(pack_impl)
    indexed = IndexedDataset(data_path)
    documents = split_documents(split, len(indexed))
    built: dict[str, Dataset | None] = {}
    for name in SPLIT_NAMES:
        needed = counts.get(name, 0)
        built[name] = None
        if needed == 0:
            continue
        if len(documents[name]) == 0:
            _report_empty(name, needed, data_path, split, len(indexed))
            continue
        order = cached_sample_index(data_path, name, documents[name], indexed.sizes, seq_length, needed, seed)
        built[name] = PackedDataset(indexed, order, vocab_size)
    return built


def _report_empty(name: str, needed: int, data_path: str, split: str, documents: int) -> None:
    """Training cannot do without data; validation and test are left out with a warning, as in NeoX."""
    what = f"the {name} split holds no document, and {needed} samples are needed"
    why = f"split {split!r} of {documents} documents leaves nothing for it"
    if name == "train":
        raise DataError(what, where=data_path, why=why, hint="give train a larger share in split")
    log.warning("%s (%s: %s): there will be no %s loss", what, data_path, why, name)


def dataset_from_list(
    paths: Sequence[str],
    weights: Sequence[float] | None,
    name: str,
    seq_length: int,
    count: int,
    seed: int,
    pack_impl: str = "packed",
    vocab_size: int | None = None,
) -> Dataset:
    """The blend of whole corpora that NeoX makes of `train_data_paths` and `train_data_weights` (or valid, test).

    Args:
        name: `train`, `valid` or `test`.
        count: samples the run needs.

    Raises:
        DataError: as above, or the lists do not match.
    """
    require_packed(pack_impl)
    weights = [1.0] * len(paths) if weights is None else weights
    if len(weights) != len(paths):
        raise DataError(
            f"{len(weights)} {name}_data_weights for {len(paths)} {name}_data_paths", why="one weight per path"
        )
    datasets: list[Dataset] = []
    for number, (path, needed) in enumerate(zip(paths, samples_per_dataset(weights, count), strict=True)):
        indexed = IndexedDataset(path)
        documents = np.arange(len(indexed), dtype=np.int32)
        order = cached_sample_index(path, f"{name}_{number}", documents, indexed.sizes, seq_length, needed, seed)
        datasets.append(PackedDataset(indexed, order, vocab_size))
    return BlendedDataset(datasets, weights, count)
