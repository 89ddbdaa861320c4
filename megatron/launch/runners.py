"""Starts a job and waits for it: forwards signals, returns the exit code, and prints the job's first error last.

Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO

from megatron.errors import LaunchError
from megatron.launch.exports import launcher_environment
from megatron.launch.job import Job
from megatron.launch.options import SUPERVISOR, LaunchOptions, Machine
from megatron.launch.process_exit import die_with_parent
from megatron.launch.stderr_follower import FirstError

# The exit codes of `megatron/reliability/stop.py` and `watchdog.py`; those files import torch, this one must not.
_EXIT_REASONS = {
    75: "it was asked to stop (signal or time limit) and its work is saved: the same command resumes it",
    76: "it was asked to stop and had no folder to save to",
    21: "a rank hung, see the watchdog's report; the same command resumes from the last checkpoint",
    22: "a rank was lost, see the report; the same command resumes from the last checkpoint",
}
# When a host has ended with an error, the others have this long to exit by themselves (their connections break at once).
HOST_GRACE_S = 12.0
_SSH_FAILED = 255
_RANK_END = re.compile(rb"(?:\S+: )?supervisor: rank (\d+) ended with (\d+)$")


def visible_devices(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Ids of the GPUs that a process started here would see.

    They come from the device files (or `nvidia-smi` if there are none), filtered by CUDA_VISIBLE_DEVICES as CUDA does: the list
    ends at the first entry that does not exist; entries may also be UUIDs.
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
    ids: list[str] = []
    for item in (entry.strip() for entry in visible.split(",")):
        exists = int(item) < present if item.isdecimal() else present and item.startswith(("GPU-", "MIG-"))
        if not exists:
            break
        ids.append(item)
    return tuple(ids)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(visible_devices(), cores, sys.executable, socket.gethostname())


def free_port() -> int:
    """A TCP port that is free on this machine, chosen by the kernel."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rendezvous_port(options: LaunchOptions, is_configured: bool, hosts: int) -> int:
    """The rendezvous port: `master_port` if the configuration sets it, else a free one.

    One command passes the port to all ranks on all hosts. torchrun on several hosts is started by a command on each host; these
    must agree without communication, on the default.

    Args:
        options: launch keys.
        is_configured: the configuration sets `master_port`.
        hosts: number of hosts in the host file; 0 without one.
    """
    several = options.num_nodes > 1 or (options.num_nodes < 0 and hosts > 1)
    return options.master_port if is_configured or (options.runner == "torchrun" and several) else free_port()


def write_files(job: Job) -> None:
    """Write the files that the launcher reads (host file, exported variables) into the run folder.

    Raises:
        LaunchError: the folder is not writable.
    """
    for name, text in job.files.items():
        try:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"cannot write {name}", why=str(error), hint="run_dir: a folder that can be written") from error


def run_job(job: Job) -> tuple[int, str]:
    """Run a job to its end. A job of one plain process replaces this process and does not return.

    Returns:
        (exit code, the job's first error or an empty string).

    Raises:
        LaunchError: the program cannot be started.
    """
    environment = {**os.environ, **{k: v for k, v in job.environment.items() if k not in os.environ or k.startswith("DS_ENV")}}
    write_files(job)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if job.route == "python":
            os.execve(job.command[0], list(job.command), environment)
        if job.route == "hosts":
            environment = launcher_environment(environment)
        # A new session: Ctrl-C in a terminal would otherwise reach the launcher too, which gives its ranks 30 s and exits
        # with 1. The pipe to its standard input closes when this process ends, however it ends: supervisors watch for that.
        child = subprocess.Popen(
            _supervised(job),
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL if job.route == "torchrun" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=None if job.route == "hosts" else die_with_parent,
        )
    except OSError as error:
        raise LaunchError(f"cannot start {job.command[0]}", why=str(error)) from error
    follower = _Follower(child, job)
    code = _wait(child, job, follower)
    return follower.finish(code)


