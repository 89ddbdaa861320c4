"""The golden files of the tree: thinned outputs read back in place, comparisons that can fail, equal to the whole numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.golden.store import ALL_NUMBERS, HERE, IN_TREE, STRIDE, _thinned, load_numbers, near, unpack


def test_thinned_outputs_are_read_in_place(tmp_path: Path) -> None:
    tensors = {"large": torch.randn(3, 50, 7, dtype=torch.float64), "small": torch.randn(4, 5), "ids": torch.arange(2000)}
    save_file(tensors, tmp_path / "whole.safetensors")
    (tmp_path / "thin.safetensors").write_bytes(_thinned(tmp_path / "whole.safetensors"))
    numbers = load_numbers(tmp_path / "thin.safetensors")
    assert torch.equal(numbers["small"], tensors["small"]) and torch.equal(numbers["ids"], tensors["ids"])
    stored = ~numbers["large"].isnan()
    assert int(stored.sum()) == math.ceil(3 * 50 * 7 / STRIDE) and stored.any(0).any(0).all() and stored.any(2).any(0).all()
    assert torch.equal(numbers["large"][stored], tensors["large"][stored])


def test_near_looks_at_stored_values_alone() -> None:
    golden = torch.tensor([1.0, math.nan, 3.0])
    near(torch.tensor([1.0, 99.0, 3.1]), golden, 0.2)
    for wrong in ([1.0, 0.0, 3.3], [math.nan, 0.0, 3.0]):
        with pytest.raises(AssertionError, match="differs by"):
            near(torch.tensor(wrong), golden, 0.2)
    with pytest.raises(AssertionError, match="no golden value"):
        near(torch.ones(1), golden[1:2], 0.2)


def test_all_archives_are_small() -> None:
    archives = list(HERE.glob("*.tar.xz"))
    assert {archive.name.split(".")[0] for archive in archives} == {"neox", *IN_TREE}
    assert sum(archive.stat().st_size for archive in archives) < 8e6


if (ALL_NUMBERS / "models").is_dir():  # on the authors' machines; elsewhere there is nothing to compare, and nothing to skip

    @pytest.mark.parametrize("name", IN_TREE)
    def test_the_tree_holds_the_whole_numbers(name: str, tmp_path: Path) -> None:
        folder, whole = unpack(name, tmp_path), ALL_NUMBERS / "models" / name
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
        for path in whole.iterdir():
            if path.name != "outputs.safetensors":
                assert (folder / path.name).read_bytes() == path.read_bytes()
        numbers, outputs = load_numbers(folder / "outputs.safetensors"), load_file(whole / "outputs.safetensors")
        assert set(numbers) == set(outputs)
        for key, tensor in outputs.items():
            if tensor.is_floating_point():
                near(numbers[key].nan_to_num() * ~numbers[key].isnan(), torch.where(numbers[key].isnan(), 0, tensor), 0)
            assert numbers[key].dtype == tensor.dtype and numbers[key].shape == tensor.shape
