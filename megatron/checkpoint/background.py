"""Asynchronous saves: a copy in host memory on the training thread, the writing on another, the same bytes on the disk.

    saver = Saver(background=True)      every rank, once; with False each save is written before `save` returns
    saver.save(folder, engine, state, model_config=...)     waits for the save before it, copies, returns
    saver.poll()                        after every step: has the save ended on all ranks? A failure is raised here
    saver.wait()                        at the end of the run, and before anything that must find the checkpoint
    saver.close()                       when the run fails: what is being written may end, nothing is raised

Never two saves at once; the host memory is one rank's share of a checkpoint, kept for the next save. The background thread
has its own gloo group, so that its collectives never meet those of a training step; `poll` has another. A kill while the
thread writes is a killed save like any other: the temporary folder is never taken for a checkpoint.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.checkpoint.layout import tag_of
from megatron.checkpoint.save import SaveOptions, Snapshot, save_checkpoint, take_snapshot, write_snapshot
from megatron.checkpoint.shard_contents import ShardContents
from megatron.engine.base import Engine, copy_all
from megatron.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_log = logging.getLogger(__name__)
_BEHIND_S, _CLOSE_S = 60.0, 600.0


class HostCopy:
    """Host memory for one rank's share, reused from save to save; page-locked when the tensors come from a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def __call__(self, holdings: ShardContents) -> None:
        """Replace all tensors of `holdings` by copies that no training step touches."""
        kept: dict[tuple[str, str], Tensor] = {}
        pairs = []
        for file, tensors in holdings.files.items():
            for name, tensor in tensors.items():
                buffer = kept[file, name] = tensors[name] = self._buffer((file, name), tensor)
                if tensor.is_cuda:
                    buffer.copy_(tensor.detach(), non_blocking=True)
                else:
                    pairs.append((buffer, tensor.detach()))
        self._buffers = kept
        copy_all(pairs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies from the device run beside each other until here

    def _buffer(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        found = self._buffers.get(key)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return found


class _Job:
    """One save in the background."""

    def __init__(self, folder: Path, snapshot: Snapshot, options: SaveOptions, group: ProcessGroup | None) -> None:
        self.path, self.begin = folder / tag_of(snapshot.iteration), time.monotonic()
        self.error: BaseException | None = None
        self._arguments = (folder, snapshot, options, group)
        # Not waited for when the process ends by an error elsewhere: that is a killed save, which harms nothing.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            write_snapshot(*self._arguments)
        except BaseException as error:
            self.error = error


class Saver:
    """See the module. Make it on every rank, after the default process group."""

    def __init__(self, background: bool = True) -> None:
        self.background, self._copy = background, HostCopy()
        self._job: _Job | None = None
        self._writing, self._voting = (_own_group(), _own_group()) if background else (None, None)

    def save(self, folder: str | Path, engine: Engine, state: Mapping[str, Any], **options: Any) -> Path:
        """As `save_checkpoint`; in the background only the copying is waited for, and the path is whole once `poll` or
        `wait` gave it.

        Raises:
            CheckpointError: on all ranks: the save before this one had failed, or the state could not be copied.
        """
        if not self.background:
            return save_checkpoint(folder, engine, state, **options)
        self.wait()
        chosen = SaveOptions(**options)
        snapshot = take_snapshot(Path(folder), engine, state, chosen, copy=self._copy, group=self._writing)
        self._job = _Job(Path(folder), snapshot, chosen, self._writing)
        return self._job.path

    def poll(self) -> Path | None:
        """The checkpoint that became whole since the last call, if one did. Every rank calls this after every step.

        While a save runs this is one reduction of two numbers, and nothing otherwise.

        Raises:
            CheckpointError: on all ranks at the same step, when the save failed on any.
        """
        if self._job is None:
            return None
        running, failed = self._vote(self._job)
        if failed:  # all fail together (collective_errors.py); the slower ones are a moment behind
            self._job.thread.join(_BEHIND_S)
        return self._end(failed) if failed or not running else None

    def wait(self) -> Path | None:
        """As `poll`, once the running save has ended."""
        if self._job is None:
            return None
        self._job.thread.join()
        return self._end(self._vote(self._job)[1])

    def close(self) -> None:
        """Give a running save `_CLOSE_S` seconds to end; for the way out of a failed run, where nobody polls any more."""
        if self._job is not None:
            self._job.thread.join(_CLOSE_S)

    def _vote(self, job: _Job) -> tuple[int, int]:
        """On how many ranks the save still runs, on how many it failed."""
        running = job.thread.is_alive()
        votes = torch.tensor([int(running), int(not running and job.error is not None)])
        if self._voting is not None:
            dist.all_reduce(votes, group=self._voting)
        return int(votes[0]), int(votes[1])

    def _end(self, failed: int) -> Path:
        job, self._job = self._job, None
        assert job is not None
        if not failed:
            if not dist.is_initialized() or dist.get_rank() == 0:
                _log.info("checkpoint %s is whole, %.1f s after its step", job.path, time.monotonic() - job.begin)
            return job.path
        if isinstance(job.error, CheckpointError):
            raise job.error
        where, why = str(job.path), f"{failed} ranks failed" if job.error is None else repr(job.error)
        raise CheckpointError("a checkpoint could not be saved; the earlier ones are untouched", where=where, why=why)


def _own_group() -> ProcessGroup | None:
    """A gloo group of all ranks; None for one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo")
