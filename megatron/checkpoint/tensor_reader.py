"""Reads tensors of one checkpoint by their logical names, on several threads.

`reshard.py` plans which runs of which files fill a tensor; this module reads, verifies and assembles them. A tensor that is
one run in one file is returned as read, without a second copy.
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

from megatron.checkpoint.manifest import Manifest
from megatron.checkpoint.regions import FlatRange
from megatron.checkpoint.reshard import MeshPosition, OptimizerReads, Read, optimizer_reads, weight_reads
from megatron.checkpoint.safetensors_reader import PendingTensor, SafetensorsReader
from megatron.checkpoint.safetensors_writer import WAITING, threads
from megatron.errors import CheckpointError, DamagedCheckpoint
from megatron.parallel.shard_spec import Slice

_AHEAD = 256 << 20  # bytes read ahead while earlier tensors are assembled


@dataclass(frozen=True)
class TensorRequest:
    """A tensor to read.

    Attributes:
        name: for messages.
        shape: local shape.
        dtype: the stored dtype.
        reads: what fills it.
        into: memory to read into (see `SafetensorsReader.start`), used where the file holds the tensor as one run; None
            allocates new memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reads: tuple[Read, ...]
    into: Tensor | None = None

    @property
    def is_one_run(self) -> bool:
        """Whether one run of one file is the tensor, without rearrangement."""
        return len(self.reads) == 1 and len(self.reads[0].copies) == 1


class CheckpointReader:
    """An open checkpoint; a context manager. Returned tensors outlive it.

    Args:
        path: the checkpoint's folder.
        manifest: from `read_manifest(path)`.
        verify: compare the SHA-256 of everything that is read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self.path, self.manifest, self.verify = path, manifest, verify
        self._stack, self._readers = ExitStack(), dict[str, SafetensorsReader]()
        self.bytes_read = 0

    def __enter__(self) -> CheckpointReader:
        self._pool = self._stack.enter_context(ThreadPoolExecutor(threads() + WAITING, "read"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)  # first, so that no thread reads from a closed descriptor
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._stack.close()

    def reader(self, file: str) -> SafetensorsReader:
        """An open file of the checkpoint with a verified header.

        Raises:
            DamagedCheckpoint: the file is missing, damaged, or of another save.
        """
        if file not in self._readers:
            if file not in self.manifest.files:
                raise CheckpointError("the checkpoint has no such file", where=str(self.path / file))
            reader = SafetensorsReader(self.path / file, self.manifest.files[file], self._pool, self.verify)
            self._readers[file] = reader
            if reader.metadata().get("save_id") != self.manifest.save_id:
                raise DamagedCheckpoint("a file belongs to another save", where=str(self.path / file))
        return self._readers[file]

    def read_file(self, file: str) -> dict[str, Tensor]:
        """All tensors of a file."""
        reader = self.reader(file)
        return {name: reader.read(name) for name in reader.names()}

    def weight_request(self, name: str, target: Slice | None = None, position: MeshPosition | None = None) -> TensorRequest:
        """What to read for a weight.

        Args:
            name: its logical name.
            target: the slice to read; None is the full weight.
            position: of several replicas, the one written there is read.

        Raises:
            CheckpointError: the name is unknown, or the stored shards do not tile the weight.
        """
        entry = self.manifest.weights.get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint has no weight '{name}'", where=str(self.path))
        target = target or Slice(entry.shape, None, 0, 0)
        try:
            reads = weight_reads(name, entry, target, position or MeshPosition())
        except ValueError as error:
            raise self._misfit(name, error) from error
        return TensorRequest(name, target.local_shape, getattr(torch, entry.dtype), reads)

    def optimizer_reads(self, name: str, target: FlatRange, position: MeshPosition | None = None) -> OptimizerReads:
        """What to read for a range of a parameter's optimizer state; raises as `weight_request`."""
        try:
            return optimizer_reads(self.manifest, name, target, position or MeshPosition())
        except (ValueError, KeyError) as error:
            raise self._misfit(name, error) from error

    def weight(self, name: str, target: Slice | None = None, position: MeshPosition | None = None) -> Tensor:
        """A weight, or its slice `target`, assembled from the stored shards."""
        return next(self.tensors([self.weight_request(name, target, position)]))

    def tensors(self, requests: Iterable[TensorRequest]) -> Iterator[Tensor]:
        """The requested tensors, in order; reads run ahead of the consumer by up to `_AHEAD` bytes.

        Raises:
            DamagedCheckpoint: a file is missing or damaged, or its content differs from the manifest.
        """
        queue: deque[tuple[TensorRequest, list[PendingTensor], int]] = deque()
        ahead = 0
        for request in requests:
            into = request.into if request.is_one_run else None
            started = [self.reader(read.file).start(read.key, read.start, read.stop, into) for read in request.reads]
            size = sum(pending.size for pending in started)
            queue.append((request, started, size))
            ahead += size
            self.bytes_read += size
            while ahead > _AHEAD and len(queue) > 1:
                ready = queue.popleft()
                ahead -= ready[2]
                yield self._assemble(*ready[:2])
        while queue:
            yield self._assemble(*queue.popleft()[:2])

    def _assemble(self, request: TensorRequest, started: list[PendingTensor]) -> Tensor:
        runs = [pending.wait() for pending in started]
        for read, run in zip(request.reads, runs, strict=True):
            if run.dtype != request.dtype:
                raise DamagedCheckpoint(f"'{request.name}' has another dtype than manifest.json says", where=read.file)
        if request.is_one_run and runs[0].numel() == math.prod(request.shape):
            return runs[0].view(request.shape)
        result = torch.empty(request.shape, dtype=request.dtype).view(-1)
        for read, run in zip(request.reads, runs, strict=True):
            for copy in read.copies:
                source = run.as_strided(copy.size, copy.source_strides, run.storage_offset() + copy.source)
                result.as_strided(copy.size, copy.target_strides, copy.target).copy_(source)
        return result.view(request.shape)

    def _misfit(self, name: str, error: Exception) -> CheckpointError:
        return DamagedCheckpoint(f"the stored shards of '{name}' do not tile it", where=str(self.path), why=str(error))
