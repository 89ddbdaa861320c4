"""Inspects, verifies and merges token files, and writes the sample order of a run.

    python tools/data.py inspect --data-path data/mine_text_document --histogram lengths.png --samples 3 \\
        --tokenizer-type HFTokenizer --vocab-file tokenizer.json
    python tools/data.py verify --data-path data/mine_text_document [--vocab-size 50304] [--write-checksums]
    python tools/data.py samples --data-path P --split "969, 30, 1" --name train --seq-length S --num-samples N --seed K \\
        --output x.npz
    python tools/data.py merge --input data/a_text_document data/b_text_document --output-prefix data/ab
    python tools/data.py count --data-path data/mine_text_document data/more
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron.data.checksums import write_checksums
from megatron.data.datasets import PackedDataset, PaddedDataset
from megatron.data.fingerprint import check_fingerprint
from megatron.data.indexed import IndexedDataset
from megatron.data.inspect_corpus import corpus_statistics, excerpt, histogram, verify
from megatron.data.merge import merge_corpora
from megatron.data.order import SPLIT_NAMES, build_sample_index, split_documents
from megatron.data.packing import PACK_IMPLS, PACKED, build_padded_index
from megatron.data.tokenizers import NAMES, build_tokenizer
from megatron.errors import DataError, exit_on_error
from megatron.files import atomic_open


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; `command` is the function to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="inspect | verify | samples | merge | count")
    add = commands.add_parser("inspect", help="counts, lengths, a histogram, text")
    add.add_argument("--data-path", required=True, help="path of the pair without suffix")
    add.add_argument("--histogram", type=Path, help="write the lengths as a PNG")
    add.add_argument("--samples", type=int, default=0, help="sequences to show, spread over the corpus")
    add.add_argument("--length", type=int, default=200, help="tokens to show of each")
    add.add_argument("--tokenizer-type", help=", ".join(NAMES))
    add.add_argument("--vocab-file", help="the tokenizer's file, or its folder")
    add.add_argument("--merge-file", help="merges of a GPT-2 BPE")
    add.set_defaults(command=inspect)
    add = commands.add_parser("verify", help="prove everything that can be proved")
    add.add_argument("--data-path", required=True, nargs="+", help="paths of pairs without suffix")
    add.add_argument("--vocab-size", type=int, help="entries of the tokenizer")
    add.add_argument("--write-checksums", action="store_true", help="take the files for right and make .sums.json")
    add.set_defaults(command=prove)
    add = commands.add_parser("samples", help="the order of a run as arrays")
    add.add_argument("--data-path", required=True, help="path of the pair without suffix")
    add.add_argument("--split", default="969, 30, 1", help="shares of train, valid and test")
    add.add_argument("--name", default="train", choices=SPLIT_NAMES, help="which split")
    add.add_argument("--seq-length", type=int, required=True, help="tokens a sample predicts")
    add.add_argument("--num-samples", type=int, required=True, help="samples the run needs")
    add.add_argument("--seed", type=int, default=1234, help="seed of the run")
    add.add_argument("--pack-impl", default=PACKED, choices=PACK_IMPLS, help="how samples are made")
    add.add_argument("--tokens", type=int, default=50, help="samples whose tokens are written")
    add.add_argument("--output", type=Path, required=True, help="an .npz file")
    add.set_defaults(command=samples)
    add = commands.add_parser("merge", help="join pairs into one")
    add.add_argument("--input", required=True, nargs="+", help="paths of pairs without suffix, in the order wanted")
    add.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    add.set_defaults(command=merge)
    add = commands.add_parser("count", help="tokens and sequences")
    add.add_argument("--data-path", required=True, nargs="+", help="paths of pairs without suffix")
    add.set_defaults(command=count)
    return parser.parse_args(arguments)


def inspect(args: argparse.Namespace) -> None:
    """Print statistics of the corpus as JSON, and excerpts."""
    corpus = IndexedDataset(args.data_path)
    print(json.dumps(corpus_statistics(corpus), indent=1, ensure_ascii=False))
    if args.histogram:
        histogram(corpus.sizes, args.histogram)
    tokenizer = None
    if args.tokenizer_type:
        tokenizer = build_tokenizer(args.tokenizer_type, args.vocab_file, args.merge_file)
        check_fingerprint(args.data_path, tokenizer)
    for number in range(min(args.samples, len(corpus))):
        sequence = number * len(corpus) // args.samples
        print(f"\n--- sequence {sequence}, {corpus.sizes[sequence]} tokens")
        print(excerpt(corpus, sequence, args.length, tokenizer))


def prove(args: argparse.Namespace) -> None:
    """Verify each pair; the first error ends the command."""
    for prefix in args.data_path:
        if args.write_checksums:
            verify(prefix, args.vocab_size)
            write_checksums(prefix)
        print(json.dumps(verify(prefix, args.vocab_size), ensure_ascii=False))


def samples(args: argparse.Namespace) -> None:
    """Write doc_idx, sample_idx, shuffle_idx and, as `tokens`, the first samples of the order."""
    corpus = IndexedDataset(args.data_path)
    documents = split_documents(args.split, len(corpus))[args.name]
    if args.pack_impl == PACKED:
        order = build_sample_index(documents, corpus.sizes, args.seq_length, args.num_samples, args.seed)
        dataset: PackedDataset | PaddedDataset = PackedDataset(corpus, order)
    else:
        request = (documents, corpus.sizes, args.seq_length, args.num_samples, args.seed)
        order = build_padded_index(args.pack_impl, *request)
        dataset = PaddedDataset(corpus, order)
    shown = min(args.tokens, len(order))
    tokens = np.stack([dataset[i] for i in range(shown)]) if shown else np.zeros((0, args.seq_length + 1), np.int64)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(args.output) as handle:
            np.savez(
                handle,
                doc_idx=order.doc_idx,
                sample_idx=order.sample_idx,
                shuffle_idx=order.shuffle_idx,
                tokens=tokens,
            )
    except OSError as error:
        raise DataError("the arrays cannot be written", where=str(args.output), why=error.strerror) from None
    print(f"{len(order)} samples of {len(documents)} documents ({args.name}), tokens of the first {shown}: {args.output}")


def merge(args: argparse.Namespace) -> None:
    """Merge the pairs and print the result."""
    merged = merge_corpora(args.input, args.output_prefix)
    print(f"{len(args.input)} corpora, {len(merged)} sequences, {merged.total_tokens} tokens: {args.output_prefix}")


def count(args: argparse.Namespace) -> None:
    """Print one line per pair and, for several, their sum."""
    tokens = sequences = 0
    for prefix in args.data_path:
        corpus = IndexedDataset(prefix)
        tokens, sequences = tokens + corpus.total_tokens, sequences + len(corpus)
        print(f"{corpus.total_tokens} tokens, {len(corpus)} sequences: {prefix}")
    if len(args.data_path) > 1:
        print(f"{tokens} tokens, {sequences} sequences: total")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        parsed = parse_args()
        parsed.command(parsed)
