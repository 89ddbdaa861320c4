"""Reading tensors out of one checkpoint by what they are, not by where they lie.

Each file is verified before its first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from megatron.checkpoint.boxes import box_of, copies, range_copies
from megatron.checkpoint.manifest import Manifest, OptimizerPart
from megatron.checkpoint.tensors import Reader, check_file, open_tensors
from megatron.errors import CheckpointError
from megatron.parallel.plan import Slice


class Source:
    """An open checkpoint. Use it as a context manager; the tensors it returns outlive it (they are copies).

    Args:
        path: the checkpoint's folder. manifest: what `read_manifest(path)` gave.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._stack, self._readers = ExitStack(), dict[str, Reader]()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._readers.clear()
        self._stack.close()

    def reader(self, file: str) -> Reader:
        """A verified, open file of the checkpoint.

        Raises:
            CheckpointError: it is missing, damaged, or of another save.
        """
        if file not in self._readers:
            if file not in self.manifest.files:
                raise CheckpointError("the checkpoint has no such file", where=str(self.path / file))
            check_file(self.path / file, self.manifest.files[file])
            reader = self._stack.enter_context(open_tensors(self.path / file))
            if reader.metadata().get("save_id") != self.manifest.save_id:
                raise CheckpointError("a file belongs to another save", where=str(self.path / file))
            self._readers[file] = reader
        return self._readers[file]

    def whole_file(self, file: str) -> dict[str, Tensor]:
        """All tensors of a file."""
        reader = self.reader(file)
        return {name: reader.read(name).clone() for name in reader.names()}

    def weight(self, name: str, want: Slice | None = None, tp_rank: int = 0) -> Tensor:
        """A weight, or the slice `want` of it, joined from the stored slices; of several replicas that of `tp_rank`
        is read.

        Raises:
            CheckpointError: the name is unknown, or a file it lies in is missing or damaged.
        """
        entry = self.manifest.weights.get(name)
        if entry is None:
            raise CheckpointError(f"the checkpoint has no weight '{name}'", where=str(self.path))
        want = want or Slice(entry.shape, None, 0, 0)
        boxes = [box_of(entry.slice_of(part)) for part in entry.parts]
        own = [i for i, part in enumerate(entry.parts) if part.file.endswith(f"-model_{tp_rank:02d}.safetensors")]
        result = torch.empty(want.local_shape, dtype=getattr(torch, entry.dtype))
        try:
            for step in copies(box_of(want), boxes, own):
                result[step.target] = self.reader(entry.parts[step.piece].file).read(name, step.source)
        except (ValueError, RuntimeError) as error:
            raise self._misfit(name, error) from error
        return result

    def optimizer_parts(self, name: str, want: Slice, pp_rank: int, tp_rank: int) -> Sequence[OptimizerPart]:
        """The parts that tile the slice `want` of a parameter; of several holders the nearest to these ranks."""
        parts = [
            p for p in self.manifest.optimizer.get(name, ()) if (p.dim, p.start, p.stop) == (want.dim, want.start, want.stop)
        ]
        if not parts:
            raise CheckpointError(f"the checkpoint has no optimizer state of '{name}' for this slice", where=str(self.path))
        holder = min({p.holder for p in parts}, key=lambda h: (h[3] != pp_rank, h[4] != tp_rank, h[3], h[4]))
        return [p for p in parts if p.holder == holder]

    def flat(self, parts: Sequence[OptimizerPart], key: str, start: int, stop: int) -> Tensor:
        """`[start, stop)` of a flattened slice from the ranges that were stored; `key` is the name in the files."""
        result = torch.empty(stop - start, dtype=torch.float32)
        try:
            for step in range_copies(start, stop, [(p.range_start, p.range_stop) for p in parts]):
                result[step.target] = self.reader(parts[step.piece].file).read(key, step.source)
        except (ValueError, RuntimeError) as error:
            raise self._misfit(key, error) from error
        return result

    def _misfit(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"the stored parts of '{name}' do not fit together", where=str(self.path), why=str(error))
