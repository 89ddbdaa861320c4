"""How much of a corpus is for training, validation and test: the text of the key `split`, read without numpy."""

from __future__ import annotations

import math

from megatron.errors import DataError


def split_shares(split: str) -> tuple[float, float, float]:
    """The shares of `train`, `valid` and `test` in a text such as `969, 30, 1`; absent ones are 0.

    Args:
        split: up to three shares, separated by commas or, if there is no comma, by slashes.

    Raises:
        DataError: a share is not a number, is negative, or all are zero.
    """
    try:
        shares = [float(part) for part in split.split("," if "," in split else "/")]
    except ValueError:
        shares = [math.nan]
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not any(shares[:3]):
        raise DataError(
            f"split {split!r} cannot be read",
            why="it needs one to three numbers, none negative, not all zero",
            hint='for example split: "969, 30, 1"',
        )
    first, second, third = (*shares, 0.0, 0.0)[:3]
    return first, second, third
