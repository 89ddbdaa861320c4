"""As preprocess_data.py, with a label file: masks the loss up to and including the first `--mask-before-token`.

    python tools/datasets/preprocess_data_with_mask.py --input chats.jsonl --tokenizer-type HFTokenizer \\
        --vocab-file tokenizer.json --append-eod --output-prefix data/chats --mask-before-token 15

Writes `{output-prefix}_{key}_document` and `{output-prefix}_label_document` (for train_label_data_paths).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.errors import DataError, exit_on_error
from tools.datasets.preprocess_data import parser, run


def main() -> None:
    """Encode with labels."""
    parser_ = parser()
    parser_.description = __doc__
    parser_.add_argument("--mask-before-token", required=True, help="id, or consecutive ids separated by commas")
    args = parser_.parse_args()
    try:
        mark = tuple(int(token_id) for token_id in args.mask_before_token.split(","))
    except ValueError:
        raise DataError(f"--mask-before-token {args.mask_before_token} is not a list of token ids") from None
    if len(args.jsonl_keys) != 1:
        raise DataError("--jsonl-keys must name one field", why="the labels belong to one text")
    run(args, mark)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        main()
