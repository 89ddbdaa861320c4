"""Writing past the page cache: the same bytes and hashes as any other way, also where the file system refuses it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.block_hashes import BLOCK, FileEntry
from megatron.checkpoint.direct_io import ALIGN, Buffers, create
from megatron.checkpoint.safetensors_writer import write_files

# Boundaries of tensors and of the file that lie on no multiple of anything, one tensor over several chunks, one empty.
TENSORS = {
    "long": torch.arange(3 * BLOCK // 4 + 12_345, dtype=torch.float32),
    "short": torch.arange(7, dtype=torch.float32),
    "half": torch.arange(1_000_003).to(torch.bfloat16),
    "none": torch.zeros(0),
    "byte": torch.arange(101, dtype=torch.uint8),
}


def written(folder: Path) -> tuple[bytes, FileEntry]:
    """The bytes of the file, and its entry."""
    entry = write_files(folder, {"x.safetensors": TENSORS}, {"save_id": "abc"})["x.safetensors"]
    return (folder / "x.safetensors").read_bytes(), entry


def test_bytes_and_hashes(tmp_path: Path) -> None:
    data, entry = written(tmp_path)
    assert len(data) == entry.size
    assert len(data) % ALIGN, "the padding of the last chunk is cut off"
    loaded = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    start, ends = 0, []
    for end, digest in entry.blocks:
        assert hashlib.sha256(data[start:end]).hexdigest() == digest
        assert end - start <= BLOCK
        start = end
        ends.append(end)
    assert start == len(data)
    assert set(range(BLOCK, len(data), BLOCK)) <= set(ends), "cut at every multiple, so that threads share nothing"


def test_without_hashes_the_bytes_are_the_same(tmp_path: Path) -> None:
    data, _ = written(tmp_path)
    entry = write_files(tmp_path, {"y.safetensors": TENSORS}, {"save_id": "abc"}, hashing=False)["y.safetensors"]
    assert (tmp_path / "y.safetensors").read_bytes() == data
    assert {digest for _, digest in entry.blocks} == {""}


@pytest.mark.parametrize("late", [False, True], ids=["at the opening", "at a write"])
def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    want = written(tmp_path / "a")
    refused: list[int] = []
    really_open, really_write = os.open, os.pwrite

    def refuse(*_: Any) -> None:
        refused.append(1)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def opening(path: Any, flags: int, *mode: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and not late:
            refuse()
        return really_open(path, flags, *mode, **more)

    def writing(fd: int, data: Any, offset: int) -> int:
        if late and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refuse()
        return really_write(fd, data, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    assert written(tmp_path / "b") == want
    assert refused or late, "where the disk of this test has no direct writing, nothing is left to refuse at a write"


def test_another_error_is_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    with pytest.raises(FileExistsError):
        create(tmp_path / "x.safetensors", direct=True)


def test_buffers_are_aligned_and_come_back() -> None:
    buffers = Buffers(1, BLOCK)
    first = buffers.take()
    assert first.ctypes.data % ALIGN == 0
    buffers.give(first)
    assert buffers.take() is first
