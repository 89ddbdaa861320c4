"""Sequential image classification, as Long Range Arena's Image (arXiv 2011.04006): grey levels row by row, then the class.

An image of h x w pixels is h w tokens and the mark. Benchmarks: CIFAR-10 in grey (1,024 tokens, LRA), MNIST (784), and
scikit-learn's digits (8 x 8 pixels of 17 levels, 64 tokens), which come with that package and need no download.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron.errors import DataError
from megatron.synthetics.image_files import GreyLevels, Images, read_images
from megatron.synthetics.stored import Records, StoredTask, share_train, stored_split
from megatron.synthetics.task import need

DIGITS = "digits"
DIGITS_LEVELS = 17


@dataclass(frozen=True)
class Pixels(StoredTask):
    """Images, all of one size; see `StoredTask` for the other parameters.

    Attributes:
        source: `digits` (scikit-learn's), or a folder: of image files in a folder per class, below train and test or not; of
            MNIST's idx files; of CIFAR-10's binary files.
        size: side to which images are reduced; 0 leaves them as they are.
        levels: grey levels; 0: 256, and 17 of the digits.
    """

    name: ClassVar[str] = "pixels"
    size: int = 0
    levels: int = 0

    def __post_init__(self) -> None:
        need(bool(self.source), self, "source is missing: digits, or the path of a folder")
        need(self.levels == 0 or 2 <= self.levels <= 256, self, "levels are 2 to 256")
        need(self.source != DIGITS or self.levels in (0, DIGITS_LEVELS), self, f"the digits have {DIGITS_LEVELS} levels")
        need(self.size >= 0, self, "size must not be negative")
        need(min(self.valid_share, self.test_share) >= 0 and self.valid_share + self.test_share < 1, self, "shares are below 1")

    @property
    def mark(self) -> int:
        """After the levels."""
        return self.levels or (DIGITS_LEVELS if self.source == DIGITS else 256)

    @property
    def seq_length(self) -> int:
        """Pixels of an image and the mark; reads the source."""
        return len(stored_split(self).contents[0]) + 1 if self.available() else 0

    def read(self) -> Records:
        """See `StoredTask`."""
        images = _digits() if self.source == DIGITS else read_images(Path(self.source), self.size)
        pixels = images.pixels
        if self.size and pixels.shape[1:] != (self.size, self.size):
            pixels = _reduced(pixels, self.size, self.source)
        if self.source != DIGITS and self.levels:
            pixels = (pixels.astype(np.int64) * self.levels // 256).astype(np.uint8)
        records = Records([image.tobytes() for image in pixels], images.labels, images.splits)
        return share_train(records, self.valid_share) if any(images.splits) else records


def _reduced(pixels: GreyLevels, size: int, source: str) -> GreyLevels:
    """Means of squares of pixels: u8 [n, size, size], rounded."""
    count, height, width = pixels.shape
    if height != width or height % size:
        raise DataError(f"{height} x {width} pixels cannot be reduced to {size} x {size}", where=source, why="it is no divisor")
    block = height // size
    means = pixels.reshape(count, size, block, size, block).mean(axis=(2, 4), dtype=np.float64)
    return np.rint(means).astype(np.uint8)


def _digits() -> Images:
    """The 1,797 digits of scikit-learn, which its package contains."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits need scikit-learn",
            why=str(error),
            hint="pip install 'linear-neox[digits]', or pip install scikit-learn",
        ) from None
    data = load_digits()
    labels = [str(label) for label in data.target.tolist()]
    return Images(data.images.astype(np.uint8), labels, [""] * len(labels))
