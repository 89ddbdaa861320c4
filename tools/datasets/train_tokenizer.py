"""Trains a tokenizer: byte-level BPE for HFTokenizer, or SentencePiece for SPMTokenizer.

python tools/datasets/train_tokenizer.py --input corpus.jsonl --output tokenizer.json --vocab-size 52000
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.data.readers import READABLE, RowReader, expand_inputs
from megatron.data.rows import row_texts
from megatron.data.train_tokenizer import train_to_file
from megatron.errors import exit_on_error


def texts(reader: RowReader, keys: list[str], limit: int | None) -> Iterator[str]:
    """The texts of all rows, up to `limit` documents."""
    for number, row in enumerate(reader):
        if limit is not None and number >= limit:
            return
        yield from (text for text in row_texts(row, keys) if text)


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help=f"files ({READABLE}), folders, hf: datasets, separated by commas")
    parser.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to read")
    parser.add_argument("--kind", default="bpe", choices=["bpe", "spm-bpe", "spm-unigram"], help="what to train")
    parser.add_argument("--vocab-size", type=int, default=52000, help="entries, special tokens included")
    parser.add_argument("--num-docs", type=int, help="use only so many documents")
    parser.add_argument("--output", required=True, help="tokenizer.json, or NAME.model")
    args = parser.parse_args()
    reader = RowReader(expand_inputs(args.input.split(",")), args.jsonl_keys)
    train_to_file(texts(reader, args.jsonl_keys, args.num_docs), args.kind, args.vocab_size, Path(args.output))
    kind = "HFTokenizer" if args.kind == "bpe" else "SPMTokenizer"
    print(f'tokenizer_type: "{kind}"\nvocab_file: "{args.output}"')


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        main()
