"""Reading tensors out of one checkpoint by what they are, not by where they lie, on several threads.

`reshard.py` says which runs of which files fill a tensor; here they are read, verified and put together. A tensor that is one
run in one file is returned as it was read, without a second copy.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron.checkpoint.damage import DamagedCheckpoint
from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import OptimizerReads, Place, Read, optimizer_reads, weight_reads
from megatron.checkpoint.safetensors_reader import Pending, Reader
from megatron.checkpoint.safetensors_writer import WAITING, threads
from megatron.errors import CheckpointError
from megatron.parallel.shard_spec import Slice

_AHEAD = 256 << 20  # bytes that are being read while earlier ones are put together


@dataclass(frozen=True)
class TensorRequest:
    """A tensor to be read: its name for messages, local shape, dtype, the reads that fill it, and where it is to go.

    into: memory for it (see `Reader.start`), used where the tensor lies in the file as it is wanted; None for new memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reads: tuple[Read, ...]
    into: Tensor | None = None

    @property
    def is_one_run(self) -> bool:
        """Whether one piece of one file is the tensor as it stands."""
        return len(self.reads) == 1 and len(self.reads[0].copies) == 1


class Source:
    """An open checkpoint; a context manager. Tensors it returned outlive it.

    Args:
        path: the checkpoint's folder. manifest: what `read_manifest(path)` gave. verify: compare SHA-256 of what is read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self.path, self.manifest, self.verify = path, manifest, verify
        self._stack, self._readers = ExitStack(), dict[str, Reader]()
        self.bytes_read = 0

    def __enter__(self) -> Source:
        self._pool = self._stack.enter_context(ThreadPoolExecutor(threads() + WAITING, "read"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)  # before the files are closed
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._stack.close()

    def reader(self, file: str) -> Reader:
        """An open file of the checkpoint, its header verified.

        Raises:
            DamagedCheckpoint: it is missing, damaged, or of another save.
        """
        if file not in self._readers:
            if file not in self.manifest.files:
                raise CheckpointError("the checkpoint has no such file", where=str(self.path / file))
            reader = Reader(self.path / file, self.manifest.files[file], self._pool, self.verify)
            self._readers[file] = reader
            if reader.metadata().get("save_id") != self.manifest.save_id:
                raise DamagedCheckpoint("a file belongs to another save", where=str(self.path / file))
        return self._readers[file]

    def whole_file(self, file: str) -> dict[str, Tensor]:
        """All tensors of a file."""
        reader = self.reader(file)
        return {name: reader.read(name) for name in reader.names()}

    def wanted_weight(self, name: str, want: Slice | None = None, place: Place | None = None) -> TensorRequest:
        """What to read for a weight, or for the slice `want` of it; of several replicas that of `place` is read.

        Raises:
            CheckpointError: the name is unknown, or the stored parts do not fit together.
        """
        entry = self.manifest.weights.get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint has no weight '{name}'", where=str(self.path))
        want = want or Slice(entry.shape, None, 0, 0)
        try:
            reads = weight_reads(name, entry, want, place or Place())
        except ValueError as error:
            raise self._misfit(name, error) from error
        return TensorRequest(name, want.local_shape, getattr(torch, entry.dtype), reads)

    def optimizer_reads(self, name: str, want: FlatRange, place: Place | None = None) -> OptimizerReads:
        """What to read for a range of a parameter's optimizer state; CheckpointError as `wanted_weight`."""
        try:
            return optimizer_reads(self.manifest, name, want, place or Place())
        except (ValueError, KeyError) as error:
            raise self._misfit(name, error) from error

    def weight(self, name: str, want: Slice | None = None, place: Place | None = None) -> Tensor:
        """A weight, or the slice `want` of it, joined from the stored slices."""
        return next(self.tensors([self.wanted_weight(name, want, place)]))

    def tensors(self, wanted: Iterable[TensorRequest]) -> Iterator[Tensor]:
        """The tensors, in order; reading runs ahead of what was taken.

        Raises:
            DamagedCheckpoint: a file is missing, damaged or does not hold what the manifest says.
        """
        queue: deque[tuple[TensorRequest, list[Pending], int]] = deque()
        ahead = 0
        for item in wanted:
            into = item.into if item.is_one_run else None
            started = [self.reader(read.file).start(read.key, read.start, read.stop, into) for read in item.reads]
            size = sum(pending.size for pending in started)
            queue.append((item, started, size))
            ahead += size
            self.bytes_read += size
            while ahead > _AHEAD and len(queue) > 1:
                ready = queue.popleft()
                ahead -= ready[2]
                yield self._assemble(*ready[:2])
        while queue:
            yield self._assemble(*queue.popleft()[:2])

    def _assemble(self, item: TensorRequest, started: list[Pending]) -> Tensor:
        pieces = [pending.wait() for pending in started]
        for read, piece in zip(item.reads, pieces, strict=True):
            if piece.dtype != item.dtype:
                raise DamagedCheckpoint(f"'{item.name}' has another dtype than manifest.json says", where=read.file)
        if item.is_one_run and pieces[0].numel() == math.prod(item.shape):
            return pieces[0].view(item.shape)  # one run that is all of it
        result = torch.empty(item.shape, dtype=item.dtype).view(-1)
        for read, piece in zip(item.reads, pieces, strict=True):
            for copy in read.copies:
                source = piece.as_strided(copy.size, copy.source_strides, piece.storage_offset() + copy.source)
                result.as_strided(copy.size, copy.target_strides, copy.target).copy_(source)
        return result.view(item.shape)

    def _misfit(self, name: str, error: Exception) -> CheckpointError:
        return DamagedCheckpoint(f"the stored parts of '{name}' do not fit together", where=str(self.path), why=str(error))
