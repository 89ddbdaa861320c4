"""As preprocess_data.py, and a label file beside the tokens: no loss up to and with the first `--mask-before-token`.

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
    made = parser()
    made.description = __doc__
    made.add_argument("--mask-before-token", required=True, help="id, or ids in a row separated by commas")
    args = made.parse_args()
    try:
        mark = tuple(int(part) for part in args.mask_before_token.split(","))
    except ValueError:
        raise DataError(f"--mask-before-token {args.mask_before_token} is not a list of token ids") from None
    if len(args.jsonl_keys) != 1:
        raise DataError("--jsonl-keys must name one field", why="the labels belong to one text")
    run(args, mark)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with exit_on_error():
        main()
