"""Text to token files, with NeoX's flags: `{output-prefix}_{key}_document.bin` and `.idx` for each key.

    python tools/datasets/preprocess_data.py --input corpus.jsonl --tokenizer-type HFTokenizer \\
        --vocab-file tokenizer.json --append-eod --output-prefix data/mine
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.data.encode import EncodeJob, encode_corpus
from megatron.data.tokenizers import NAMES
from megatron.errors import DataError, exit_on_error


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, NeoX's names and defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="files (.jsonl, .txt) or folders, separated by commas")
    parser.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields to read, one output each")
    parser.add_argument("--num-docs", type=int, help="number of documents if known; shown, nothing else")
    parser.add_argument("--tokenizer-type", required=True, help=", ".join(NAMES))
    parser.add_argument("--vocab-file", help="the tokenizer's file, or its folder")
    parser.add_argument("--merge-file", help="merges of a GPT-2 BPE")
    parser.add_argument("--append-eod", action="store_true", help="end each document by the end-of-document token")
    parser.add_argument("--ftfy", action="store_true", help="repair mojibake with ftfy")
    parser.add_argument("--output-prefix", required=True, help="path of the output without _{key}_document.bin")
    parser.add_argument("--dataset-impl", default="mmap", help="only mmap is written")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    parser.add_argument("--log-interval", type=int, default=100, help="documents between lines of progress")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    """Encode as asked and say what was written."""
    if args.dataset_impl != "mmap":
        raise DataError(f"--dataset-impl {args.dataset_impl} is not written", hint="use --dataset-impl mmap")
    if args.workers < 1 or args.log_interval < 1:
        raise DataError("--workers and --log-interval must be at least 1")
    if args.num_docs is not None:
        logging.getLogger(__name__).info("%d documents announced", args.num_docs)
    job = EncodeJob(
        args.tokenizer_type, args.vocab_file, args.merge_file, tuple(args.jsonl_keys), args.append_eod, args.ftfy
    )
    done = encode_corpus(job, args.input.split(","), args.output_prefix, args.workers, args.log_interval)
    print(f"{done.documents} documents ({done.empty} without text), {done.bytes} bytes, {done.seconds:.1f} s")
    for key, tokens in done.tokens.items():
        print(f"{args.output_prefix}_{key}_document: {tokens} tokens")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        run(parse_args())
