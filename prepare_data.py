"""Makes token files of a built-in corpus, with NeoX's flags: `python prepare_data.py pystdlib --data-dir data`.

Without a name it makes pystdlib, which needs no download (GPT-NeoX: enwik8). For your own text use
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


def _said_by_default() -> str:
    """What was chosen for a user who named no dataset, and what else there is."""
    others = ", ".join(name for name in CORPORA if name != DEFAULT)
    return (
        f"no dataset was named, so {DEFAULT} is made (GPT-NeoX's default is enwik8); also built in: {others}\n"
        f"GPT-NeoX's other sets are not built in: {', '.join(sorted(NEOX_CORPORA))}\n"
        "turn a copy of one into token files with tools/datasets/preprocess_data.py --input FILE\n"
    )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; flags and short forms are NeoX's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", help=f"one of: {', '.join(CORPORA)} (default: {DEFAULT})")
    parser.add_argument("-t", "--tokenizer", help=f"{', '.join(NAMES)}; default: the corpus trains its own (HFTokenizer)")
    parser.add_argument("-d", "--data-dir", default=os.environ.get("DATA_DIR", "data"), help="where DATASET/ is made")
    parser.add_argument("-v", "--vocab-file", help="the tokenizer's file, or its folder")
    parser.add_argument("-m", "--merge-file", help="merges of a GPT-2 BPE")
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="a local copy instead of a download")
    parser.add_argument("-f", "--force", "--force-redownload", action="store_true", help="make it again if it is there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the corpus and print how to use it."""
    args = parse_args(arguments)
    request = CorpusRequest(Path(args.data_dir), args.tokenizer, args.vocab_file, args.merge_file, args.force, args.source)
    if args.dataset is None:
        print(_said_by_default(), flush=True)
    done = prepare(args.dataset or DEFAULT, request)
    receipt = done.receipt
    if done.made:
        print(f"made {done.data_path}.bin and .idx in {receipt['seconds']} s")
    else:
        print(f"{done.data_path}.bin and .idx are there and whole: nothing to do (--force makes them again)")
    print(
        f"{receipt['documents']} documents, {receipt['bytes'] / 1e6:.1f} MB, {receipt['tokens'] / 1e6:.2f} M tokens, "
        f"vocabulary {receipt['vocab_size']}, {receipt['undecodable_files']} files left out (not decodable)"
    )
    print(f"\nFor your configuration:\n\n{done.yaml_lines()}")


if __name__ == "__main__":
    with exit_on_error():
        main()
