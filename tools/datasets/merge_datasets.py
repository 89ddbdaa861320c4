"""Joins all corpora of a folder into one (NeoX's flags): `merge_datasets.py --input FOLDER --output-prefix data/all`.

tools/data.py merge does the same for corpora named one by one.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.data.merge import merge_corpora, prefixes_in
from megatron.errors import exit_on_error


def main() -> None:
    """Merge and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", required=True, help="folder of .bin and .idx pairs, taken in the order of their names")
    parser.add_argument("--output-prefix", required=True, help="path of the output without suffix")
    args = parser.parse_args()
    prefixes = prefixes_in(Path(args.input))
    merged = merge_corpora(prefixes, args.output_prefix)
    print(f"{len(prefixes)} corpora, {len(merged)} sequences, {merged.total_tokens} tokens: {args.output_prefix}")


if __name__ == "__main__":
    with exit_on_error():
        main()
