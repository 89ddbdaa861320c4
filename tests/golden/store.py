"""Golden numbers of the original projects: small enough to live in the tree, packed, and unpacked where a test needs them.

`neox.tar.xz` holds what the data, configuration and learning-rate code of GPT-NeoX gave; `<model>.tar.xz` the random weights
of a tiny released model, inputs, and the outputs and gradients of the official code. Of an output with more than `WHOLE` values
every `STRIDE`-th is stored (in row-major order; 11 divides no width here, so every channel and position has its turn), and the
rest reads as NaN, which `near` leaves out. `README.md` beside this file says how the numbers were made.

    python -m tests.golden.store FOLDER_WITH_ALL_NUMBERS     # packs `neox/` and the models of `IN_TREE` again
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

HERE = Path(__file__).resolve().parent
ALL_NUMBERS = HERE.parents[2] / "shared" / "golden"
"""Where the authors keep the numbers whole, with three models that are too large for the tree."""
IN_TREE = ("metala_a", "metala_c", "based_a", "based_decay", "jrt_a", "attn_a", "mamba_a")
STRIDE, WHOLE = 11, 512


def model_names(*families: str) -> list[str]:
    """Golden models of some families: those in the tree, and those beside it on the authors' machines.

    Args:
        families: beginnings of names, such as `based`.
    """
    beside = [folder.name for folder in (ALL_NUMBERS / "models").glob("*/")]
    return sorted(name for name in {*IN_TREE, *beside} if name.split("_")[0] in families)


def model_folder(name: str, directory: Path) -> Path:
    """The folder of one golden model.

    Args:
        name: such as `metala_a`.
        directory: an empty folder of the test, to unpack into.
    """
    return unpack(name, directory) if name in IN_TREE else ALL_NUMBERS / "models" / name


def unpack(name: str, directory: Path) -> Path:
    """Unpack one archive of this folder.

    Args:
        name: file name without `.tar.xz`.
        directory: where to.

    Returns:
        `directory / name`.
    """
    with tarfile.open(HERE / f"{name}.tar.xz", "r:xz") as archive:
        archive.extractall(directory, filter="data")
    return directory / name


def load_numbers(path: Path) -> dict[str, Tensor]:
    """Tensors of a golden file, at their full shapes; NaN where a value is not stored.

    Args:
        path: `outputs.safetensors` of the tree, or any safetensors file.
    """
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        shapes = json.loads((file.metadata() or {}).get("thinned", "{}"))
    for name, shape in shapes.items():
        whole = torch.full(shape, torch.nan, dtype=tensors[name].dtype)
        whole.view(-1)[::STRIDE] = tensors[name]
        tensors[name] = whole
    return tensors


def largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude that is stored in several golden tensors."""
    return max(float(tensor.nan_to_num().abs().max()) for tensor in tensors)


def near(got: Tensor, golden: Tensor, limit: float) -> None:
    """Assert that all stored golden values are met.

    Args:
        got: any shape, any dtype.
        golden: the same shape; NaN where nothing is stored.
        limit: largest absolute difference.
    """
    assert got.shape == golden.shape
    stored = ~golden.isnan()
    assert stored.any(), "no golden value is stored here"
    difference = float((got.detach().double() - golden.double())[stored].abs().max())
    assert difference <= limit, f"differs by {difference:.2e}, limit {limit:.0e}"


def _thinned(path: Path) -> bytes:
    """A file of outputs with the large floating-point tensors thinned."""
    tensors, shapes = load_file(path), {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > WHOLE:
            shapes[name] = list(tensor.shape)
            tensors[name] = tensor.reshape(-1)[::STRIDE].contiguous()
    return save(tensors, {"thinned": json.dumps(shapes)})


def _pack(source: Path, target: Path) -> None:
    """One archive, the same bytes each time: sorted names, no times, no owners."""
    with lzma.open(target, "wb", preset=9 | lzma.PRESET_EXTREME) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            data = _thinned(path) if path.name == "outputs.safetensors" else path.read_bytes()
            entry = tarfile.TarInfo(f"{source.name}/{path.relative_to(source)}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    print(f"{target.name}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="pack golden numbers for the tree")
    parser.add_argument("folder", type=Path, help="holds neox/ and models/")
    folder = parser.parse_args().folder
    for packed in (folder / "neox", *(folder / "models" / name for name in IN_TREE)):
        _pack(packed, HERE / f"{packed.name}.tar.xz")
    sys.exit(0)
