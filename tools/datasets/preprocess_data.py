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

from megatron.data.encode import EncodeJob, EncodeOptions, EncodeSummary, encode_corpus
from megatron.data.readers import READABLE, check_sums, expand_inputs
from megatron.data.tokenizers import NAMES
from megatron.errors import DataError, exit_on_error


def parser() -> argparse.ArgumentParser:
    """The parser: NeoX's flags and defaults, followed by our own."""
    parser_ = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser_.add_argument(
        "--input", required=True, help=f"files ({READABLE}), folders, hf:NAME?split=train datasets, separated by commas"
    )
    parser_.add_argument("--jsonl-keys", nargs="+", default=["text"], help="fields (or columns) to read, one output each")
    parser_.add_argument("--num-docs", type=int, help="number of documents if known; only displayed")
    parser_.add_argument("--tokenizer-type", required=True, help=", ".join(NAMES))
    parser_.add_argument("--vocab-file", help="the tokenizer's file, or its folder")
    parser_.add_argument("--merge-file", help="merges of a GPT-2 BPE")
    parser_.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    parser_.add_argument("--ftfy", action="store_true", help="repair mojibake with ftfy")
    parser_.add_argument("--output-prefix", required=True, help="path of the output without _{key}_document.bin")
    parser_.add_argument("--dataset-impl", default="mmap", choices=["mmap", "cached"], help="cached: NeoX's legacy format")
    parser_.add_argument("--workers", type=int, default=1, help="processes that tokenise")
    parser_.add_argument("--log-interval", type=int, default=100, help="documents between progress lines")
    parser_.add_argument(
        "--bad-row-limit", type=int, default=0, help="bad rows to set aside in PREFIX_bad_rows.jsonl before it is an error"
    )
    parser_.add_argument("--input-sums", help="a list written by sha256sum, which must contain every input file")
    parser_.add_argument("--no-checksums", action="store_true", help="do not write .sums.json")
    return parser_


def run(args: argparse.Namespace, mask_before: tuple[int, ...] = ()) -> EncodeSummary:
    """Encode and print a summary."""
    if args.workers < 1 or args.log_interval < 1 or args.bad_row_limit < 0:
        raise DataError("--workers and --log-interval must be at least 1, --bad-row-limit at least 0")
    if args.num_docs is not None:
        logging.getLogger(__name__).info("%d documents announced", args.num_docs)
    inputs = args.input.split(",")
    if args.input_sums:
        check_sums(expand_inputs(inputs), Path(args.input_sums))
    job = EncodeJob(
        args.tokenizer_type,
        args.vocab_file,
        args.merge_file,
        tuple(args.jsonl_keys),
        args.append_eod,
        args.ftfy,
        mask_before,
        args.dataset_impl == "cached",
    )
    options = EncodeOptions(args.workers, args.log_interval, args.bad_row_limit, not args.no_checksums)
    summary = encode_corpus(job, inputs, args.output_prefix, options)
    print(f"{summary.documents} documents ({summary.empty} without text), {summary.bytes} bytes, {summary.seconds:.1f} s")
    if summary.resumed_at:
        print(f"the first {summary.resumed_at} documents are from an interrupted run")
    if summary.bad:
        print(f"{summary.bad} bad rows were set aside: {args.output_prefix}_bad_rows.jsonl")
    if summary.unmarked:
        print(
            f"warning: {summary.unmarked} of {summary.documents} documents do not contain the marker, the first is "
            f"{summary.first_unmarked}: all their tokens count in the loss"
        )
    for name, tokens in summary.tokens.items():
        print(f"{args.output_prefix}_{name}: {tokens} tokens")
    return summary


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        run(parser().parse_args())
