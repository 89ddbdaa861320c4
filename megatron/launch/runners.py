"""Starts a job and stays with it: signals go through, the exit code comes back. Imports neither torch nor deepspeed."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType

from megatron.errors import LaunchError
from megatron.launch.environment import DEFAULT_PORT
from megatron.launch.job import SYSTEM_HOSTFILE, Job, Machine

# What the codes of `megatron/training/control.py` and `watchdog.py` mean; those files import torch, this one must not.
_LEFT = {
    75: "it was asked to leave (signal or time limit) and its work is saved: the same command goes on",
    76: "it was asked to leave and had no folder to save to",
    21: "a rank stood still, see the watchdog's report; the same command goes on from the last checkpoint",
    22: "a rank was lost, see the report; the same command goes on from the last checkpoint",
}


def visible_devices(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Ids of the GPUs that a process started here would see.

    They come from the device files (or `nvidia-smi` where there are none), cut down by CUDA_VISIBLE_DEVICES as CUDA does it:
    the list ends at the first entry that does not exist; entries may also be UUIDs.
    """
    env = os.environ if environ is None else environ
    present = len(glob.glob("/dev/nvidia[0-9]*"))
    if not present and shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
        present = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return chosen_devices(present, env.get("CUDA_VISIBLE_DEVICES"))


def chosen_devices(present: int, visible: str | None) -> tuple[str, ...]:
    """The ids that `visible` (a value of CUDA_VISIBLE_DEVICES, None if unset) leaves of `present` GPUs."""
    if visible is None:
        return tuple(str(i) for i in range(present))
    chosen: list[str] = []
    for item in (part.strip() for part in visible.split(",")):
        exists = int(item) < present if item.isdecimal() else present and item.startswith(("GPU-", "MIG-"))
        if not exists:
            break
        chosen.append(item)
    return tuple(chosen)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(visible_devices(), cores, sys.executable, os.path.isfile(SYSTEM_HOSTFILE))


def usable_port(wanted: int) -> int:
    """`wanted`, or a free port when it is the default and another job on this machine has taken it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted))
        except OSError:
            if wanted != DEFAULT_PORT:
                return wanted  # asked for by name: the error of the connecting ranks says what is wrong
        else:
            return wanted
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def run_job(job: Job) -> int:
    """Run to the end and return the exit code; a job of one plain process replaces this one and does not return.

    Raises:
        LaunchError: the program cannot be started.
    """
    environment = {**os.environ, **{k: v for k, v in job.environment.items() if k not in os.environ}}
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if job.route == "python":
            os.execve(job.command[0], list(job.command), environment)
        # A session of its own: Ctrl-C in a terminal would reach the launcher too, which gives its ranks 30 s and exits with 1.
        child = subprocess.Popen(job.command, env=environment, start_new_session=True)
    except OSError as error:
        raise LaunchError(f"cannot start {job.command[0]}", why=str(error)) from error
    return _wait(child, to_ranks=job.route == "local")


def _wait(child: subprocess.Popen[bytes], to_ranks: bool) -> int:
    """Wait for the launcher; its exit code, 128 + n for a signal n.

    Signals are passed on: to the ranks themselves where they are the launcher's children, since DeepSpeed's launcher would end
    them after 30 seconds and hide their exit code (75: stopped, work saved); else to the launcher. A closed terminal counts as
    SIGTERM.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        wanted = signal.SIGTERM if number == signal.SIGHUP else number
        for pid in (children(child.pid) if to_ranks else ()) or (child.pid,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, wanted)

    passed = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in passed}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def children(pid: int) -> tuple[int, ...]:
    """Process ids of the direct children of `pid`; empty where there is no /proc."""
    found: list[int] = []
    for listing in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(listing, encoding="ascii") as file:
            found += [int(word) for word in file.read().split()]
    return tuple(found)


def explain_failure(job: Job, code: int) -> LaunchError:
    """The error to show when a job ended with `code`; the ranks have printed their own before."""
    if code in _LEFT:
        return LaunchError(f"the job left with exit code {code}", why=_LEFT[code], hint="docs/reliability.md lists the codes")
    return LaunchError(
        f"the job ended with exit code {code}",
        where=f"{job.processes or 'all'} processes, started through DeepSpeed's launcher",
        why="the first process that failed says so above; the others were stopped",
    )
