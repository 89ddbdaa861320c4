"""From the paths of a configuration to the datasets of a run: one corpus split in three, or lists of corpora with weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.data.blend import samples_per_dataset, weights_by_documents
from megatron.data.datasets import (
    BlendedDataset,
    ChainedDataset,
    Dataset,
    PackedDataset,
    PaddedDataset,
    RepeatedDataset,
)
from megatron.data.indexed import IndexedDataset
from megatron.data.labels import Labels
from megatron.data.order import SPLIT_NAMES, split_documents
from megatron.data.order_cache import cached_sample_index
from megatron.data.packing import PACKED, check_pack_impl
from megatron.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Order:
    """How the documents of one corpus become samples."""

    seq_length: int
    seed: int
    pack_impl: str
    allow_chopped: bool
    vocab_size: int | None
    one_epoch: bool

    def dataset(
        self, indexed: IndexedDataset, name: str, documents: range, counts: Sequence[int], labels: Labels | None
    ) -> Dataset:
        """Samples for the last of `counts`; the earlier ones are the counts this run was started with before.

        The order of several epochs depends on their number, so another count would give another order: samples repeated and
        left out. Hence the order of the first count stays, and what is missing is a further order behind it, by the next seed.
        """
        parts: list[Dataset] = []
        have = 0
        for count in counts:
            if count > have or not parts:
                parts.append(self._one(indexed, name, documents, count - have, self.seed + len(parts), labels))
                have += len(parts[-1])
        return parts[0] if len(parts) == 1 else ChainedDataset(parts)

    def _one(
        self, indexed: IndexedDataset, name: str, documents: range, count: int, seed: int, labels: Labels | None
    ) -> Dataset:
        packed = self.pack_impl == PACKED
        ignored = None if packed or labels is None else labels.ignored(documents, self.seq_length + 1)
        order = cached_sample_index(
            indexed.prefix,
            name,
            documents,
            indexed.sizes,
            self.seq_length,
            None if self.one_epoch else count,
            seed % 2**32,
            1 if self.one_epoch else None,
            pack_impl=self.pack_impl,
            allow_chopped=self.allow_chopped,
            ignored=ignored,
        )
        return (PackedDataset if packed else PaddedDataset)(indexed, order, self.vocab_size, labels)


def _order(
    seq_length: int, seed: int, pack_impl: str, allow_chopped: bool, vocab_size: int | None, train_epochs: int | None
) -> _Order:
    check_pack_impl(pack_impl)
    if train_epochs is not None and pack_impl != PACKED:
        raise DataError(
            f"train_epochs does not go with pack_impl: {pack_impl}",
            why="whole documents are drawn until the number of samples is reached, there is no end of an epoch",
            hint="set train_iters instead, or pack_impl: packed",
        )
    return _Order(seq_length, seed, pack_impl, allow_chopped, vocab_size, train_epochs is not None)


def datasets_from_split(
    data_path: str,
    split: str,
    seq_length: int,
    counts: dict[str, int],
    seed: int,
    pack_impl: str = PACKED,
    vocab_size: int | None = None,
    *,
    allow_chopped: bool = True,
    train_epochs: int | None = None,
    earlier_counts: Sequence[int] = (),
) -> dict[str, Dataset | None]:
    """`train`, `valid` and `test` from one corpus, by contiguous ranges of documents.

    Args:
        data_path: prefix of the `.bin` / `.idx` pair.
        split: shares, such as `969, 30, 1`.
        counts: samples needed per name (`order.sample_counts`); a name that is absent or 0 gives None, as
            does a valid or test split without documents (with a warning).
        pack_impl: `packed`, `pack_until_overflow` or `unpacked`.
        vocab_size: entries of the embedding; a token beyond it is an error when it is met.
        allow_chopped: see `build_padded_index`.
        train_epochs: every split holds one epoch and the training samples are repeated so many times; the counts
            then only say which splits are wanted.
        earlier_counts: the training counts of the earlier starts of this run, in order, from its checkpoint; the samples they
            promised stay the same whatever the count is now.

    Raises:
        DataError: a file is missing or damaged, or the train split has no documents.
    """
    order = _order(seq_length, seed, pack_impl, allow_chopped, vocab_size, train_epochs)
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
        wanted = [*earlier_counts, needed] if name == "train" else [needed]
        dataset = order.dataset(indexed, name, documents[name], wanted, None)
        built[name] = RepeatedDataset(dataset, train_epochs) if train_epochs and name == "train" else dataset
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
    pack_impl: str = PACKED,
    vocab_size: int | None = None,
    *,
    allow_chopped: bool = True,
    train_epochs: int | None = None,
    earlier_counts: Sequence[int] = (),
    label_paths: Sequence[str] | None = None,
    documents_alpha: float | None = None,
) -> Dataset:
    """The blend of whole corpora that NeoX makes of `train_data_paths` and `train_data_weights` (or valid, test).

    Args:
        name: `train`, `valid` or `test`.
        count: samples the run needs.
        train_epochs: each corpus gives one epoch, the blend has as many samples as all of them together, and for `train` it is
            repeated so many times. A corpus whose weight asks for more than it has starts over (with a warning).
        label_paths: label files, one per path.
        documents_alpha: with `weight_by_num_documents`, `weighted_sampler_alpha`: the weights come from the numbers of
            documents.

    Raises:
        DataError: as above, or the lists do not match.
    """
    order = _order(seq_length, seed, pack_impl, allow_chopped, vocab_size, train_epochs)
    corpora = [IndexedDataset(path) for path in paths]
    if documents_alpha is not None:
        weights = weights_by_documents([len(corpus) for corpus in corpora], documents_alpha)
    weights = [1.0] * len(paths) if weights is None else weights
    labels = _labels(name, corpora, label_paths)
    if len(weights) != len(paths):
        raise DataError(f"{len(weights)} {name}_data_weights for {len(paths)} {name}_data_paths", why="one weight per path")
    totals = [*(earlier_counts if name == "train" else ()), count]
    shares = zip(*(samples_per_dataset(weights, total) for total in totals), strict=True)
    datasets = [
        order.dataset(corpus, f"{name}_{number}", range(len(corpus)), wanted, labels[number])
        for number, (corpus, wanted) in enumerate(zip(corpora, shares, strict=True))
    ]
    if train_epochs is None:
        return BlendedDataset(datasets, weights, count)
    return _epochs_of_blend(datasets, weights, name, train_epochs)


def _labels(name: str, corpora: Sequence[IndexedDataset], paths: Sequence[str] | None) -> list[Labels | None]:
    if not paths:
        return [None] * len(corpora)
    if len(paths) != len(corpora):
        raise DataError(
            f"{len(paths)} {name}_label_data_paths for {len(corpora)} {name}_data_paths", why="one label file per path"
        )
    return [Labels(IndexedDataset(path), corpus) for path, corpus in zip(paths, corpora, strict=True)]


def _epochs_of_blend(datasets: Sequence[Dataset], weights: Sequence[float], name: str, epochs: int) -> Dataset:
    """NeoX's length: its datasets report one sample less than they have."""
    size = sum(len(dataset) - 1 for dataset in datasets)
    blended = BlendedDataset(datasets, weights, size, repeat=True)
    for number, (needed, dataset) in enumerate(zip(blended.needed, datasets, strict=True)):
        if needed > len(dataset):
            log.warning(
                "%s_data_paths[%d] is seen %.2f times per epoch: its weight asks for %d samples and it has %d",
                name, number, needed / len(dataset), needed, len(dataset),
            )  # fmt: skip
    return RepeatedDataset(blended, epochs) if name == "train" else blended
