"""Forks ranks that are allowed to die: each trial is a set of processes whose exit codes and last words are the result.

A command that counts (`python -m tests.faults.signals_count`) imports torch and DeepSpeed once and calls `start`; this process
runs no parallel torch operation and opens no process group, so its children can.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.parallel.rank_server import die_with_parent, free_port

Job = Callable[[Path, dict[str, Any]], Any]


def preload() -> None:
    """Import what every rank needs, once, with one thread each."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    import megatron.engine.deepspeed_pipeline
    import megatron.engine.deepspeed_zero  # noqa: F401
    from megatron.registry import layer_class

    layer_class("metala")
    importlib.import_module("tests.training.runs")
    gc.collect()
    gc.freeze()  # garbage collections of the forked ranks pass over what was imported


@dataclass
class Trial:
    """Running ranks: pids by rank, and the folder of their logs and results."""

    folder: Path
    pids: dict[int, int]

    def wait(self, seconds: float) -> dict[int, int | None]:
        """Exit codes by rank (negative: killed by that signal); None for those that had to be killed after `seconds`."""
        codes: dict[int, int | None] = {}
        deadline = time.monotonic() + seconds
        while len(codes) < len(self.pids) and time.monotonic() < deadline:
            for rank, pid in self.pids.items():
                if rank not in codes:
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        for rank, pid in self.pids.items():
            if rank not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[rank] = None
        return codes

    def send(self, rank: int, number: int) -> None:
        """Signal one rank, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def result(self, rank: int) -> dict[str, Any]:
        """What the rank wrote before it ended; empty if it did not."""
        path = self.folder / f"{rank}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def log(self, rank: int) -> str:
        """Its stdout and stderr."""
        return (self.folder / f"{rank}.log").read_text(errors="replace")

    def started(self, seconds: float = 60.0) -> None:
        """Wait until every rank has said that it is about to train."""
        deadline = time.monotonic() + seconds
        while not all((self.folder / f"{rank}.ready").exists() for rank in self.pids):
            assert time.monotonic() < deadline, "\n".join(self.log(rank) for rank in self.pids)
            time.sleep(0.005)


def ready(folder: Path) -> None:
    """A rank's word that training begins."""
    (folder / f"{os.environ['RANK']}.ready").touch()


def start(job: Job, world: int, folder: Path, spec: dict[str, Any]) -> Trial:
    """Fork `world` ranks that run `job(folder, spec)`; what it returns is written as JSON, its `code` is the exit code."""
    folder.mkdir(parents=True)
    port, pids = free_port(), {}
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            die_with_parent()
            os._exit(_run(job, rank, world, port, folder, spec))
        pids[rank] = pid
    return Trial(folder, pids)


def _run(job: Job, rank: int, world: int, port: int, folder: Path, spec: dict[str, Any]) -> int:
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    code = 1
    try:
        from megatron.launch.environment import init_process_group, read_rank_environment

        init_process_group(read_rank_environment(), timeout_s=60)
        result = job(folder, spec)
        (folder / f"{rank}.tmp").write_text(json.dumps(result))
        os.replace(folder / f"{rank}.tmp", folder / f"{rank}.json")
        code = int(result.get("code", 0))
    except BaseException as error:
        traceback.print_exc()
        code = int(getattr(error, "exit_code", 1))
    sys.stdout.flush()
    sys.stderr.flush()
    return code