def _supervised(job: Job) -> tuple[str, ...]:
    """The command; a runner of several hosts gets a supervisor, because its pdsh or mpirun would outlive it."""
    if job.route != "hosts":
        return job.command
    # No SIGTERM for pdsh: DeepSpeed's runner would then kill every DeepSpeed job on the hosts by name.
    option = "--group-at-once" if job.launcher == "pdsh" else "--group"
    return (job.command[0], "-SE", SUPERVISOR, option, *job.command[1:])


class _Follower:
    """Forwards the job's stderr, and ends a job of several hosts when one of them has failed."""

    def __init__(self, child: subprocess.Popen[bytes], job: Job) -> None:
        self._child, self._job, self._codes, self._ranks = child, job, list[int](), dict[int, int]()
        self._timer = threading.Timer(HOST_GRACE_S, self.end_group)
        self._timer.daemon = True
        self._first = FirstError(self._host_ended if job.launcher == "pdsh" else None)
        assert child.stderr is not None
        self._thread = threading.Thread(target=self._read, args=(child.stderr,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            if match := _RANK_END.match(line.rstrip()):
                self._ranks[int(match.group(1))] = int(match.group(2))
                continue
            with contextlib.suppress(OSError):  # stderr is closed; keep reading, or the job blocks on a full pipe
                os.write(sys.stderr.fileno(), line)
            self._first.hear(line.decode(errors="replace").rstrip("\n"))

    def _host_ended(self, host: str, code: int) -> None:
        if code and not self._codes:
            self._timer.start()
        self._codes.append(code)

    def end_group(self) -> None:
        """Kill runner and pdsh; the ssh connections close, and the supervisors on the hosts end their ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def finish(self, code: int) -> tuple[int, str]:
        """(exit code to return, first error); codes reported by hosts take precedence over the launcher's own."""
        self._timer.cancel()
        self._thread.join(timeout=2.0)
        failures = [c for c in self._codes if c]
        if failures:
            ours = [c for c in failures if c < 128]
            # A broken connection (255) is a lost rank; our own codes say more than "ended by signal 9".
            code = ours[0] if ours else 22 if _SSH_FAILED in failures else failures[0]
        elif self._job.launcher == "pdsh" and not code and len(self._ranks) < self._job.processes:
            code = 22  # the launcher reports success, but not every rank has reported its end
        return code, self._first.text()


def _wait(child: subprocess.Popen[bytes], job: Job, follower: _Follower) -> int:
    """Wait for the launcher and forward signals; returns its exit code, 128 + n for signal n.

    Ranks that are the launcher's children get the signal directly: DeepSpeed's launcher would kill them after 30 seconds and
    hide their exit code (75: stopped, work saved). With pdsh the connections are closed, and the supervisors stop their ranks
    (its runner would kill every DeepSpeed job on the hosts by name). Otherwise the launcher gets the signal. SIGHUP (a closed
    terminal) is forwarded as SIGTERM.
    """

    def forward(number: int, frame: FrameType | None) -> None:
        if job.launcher == "pdsh":
            follower.end_group()
            return
        signal_number = signal.SIGTERM if number == signal.SIGHUP else number
        for pid in (children(child.pid) if job.route == "local" else ()) or (child.pid,):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal_number)

    passed = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in passed}
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    # DeepSpeed's launcher passes the negative signal number to exit(), which turns it into 256 - n.
    return 128 - code if code < 0 else 384 - code if 192 <= code < 255 else code


def children(pid: int) -> tuple[int, ...]:
    """Process ids of the direct children of `pid`; empty where there is no /proc."""
    pids: list[int] = []
    for listing in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(listing, encoding="ascii") as file:
            pids += [int(word) for word in file.read().split()]
    return tuple(pids)


def explain_failure(job: Job, code: int) -> LaunchError:
    """The error to print when a job ended with `code`; the job's first error is printed after it."""
    if code in _EXIT_REASONS:
        hint = "docs/reliability.md lists the codes"
        return LaunchError(f"the job left with exit code {code}", why=_EXIT_REASONS[code], hint=hint)
    reason = "the first process that failed says so; the others were stopped"
    if code > 128:
        name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else str(code - 128)
        reason = f"a process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return LaunchError(f"the job ended with exit code {code}", where=f"{job.processes} processes, {job.launcher}", why=reason)
