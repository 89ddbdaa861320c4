"""Images from local files as grey levels: folders of image files by class, MNIST's idx files, CIFAR-10's binary files.

The last two are plain arrays and need no further package; CIFAR-10's Python version is made of pickles, which are not read.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError
from megatron.files import read_bytes

GreyLevels: TypeAlias = NDArray[np.uint8]
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp")
_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_IDX = {"train": "train", "test": "t10k"}
_CIFAR = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR_RECORD = 1 + 3 * 32 * 32


@dataclass(frozen=True)
class Images:
    """Attributes:
    pixels: u8 [n, height, width].
    labels: names of the classes [n].
    splits: train, valid or test of each [n]; empty where the source does not say.
    """

    pixels: GreyLevels
    labels: Sequence[str]
    splits: Sequence[str]


def read_images(path: Path, size: int = 0) -> Images:
    """All images under a folder.

    Args:
        path: see the module.
        size: side to which image files are scaled; 0 requires equal sizes. Arrays keep theirs.

    Raises:
        DataError: the folder is missing, holds no images, or a file is damaged.
    """
    if not path.is_dir():
        raise DataError("the folder of images does not exist", where=str(path))
    if _idx_file(path, "train-images-idx3-ubyte") is not None:
        return _joined([_idx(path, split) for split in _IDX])
    if (path / _CIFAR["train"][0]).is_file():
        return _joined([_cifar(path, split) for split in _CIFAR])
    if (path / "data_batch_1").is_file():
        hint = "take cifar-10-binary.tar.gz, whose files end in .bin"
        raise DataError("CIFAR-10 as pickles is not read", where=str(path), why="pickles run code", hint=hint)
    if (path / "train").is_dir():
        splits = [split for split in ("train", "valid", "test") if (path / split).is_dir()]
        if "test" not in splits:
            raise DataError("there is a train split without a test split", where=str(path))
        return _joined([_class_folders(path / split, split, size) for split in splits])
    return _class_folders(path, "", size)


def _joined(parts: Sequence[Images]) -> Images:
    shapes = {part.pixels.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DataError("the splits have images of several sizes", why=str(sorted(shapes)), hint="set size")
    labels, splits = ([value for part in parts for value in getattr(part, name)] for name in ("labels", "splits"))
    return Images(np.concatenate([part.pixels for part in parts]), labels, splits)


def _content(path: Path) -> bytes:
    try:
        data = read_bytes(path)
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("a file of images cannot be read", where=str(path), why=str(error)) from None


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _idx(folder: Path, split: str) -> Images:
    """A split of MNIST and its relatives."""
    arrays = []
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        name = f"{_IDX[split]}-{kind}-ubyte"
        path = _idx_file(folder, name)
        if path is None:
            raise DataError("a file of images is missing", where=str(folder / name))
        arrays.append(_idx_array(_content(path), dimensions, path))
    pixels, labels = arrays
    if len(pixels) != len(labels):
        raise DataError(f"{len(pixels)} images have {len(labels)} labels", where=str(folder), why=f"split {split}")
    return Images(pixels, [str(label) for label in labels.tolist()], [split] * len(labels))


def _idx_array(data: bytes, dimensions: int, path: Path) -> GreyLevels:
    """An idx file: two zero bytes, 8 for unsigned bytes, the number of dimensions, big-endian sizes, the values."""
    head = 4 + 4 * dimensions
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, head, 4)]
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != head + math.prod(sizes):
        raise DataError("the file is no idx file of its size", where=str(path))
    return np.frombuffer(data, dtype=np.uint8, offset=head).reshape(sizes)


def _cifar(folder: Path, split: str) -> Images:
    """A split of CIFAR-10: records of a label and 32 x 32 pixels of red, green and blue."""
    parts = []
    for name in _CIFAR[split]:
        if not (folder / name).is_file():
            raise DataError("a file of images is missing", where=str(folder / name))
        data = _content(folder / name)
        if not data or len(data) % _CIFAR_RECORD:
            raise DataError("the file is no CIFAR-10 binary file", where=str(folder / name), why=f"it has {len(data)} bytes")
        parts.append(np.frombuffer(data, dtype=np.uint8).reshape(-1, _CIFAR_RECORD))
    records = np.concatenate(parts)
    colours = records[:, 1:].reshape(-1, 3, 32, 32)
    grey = np.rint(np.tensordot(_GREY, colours, axes=(0, 1))).astype(np.uint8)
    return Images(grey, [str(label) for label in records[:, 0].tolist()], [split] * len(records))


def _class_folders(path: Path, split: str, size: int) -> Images:
    """Image files in a folder per class."""
    files = [
        (file, folder.name)
        for folder in sorted(child for child in path.iterdir() if child.is_dir())
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise DataError(
            "the folder has no images", where=str(path), hint=f"a folder per class with {', '.join(SUFFIXES)} files"
        )
    pixels: list[GreyLevels] = []
    for file, _ in files:
        pixels.append(_grey_levels(file, size))
        if pixels[-1].shape != pixels[0].shape:
            raise DataError("the images have several sizes", where=str(file), hint="set size, to which all are scaled")
    return Images(np.stack(pixels), [label for _, label in files], [split] * len(files))


def _grey_levels(path: Path, size: int) -> GreyLevels:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image files need Pillow", why=str(error), hint="pip install pillow") from None
    try:
        with Image.open(path) as image:
            grey = image.convert("L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for damaged files
        raise DataError("an image cannot be read", where=str(path), why=str(error)) from None
    if size and grey.size != (size, size):
        grey = grey.resize((size, size), Image.Resampling.BOX)
    return np.asarray(grey, dtype=np.uint8)
