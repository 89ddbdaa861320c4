"""Builds the token files of a built-in corpus, with NeoX's flags: `python prepare_data.py pystdlib --data-dir data`.

Without a name it builds pystdlib, which needs no download (GPT-NeoX: enwik8). For your own text use
tools/datasets/preprocess_data.py.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron.data.corpora import CORPORA, NEOX_CORPORA, prepare
from megatron.data.corpus_request import CorpusRequest
from megatron.data.tokenizers import NAMES
from megatron.errors import exit_on_error

DEFAULT = "pystdlib"


def _default_notice() -> str:
    """The notice for a user who named no dataset: the default, and the other corpora."""
    others = ", ".join(name for name in CORPORA if name != DEFAULT)
    return (
        f"no dataset was named: preparing {DEFAULT} (GPT-NeoX's default is enwik8); also built in: {others}\n"
        f"GPT-NeoX's other datasets are not built in: {', '.join(sorted(NEOX_CORPORA))}\n"
        "encode a copy of one with tools/datasets/preprocess_data.py --input FILE\n"
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags and short forms are NeoX's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help=f"one of: {', '.join(CORPORA)} (default: {DEFAULT})")
    parser.add_argument("-t", "--tokenizer", help=f"{', '.join(NAMES)}; default: the corpus trains its own (HFTokenizer)")
    parser.add_argument("-d", "--data-dir", default=os.environ.get("DATA_DIR", "data"), help="parent folder of DATASET/")
    parser.add_argument("-v", "--vocab-file", help="the tokenizer's file, or its folder")
    parser.add_argument("-m", "--merge-file", help="merges of a GPT-2 BPE")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a local copy instead of a download")
    parser.add_argument("-f", "--force", "--force-redownload", action="store_true", help="rebuild an existing corpus")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the corpus and print how to use it."""
    args = parse_args(arguments)
    request = CorpusRequest(Path(args.data_dir), args.tokenizer, args.vocab_file, args.merge_file, args.force, args.source)
    if args.dataset is None:
        print(_default_notice(), flush=True)
    corpus = prepare(args.dataset or DEFAULT, request)
    receipt = corpus.receipt
    if corpus.created:
        print(f"wrote {corpus.data_path}.bin and .idx in {receipt['seconds']} s")
    else:
        print(f"{corpus.data_path}.bin and .idx are complete: nothing to do (--force rebuilds them)")
    print(
        f"{receipt['documents']} documents, {receipt['bytes'] / 1e6:.1f} MB, {receipt['tokens'] / 1e6:.2f} M tokens, "
        f"vocabulary {receipt['vocab_size']}, {receipt['undecodable_files']} files skipped (not decodable)"
    )
    print(f"\nFor your configuration:\n\n{corpus.yaml_lines()}")


if __name__ == "__main__":
    with exit_on_error():
        main()
