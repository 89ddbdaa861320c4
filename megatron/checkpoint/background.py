"""Asynchronous saves: the training thread copies to host memory, a background thread writes; the files are the same bytes.

    saver = Saver(background=True)                once on every rank; with False, `save` returns when the files are written
    saver.save(folder, engine, state, options)    waits for the previous save, copies, returns
    saver.poll()                                  after every step: has the save finished on all ranks? Raises its failure
    saver.wait()                                  at the end of the run, and before anything that needs the checkpoint
    saver.close()                                 when the run fails: lets a running save finish, raises nothing

There is one save at a time; the host memory, one rank's share of a checkpoint, is reused by the next save. The background
thread has its own gloo group, so that its collectives cannot interleave with those of a training step; `poll` has another. A
kill while the thread writes is a killed save like any other: the temporary folder is never taken for a checkpoint.
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
_STRAGGLER_S, _CLOSE_S = 60.0, 600.0


class HostCopy:
    """Host memory for one rank's share, reused by every save; pinned when the tensors are on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def __call__(self, contents: ShardContents) -> None:
        """Replace all tensors of `contents` by copies that no training step touches."""
        buffers: dict[tuple[str, str], Tensor] = {}
        pairs = []
        for file, tensors in contents.files.items():
            for name, tensor in tensors.items():
                buffer = buffers[file, name] = tensors[name] = self._buffer((file, name), tensor)
                if tensor.is_cuda:
                    buffer.copy_(tensor.detach(), non_blocking=True)
                else:
                    pairs.append((buffer, tensor.detach()))
        self._buffers = buffers
        copy_all(pairs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the device-to-host copies overlap until here; the next step may change their sources

    def _buffer(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer


class _Job:
    """One save in the background."""

    def __init__(self, folder: Path, snapshot: Snapshot, options: SaveOptions, group: ProcessGroup | None) -> None:
        self.path, self.begin = folder / tag_of(snapshot.iteration), time.monotonic()
        self.error: BaseException | None = None
        self._arguments = (folder, snapshot, options, group)
        # A daemon: when the process ends by an error elsewhere, this is a killed save, which harms nothing.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            write_snapshot(*self._arguments)
        except BaseException as error:
            self.error = error


class Saver:
    """Saves checkpoints in the background (see the module); create it on every rank, after the default process group."""

    def __init__(self, background: bool = True) -> None:
        self.background, self._copy = background, HostCopy()
        self._job: _Job | None = None
        self._write_group, self._poll_group = (_new_group(), _new_group()) if background else (None, None)

    def save(self, folder: str | Path, engine: Engine, state: Mapping[str, Any], options: SaveOptions) -> Path:
        """As `save_checkpoint`; in the background it returns after the copy, and `poll` or `wait` return the finished path.

        Raises:
            CheckpointError: on all ranks: the previous save failed, or the state could not be copied.
        """
        if not self.background:
            return save_checkpoint(folder, engine, state, options)
        self.wait()
        snapshot = take_snapshot(Path(folder), engine, state, options, copy=self._copy, group=self._write_group)
        self._job = _Job(Path(folder), snapshot, options, self._write_group)
        return self._job.path

    def poll(self) -> Path | None:
        """The checkpoint that was completed since the last call, if any. Every rank calls this after every step.

        While a save runs this is one all-reduce of two numbers; otherwise it does nothing.

        Raises:
            CheckpointError: on all ranks at the same step, if the save failed on any.
        """
        if self._job is None:
            return None
        running, failed = self._count(self._job)
        if failed:  # the error check fails all ranks together (collective_errors.py); slower threads end a moment later
            self._job.thread.join(_STRAGGLER_S)
        return self._finish(failed) if failed or not running else None

    def wait(self) -> Path | None:
        """Wait for the running save, then return as `poll`."""
        if self._job is None:
            return None
        self._job.thread.join()
        return self._finish(self._count(self._job)[1])

    def close(self) -> None:
        """Give a running save `_CLOSE_S` seconds to finish, when a run has failed and nobody polls any more."""
        if self._job is not None:
            self._job.thread.join(_CLOSE_S)

    def _count(self, job: _Job) -> tuple[int, int]:
        """(ranks on which the save still runs, ranks on which it failed)."""
        running = job.thread.is_alive()
        counts = torch.tensor([int(running), int(not running and job.error is not None)])
        if self._poll_group is not None:
            dist.all_reduce(counts, group=self._poll_group)
        return int(counts[0]), int(counts[1])

    def _finish(self, failed: int) -> Path:
        job, self._job = self._job, None
        assert job is not None
        if not failed:
            if not dist.is_initialized() or dist.get_rank() == 0:
                _log.info("checkpoint %s is complete, %.1f s after its step", job.path, time.monotonic() - job.begin)
            return job.path
        if isinstance(job.error, CheckpointError):
            raise job.error
        where, reason = str(job.path), f"{failed} ranks failed" if job.error is None else repr(job.error)
        raise CheckpointError("a checkpoint could not be saved; the earlier ones are untouched", where=where, why=reason)


def _new_group() -> ProcessGroup | None:
    """A new gloo group of all ranks; None for one process."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo")
